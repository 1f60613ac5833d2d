"""Measurements of kernels, and of whole pipelines against diffusers in one process. Run as modules."""
