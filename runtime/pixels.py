"""What a decoder gives, as 8-bit pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from sgl_diffusion.runtime.errors import RunFailure
from sgl_diffusion.runtime.events import Pixels


def quantised(decoded: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) or frames (B, 3, F, H, W) in [-1, 1] -> uint8, channels last; rounded half to even."""
    unit = decoded.float() / 2
    return unit.add_(0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8).movedim(1, -1)


def to_pixels(decoded: Tensor) -> list[Pixels]:
    """Rounded 8-bit pictures, or clips, of a batch.

    Raises:
        RunFailure: not a number in a picture, as fp16 overflow gives.
    """
    if not torch.isfinite(decoded).all():
        raise RunFailure("the decoded pictures hold NaN or infinity; try a wider --precision")
    return list(quantised(decoded).cpu().numpy().copy())  # a decode's memory is not held by what it gave
