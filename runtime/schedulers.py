"""Samplers of our own, read from a checkpoint's `scheduler_config.json`, and the schedules they make.

All of them integrate a flow: x = (1 - sigma) * picture + sigma * noise, and the model predicts the velocity
noise - picture. What a sampler does to tensors is in `denoise.py`; here are only its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sgl_diffusion.models.config import ConfigError, demand, read_config

TRAIN_TIMESTEPS = 1000
Row = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """What a sampler of so many steps comes to: numbers alone.

    Attributes:
        timesteps: what the model sees, in thousandths, one a step.
        sigmas: noise levels from the first state to the last, one more than there are steps; exact in fp32.
        weights: by step, what makes the next state: factors of the state, of the picture predicted from it, of earlier
            predictions (the latest first), and of fresh noise. Without them, a step is Euler's.
        fresh_noise: noise is added after every step but the last.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...] = ()
    fresh_noise: bool = False

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def noises(self) -> int:
        """How many tensors of fresh noise the steps take."""
        return self.steps - 1 if self.fresh_noise else 0

    @property
    def remembered(self) -> int:
        """Earlier predictions that a step goes back to."""
        return len(self.weights[0]) - 2 - self.fresh_noise if self.weights else 0


class Sampler(Protocol):
    """A way to integrate, as a checkpoint asks for it."""

    def schedule(
        self, steps: int, image_tokens: int, mu: float | None = None, levels: Sequence[float] | None = None
    ) -> Schedule:
        """The noise levels of a picture of so many tokens.

        Args:
            mu: the logarithm of a dynamic shift; None for what the config makes of `image_tokens`.
            levels: where the steps begin, before any shift; None for evenly apart, or as the sampler has them.
        Raises:
            ValueError: for a number of steps, or for levels, that it cannot take.
        """

    def with_shift(self, shift: float) -> Sampler:
        """The same with another shift of its noise levels. Raises ValueError if that would have no effect."""


def read_scheduler(raw: Mapping[str, Any]) -> Sampler:
    """The sampler that a `scheduler_config.json` asks for.

    Raises:
        ConfigError: for another scheduler class, or a key or value that is not implemented, naming it.
    """
    name = raw.get("_class_name")
    if not isinstance(name, str) or name not in READERS:
        raise ConfigError(f"scheduler {name!r} is not supported natively; supported: {', '.join(READERS)}")
    return READERS[name](raw)


def _refuse(levels: Sequence[float] | None) -> None:
    if levels is not None:
        raise ValueError("scheduler: this model's noise levels are for FlowMatchEulerDiscreteScheduler alone")


def shifted(sigma: NDArray[Any], shift: float) -> NDArray[Any]:
    """More steps at high noise, for a shift above 1 (Esser et al. 2024, section 5.3.2).

    Raises:
        ValueError: the shift is not a positive number.
    """
    if not shift > 0:
        raise ValueError(f"flow_shift={shift}: expected a positive number")
    return shift * sigma / (1 + (shift - 1) * sigma)


# -- Euler ------------------------------------------------------------------------


