"""How alike two pictures are: by pixels (PSNR), by structure (SSIM), and to a network that sees (LPIPS)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion.runtime.events import Pixels

PEAK = 255.0
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
WINDOW, SIGMA = 11, 1.5  # pixels, of SSIM's Gaussian
K1, K2 = 0.01, 0.03  # of SSIM: they keep divisions by nearly nothing steady
BACKBONE = "alexnet-owt-7be5be79.pth"  # torchvision's file, which LPIPS would download


def psnr(picture: Pixels, judge: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures (H, W, 3) or clips (F, H, W, 3); infinite if equal."""
    square = float(np.mean((picture.astype(np.float64) - judge.astype(np.float64)) ** 2))
    return math.inf if square == 0 else 10 * math.log10(PEAK**2 / square)


def ssim(picture: Pixels, judge: Pixels) -> float:
    """Mean structural similarity of the luma of uint8 pictures (H, W, 3), or of the frames of clips (F, H, W, 3); 1 if
    they are equal (Wang et al. 2004, IEEE Transactions on Image Processing 13 (4), with its window and constants).

    Raises:
        ValueError: sides shorter than the window.
    """
    if min(picture.shape[-3:-1]) < WINDOW:
        raise ValueError(f"SSIM of {picture.shape[-2]}x{picture.shape[-3]}: expected sides of {WINDOW} pixels or more")
    frames = zip(_frames(picture), _frames(judge), strict=True)  # one by one: a clip's would not fit at once
    return float(np.mean([_ssim(_luma(a), _luma(b)) for a, b in frames]))


def _frames(pixels: Pixels) -> Sequence[Pixels]:
    return [pixels] if pixels.ndim == 3 else list(pixels)


def _luma(frame: Pixels) -> Tensor:
    return torch.from_numpy(frame.astype(np.float64) @ np.array(LUMA))[None, None]


def _ssim(a: Tensor, b: Tensor) -> float:
    mean_a, mean_b = _local_mean(a), _local_mean(b)
    var_a, var_b = _local_mean(a * a) - mean_a**2, _local_mean(b * b) - mean_b**2
    covariance = _local_mean(a * b) - mean_a * mean_b
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean().item()


def _local_mean(x: Tensor) -> Tensor:
    """Under the Gaussian window, where all of it is inside."""
    offset = torch.arange(WINDOW, dtype=x.dtype) - WINDOW // 2
    weight = torch.exp(-(offset**2) / (2 * SIGMA**2))
    weight = weight / weight.sum()
    return F.conv2d(F.conv2d(x, weight.view(1, 1, 1, -1)), weight.view(1, 1, -1, 1))


class Lpips:
    """Learned perceptual distance, with AlexNet (Zhang et al. 2018, arXiv 1801.03924); 0 if pictures are equal.

    Raises:
        ImportError: the package `lpips`, or the network's weights, are not on this machine; says which.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("lpips") is None:
            raise ImportError("lpips is not installed")
        weights = Path(torch.hub.get_dir(), "checkpoints", BACKBONE)
        if not weights.is_file():
            raise ImportError(f"lpips: no {weights}")
        import lpips

        self.network = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)

    def __call__(self, picture: Pixels, judge: Pixels) -> float:
        """Mean distance of uint8 pictures (H, W, 3), or of the frames of clips (F, H, W, 3)."""
        frames = zip(_frames(picture), _frames(judge), strict=True)
        return float(np.mean([self.network(_signed(a), _signed(b)).item() for a, b in frames]))


def _signed(frame: Pixels) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float() / (PEAK / 2) - 1
