"""The Hopper kernels and their parts: jit functions alone."""
