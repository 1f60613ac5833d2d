"""What a run leaves behind: its report, its files, and the tools that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sgl_diffusion.cli.main import main
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.output import CLIPS, Output, plan_outputs, read_metadata, request_digest, save, save_frames
from sgl_diffusion.runtime.report import Report
from sgl_diffusion.runtime.request import Request, resolve_request
from sgl_diffusion.runtime.trace import Stopwatch

CPU = torch.device("cpu")


def request(**sampling: Any) -> Request:
    return resolve_request(SamplingParams(**{"prompt": "A Café, 50% off!", **sampling}), {}, ServerArgs())


def output(*, frames: int = 0, height: int = 32, width: int = 48) -> Output:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (max(frames, 1), height // 8, width // 8, 3), dtype=np.uint8)
    pixels = pixels.repeat(8, 1).repeat(8, 2)
    if frames:
        return Output("a", 1, 0, None, pixels, 8)
    return Output("a", 1, 0, Image.fromarray(pixels[0]), None, None)


# -- names --------------------------------------------------------------------------------


def names(folder: Path, *, is_video: bool = False, **sampling: Any) -> list[str]:
    params = SamplingParams(**{"prompt": "a", "output_path": str(folder), **sampling})
    return [p.name for p in plan_outputs(params, resolve_request(params, {}, ServerArgs()), is_video=is_video)]


def test_names_follow_what_was_asked_for(tmp_path: Path) -> None:
    assert names(tmp_path, output_file_name="a.jpg") == ["a.jpg"]
    assert names(tmp_path, output_file_name="a", num_outputs_per_prompt=3) == ["a_0.png", "a_1.png", "a_2.png"]
    assert names(tmp_path, output_file_name="v1.5") == ["v1.5.png"]
    assert names(tmp_path, output_file_name="a", is_video=True) == ["a.mp4"]
    assert names(tmp_path, output_file_name="A curious raccoon.mp4", is_video=True) == ["A curious raccoon.mp4"]
    (default,) = names(tmp_path, prompt="A Café, 50% off!")
    assert default.startswith("A-Cafe-50-off_") and default.endswith(".png") and default.isascii()


@pytest.mark.parametrize(
    ("sampling", "is_video", "told"),
    [
        ({"output_file_name": "a/b.png"}, False, "must not hold a folder"),
        ({"output_file_name": "a.mp4"}, False, "a picture is written as one of .png, .jpg, .jpeg, .webp"),
        ({"output_file_name": "a.png"}, True, "a video is written as one of .mp4"),
        ({"output_quality": 50}, False, "output_quality=50: .png has no quality; use one of .jpg, .jpeg, .webp"),
        ({"save_output": False, "output_file_name": "a"}, False, "output_file_name=a: has no effect"),
        ({"save_output": False, "output_quality": 9}, False, "output_quality=9: has no effect"),
    ],
)
def test_names_that_cannot_be_written(tmp_path: Path, sampling: dict[str, Any], is_video: bool, told: str) -> None:
    with pytest.raises(UserError, match=told):
        names(tmp_path, is_video=is_video, **sampling)


def test_digests_tell_requests_apart() -> None:
    digests = {
        request_digest(request(**change), 0)
        for change in ({}, {"seed": 1}, {"height": 64}, {"negative_prompt": "x"}, {"diffusers_kwargs": {"eta": 1}})
    }
    digests.add(
        request_digest(resolve_request(SamplingParams(prompt="A Café, 50% off!"), {}, ServerArgs(precision="bf16")), 0)
    )
    assert len(digests) == 6
    assert request_digest(request(), 0) == request_digest(request(output_path="elsewhere"), 0)


# -- files --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_pictures_hold_their_parameters_and_repeat_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    note = {"prompt": "naïve ☃", "seed": 3}
    for name in ("a", "b"):
        save(output(), tmp_path / f"{name}{suffix}", note, None)
    a, b = (tmp_path / f"{n}{suffix}" for n in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert read_metadata(a) == note
    drawn, original = np.asarray(Image.open(a), float), np.asarray(output().image, float)
    assert np.abs(drawn - original).mean() <= (0 if suffix == ".png" else 8)  # WebP halves the colour's resolution
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_quality_changes_the_size(tmp_path: Path) -> None:
    for quality in (10, 95):
        save(output(), tmp_path / f"{quality}.jpg", {}, quality)
    assert (tmp_path / "10.jpg").stat().st_size < (tmp_path / "95.jpg").stat().st_size


@pytest.mark.parametrize("suffix", CLIPS)
@pytest.mark.parametrize("height", [96, 72])
def test_clips_play_back(tmp_path: Path, suffix: str, height: int) -> None:
    clip = output(frames=5, height=height, width=96)
    for name in ("a", "b"):
        save(clip, tmp_path / f"{name}{suffix}", {"seed": 3}, None)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    with av.open(str(tmp_path / f"a{suffix}")) as container:
        stream = container.streams.video[0]
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
        assert round(float(stream.average_rate)) == 8
    assert clip.frames is not None and frames.shape == clip.frames.shape
    if suffix != ".gif":  # 256 colours and dithering
        assert np.abs(frames.astype(float) - clip.frames).mean() < 12
        assert read_metadata(tmp_path / f"a{suffix}") == {"seed": 3}


def test_odd_sizes_keep_every_pixel(tmp_path: Path) -> None:
    frames = np.zeros((3, 33, 47, 3), np.uint8)
    save(Output("a", 1, 0, None, frames, 8), tmp_path / "odd.mp4", {}, None)
    with av.open(str(tmp_path / "odd.mp4")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (47, 33)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    broken = Output("a", 1, 0, None, np.zeros((2, 8, 8, 4), np.uint8), 8)
    with pytest.raises(ValueError, match="channel|shape|array"):
        save(broken, tmp_path / "a.mp4", {}, None)
    assert list(tmp_path.iterdir()) == []


def test_raw_frames(tmp_path: Path) -> None:
    assert np.load(save_frames(output(), tmp_path / "p.npy")).shape == (1, 32, 48, 3)
    assert np.load(save_frames(output(frames=5), tmp_path / "c.npy")).shape == (5, 32, 48, 3)


# -- time -----------------------------------------------------------------------------------


def test_spans_nest_add_up_and_survive_failures() -> None:
    watch = Stopwatch(CPU)
    with watch.span("outer"):
        with watch.span("inner"):
            sum(range(100_000))
        with pytest.raises(KeyError), watch.span("failing"):
            raise KeyError
    with watch.span("after"):
        pass
    spans = {s.name: s for s in watch.finish()}
    assert [s.depth for s in spans.values()] == [0, 1, 1, 0]
    assert 0 < spans["inner"].duration_ms <= spans["outer"].duration_ms
    assert spans["after"].start_ms >= spans["outer"].start_ms + spans["outer"].duration_ms


# -- reports and `sglang perf` ------------------------------------------------------------------


@pytest.fixture
def reports(tmp_path: Path, tiny: Callable[[str], Path]) -> tuple[Path, Path]:
    """A report of a real run, and the same run with every step a quarter slower."""
    from sgl_diffusion.runtime.engine import Engine

    fast, slow = tmp_path / "fast.json", tmp_path / "slow.json"
    engine = Engine.load(ServerArgs(model_path=str(tiny("flux")), device="cpu"))
    engine.run(
        SamplingParams(
            prompt="a",
            height=32,
            width=32,
            num_inference_steps=3,
            save_output=False,
            perf_dump_path=str(fast),
            max_sequence_length=16,
        )  # fmt: skip
    )
    report = Report.read(fast)
    for step in report.denoise_steps_ms:
        step.duration_ms *= 1.25
    report.total_duration_ms *= 1.25
    report.write(slow)
    return fast, slow


def test_a_report_has_the_keys_other_tools_read(reports: tuple[Path, Path]) -> None:
    raw = json.loads(reports[0].read_text())
    assert list(raw)[:9] == [
        "timestamp", "request_id", "commit_hash", "tag", "total_duration_ms", "steps", "denoise_steps_ms",
        "memory_checkpoints", "meta",
    ]  # fmt: skip
    assert set(raw["steps"][0]) == {"name", "duration_ms"}
    assert set(raw["denoise_steps_ms"][0]) == {"step", "duration_ms"}
    assert raw["memory_checkpoints"]["after_forward"]["peak_host_mb"] > 0
    assert raw["meta"]["prompt"] == ["a"] and raw["versions"]["torch"] == torch.__version__
    stages = sum(s["duration_ms"] for s in raw["steps"])
    assert 0.5 * raw["total_duration_ms"] < stages <= raw["total_duration_ms"]


def test_compare_judges_by_the_median_step(reports: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow = map(str, reports)
    assert main(["perf", "compare", fast, slow]) == 0
    assert "1.250" in capsys.readouterr().out
    assert main(["perf", "compare", fast, slow, "--fail-over", "5%"]) == 1
    assert main(["perf", "compare", fast, slow, "--fail-over", "0.3"]) == 0
    assert main(["perf", "compare", slow, fast, "--fail-over", "0%"]) == 0
    assert main(["perf", "show", fast]) == 0
    assert "denoising" in capsys.readouterr().out


def test_timelines_show_every_stage(reports: tuple[Path, Path], tmp_path: Path) -> None:
    fast, slow = map(str, reports)
    assert main(["perf", "compare", fast, slow, "--plot", str(tmp_path / "t.html")]) == 0
    page = (tmp_path / "t.html").read_text()
    assert (
        page.count("<rect") == 2 * (4 + 3 + 4)
        and "step 2: " in page
        and "http" not in page.replace("http://www.w3.org", "")
    )
    assert main(["perf", "show", fast, "--plot", str(tmp_path / "t.png")]) == 0
    with Image.open(tmp_path / "t.png") as picture:
        assert len(set(picture.convert("RGB").getdata())) > 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["compare", "fast.json"], "needs two reports"),
        (["compare", "fast.json", "none.json"], "none.json: cannot be read"),
        (["compare", "fast.json", "broken.json"], "broken.json: not a perf dump"),
        (["compare", "fast.json", "slow.json", "--fail-over", "x"], "fail_over=x: expected a share"),
        (["show", "fast.json", "--plot", "t.svg"], "plot=t.svg: expected a .png or .html file"),
        (["show", "fast.json", "--plot", "none/t.png"], "the folder none does not exist"),
        ([], "show|compare"),
    ],
)
def test_perf_mistakes(
    reports: tuple[Path, Path],
    words: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(reports[0].parent)
    Path("broken.json").write_text('{"timestamp": 1}')
    assert main(["perf", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