@dataclass(frozen=True)
class FlowMatchEuler:
    """Flow matching with Euler steps (`FlowMatchEulerDiscreteScheduler`; Esser et al. 2024, section 5.3 for shifting).

    Sigma runs from 1 (noise) to 0. Shifting spends more steps at high noise: by a fixed factor, or by one that grows
    with the number of image tokens (`use_dynamic_shifting`).
    """

    num_train_timesteps: int = TRAIN_TIMESTEPS
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    time_shift_type: str = "exponential"
    stochastic_sampling: bool = False

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> FlowMatchEuler:
        """Raises ConfigError for an option that is not implemented."""
        config = read_config(cls, raw)
        demand(
            config,
            num_train_timesteps=TRAIN_TIMESTEPS,
            invert_sigmas=False,
            use_karras_sigmas=False,
            use_exponential_sigmas=False,
            use_beta_sigmas=False,
            stochastic_sampling=False,
        )
        _one_of(config, time_shift_type=("exponential", "linear"))
        return config

    def schedule(
        self, steps: int, image_tokens: int, mu: float | None = None, levels: Sequence[float] | None = None
    ) -> Schedule:
        """Raises ValueError as `sigmas`."""
        sigmas = self.sigmas(steps, image_tokens, mu, levels)
        timesteps = np.array(sigmas[:-1], np.float32) * np.float32(TRAIN_TIMESTEPS)
        return Schedule(tuple(timesteps.tolist()), tuple(sigmas))

    def with_shift(self, shift: float) -> FlowMatchEuler:
        if self.use_dynamic_shifting:
            raise ValueError(f"flow_shift={shift}: no effect, this checkpoint shifts by the size of the picture")
        return replace(self, shift=shift)

    def sigmas(
        self, steps: int, image_tokens: int, mu: float | None = None, levels: Sequence[float] | None = None
    ) -> list[float]:
        """`steps` + 1 sigmas, the last one 0. Every value is an exact float32, computed as diffusers does.

        Raises:
            ValueError: one step with a terminal shift, which divides by zero.
        """
        even = np.linspace(1.0, 1 / steps, steps) if levels is None else np.array(levels)
        sigma: NDArray[Any] = even.astype(np.float32)
        if self.use_dynamic_shifting:
            mu = self._mu(image_tokens) if mu is None else mu
            factor = math.exp(mu) if self.time_shift_type == "exponential" else mu
            sigma = factor / (factor + (1 / sigma - 1) ** 1.0)
        else:
            sigma = shifted(sigma, self.shift)
        if self.shift_terminal:
            if steps == 1:
                raise ValueError("num_inference_steps=1: this checkpoint's schedule (shift_terminal) needs at least 2")
            rest = 1 - sigma
            sigma = 1 - rest / (rest[-1] / (1 - self.shift_terminal))
        return [*(float(s) for s in sigma.astype(np.float32)), 0.0]

    def _mu(self, image_tokens: int) -> float:
        """Linear in the number of tokens through (base_image_seq_len, base_shift) and (max_.., max_shift)."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return image_tokens * slope + (self.base_shift - slope * self.base_image_seq_len)


# -- multistep solvers ------------------------------------------------------------

OVERRULED = "use_flow_sigmas overrules it"
WITHOUT_EFFECT = {
    "beta_end": OVERRULED,
    "timestep_spacing": OVERRULED,
    "steps_offset": OVERRULED,
    "dynamic_thresholding_ratio": "needs thresholding",
    "sample_max_value": "needs thresholding",
    "time_shift_type": "needs use_dynamic_shifting",
}
PLAIN_FLOW = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "use_dynamic_shifting": False,  # no config says by how much
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


@dataclass(frozen=True)
class UniPC:
    """The unified predictor-corrector of a flow (`UniPCMultistepScheduler`; Zhao et al. 2023, arXiv 2302.04867).

    In terms of lambda = log((1 - sigma) / sigma), the ODE is linear but for the predicted picture, whose course a
    polynomial through the latest predictions stands for. Once the model has seen the state a step led to, the step is
    taken again with what it predicted there: the corrector, which costs no call of the model.
    """

    num_train_timesteps: int = TRAIN_TIMESTEPS
    solver_order: int = 2
    prediction_type: str = "epsilon"
    thresholding: bool = False
    predict_x0: bool = True
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    final_sigmas_type: str = "zero"
    use_dynamic_shifting: bool = False
    shift_terminal: None = None

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> UniPC:
        """Raises ConfigError for what is not implemented."""
        betas = ("beta_start", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "sigma_min", "sigma_max")
        config = read_config(cls, raw, ignored=WITHOUT_EFFECT | dict.fromkeys(betas, OVERRULED))
        demand(config, **PLAIN_FLOW, predict_x0=True, solver_p=None, shift_terminal=None)
        _one_of(config, solver_order=(1, 2, 3), solver_type=("bh1", "bh2"), final_sigmas_type=("zero", "sigma_min"))
        if config.solver_order > 1:  # at sigma 0, lambda is infinite: only a first-order step gets there
            demand(config, lower_order_final=True)
        return config

    def with_shift(self, shift: float) -> UniPC:
        return replace(self, flow_shift=shift)

    def schedule(
        self, steps: int, image_tokens: int, mu: float | None = None, levels: Sequence[float] | None = None
    ) -> Schedule:
        """Raises ValueError if noise levels coincide."""
        _refuse(levels)
        sigma = shifted(np.linspace(1, 1 / TRAIN_TIMESTEPS, steps + 1)[:-1], self.flow_shift)
        if abs(sigma[0] - 1) < 1e-6:
            sigma[0] -= 1e-6  # at sigma 1, lambda is infinite
        last = sigma[-1] if self.final_sigmas_type == "sigma_min" else 0.0
        return _multistep(sigma, last, self._rows)

    def _rows(self, sigma: Row, log_snr: Row) -> list[Row]:
        """The corrector of the last step and the predictor of this one, added up.

        Both corrector and predictor of a step start from sigma' / sigma * x, so that what the corrector changes is a
        combination of predictions alone: the state before it needs not be kept.
        """
        steps = len(sigma) - 1
        orders = [min(self.solver_order, i + 1, steps - i) for i in range(steps)]
        rows = []
        for i, order in enumerate(orders):
            decay = sigma[i + 1] / sigma[i]
            predictions = self._update(sigma, log_snr, i, order, corrects=False)[1:]
            if i > 0 and i - 1 not in self.disable_corrector:
                predictor, corrector = (
                    self._update(sigma, log_snr, i - 1, orders[i - 1], corrects=corrects) for corrects in (False, True)
                )
                predictions = predictions + decay * (corrector - predictor)[:-1]
            rows.append(np.array([decay, *predictions]))
        return rows

    def _update(self, sigma: Row, log_snr: Row, i: int, order: int, *, corrects: bool) -> Row:
        """UniP or UniC of an order from step i to i + 1: factors of the predictions at i + 1, i, i - 1, ..."""
        h = log_snr[i + 1] - log_snr[i]
        alpha, grown = 1 - sigma[i + 1], np.expm1(-h)
        nodes = {1 + k: (log_snr[i - k] - log_snr[i]) / h for k in range(1, order)}
        if corrects:
            nodes[0] = 1.0
        update = np.zeros(self.solver_order + 2)
        update[1] = -alpha * grown
        scale = grown if self.solver_type == "bh2" else -h  # B(h) of the paper
        for (at, node), slope in zip(nodes.items(), _slopes(list(nodes.values()), -h, scale), strict=True):
            factor = -alpha * scale * slope / node
            update[at] += factor
            update[1] -= factor
        return update


def _slopes(nodes: Sequence[float], h: float, scale: float) -> Sequence[float]:
    """What the differences to the predictions at these nodes count, for the highest order (theorem 3.1 of UniPC)."""
    if len(nodes) < 2:
        return [0.5] * len(nodes)  # of an asymptotically equal effect, as the paper has it
    integrals = []
    phi, factorial = np.expm1(h) / h - 1, 1
    for k in range(1, len(nodes) + 1):
        integrals.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / h - 1 / factorial
    powers = np.vander(nodes, increasing=True).T
    return list(np.linalg.solve(powers, integrals))


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++ of a flow, multistep (`DPMSolverMultistepScheduler`; Lu et al. 2022, arXiv 2211.01095)."""

    num_train_timesteps: int = TRAIN_TIMESTEPS
    beta_start: float = 0.0001
    beta_schedule: str = "linear"
    trained_betas: None = None
    solver_order: int = 2
    prediction_type: str = "epsilon"
    thresholding: bool = False
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    final_sigmas_type: str = "zero"
    variance_type: None = None
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> DPMSolver:
        """Raises ConfigError for what is not implemented."""
        config = read_config(cls, raw, ignored=WITHOUT_EFFECT | {"lambda_min_clipped": OVERRULED})
        demand(config, **PLAIN_FLOW, algorithm_type="dpmsolver++", use_lu_lambdas=False, variance_type=None)
        _one_of(
            config, solver_order=(1, 2, 3), solver_type=("midpoint", "heun"), final_sigmas_type=("zero", "sigma_min")
        )
        # the last noise level comes from the first of these
        demand(config, beta_schedule="linear", trained_betas=None, rescale_betas_zero_snr=False)
        return config

    def with_shift(self, shift: float) -> DPMSolver:
        return replace(self, flow_shift=shift)

    def schedule(
        self, steps: int, image_tokens: int, mu: float | None = None, levels: Sequence[float] | None = None
    ) -> Schedule:
        """Raises ValueError if noise levels coincide."""
        _refuse(levels)
        sigma = shifted(1 - np.linspace(1, 1 / TRAIN_TIMESTEPS, steps + 1), self.flow_shift)[:0:-1].copy()
        kept = np.float32(1) - np.float32(self.beta_start)  # of the signal's power, after the first training step
        last = float(np.sqrt((1 - kept) / kept)) if self.final_sigmas_type == "sigma_min" else 0.0
        return _multistep(sigma, last, self._rows)

    def _rows(self, sigma: Row, log_snr: Row) -> list[Row]:
        steps = len(sigma) - 1
        return [self._update(sigma, log_snr, i, self._order(i, steps)) for i in range(steps)]

    def _order(self, i: int, steps: int) -> int:
        """Of step i: that of the predictions there are, and a lower one towards the end of a short schedule."""
        order = min(self.solver_order, i + 1)
        ends_lower = self.lower_order_final and steps < 15
        if i == steps - 1 and (self.euler_at_final or ends_lower or self.final_sigmas_type == "zero"):
            return 1
        return min(order, 2) if i == steps - 2 and ends_lower else order

    def _update(self, sigma: Row, log_snr: Row, i: int, order: int) -> Row:
        """Factors of the state at step i, and of the predictions at i, i - 1, ..., to get to i + 1."""
        h = log_snr[i + 1] - log_snr[i]
        alpha, grown = 1 - sigma[i + 1], np.expm1(-h)
        at = np.eye(self.solver_order)  # at[k] stands for the prediction at i - k
        update = -alpha * grown * at[0]
        if order > 1:
            latest = log_snr[i] - log_snr[i - 1]
            slope = (at[0] - at[1]) * h / latest
            linear = alpha * (grown / h + 1)
            if order == 2:
                update = update + (linear if self.solver_type == "heun" else -alpha * grown / 2) * slope
            else:
                before = log_snr[i - 1] - log_snr[i - 2]
                bend = (slope - (at[1] - at[2]) * h / before) / (latest + before)
                update = update + linear * (slope + latest * bend) - (linear - alpha * h / 2) * bend
        return np.array([sigma[i + 1] / sigma[i], *update])


