"""Given pictures as models take them."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def fit(picture: Image.Image, height: int, width: int) -> Tensor:
    """A picture as a model's VAE takes it: resized (Lanczos) to the size, whatever its own proportions.

    Args:
        picture: RGB.
        height, width: pixels, of a size that the model takes.
    Returns:
        (1, 3, height, width) fp32 in [-1, 1], bit-equal to diffusers' `VideoProcessor.preprocess`.
    """
    resized = picture.resize((width, height), resample=Image.Resampling.LANCZOS)
    unit_HWC = np.asarray(resized).astype(np.float32) / 255.0
    return 2.0 * torch.from_numpy(unit_HWC).permute(2, 0, 1)[None].contiguous() - 1.0


def area_size(picture: Image.Image, area: int, multiple: int) -> tuple[int, int]:
    """Height and width of about `area` pixels, the nearest multiples in the proportions of a picture.

    The rule of the published editing pipelines (`calculate_dimensions` of diffusers). Each side is at least one
    multiple.
    """
    aspect = picture.width / picture.height
    width = math.sqrt(area * aspect)
    height = width / aspect
    return max(round(height / multiple), 1) * multiple, max(round(width / multiple), 1) * multiple
