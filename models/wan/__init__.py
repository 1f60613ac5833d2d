"""Wan (Alibaba 2025, arXiv 2503.20314): videos from text, from a picture, from a first and a last frame."""

from sgl_diffusion.models.wan.family import DistilledWan, Wan

__all__ = ["DistilledWan", "Wan"]