def _multistep(sigma: Row, last: float, rows: Callable[[Row, Row], Sequence[Row]]) -> Schedule:
    """The schedule over noise levels and a last one, as diffusers rounds them; a timestep is a whole number."""
    levels = np.append(sigma, last).astype(np.float32)
    if levels[0] >= 1 or (np.diff(levels[:-1]) >= 0).any():
        raise ValueError(
            f"num_inference_steps={len(sigma)}: noise levels coincide at this flow_shift, which is too far from 1"
        )
    exact = levels.astype(np.float64)
    with np.errstate(divide="ignore"):  # infinite at sigma 0
        log_snr = np.log(1 - exact) - np.log(exact)
    weights = np.array(rows(exact, log_snr))
    timesteps = tuple((sigma * TRAIN_TIMESTEPS).astype(np.int64).tolist())
    return Schedule(timesteps, tuple(levels.tolist()), tuple(map(tuple, weights.tolist())))


# -- few-step sampling of a distilled model ---------------------------------------


@dataclass(frozen=True)
class DMD:
    """What a model distilled by distribution matching was trained for (Yin et al. 2024, arXiv 2405.14867, section 4.4).

    From each of a few timesteps, it predicts the picture at once, which gets fresh noise up to the next timestep.

    Attributes:
        timesteps: in thousandths, falling; those of the distillation.
        shift: of the noise levels it was distilled with.
    """

    timesteps: tuple[int, ...]
    shift: float

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in pairwise((TRAIN_TIMESTEPS + 1, *self.timesteps, 0)))
        if not (self.timesteps and falling):
            told = ",".join(map(str, self.timesteps))
            raise ValueError(f"dmd_denoising_steps={told}: expected falling timesteps from 1 to {TRAIN_TIMESTEPS}")

    def with_shift(self, shift: float) -> DMD:
        return replace(self, shift=shift)

    def schedule(
        self, steps: int, image_tokens: int, mu: float | None = None, levels: Sequence[float] | None = None
    ) -> Schedule:
        """The first of the timesteps. Raises ValueError for more steps than there are."""
        _refuse(levels)
        if steps > len(self.timesteps):
            told = ",".join(map(str, self.timesteps))
            raise ValueError(f"num_inference_steps={steps}: this model was distilled for {len(self.timesteps)}: {told}")
        timesteps = self.timesteps[:steps]
        # a timestep means the noise level of training that is nearest to it
        trained = shifted(np.arange(TRAIN_TIMESTEPS, 0, -1, dtype=np.float32) / TRAIN_TIMESTEPS, self.shift)
        nearest = [np.abs(trained * np.float32(TRAIN_TIMESTEPS) - t).argmin() for t in timesteps]
        sigmas = (*trained[nearest].tolist(), 0.0)
        return Schedule(timesteps, sigmas, tuple((0.0, 1 - after, after) for after in sigmas[1:]), fresh_noise=True)


READERS: Mapping[str, Callable[[Mapping[str, Any]], Sampler]] = {
    "FlowMatchEulerDiscreteScheduler": FlowMatchEuler.read,
    "UniPCMultistepScheduler": UniPC.read,
    "DPMSolverMultistepScheduler": DPMSolver.read,
}


def _one_of(config: object, **allowed: tuple[Any, ...]) -> None:
    """Raises ConfigError for a field with a value that is none of these."""
    for name, values in allowed.items():
        if (got := getattr(config, name)) not in values:
            raise ConfigError(f"config key {name}={got!r} is not {' or '.join(map(str, values))}")
