"""Noise schedules of our own, read from a checkpoint's `scheduler_config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgl_diffusion.models.config import ConfigError, demand, read_config


@dataclass(frozen=True)
class FlowMatchEuler:
    """Flow matching with Euler steps (`FlowMatchEulerDiscreteScheduler`; Esser et al. 2024, section 5.3 for shifting).

    Sigma runs from 1 (noise) to 0. Shifting spends more steps at high noise: by a fixed factor, or by one that grows
    with the number of image tokens (`use_dynamic_shifting`).
    """

    num_train_timesteps: int = 1000
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
        """Raises ConfigError for another scheduler class or an option that is not implemented."""
        if raw.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
            raise ConfigError(f"scheduler {raw.get('_class_name')!r} is not supported natively")
        config = read_config(cls, raw)
        demand(
            config,
            num_train_timesteps=1000,
            invert_sigmas=False,
            use_karras_sigmas=False,
            use_exponential_sigmas=False,
            use_beta_sigmas=False,
            stochastic_sampling=False,
        )
        if config.time_shift_type not in ("exponential", "linear"):
            raise ConfigError(f"config key time_shift_type={config.time_shift_type!r} is not exponential or linear")
        return config

    def sigmas(self, steps: int, image_tokens: int) -> list[float]:
        """`steps` + 1 sigmas, the last one 0. Every value is an exact float32, computed as diffusers does.

        Raises:
            ValueError: one step with a terminal shift, which divides by zero.
        """
        sigma: NDArray[Any] = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
        if self.use_dynamic_shifting:
            mu = self._mu(image_tokens)
            factor = math.exp(mu) if self.time_shift_type == "exponential" else mu
            sigma = factor / (factor + (1 / sigma - 1) ** 1.0)
        else:
            sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
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
