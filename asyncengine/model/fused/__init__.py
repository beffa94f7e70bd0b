"""A decoder's step for a few tokens on CUDA, in few launches: norms, biases and activations inside the products."""
