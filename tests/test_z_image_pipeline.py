"""Z-Image from prompt to picture: the native pipeline equals diffusers stage by stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from test_graphs import Watch
from test_offload import StandIn
from test_offload import load as load_offloaded

from sgl_diffusion.models.text import LayerStates
from sgl_diffusion.models.z_image import ZImage
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.events import Result
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.resolve import resolve
from sgl_diffusion.runtime.schedulers import read_scheduler
from sgl_diffusion.runtime.verify import Verification, verify

Tiny = Callable[[str], Path]
PROMPT = "a red circle left of a blue square"
OTHER = "a white cross on a black background, seen from above"
STAGES = {"cap_feats", "initial_latents", "timesteps", "final_latents", "pixels"}


def asked(**sampling: Any) -> SamplingParams:
    small = {"prompt": PROMPT, "height": 64, "width": 96, "num_inference_steps": 3, "seed": 3, "save_output": False}
    return SamplingParams(**{**small, "max_sequence_length": 128, **sampling})


def load(folder: Path, **server: Any) -> Engine:
    return Engine.load(ServerArgs(model_path=str(folder), device="cpu", **server))


def pictures(result: Result) -> list[np.ndarray]:
    return [np.asarray(output.image) for output in result.outputs]


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> Engine:
    return load(tiny("z_image"))


# -- parity -------------------------------------------------------------------------


def compared(folder: Path, sampling: dict[str, Any], **server: Any) -> Verification:
    return verify(ServerArgs(model_path=str(folder), device="cpu", **server), asked(**sampling))


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("z_image", {"negative_prompt": "a green triangle"}),
        ("z_image", {"guidance_scale": 0.5, "height": 112, "width": 48, "num_inference_steps": 1}),
        ("z_image", {"prompt": [PROMPT, OTHER], "num_outputs_per_prompt": 2, "guidance_scale": 3.0}),
        ("z_image_turbo", {}),
        ("z_image_turbo", {"prompt": [OTHER, PROMPT], "height": 80, "width": 80}),
    ],
    ids=["guided", "weakly", "prompts", "turbo", "unguided prompts"],
)
def test_every_stage_equals_diffusers(tiny: Tiny, name: str, sampling: dict[str, Any]) -> None:
    result = compared(tiny(name), sampling)
    assert {c.stage for c in result.comparisons} >= STAGES
    assert result.tolerance == 1e-4
    assert result.passed, "\n".join(f"{c.stage}: {c.relative_max:.1e}" for c in result.comparisons)
    assert next(c for c in result.comparisons if c.stage == "timesteps").max_abs == 0


def test_half_precision_follows_the_roundings_of_diffusers(tiny: Tiny) -> None:
    stages = {c.stage: c for c in compared(tiny("z_image"), {}, precision="bf16").comparisons}
    assert stages["initial_latents"].max_abs == stages["timesteps"].max_abs == 0
    # bf16 keeps 8 bits and both sides round at different places of the same formulas; guidance of 5 lengthens both
    assert stages["prediction_0"].relative_l2 < 0.05


@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_noise_levels_are_diffusers_own_to_the_last_bit(engine: Engine, shift: float) -> None:
    """The embedding's fastest sine turns by a radian in a thousandth: it shows what rounding does to 923.0769."""
    assert isinstance(engine.backend, NativePipeline)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    sampler, judge = read_scheduler(config), diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    for steps in (1, 8, 28, 50):
        judge.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(), mu=1.0)
        schedule = sampler.schedule(steps, 0, None, engine.backend.family.noise_levels(steps))
        assert list(schedule.timesteps) == judge.timesteps.tolist()
        assert list(schedule.sigmas) == judge.sigmas.tolist()
    with pytest.raises(ValueError, match="noise levels are for FlowMatchEulerDiscreteScheduler alone"):
        read_scheduler({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction",
                        "use_flow_sigmas": True}).schedule(8, 0, None, [1.0])  # fmt: skip


# -- the runtime's promises -----------------------------------------------------------


