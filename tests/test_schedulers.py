"""Our schedules equal diffusers' to the last bit, and what a config asks for beyond them is refused by name."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest

from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.runtime.schedulers import DMD, Sampler, read_scheduler

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
UNIPC = {"_class_name": "UniPCMultistepScheduler", **FLOW}
DPM = {"_class_name": "DPMSolverMultistepScheduler", **FLOW}
WAN = {  # as published with Wan2.1-T2V-1.3B-Diffusers
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.33.0.dev0",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "solver_order": 2,
    "prediction_type": "flow_prediction",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "predict_x0": True,
    "solver_type": "bh2",
    "lower_order_final": True,
    "disable_corrector": [],
    "solver_p": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "final_sigmas_type": "zero",
    "rescale_betas_zero_snr": False,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}


def judge_of(config: dict[str, Any]) -> Any:
    """Diffusers' scheduler of the class that the config names."""
    return getattr(diffusers, config["_class_name"]).from_config(config)


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
    ours = read_scheduler({**EULER, **config})
    if steps == 1 and "shift_terminal" in config:
        with pytest.raises(ValueError, match="num_inference_steps=1"):
            ours.schedule(steps, tokens)
        return
    judge = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    c = judge.config
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    judge.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    schedule = ours.schedule(steps, tokens)
    assert list(schedule.sigmas) == judge.sigmas.tolist()
    assert list(schedule.timesteps) == judge.timesteps.tolist()
    assert (schedule.weights, schedule.remembered, schedule.noises) == ((), 0, 0)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 15, 40, 50, 333])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("last", ["zero", "sigma_min"])
@pytest.mark.parametrize("config", [UNIPC, DPM], ids=["unipc", "dpm"])
def test_multistep_levels_and_timesteps_equal_diffusers(
    config: dict[str, Any], last: str, shift: float, steps: int
) -> None:
    config = {**config, "flow_shift": shift, "final_sigmas_type": last}
    schedule, judge = read_scheduler(config).schedule(steps, 0), judge_of(config)
    judge.set_timesteps(steps)
    assert list(schedule.sigmas) == judge.sigmas.tolist()
    assert list(schedule.timesteps) == judge.timesteps.tolist()
    assert all(isinstance(t, int) for t in schedule.timesteps)


def test_a_published_config_and_another_shift_of_it() -> None:
    sampler = read_scheduler(WAN)
    schedule = sampler.schedule(50, 32760)
    assert (schedule.steps, schedule.remembered, schedule.noises) == (50, 2, 0)
    moved, judge = sampler.with_shift(8.0).schedule(50, 32760), judge_of({**WAN, "flow_shift": 8.0})
    judge.set_timesteps(50)
    assert list(moved.timesteps) == judge.timesteps.tolist() != list(schedule.timesteps)


@pytest.mark.parametrize("config", [EULER, DPM], ids=["euler", "dpm"])
def test_every_sampler_takes_a_shift(config: dict[str, Any]) -> None:
    key = "shift" if config is EULER else "flow_shift"
    assert read_scheduler(config).with_shift(5.0) == read_scheduler({**config, key: 5.0})


def test_a_shift_without_effect_is_an_error() -> None:
    with pytest.raises(ValueError, match="flow_shift=5.0: no effect"):
        read_scheduler({**EULER, "use_dynamic_shifting": True}).with_shift(5.0)


@pytest.mark.parametrize("config", [UNIPC, DPM], ids=["unipc", "dpm"])
def test_a_shift_that_leaves_no_room_between_levels_is_an_error(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="num_inference_steps=4: noise levels coincide"):
        read_scheduler(config).with_shift(1e9).schedule(4, 0)


@pytest.mark.parametrize("sampler", [*map(read_scheduler, (EULER, UNIPC, DPM)), DMD((500,), 8.0)])
@pytest.mark.parametrize("shift", [0.0, -3.0, float("nan")])
def test_a_shift_is_positive(sampler: Sampler, shift: float) -> None:
    with pytest.raises(ValueError, match=f"flow_shift={shift}: expected a positive number"):
        sampler.with_shift(shift).schedule(1, 0)


