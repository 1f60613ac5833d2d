"""Our schedule equals diffusers' to the last bit, for every kind of shift."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest

from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.runtime.schedulers import FlowMatchEuler

CLASS = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 9216])
@pytest.mark.parametrize(
    "config",
    [
        {"shift": 1.0},
        {"shift": 3.0},
        {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
        {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"shift": 1.5, "shift_terminal": 0.02},
    ],
    ids=["none", "fixed", "dynamic", "dynamic-long", "linear", "terminal"],
)
def test_sigmas_equal_diffusers(config: dict[str, Any], steps: int, tokens: int) -> None:
    ours = FlowMatchEuler.read({**CLASS, **config})
    if steps == 1 and "shift_terminal" in config:
        with pytest.raises(ValueError, match="num_inference_steps=1"):
            ours.sigmas(steps, tokens)
        return
    judge = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    c = judge.config
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    judge.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    assert ours.sigmas(steps, tokens) == judge.sigmas.tolist()


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler"),
        ({**CLASS, "use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({**CLASS, "invented": 1}, "config key invented=1 is not understood"),
        ({**CLASS, "time_shift_type": "cubic"}, "time_shift_type='cubic'"),
    ],
)
def test_what_is_not_implemented_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FlowMatchEuler.read(config)
