"""The one denoising loop, and the steps it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sgl_diffusion.kernels.linear_combination import linear_combination
from sgl_diffusion.kernels.sampler import guided_euler_step
from sgl_diffusion.models.family import Execute, Predictor, Tensors, eager
from sgl_diffusion.runtime.schedulers import Schedule


@dataclass(frozen=True)
class State:
    """What goes from step to step: x, the pictures predicted before it, the latest first, and how many are done."""

    x: Tensor
    history: tuple[Tensor, ...] = ()
    done: int = 0

    @classmethod
    def start(cls, x: Tensor, schedule: Schedule) -> State:
        """Before the first step. Predictions that are not there yet are zeros, and count nothing."""
        return cls(x, (torch.zeros_like(x),) * schedule.remembered)

    def left(self, steps: range) -> range:
        """Those of the steps that are not done yet."""
        return range(max(self.done, steps.start), steps.stop)


@dataclass(frozen=True)
class Step:
    """State after a step; `velocity` is the guided prediction the step was made with.

    `predicted` is what is left of it at sigma 0, where the step computed that.
    """

    index: int
    sigma: float
    state: State
    velocity: Tensor
    predicted: Tensor | None = None

    @property
    def x(self) -> Tensor:
        return self.state.x

    @property
    def picture(self) -> Tensor:
        """The state at sigma 0, if the velocity were the same all the way."""
        return self.x - self.sigma * self.velocity if self.predicted is None else self.predicted


@dataclass(frozen=True)
class EulerStep:
    """x' = x + (sigma' - sigma) * velocity, a pure function of tensors on one device.

    With a negative branch, the velocity is negative + scale * (positive - negative): classifier-free guidance
    (Ho & Salimans 2022), combined by the kernel that takes the step. `keeps_norm` as of a family. With `gather`, the
    branches are on two ranks: `positive` is the one that is here, and `gather` gives the velocities of both.
    """

    positive: Callable[..., Tensor]
    negative: Callable[..., Tensor] | None = None
    keeps_norm: bool = False
    gather: Callable[[Tensor], Tensor] | None = None

    def __call__(
        self, x: Tensor, dt: Tensor, scale: Tensor, positive: Tensors, negative: Tensors = None
    ) -> tuple[Tensor, Tensor]:
        """The state after the step, and the velocity. dt and scale are 0-d in fp32; the rest is for the branches."""
        velocity = self.positive(x, *positive)
        if self.gather is not None:
            velocity, against = self.gather(velocity)
        elif self.negative is not None:
            against = self.negative(x, *negative)
        else:
            return guided_euler_step(x, velocity, dt), velocity
        guided = torch.empty_like(velocity)
        x = guided_euler_step(
            x, velocity, dt, negative=against, scale=scale, per_token_norm=self.keeps_norm, velocity_out=guided
        )
        return x, guided


@dataclass(frozen=True)
class MultistepStep:
    """x' = a combination of x, the picture predicted from it, and other tensors: earlier predictions, fresh noise.

    A pure function of tensors on one device. Solvers of any order, at any step, differ in `weights` alone.
    """

    euler: EulerStep

    def __call__(
        self,
        x: Tensor,
        others: tuple[Tensor, ...],
        minus_sigma: Tensor,
        weights: Tensor,
        scale: Tensor,
        *branches: Tensors,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state after the step, the velocity, and the prediction.

        Args:
            minus_sigma, scale: 0-d in fp32.
            weights: (2 + number of others,) in fp32.
            branches: as for Euler's step.
        """
        picture, velocity = self.euler(x, minus_sigma, scale, *branches)  # all the way to sigma 0
        return linear_combination((x, picture, *others), weights), velocity, picture


def integrate(
    state: State,
    schedule: Schedule,
    steps: range,
    positive: Predictor,
    negative: Predictor | None = None,
    scale: float = 1.0,
    noise: Sequence[Tensor] = (),
    execute: Execute = eager,
    *,
    keeps_norm: bool = False,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Step]:
    """Takes those of some steps that are left, and gives a `Step` after each; the next range goes on from its state.

    What steps differ in lies on the device before the first: a step moves nothing between host and device.

    Args:
        positive, negative: with the tensors of these steps, from that of `steps[0]` on.
        scale: of guidance, with a negative.
        noise: fresh; `schedule.noises` tensors like x, whatever the range.
        keeps_norm: as of the family.
        gather: as of `EulerStep`, for a positive that is whichever branch is here.
    Raises:
        ValueError: there are more of them, or fewer.
    """
    if len(noise) != schedule.noises:
        raise ValueError(f"noise: {len(noise)} tensors, expected {schedule.noises}")
    x, history, device = state.x, state.history, state.x.device
    euler = EulerStep(positive.call, negative.call if negative else None, keeps_norm, gather)
    multistep = MultistepStep(euler)
    branches = [branch for branch in (positive, negative) if branch is not None]
    strength = torch.tensor(scale, dtype=torch.float32, device=device)
    sigmas = np.array(schedule.sigmas, np.float32)
    dts = torch.tensor(-sigmas if schedule.weights else np.diff(sigmas), device=device)
    weights = torch.tensor(schedule.weights, dtype=torch.float32, device=device)
    picture: Tensor | None = None
    for i in state.left(steps):
        inputs = ((branch.steps[i - steps.start], *branch.request) for branch in branches)
        if schedule.weights:
            # the last step adds no noise: any tensor of the shape does for it
            fresh = ((*noise, x)[i],) if schedule.fresh_noise else ()
            x, velocity, picture = execute(multistep, x, (*history, *fresh), dts[i], weights[i], strength, *inputs)
            history = (picture, *history)[: len(history)]
        else:
            x, velocity = execute(euler, x, dts[i], strength, *inputs)
        yield Step(i, schedule.sigmas[i + 1], State(x, history, i + 1), velocity, picture)
