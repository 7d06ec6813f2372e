"""Faster forms for a GPU: Triton kernels and the modules that call them. They know no method."""
