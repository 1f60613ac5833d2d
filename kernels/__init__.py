"""Fused operations, one file each: `from sgl_diffusion.kernels.gelu import gelu_tanh`."""
