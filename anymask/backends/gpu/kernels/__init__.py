"""Kernels that both GPU backends run, and their parts: jit functions alone."""
