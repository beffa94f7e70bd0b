"""Weights in fewer bits than they are computed with: what they are, layers that have them, and kernels for CUDA."""
