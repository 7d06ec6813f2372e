"""Triton kernels and fused modules for GPUs, independent of any method."""
