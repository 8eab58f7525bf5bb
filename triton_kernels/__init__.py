"""Triton kernels of stepladder, installed as stepladder.triton_kernels."""
