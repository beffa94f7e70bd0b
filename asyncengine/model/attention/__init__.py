"""Attention over a paged KV cache: one narrow protocol, several back ends."""
