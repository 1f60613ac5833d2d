"""Clips from prompts and pictures: the native pipelines equal diffusers stage by stage, and what reaches the file."""

from __future__ import annotations

import io
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import diffusers
import numpy as np
import pytest
import torch
from forks import sglang
from PIL import Image
from test_offload import StandIn
from test_offload import load as load_offloaded
from torch import Tensor

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.events import Drawn, StepDone
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.request import resolve_request
from sgl_diffusion.runtime.resolve import resolve
from sgl_diffusion.runtime.trace import Stopwatch
from sgl_diffusion.runtime.verify import Verification, verify

Tiny = Callable[[str], Path]
PROMPT = "a red circle left of a blue square"
STAGES = {"encoder_hidden_states", "initial_latents", "timesteps", "final_latents", "pixels"}
# diffusers takes the last 512 tokens of what a model with an image encoder reads for its text
WITH_IMAGE_ENCODER = {"max_sequence_length": 512}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files, of proportions that no request here has."""
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (7, 9, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        paths.append(str(folder / f"{i}.png"))
    return paths


def asked(**sampling: Any) -> SamplingParams:
    small = {"prompt": PROMPT, "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 4, "seed": 3}
    return SamplingParams(**{**small, "max_sequence_length": 24, "save_output": False, **sampling})


def check(folder: Path, server: dict[str, Any] | None = None, **sampling: Any) -> Verification:
    result = verify(ServerArgs(model_path=str(folder), device="cpu", **(server or {})), asked(**sampling))
    assert {c.stage for c in result.comparisons} >= STAGES
    assert result.tolerance == 1e-4
    assert result.passed, "\n".join(f"{c.stage}: {c.relative_max:.1e}" for c in result.comparisons)
    assert min(c.psnr for c in result.comparisons if c.stage == "pixels") > 60
    return result


# -- parity -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "sampling"),
    [
        ("wan", 0, {"negative_prompt": "a white cross"}),
        ("wan", 0, {"guidance_scale": 1.0, "num_frames": 1, "height": 80, "width": 48}),
        ("wan", 0, {"prompt": [PROMPT, "a white cross &amp; a  ring"], "num_outputs_per_prompt": 2, "num_frames": 5}),
        ("wan_i2v", 1, WITH_IMAGE_ENCODER),
        ("wan_flf2v", 2, WITH_IMAGE_ENCODER),
        ("wan22", 0, {"guidance_scale": 4.0, "guidance_scale_2": 3.0}),
        ("wan22_i2v", 1, {"guidance_scale": 3.5, "num_outputs_per_prompt": 2}),
        ("wan22_i2v", 2, {"guidance_scale": 3.5}),
        ("wan22_ti2v", 0, {"num_frames": 13}),
        ("wan22_ti2v", 1, {"num_outputs_per_prompt": 2}),
    ],
)
def test_every_stage_equals_diffusers(
    tiny: Tiny, pictures: list[str], name: str, given: int, sampling: dict[str, Any]
) -> None:
    server = {"pipeline_class_name": "WanImageToVideoPipeline"} if given else {}
    result = check(tiny(name), server, image_path=pictures[:given], **sampling)
    compared = {c.stage for c in result.comparisons}
    assert ("latent_condition" in compared) == bool(given)
    assert ("encoder_hidden_states_image" in compared) == (name in ("wan_i2v", "wan_flf2v"))


def test_a_judge_that_takes_no_pictures_says_so(tiny: Tiny, pictures: list[str]) -> None:
    with pytest.raises(UserError, match="WanPipeline does not take it; pipeline_class_name can name"):
        check(tiny("wan22_ti2v"), image_path=pictures[:1])


def test_a_picture_is_fetched_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links may work once. What is settled before the model is loaded waits for the picture then."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(file := io.BytesIO(), "PNG")
    fetched: list[str] = []

    def fetch(url: str, timeout: float) -> io.BytesIO:
        fetched.append(url)
        return io.BytesIO(file.getvalue())

    monkeypatch.setattr("urllib.request.urlopen", fetch)
    like = asked(image_path=["http://somewhere/a.png"], num_frames=5, num_inference_steps=1)
    engine = Engine.load(ServerArgs(model_path=str(tiny("wan22_ti2v")), device="cpu"), like=like)
    assert not fetched
    assert engine.run(like).outputs and fetched == ["http://somewhere/a.png"]


TILED = {"vae_tiling": True, "vae_config": {"tile_sample_min_height": 64, "tile_sample_min_width": 64}}


@pytest.mark.parametrize("name", ["wan", "wan22_ti2v"])
def test_tiles_leave_no_seams(tiny: Tiny, name: str) -> None:
    """Those of diffusers do, so that the judge is the decode of the whole."""
    check(tiny(name), TILED, height=128, width=160, num_frames=5)
    found = {}
    for server in ({}, TILED):
        engine = Engine.load(ServerArgs(model_path=str(tiny(name)), device="cpu", **server))
        result = engine.run(asked(height=128, width=160, num_frames=5, num_inference_steps=1))
        found[bool(result.report.effective["vae"]["tiling"])] = result.outputs[0].frames.astype(int)
    assert np.abs(found[True] - found[False]).max() <= 1  # of 255, by rounding


def test_slices_change_nothing(tiny: Tiny) -> None:
    check(tiny("wan"), {"vae_slicing": True}, num_outputs_per_prompt=2, num_frames=5)


def test_another_shift_moves_the_timesteps(tiny: Tiny) -> None:
    engine = Engine.load(ServerArgs(model_path=str(tiny("wan")), device="cpu"))
    timesteps = [engine.backend.prepare(_request(engine, asked(**more))).schedule.timesteps
                 for more in ({}, {"flow_shift": 3.0}, {"flow_shift": 8.0})]  # fmt: skip
    assert timesteps[0] == timesteps[1] and all(a < b for a, b in zip(timesteps[1][1:], timesteps[2][1:], strict=True))


def test_a_distilled_model_takes_its_few_steps(tiny: Tiny) -> None:
    """The loop of FastVideo's pipeline by hand, with diffusers' denoiser and its scheduler that adds fresh noise."""
    engine = Engine.load(ServerArgs(model_path=str(tiny("wan_dmd")), device="cpu"))
    backend = engine.backend
    assert isinstance(backend, NativePipeline)
    job = backend.prepare(_request(engine, asked(num_inference_steps=None)))
    assert job.schedule.timesteps == (1000, 757, 522) and job.negative_prompt is None
    seen: dict[str, Tensor] = {}
    list(backend.run(job, Stopwatch(engine.device), lambda name, x: seen.__setitem__(name, x.clone())))

    pipe = diffusers.WanPipeline.from_pretrained(tiny("wan"))
    text, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False, max_sequence_length=24)
    judge, generator = diffusers.FlowMatchLCMScheduler(), torch.Generator().manual_seed(3)
    judge.set_timesteps(sigmas=list(job.schedule.sigmas[:-1]))
    x = torch.randn(seen["initial_latents"].shape, generator=generator)
    with torch.no_grad():
        for asked_at, t in zip((1000, 757, 522), judge.timesteps, strict=True):
            velocity = pipe.transformer(x, torch.tensor([asked_at]), text).sample
            x = judge.step(velocity, t, x, generator=generator, return_dict=False)[0]
    assert ((seen["final_latents"] - x).abs().max() / x.std()).item() < 1e-4
    with pytest.raises(UserError, match="num_inference_steps=4: this model was distilled for 3: 1000,757,522"):
        engine.run(asked(num_inference_steps=4))
    with pytest.raises(UserError, match="guidance_scale=5: this model was distilled without; expected 1"):
        engine.run(asked(num_inference_steps=3, guidance_scale=5.0))


# -- two denoisers ------------------------------------------------------------------


def test_each_denoiser_takes_its_own_steps_with_its_own_strength(tiny: Tiny) -> None:
    engine = Engine.load(ServerArgs(model_path=str(tiny("wan22")), device="cpu"))
    backend = engine.backend
    assert isinstance(backend, NativePipeline)
    called: list[str] = []
    for key in ("transformer", "transformer_2"):
        backend.parts[key].register_forward_pre_hook(lambda *_, key=key: called.append(key))
    graphs = {**backend.graphs, "denoising": lambda function, *arguments: function(*arguments)}
    backend.graphs = graphs  # type: ignore[assignment]
    job = backend.prepare(_request(engine, asked(num_inference_steps=8)))
    first, second = backend.family.phases(job.schedule.timesteps, job.guidance)
    assert all(job.schedule.timesteps[i] >= 875 for i in first.steps)
    assert all(job.schedule.timesteps[i] < 875 for i in second.steps)
    list(backend.run(job, Stopwatch(engine.device)))
    assert called == ["transformer"] * 2 * len(first.steps) + ["transformer_2"] * 2 * len(second.steps)
    # strength 0 of the second is the negative prompt's prediction: it reaches the second's steps alone
    seen = [_predictions(engine, guidance_scale=4.0, guidance_scale_2=scale) for scale in (3.0, 0.0)]
    equal = [torch.equal(a, b) for a, b in zip(*seen, strict=True)]
    steps = backend.family.phases(backend.prepare(_request(engine, asked())).schedule.timesteps, job.guidance)
    assert equal == [True] * len(steps[0].steps) + [False] * len(steps[1].steps)


def _request(engine: Engine, params: SamplingParams) -> Any:
    return resolve_request(params, {}, engine.args)


def _predictions(engine: Engine, **sampling: Any) -> list[Tensor]:
    seen: list[Tensor] = []

    def record(name: str, tensor: Tensor) -> None:
        if name.startswith("prediction_"):
            seen.append(tensor.clone())

    backend = engine.backend
    assert isinstance(backend, NativePipeline)
    list(backend.run(backend.prepare(_request(engine, asked(**sampling))), Stopwatch(engine.device), record))
    return seen


def test_a_warm_up_keeps_the_steps_of_both_denoisers(tiny: Tiny) -> None:
    sizes = ["32x32", "48x32", "32x48"]
    warm = {"warmup": True, "warmup_resolutions": sizes, "warmup_steps": 4}
    args = ServerArgs.model_validate({"model_path": str(tiny("wan22")), "device": "cpu", **warm})
    engine = Engine.load(args, like=asked(height=None, width=None))
    for size in sizes:
        width, height = map(int, size.split("x"))
        report = engine.run(asked(height=height, width=width)).report
        assert report.effective["cuda_graph"]["denoising"]["replays"] == 4, size


@pytest.mark.parametrize("place", ["component", "layerwise"])
def test_the_idle_denoiser_is_on_the_host(tiny: Tiny, pictures: list[str], place: str) -> None:
    """On a device that stands in for a GPU, whose memory and whose copies in flight are not numbers."""
    denoisers = ("transformer", "transformer_2")
    resident = Engine.load(ServerArgs(model_path=str(tiny("wan22_i2v")), device="cpu"))
    engine = load_offloaded(tiny("wan22_i2v"), StandIn(), dict.fromkeys((*denoisers, "vae", "text_encoder"), place))
    backend = engine.backend
    assert isinstance(backend, NativePipeline)
    there: set[tuple[bool, ...]] = set()
    for key in denoisers:
        backend.parts[key].register_forward_pre_hook(
            lambda *_: there.add(tuple(backend.offload.components[key].space is not None for key in denoisers))
        )
    params = asked(image_path=pictures[:1], guidance_scale=3.5)
    assert np.array_equal(engine.run(params).outputs[0].frames, resident.run(params).outputs[0].frames)
    assert there == {(True, False), (False, True)}


# -- determinism and files ----------------------------------------------------------


def test_a_clip_does_not_depend_on_its_neighbours_and_replays_are_equal(tiny: Tiny) -> None:
    engine = Engine.load(ServerArgs(model_path=str(tiny("wan")), device="cpu"))
    alone = engine.run(asked(seed=4)).outputs[0].frames
    both = engine.run(asked(seed=3, num_outputs_per_prompt=2))
    assert alone is not None and alone.shape == (9, 64, 96, 3)
    assert np.array_equal(both.outputs[1].frames, alone)
    again = engine.run(asked(seed=4))
    assert np.array_equal(again.outputs[0].frames, alone)
    denoising = again.report.effective["cuda_graph"]["denoising"]
    assert denoising["replays"] == 4 and denoising["captures"] == 0


def test_a_picture_is_encoded_as_this_request_says_and_not_the_last(tiny: Tiny, pictures: list[str]) -> None:
    tiles = {"tile_sample_min_height": 64, "tile_sample_min_width": 64}
    engine = Engine.load(ServerArgs(model_path=str(tiny("wan22_i2v")), device="cpu", vae_config=tiles))
    params = asked(image_path=pictures[:1], height=128, width=160, num_frames=5)
    first = engine.run(params).outputs[0].frames
    engine.backend.parts["vae"].tiling = True  # type: ignore[union-attr] # as a larger request leaves it
    assert np.array_equal(engine.run(params).outputs[0].frames, first)


def test_frames_come_in_chunks_while_later_ones_are_to_be_decoded(tiny: Tiny) -> None:
    engine = Engine.load(ServerArgs(model_path=str(tiny("wan")), device="cpu"))
    backend = engine.backend
    assert isinstance(backend, NativePipeline)
    events = list(backend.run(backend.prepare(_request(engine, asked())), Stopwatch(engine.device)))
    assert [len(e.pixels[0]) for e in events if isinstance(e, Drawn)] == [1, 4, 4]
    assert [e.step for e in events if isinstance(e, StepDone)] == [1, 2, 3, 4]


@pytest.mark.parametrize("room", [100_000, 3_000])
def test_a_clip_that_cannot_be_written_leaves_its_latents(tiny: Tiny, tmp_path: Path, room: int) -> None:
    engine = Engine.load(ServerArgs(model_path=str(tiny("wan")), device="cpu"))
    params = asked(save_output=True, output_path=str(tmp_path), output_file_name="a.mp4", return_frames=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(RunFailure, match=r"a\.(npy|mp4) cannot be written: File too large") as failure:
            engine.run(params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = tmp_path / "a.latents.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ([kept.name] if room == 100_000 else [])
    assert ("--resume-latents" if room == 100_000 else "latents.safetensors cannot be written") in str(failure.value)
    if kept.exists():
        given = {"output_path": str(tmp_path), "return_frames": True, "output_file_name": "b.mp4"}
        engine.run(SamplingParams(resume_latents=str(kept), **given))
        engine.run(params)
        assert (tmp_path / "b.npy").read_bytes() == (tmp_path / "a.npy").read_bytes()


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_a_clip_reaches_its_file(tiny: Tiny, tmp_path: Path, suffix: str) -> None:
    arguments = ["--prompt", PROMPT, "--height", "64", "--width", "96", "--num-frames", "9", "--return-frames",
                 "--num-inference-steps", "2", "--max-sequence-length", "24"]  # fmt: skip
    where = ["--output-path", tmp_path, "--output-file-name", f"clip{suffix}"]
    done = sglang("generate", "--model-path", tiny("wan"), "--device", "cpu", *arguments, *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["clip.npy", f"clip{suffix}"])
    raw = np.load(tmp_path / "clip.npy")
    with av.open(str(tmp_path / f"clip{suffix}")) as container:
        stream = container.streams.video[0]
        # the model's own frame rate, which a GIF holds in hundredths of a second
        assert float(stream.average_rate or 0) == pytest.approx(16, rel=0.05)
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    assert raw.shape == frames.shape == (9, 64, 96, 3)
    assert np.abs(frames.astype(float) - raw).mean() < 14, "what codecs lose on the noise of random weights"


def test_a_decode_that_fails_leaves_the_latents_and_no_half_clip(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(ServerArgs(model_path=str(tiny("wan")), device="cpu"))
    saved = {"save_output": True, "output_path": str(tmp_path), "output_file_name": "clip.mp4"}
    family = engine.backend.family  # type: ignore[union-attr]
    decode = family.decode

    def stops(*arguments: Any) -> Any:
        chunks = decode(*arguments)
        yield next(chunks)
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(family, "decode", stops)
    with pytest.raises(RunFailure, match="finished latents are kept"):
        engine.run(asked(**saved))
    assert [p.name for p in tmp_path.iterdir()] == ["clip.latents.safetensors"]
    monkeypatch.undo()
    resumed = engine.run(SamplingParams(resume_latents=str(tmp_path / "clip.latents.safetensors"), save_output=False))
    assert np.array_equal(resumed.outputs[0].frames, engine.run(asked()).outputs[0].frames)


# -- memory -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "sampling"),
    [
        ("wan", 0, {}),
        ("wan_i2v", 1, WITH_IMAGE_ENCODER),
        ("wan22", 0, {}),
        ("wan22_i2v", 2, {}),
        ("wan22_ti2v", 1, {}),
    ],
)
def test_prediction_is_what_a_run_holds(
    tiny: Tiny, pictures: list[str], name: str, given: int, sampling: dict[str, Any]
) -> None:
    engine = Engine.load(ServerArgs(model_path=str(tiny(name)), device="cpu"))
    report = engine.run(asked(measure_memory=True, image_path=pictures[:given], **sampling)).report
    assert report.memory is not None
    stages = {stage.name: stage for stage in report.memory.stages}
    assert ("picture_encoding" in stages) == bool(given)
    for stage in stages.values():
        assert stage.measured_mb is not None
        assert stage.predicted_mb == pytest.approx(stage.measured_mb, rel=0.02), stage


def test_a_batch_takes_at_most_what_was_predicted(tiny: Tiny) -> None:
    """Whether its results can be computed together is not known before: that takes more than one by one."""
    engine = Engine.load(ServerArgs(model_path=str(tiny("wan")), device="cpu"))
    memory = engine.run(asked(measure_memory=True, num_outputs_per_prompt=2)).report.memory
    assert memory is not None
    for stage in memory.stages:
        assert stage.measured_mb is not None
        assert 0.85 * stage.predicted_mb < stage.measured_mb < 1.02 * stage.predicted_mb, stage


@pytest.mark.parametrize(("name", "given"), [("wan", 0), ("wan22_ti2v", 1)])
def test_prediction_of_tiles_is_what_they_hold(tiny: Tiny, pictures: list[str], name: str, given: int) -> None:
    engine = Engine.load(ServerArgs(model_path=str(tiny(name)), device="cpu", **TILED))
    params = asked(measure_memory=True, image_path=pictures[:given], height=128, width=160, num_inference_steps=1)
    memory = engine.run(params).report.memory
    assert memory is not None and memory.decode == "tiles"
    for stage in memory.stages:
        assert stage.predicted_mb == pytest.approx(stage.measured_mb, rel=0.02), stage


@pytest.mark.parametrize(("name", "seen"), [("wan", 0), ("wan_i2v", 1), ("wan_flf2v", 2), ("wan22_ti2v", 0)])
def test_a_model_is_planned_for_before_there_is_a_request(tiny: Tiny, name: str, seen: int) -> None:
    """As a GPU's choice of offload does; and an autoencoder has an encoder only where there are pictures."""
    model = resolve(ServerArgs(model_path=str(tiny(name)), device="cpu"))
    assert model.memory is not None
    rehearsal = model.memory.rehearsal
    work = rehearsal.usual_workload(replace(rehearsal.blueprint.defaults, height=64, width=96, num_frames=5))
    assert work.negative and len(work.seen) == seen
    assert rehearsal.activations(work, False)["decoding"] > 0
    assert hasattr(rehearsal.parts["vae"], "encoder") == (name != "wan")


