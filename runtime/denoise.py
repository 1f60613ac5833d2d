"""The one denoising loop, and functions that wrap what it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sgl_diffusion.kernels.sampler import guided_euler_step
from sgl_diffusion.models.family import Predict


@dataclass(frozen=True)
class Prediction:
    """Velocities of one step. With a negative one, `scale` is that of classifier-free guidance (Ho & Salimans 2022)."""

    positive: Tensor
    negative: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Step:
    """State after a step; `velocity` is the guided prediction the step was made with."""

    index: int
    sigma: float
    x: Tensor
    velocity: Tensor


def euler(predict: Callable[[Tensor, int], Prediction], x: Tensor, sigmas: Sequence[float]) -> Iterator[Step]:
    """x' = x + (sigma' - sigma) * velocity along `sigmas`, one `Step` after each."""
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        p = predict(x, i)
        velocity = p.positive if p.negative is None else torch.empty_like(p.positive)
        dt = float(np.float32(after) - np.float32(sigma))
        guided = None if p.negative is None else velocity
        x = guided_euler_step(x, p.positive, dt, negative=p.negative, scale=p.scale, velocity_out=guided)
        yield Step(i, after, x, velocity)


def alone(predict: Predict) -> Callable[[Tensor, int], Prediction]:
    """One branch, no guidance beside what the model has embedded."""
    return lambda x, step: Prediction(predict(x, step))


def with_true_cfg(predict: Predict, predict_negative: Predict, scale: float) -> Callable[[Tensor, int], Prediction]:
    """negative + scale * (positive - negative), combined by the step itself."""
    return lambda x, step: Prediction(predict(x, step), predict_negative(x, step), scale)
