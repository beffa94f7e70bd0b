"""A decoder's whole step on the CPU as one call of compiled code."""
