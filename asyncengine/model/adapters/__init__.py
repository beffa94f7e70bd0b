"""LoRA adapters: how they are read, and how a step is computed with several of them."""
