"""What runs on the step thread: plain synchronous Python, without torch and without asyncio."""
