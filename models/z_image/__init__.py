"""Z-Image (Alibaba 2025, arXiv 2511.22699): pictures from text, in many steps with guidance or in few without."""

from sgl_diffusion.models.z_image.family import ZImage

__all__ = ["ZImage"]
