"""Given pictures as FLUX.2 takes them, and the places of their tokens.

Each keeps its own proportions: it is made smaller where it has more than a megapixel, and cut around its middle to
sides that tokens cover. A token has a place on four axes: the picture (0 is drawn, 10, 20 ... are given), row, column,
and its number in the text.
"""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

from sgl_diffusion.models.pictures import fit

TOKEN_PIXELS = 16  # per side
MAX_AREA = 1024 * 1024
MIN_SIDE = 64
MAX_ASPECT = 8
BETWEEN_PICTURES = 10  # on the first axis


def fitting(picture: Image.Image) -> tuple[int, int]:
    """Height and width that a picture is taken in.

    Raises:
        ValueError: it is too small or too long.
    """
    width, height = picture.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"image_path: a picture of {width}x{height} pixels; each side must have at least {MIN_SIDE}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"image_path: a picture of {width}x{height} pixels; sides may be at most {MAX_ASPECT}:1")
    width, height = _smaller(picture)
    return height // TOKEN_PIXELS * TOKEN_PIXELS, width // TOKEN_PIXELS * TOKEN_PIXELS


def prepared(picture: Image.Image) -> Tensor:
    """(1, 3, height, width) of `fitting`, fp32 in [-1, 1].

    Source: `Flux2ImageProcessor` of diffusers.
    """
    height, width = fitting(picture)
    size = _smaller(picture)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return fit(picture.crop((left, top, left + width, top + height)), height, width)


def places(rows: int, columns: int, picture: int = 0) -> Tensor:
    """(rows * columns, 4) of a picture's tokens, row by row; the first picture that is given is 1."""
    grid = torch.zeros(rows, columns, 4, dtype=torch.int64)
    grid[..., 0] = BETWEEN_PICTURES * picture
    grid[..., 1] = torch.arange(rows)[:, None]
    grid[..., 2] = torch.arange(columns)
    return grid.flatten(0, 1)


def _smaller(picture: Image.Image) -> tuple[int, int]:
    """Width and height of at most a megapixel."""
    width, height = picture.size
    if width * height <= MAX_AREA:
        return width, height
    scale = math.sqrt(MAX_AREA / (width * height))
    return int(width * scale), int(height * scale)