# -- mistakes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sampling", "message"),
    [
        ("wan", {"num_frames": 10}, r"num_frames=10: must be 4 k \+ 1; nearest: 9 or 13"),
        ("wan", {"height": 40}, "height=40: must be a multiple of 16; nearest: 32 or 48"),
        ("wan22_ti2v", {"width": 48}, "width=48: must be a multiple of 32; nearest: 32 or 64"),
        ("wan", {"image_path": ["x.png"]}, "image_path: 1 given; this checkpoint takes 0"),
        ("wan_i2v", {}, "image_path: 0 given; this checkpoint takes 1"),
        ("wan_flf2v", {"image_path": ["x.png"]}, "image_path: 1 given; this checkpoint takes 2"),
        ("wan22_i2v", {}, "image_path: 0 given; this checkpoint takes 1 or 2"),
        ("wan22_ti2v", {"image_path": ["missing.png"]}, "image_path=missing.png: not a readable picture"),
        ("wan", {"guidance_scale_2": 2.0}, "guidance_scale_2=2.0: this checkpoint has one denoiser"),
        ("wan", {"true_cfg_scale": 2.0}, "true_cfg_scale=2.0: this model's is called guidance_scale"),
        (
            "wan",
            {"guidance_scale": 1.0, "negative_prompt": "x"},
            "negative_prompt: has no effect with guidance_scale=1",
        ),
        ("wan", {"max_sequence_length": 600}, "max_sequence_length=600: at most 512"),
        ("wan", {"max_sequence_length": 2}, "this would be lost"),
        ("flux", {"num_frames": 5}, "num_frames=5: this model draws pictures"),
        ("flux", {"image_path": ["x.png"]}, "image_path: 1 given; this model draws from text alone"),
        ("flux", {"flow_shift": 2.0}, "flow_shift=2.0: no effect"),
    ],
)
def test_a_mistake_is_one_line(tiny: Tiny, name: str, sampling: dict[str, Any], message: str) -> None:
    engine = Engine.load(ServerArgs(model_path=str(tiny(name)), device="cpu"))
    frames = {} if name != "flux" else {"num_frames": None}
    with pytest.raises(UserError, match=message):
        engine.run(asked(**{**frames, **sampling}))
