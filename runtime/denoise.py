"""The one denoising loop, and functions that wrap what it calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from sgl_diffusion.kernels.euler_step import euler_step
from sgl_diffusion.models.family import Predict


@dataclass(frozen=True)
class Step:
    """State after a step; `velocity` is the prediction the step was made with."""

    index: int
    sigma: float
    x: Tensor
    velocity: Tensor


def euler(predict: Predict, x: Tensor, sigmas: Sequence[float]) -> Iterator[Step]:
    """x' = x + (sigma' - sigma) * predict(x, sigma) along `sigmas`, one `Step` after each."""
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        velocity = predict(x, sigma)
        x = euler_step(x, velocity, float(np.float32(after) - np.float32(sigma)))
        yield Step(i, after, x, velocity)


def with_true_cfg(predict: Predict, predict_negative: Predict, scale: float) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2022): negative + scale * (positive - negative)."""

    def guided(x: Tensor, sigma: float) -> Tensor:
        positive, negative = predict(x, sigma), predict_negative(x, sigma)
        return negative + scale * (positive - negative)

    return guided
