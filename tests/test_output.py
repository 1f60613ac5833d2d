"""Files of results at their edges: names that fail early, what a file tells about itself, what a failure leaves."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.output import CLIPS, PICTURES, Output, plan_outputs, read_metadata, request_digest, save
from sgl_diffusion.runtime.request import Request, resolve_request

FRAMES = np.random.default_rng(0).integers(0, 255, (7, 5, 6, 3), np.uint8).repeat(16, 1).repeat(16, 2)
PICTURE = Output("a", 1, 0, Image.fromarray(FRAMES[0]), None, None)
CLIP = Output("a", 1, 0, None, FRAMES, 24)


def plan(folder: Path, *, is_video: bool = False, **sampling: Any) -> tuple[Path, Request]:
    """The first planned path, and the request it is for."""
    params = SamplingParams(**{"prompt": "a", "output_path": str(folder), **sampling})
    request = resolve_request(params, {}, ServerArgs())
    return plan_outputs(params, request, is_video=is_video)[0], request


# -- found before the work ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ({"output_file_name": "x" * 252 + ".png"}, "expected at most 255 bytes"),
        ({"output_file_name": "é" * 126 + ".png"}, "expected at most 255 bytes"),
        ({"output_file_name": "x" * 250 + ".png", "num_outputs_per_prompt": 2}, "expected at most 255 bytes"),
        ({"output_file_name": "a\0.png"}, "none of them null"),
        ({"output_path": "a\0"}, "output_path=a\0: cannot be written"),
        ({"output_path": "x" * 300}, "cannot be written: File name too long"),
        ({"output_file_name": "a.jpg", "prompt": "猫" * 31_000}, "too long to be kept inside a .jpg file"),
        ({"output_file_name": "a.gif", "fps": 60, "is_video": True}, "fps=60: .gif shows at most 50 frames a second"),
        (
            {"output_file_name": "a.mkv", "width": 64, "is_video": True},
            "a.mkv: .mkv takes frames from 65 pixels a side",
        ),
    ],
)
def test_what_the_disk_or_the_format_refuses(tmp_path: Path, sampling: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan(tmp_path, **sampling)


def test_the_longest_name_and_the_longest_jpeg_prompt_are_written(tmp_path: Path) -> None:
    path, _ = plan(tmp_path, output_file_name="x" * 251 + ".png")
    save(PICTURE, path, {}, None)
    prompt = "猫" * 29_000
    path, _ = plan(tmp_path, output_file_name="a.jpg", prompt=prompt)
    save(PICTURE, path, {"prompt": prompt}, None)
    assert read_metadata(path) == {"prompt": prompt}


@pytest.mark.parametrize("suffix", [*PICTURES, *CLIPS])
def test_the_same_request_may_replace_its_file_and_no_other_may(tmp_path: Path, suffix: str) -> None:
    is_video = suffix in CLIPS
    path, request = plan(tmp_path, is_video=is_video, output_file_name="a" + suffix)
    save(CLIP if is_video else PICTURE, path, {"digest": request_digest(request, 0)}, None)
    assert plan(tmp_path, is_video=is_video, output_file_name="a" + suffix)[0] == path
    with pytest.raises(UserError, match=f"a{suffix} holds another run"):
        plan(tmp_path, is_video=is_video, output_file_name="a" + suffix, seed=7)


def test_raw_frames_of_something_else_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text("precious")
    with pytest.raises(UserError, match=r"a\.npy exists already"):
        plan(tmp_path, output_file_name="a.png", return_frames=True)
    assert plan(tmp_path, output_file_name="a.png")[0].name == "a.png"


# -- what is inside ---------------------------------------------------------------------------


def test_a_png_tells_its_parameters_to_viewers(tmp_path: Path) -> None:
    metadata = {"prompt": "a cat", "negative_prompt": "dogs", "seed": 3, "num_inference_steps": 4, "model": "m"}
    save(PICTURE, tmp_path / "a.png", metadata, None)
    with Image.open(tmp_path / "a.png") as picture:
        shown = picture.info["parameters"]
    assert shown == "a cat\nNegative prompt: dogs\nSteps: 4, Seed: 3, Size: 96x80, Model: m"


def test_gifs_keep_colours_time_and_parameters(tmp_path: Path) -> None:
    save(CLIP, tmp_path / "a.gif", {"prompt": "naïve ☃"}, None)
    assert read_metadata(tmp_path / "a.gif") == {"prompt": "naïve ☃"}
    with av.open(str(tmp_path / "a.gif")) as container:
        frames = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    assert np.array_equal(np.stack([pixels for _, pixels in frames]), FRAMES)
    assert [round(time * 100) for time, _ in frames] == [0, 4, 8, 12, 17, 21, 25]  # 1/24 s, to the nearest 1/100


# -- how it gets there --------------------------------------------------------------------------


def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save(PICTURE, tmp_path / "a.png", {}, None)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunFailure, match=r"a\.png cannot be written: No space left on device"):
        save(PICTURE, tmp_path / "a.png", {}, None)
    assert list(tmp_path.iterdir()) == []
