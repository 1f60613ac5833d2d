"""The one denoising loop, and the step it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from sgl_diffusion.kernels.sampler import guided_euler_step
from sgl_diffusion.models.family import Execute, Predictor, Tensors, eager


@dataclass(frozen=True)
class Step:
    """State after a step; `velocity` is the guided prediction the step was made with."""

    index: int
    sigma: float
    x: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class EulerStep:
    """x' = x + (sigma' - sigma) * velocity, a pure function of tensors on one device.

    With a negative branch, the velocity is negative + scale * (positive - negative): classifier-free guidance
    (Ho & Salimans 2022), combined by the kernel that takes the step.
    """

    positive: Callable[..., Tensor]
    negative: Callable[..., Tensor] | None = None

    def __call__(
        self, x: Tensor, dt: Tensor, scale: Tensor, positive: Tensors, negative: Tensors = None
    ) -> tuple[Tensor, Tensor]:
        """The state after the step, and the velocity. dt and scale are 0-d in fp32; the rest is for the branches."""
        velocity = self.positive(x, *positive)
        if self.negative is None:
            return guided_euler_step(x, velocity, dt), velocity
        guided = torch.empty_like(velocity)
        against = self.negative(x, *negative)
        x = guided_euler_step(x, velocity, dt, negative=against, scale=scale, velocity_out=guided)
        return x, guided


def euler(
    x: Tensor,
    sigmas: Sequence[float],
    positive: Predictor,
    negative: Predictor | None = None,
    scale: float = 1.0,
    execute: Execute = eager,
) -> Iterator[Step]:
    """Integrates from the first sigma to the last, one `Step` after each. `scale` is that of guidance, with a negative.

    What steps differ in lies on the device before the first: a step moves nothing between host and device.
    """
    step = EulerStep(positive.call, negative.call if negative else None)
    strength = torch.tensor(scale, device=x.device)
    dts = torch.tensor([float(np.float32(b) - np.float32(a)) for a, b in pairwise(sigmas)], device=x.device)
    branches = [branch for branch in (positive, negative) if branch is not None]
    for i, after in enumerate(sigmas[1:]):
        x, velocity = execute(step, x, dts[i], strength, *((branch.steps[i], *branch.request) for branch in branches))
        yield Step(i, after, x, velocity)