def test_a_picture_does_not_depend_on_its_neighbours(engine: Engine) -> None:
    """Prompts of different lengths, and two results of one prompt."""
    together = engine.run(asked(prompt=[PROMPT, OTHER], seed=[3, 9], guidance_scale=0.0))
    assert together.report.effective["batch"]["denoising"] == "one by one: prompts are not equally long"
    for picture, prompt, seed in zip(pictures(together), (PROMPT, OTHER), (3, 9), strict=True):
        alone = engine.run(asked(prompt=prompt, seed=seed, guidance_scale=0.0))
        assert np.array_equal(picture, pictures(alone)[0])
    twice = pictures(engine.run(asked(num_outputs_per_prompt=2)))
    assert np.array_equal(twice[0], pictures(engine.run(asked()))[0]) and not np.array_equal(*twice)


def test_predicted_memory_is_what_a_run_holds(tiny: Tiny) -> None:
    """Of prompts as long as they may be, which is what a prediction is of."""
    for sampling in ({"negative_prompt": PROMPT}, {"num_outputs_per_prompt": 2, "guidance_scale": 0.0}):
        params = asked(measure_memory=True, max_sequence_length=53, **sampling)
        memory = load(tiny("z_image")).run(params).report.memory
        assert memory is not None
        for stage in memory.stages:
            if stage.name in ("denoising", "decoding"):
                assert stage.measured_mb is not None
                counted = stage.measured_mb - stage.weights_mb
                assert stage.activations_mb == pytest.approx(counted, rel=0.05), stage


def test_an_encoding_waits_for_nothing(engine: Engine) -> None:
    """So that it can be captured."""
    assert isinstance(engine.backend, NativePipeline)
    with Watch() as watch:
        LayerStates(engine.backend.parts["text_encoder"], (-2,))(torch.zeros(1, 7, dtype=torch.int64))
    assert watch.seen


def test_offloaded_weights_draw_what_resident_ones_draw(tiny: Tiny, engine: Engine) -> None:
    places = dict.fromkeys(("transformer", "vae", "text_encoder"), "layerwise")
    offloaded = load_offloaded(tiny("z_image"), StandIn(), places, prefetch=1.0)
    params = asked(negative_prompt="a green triangle")
    assert np.array_equal(pictures(offloaded.run(params))[0], pictures(engine.run(params))[0])


def test_dummy_weights_are_drawn_with(tiny: Tiny) -> None:
    result = load(tiny("z_image"), load_format="dummy").run(asked())
    assert result.report.effective["dummy_weights"] and len(result.outputs) == 1


# -- defaults and mistakes --------------------------------------------------------------


def test_the_schedule_tells_few_steps_from_many(tiny: Tiny, tmp_path: Path) -> None:
    found = {}
    for name in ("z_image", "z_image_turbo"):
        blueprint = resolve(ServerArgs(model_path=str(tiny(name)), device="cpu")).blueprint
        assert blueprint is not None and blueprint.family is ZImage
        found[name] = (blueprint.defaults.num_inference_steps, blueprint.defaults.guidance_scale)
    assert found == {"z_image": (50, 5.0), "z_image_turbo": (8, 0.0)}
    presets = {name: preset.defaults for name, preset in ZImage.presets().items()}
    for name, preset in ZImage.presets().items():
        assert ZImage.defaults(preset.components) == presets[name]


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"height": 72}, "height=72: must be a multiple of 16; nearest: 64 or 80"),
        ({"width": 8208}, "width=8208: at most 8192"),
        ({"num_frames": 5}, "num_frames=5: this model draws pictures"),
        ({"image_path": ["x.png"]}, "image_path: 1 given; this model draws from text alone"),
        ({"max_sequence_length": 2000}, "max_sequence_length=2000: at most 1504"),
        ({"max_sequence_length": 49}, "the prompt has 53 tokens with its template; this would be lost: 'uare'"),
        ({"guidance_scale": 0.0, "negative_prompt": "x"}, "has no effect with guidance_scale=0; expected above 0"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale=2.0: this model's is called guidance_scale"),
    ],
)
def test_a_mistake_is_one_line(engine: Engine, sampling: dict[str, Any], message: str, tmp_path: Path) -> None:
    from PIL import Image

    if "image_path" in sampling:
        Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
        sampling = {"image_path": [str(tmp_path / "x.png")]}
    with pytest.raises(UserError, match=message):
        engine.run(asked(**sampling))


def test_a_model_that_looks_at_pictures_runs_on_diffusers(tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(tiny("z_image"), tmp_path / "omni")
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "siglip_feat_dim": 1152}))
    model = resolve(ServerArgs(model_path=str(folder), device="cpu"))
    assert not model.native and "transformer: config key siglip_feat_dim=1152" in model.why