def test_a_distilled_model_is_sampled_at_the_levels_it_was_trained_on() -> None:
    """As in training: the level of the timestep, of a thousand shifted ones, that is nearest."""
    schedule = DMD((1000, 757, 522), shift=8.0).schedule(3, 0)
    judge = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    nearest = [int((judge.timesteps - t).abs().argmin()) for t in (1000, 757, 522)]
    assert list(schedule.sigmas) == [*judge.sigmas[nearest].tolist(), 0.0]
    assert schedule.sigmas[0] == 1.0
    assert schedule.timesteps == (1000, 757, 522)
    assert (schedule.noises, schedule.remembered) == (2, 0)
    with pytest.raises(ValueError, match="num_inference_steps=4: this model was distilled for 3: 1000,757,522"):
        DMD((1000, 757, 522), shift=8.0).schedule(4, 0)


@pytest.mark.parametrize("timesteps", [(), (1001, 500), (500, 500), (500, 0), (500, 700)])
def test_timesteps_that_do_not_fall_are_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"dmd_denoising_steps=.*: expected falling timesteps from 1 to 1000"):
        DMD(timesteps, shift=8.0)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"_class_name": "EulerDiscreteScheduler"}, "scheduler 'EulerDiscreteScheduler' is not supported natively"),
        ({}, "scheduler None is not supported natively; supported: FlowMatchEulerDiscreteScheduler, UniPC"),
        ({**EULER, "use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({**EULER, "invented": 1}, "config key invented=1 is not understood"),
        ({**EULER, "time_shift_type": "cubic"}, "time_shift_type='cubic' is not exponential or linear"),
        ({"_class_name": "UniPCMultistepScheduler"}, "prediction_type='epsilon'.*only 'flow_prediction' is"),
        ({**UNIPC, "use_flow_sigmas": False}, "use_flow_sigmas=False"),
        ({**UNIPC, "solver_order": 4}, "solver_order=4 is not 1 or 2 or 3"),
        ({**UNIPC, "solver_type": "heun"}, "solver_type='heun' is not bh1 or bh2"),
        ({**UNIPC, "predict_x0": False}, "predict_x0=False"),
        ({**UNIPC, "lower_order_final": False}, "lower_order_final=False"),
        ({**UNIPC, "use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({**UNIPC, "shift_terminal": 0.1}, "shift_terminal=0.1"),
        ({**UNIPC, "thresholding": True}, "thresholding=True"),
        ({**UNIPC, "use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ({**UNIPC, "solver_p": {}}, "solver_p={}"),
        ({**UNIPC, "final_sigmas_type": "one"}, "final_sigmas_type='one' is not zero or sigma_min"),
        ({**UNIPC, "num_train_timesteps": 500}, "num_train_timesteps=500"),
        ({**UNIPC, "algorithm_type": "dpmsolver++"}, "config key algorithm_type='dpmsolver..' is not understood"),
        ({**DPM, "algorithm_type": "sde-dpmsolver++"}, "algorithm_type='sde-dpmsolver"),
        ({**DPM, "solver_type": "bh2"}, "solver_type='bh2' is not midpoint or heun"),
        ({**DPM, "use_lu_lambdas": True}, "use_lu_lambdas=True"),
        ({**DPM, "variance_type": "learned"}, "variance_type='learned'"),
        ({**DPM, "beta_schedule": "scaled_linear"}, "beta_schedule='scaled_linear'"),
        ({**DPM, "predict_x0": True}, "config key predict_x0=True is not understood"),
    ],
)
def test_what_is_not_implemented_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_scheduler(config)


def test_another_class_is_named() -> None:
    with pytest.raises(ConfigError, match="scheduler 'EulerDiscreteScheduler' is not supported natively"):
        read_scheduler({"_class_name": "EulerDiscreteScheduler"})
