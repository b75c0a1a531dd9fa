"""The Triton kernels that no other backend runs: jit functions alone."""
