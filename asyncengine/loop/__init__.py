"""What runs on event loops: streams, futures, text. Never imports torch."""
