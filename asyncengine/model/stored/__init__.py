"""Checkpoints whose weights are stored as codes: what belongs together, and how it becomes numbers."""
