"""FLUX.2 (Black Forest Labs 2025): pictures from text and from up to several given pictures; dev and klein."""

from sgl_diffusion.models.flux2.family import Flux2, Flux2Klein

__all__ = ["Flux2", "Flux2Klein"]
