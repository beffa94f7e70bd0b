"""llama.cpp's files of weights (GGUF)."""
