"""Any diffusers pipeline behind our face: same requests, events, receipts and errors as the native backend."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models import attention_dispatch
from PIL import Image

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.events import Finished, StageFinished, StageStarted, StepDone

Tiny = Callable[[str], Path]


def load(path: Path, **server: Any) -> Engine:
    return Engine.load(ServerArgs(model_path=str(path), device="cpu", **server))


def params(**sampling: Any) -> SamplingParams:
    small = {"prompt": "a red circle", "height": 64, "width": 64, "num_inference_steps": 2, "save_output": False}
    return SamplingParams(**{**small, **sampling})


def pictures(engine: Engine, **sampling: Any) -> list[np.ndarray]:
    return [np.asarray(o.image) for o in engine.run(params(**sampling)).outputs]


def test_pickles_are_read_only_if_they_are_allowed(tiny: Tiny, tmp_path: Path) -> None:
    pickled = shutil.copytree(tiny("sdxl"), tmp_path / "pickled")
    unet = diffusers.UNet2DConditionModel.from_pretrained(pickled / "unet")
    shutil.rmtree(pickled / "unet")
    unet.save_pretrained(pickled / "unet", safe_serialization=False)
    assert [file.suffix for file in (pickled / "unet").iterdir() if file.suffix != ".json"] == [".bin"]
    with pytest.raises(UserError, match="its weights are pickles, which may run code: --allow-pickle-weights"):
        load(pickled)
    assert np.array_equal(pictures(load(pickled, allow_pickle_weights=True)), pictures(load(tiny("sdxl"))))


@pytest.mark.parametrize(
    ("name", "cls", "sampling"),
    [
        ("sdxl", diffusers.StableDiffusionXLPipeline, {"guidance_scale": 7.0, "negative_prompt": "a blue square"}),
        ("sd3", diffusers.StableDiffusion3Pipeline, {"guidance_scale": 5.0, "max_sequence_length": 32}),
        ("ovis", diffusers.OvisImagePipeline, {"guidance_scale": 3.0, "max_sequence_length": 64}),
    ],
)
def test_pictures_are_those_of_the_pipeline_itself(tiny: Tiny, name: str, cls: Any, sampling: dict[str, Any]) -> None:
    engine = load(tiny(name))
    assert engine.backend.name == "diffusers" and "has no native implementation" in engine.model.why
    ours = pictures(engine, seed=5, num_outputs_per_prompt=2, **sampling)
    judge = cls.from_pretrained(tiny(name))
    theirs = judge(
        "a red circle",
        height=64,
        width=64,
        num_inference_steps=2,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(s) for s in (5, 6)],
        **sampling,
    ).images
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(ours, theirs, strict=True))


def test_a_video_is_written_with_its_frame_rate(tiny: Tiny, tmp_path: Path) -> None:
    import av

    request = params(prompt="a red circle", height=32, width=48, num_frames=5, fps=8, guidance_scale=1.0)
    saved = {"save_output": True, "output_path": str(tmp_path), "output_file_name": "clip.mp4", "return_frames": True}
    result = load(tiny("wan"), backend="diffusers").run(request.model_copy(update=saved))
    assert [p.name for p in result.paths] == ["clip.mp4", "clip.npy"]
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (48, 32, 8)
        decoded = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    raw = np.load(tmp_path / "clip.npy")
    assert raw.shape == (5, 32, 48, 3) and np.array_equal(raw, result.outputs[0].frames)
    assert np.abs(decoded.astype(float) - raw).mean() < 12  # what H.264 loses on noise


def test_events_and_report_have_the_shape_of_the_native_ones(tiny: Tiny) -> None:
    engine = load(tiny("sdxl"))
    events = list(engine.generate(params()))
    assert [e.step for e in events if isinstance(e, StepDone)] == [1, 2]
    started = [e.name for e in events if isinstance(e, StageStarted)]
    assert started == ["text_encoding", "denoising", "decoding"]
    assert sorted(started) == sorted(e.name for e in events if isinstance(e, StageFinished))
    assert isinstance(events[-1], Finished)
    report = events[-1].result.report
    assert [s.name for s in report.steps] == started and len(report.denoise_steps_ms) == 2
    assert report.effective["attention"]["unet"] == "native"
    assert report.effective["scheduler"] == "EulerDiscreteScheduler"
    assert report.effective["ignored"] == []


# -- options take effect or are errors ---------------------------------------------------


def test_vae_options_precisions_and_scheduler_options(tiny: Tiny) -> None:
    engine = load(tiny("sdxl"), vae_tiling=True, vae_slicing=True, dit_precision="bf16", vae_precision="fp32",
                  vae_config={"tile_sample_min_height": 128, "tile_sample_min_width": 128})  # fmt: skip
    plain = pictures(load(tiny("sdxl")), height=192)
    assert not np.array_equal(pictures(engine, height=192)[0], plain[0])
    options = {"eta": 0.5, "use_karras_sigmas": True}
    report = engine.run(params(diffusers_kwargs=options)).report
    assert report.effective["vae"] == {"tiling": True, "slicing": True, "tile": (128, 128)}
    assert report.effective["precision"]["unet"] == "bf16" and report.effective["precision"]["vae"] == "fp32"
    assert report.effective["diffusers_kwargs"] == options


def test_scheduler_options_take_effect_for_their_request_alone(tiny: Tiny) -> None:
    engine = load(tiny("sdxl"))
    before, karras, after = (
        pictures(engine, num_inference_steps=5, diffusers_kwargs=options)[0]
        for options in ({}, {"use_karras_sigmas": True}, {})
    )
    assert not np.array_equal(before, karras)
    assert np.array_equal(before, after)


def test_large_pictures_are_tiled_unless_told_otherwise(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgl_diffusion.runtime.plan.AUTO_TILING_PIXELS", 100 * 100)
    for mode, height, tiled in (("auto", 96, False), ("auto", 128, True), ("speed", 128, False), ("memory", 96, True)):
        engine = load(tiny("sdxl"), performance_mode=mode)
        report = engine.run(params(height=height, width=96, num_inference_steps=1)).report
        assert report.effective["vae"]["tiling"] is tiled, (mode, height)


@pytest.mark.parametrize(
    ("name", "sampling", "told"),
    [
        ("sdxl", {"num_frames": 5}, "num_frames=5: StableDiffusionXLPipeline does not take it"),
        ("sdxl", {"fps": 5}, "fps=5: StableDiffusionXLPipeline does not take it"),
        ("sdxl", {"diffusers_kwargs": {"guidance_rescal": 1}}, "did you mean guidance_rescale?"),
        ("sdxl", {"diffusers_kwargs": {"height": 64}}, "diffusers_kwargs.height=64: already given"),
        ("sdxl", {"height": 63}, "StableDiffusionXLPipeline: `height` and `width` have to be divisible by 8"),
        ("sdxl", {"negative_prompt": "x", "guidance_scale": 1.0}, "negative_prompt: has no effect with guidance_scale"),
        ("wan", {"image_path": ["a.png"]}, "image_path=.*: WanPipeline does not take it"),
    ],
)
def test_parameters_a_pipeline_does_not_take(tiny: Tiny, name: str, sampling: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        pictures(load(tiny(name), backend="diffusers"), **sampling)


@pytest.mark.parametrize(
    ("server", "told"),
    [
        ({"diffusers_attention_backend": "nope"}, "diffusers_attention_backend=nope: "),
        ({"diffusers_attention_backend": "flash"}, "diffusers_attention_backend=flash: "),
        ({"pipeline_class_name": "StableDiffusionXLPipelin"}, "did you mean StableDiffusionXLPipeline?"),
        ({"component_attention_backends": {"vea": "x"}}, "component_attention_backends.vea=x: expected one of"),
        ({"component_attention_backends": {"text_encoder": "x"}}, "component_attention_backends.text_encoder=x"),
    ],
)
def test_options_a_pipeline_cannot_honour(tiny: Tiny, server: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load(tiny("sd3" if "diffusers_attention_backend" in server else "sdxl"), **server)


def test_guidance_that_diffusers_would_drop_is_an_error(tiny: Tiny) -> None:
    guided, unguided = load(tiny("flux"), backend="diffusers"), load(tiny("custom"), trust_remote_code=True)
    with pytest.raises(UserError, match="negative_prompt: has no effect without true_cfg_scale above 1"):
        pictures(guided, negative_prompt="x")
    with pytest.raises(UserError, match=r"true_cfg_scale=2.0: needs a negative_prompt"):
        pictures(guided, true_cfg_scale=2.0)
    with pytest.raises(UserError, match=r"guidance_scale=3.0: this checkpoint has no guidance embedding"):
        pictures(unguided, guidance_scale=3.0)


def test_attention_backend_of_diffusers_is_chosen_and_reported(tiny: Tiny) -> None:
    engine = load(tiny("flux"), diffusers_attention_backend="_native_math")
    assert engine.backend.name == "diffusers"
    report = engine.run(params(max_sequence_length=16)).report
    assert report.effective["attention"]["transformer"] == "_native_math"
    others, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    assert others.value == "native", "the next model in this process did not ask for it"


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_blocks_draw_the_same_picture(tiny: Tiny) -> None:
    """Both backends, with one block list compiled on a CPU."""
    for backend in ("sglang", "diffusers"):
        server = {"backend": backend, "pipeline_class_name": "FluxPipeline", "trust_remote_code": True}
        plain, compiled = (load(tiny("custom"), **server, enable_torch_compile=c) for c in (False, True))
        options = {"max_sequence_length": 16, "num_inference_steps": 1, "height": 32, "width": 32}
        a, b = pictures(plain, **options)[0].astype(int), pictures(compiled, **options)[0].astype(int)
        assert np.abs(a - b).max() <= 1
        assert compiled.run(params(**options)).report.effective["compile"]


# -- code of its own ------------------------------------------------------------------------


def test_remote_code_is_refused_by_path_and_runs_when_allowed(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"custom/pipeline\.py: this model runs code of its own"):
        load(tiny("custom"))
    inverted = pictures(load(tiny("custom"), trust_remote_code=True), max_sequence_length=16)[0].astype(int)
    plain = pictures(load(tiny("custom"), pipeline_class_name="FluxPipeline"), max_sequence_length=16)[0]
    assert np.abs(255 - inverted - plain).max() <= 1


def test_input_pictures_reach_the_pipeline(tiny: Tiny, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "blue.png")
    engine = load(tiny("sdxl"), pipeline_class_name="StableDiffusionXLImg2ImgPipeline")
    drawn = []
    for colour in ("red", "blue"):
        request = SamplingParams(prompt="a circle", image_path=str(tmp_path / f"{colour}.png"), num_inference_steps=4,
                                 diffusers_kwargs={"strength": 0.5}, save_output=False)  # fmt: skip
        drawn.append(np.asarray(engine.run(request).outputs[0].image))
    assert not np.array_equal(*drawn)
    with pytest.raises(UserError, match=r"image_path=none\.png: not a readable picture"):
        engine.run(SamplingParams(prompt="a circle", image_path="none.png", save_output=False))
