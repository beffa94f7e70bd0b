"""What runs on the step thread with torch: weights, KV cache, attention, sampling."""
