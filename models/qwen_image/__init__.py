"""Qwen-Image (Alibaba 2025, arXiv 2508.02324): pictures from a prompt, or from a prompt and pictures to edit."""

from sgl_diffusion.models.qwen_image.family import QwenImage, QwenImageEdit, QwenImageEditPlus

__all__ = ["QwenImage", "QwenImageEdit", "QwenImageEditPlus"]
