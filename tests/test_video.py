"""Clips as players meet them: what is decoded is what was written, and how the file comes about."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.output import read_metadata
from sgl_diffusion.runtime.video import CHUNKS_AHEAD, CLIPS, FORMATS, ClipWriter, Frames, crf, frames_file

ROOT = Path(__file__).parents[1]
CODECS = {".mp4": "h264", ".mkv": "hevc", ".webm": "vp9", ".gif": "gif"}


def natural(frames: int, height: int, width: int) -> Frames:
    """Moving shapes with texture, brighter and darker rather than of changing colour, as in a film."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    texture = rng.normal(size=(height, width, 1)).astype(np.float32)
    for axis in (0, 1):
        texture = (np.roll(texture, 1, axis) + texture + np.roll(texture, -1, axis)) / 3
    clip = []
    for f in range(frames):
        shade = np.stack([120 + 80 * np.sin(x / 47 + f / 9 + c / 2) * np.cos(y / 61) for c in range(3)], -1)
        clip.append(np.clip(shade + 30 * np.roll(texture, (f, 2 * f), (0, 1)), 0, 255).astype(np.uint8))
    return np.stack(clip)


def noise(frames: int, height: int, width: int) -> Frames:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def write(path: Path, frames: Frames, *, fps: int = 16, chunk: int = 4, **settings: Any) -> Path:
    settings = {"metadata": {}, **settings}
    with ClipWriter(path, size=(frames.shape[1], frames.shape[2]), fps=fps, **settings) as clip:
        for start in range(0, len(frames), chunk):
            clip.write(frames[start : start + chunk])
    return path


def read(path: Path) -> Frames:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def psnr(a: Frames, b: Frames) -> float:
    return float(10 * np.log10(255**2 / ((a.astype(np.float64) - b) ** 2).mean()))


# -- what is in the file ----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", CLIPS)
@pytest.mark.parametrize("fps", [16, 24])
def test_frames_time_and_parameters_come_back(tmp_path: Path, suffix: str, fps: int) -> None:
    frames = natural(17, 120, 208)
    path = write(tmp_path / f"a{suffix}", frames, fps=fps, metadata={"prompt": "naïve ☃", "seed": 3})
    assert read_metadata(path) == {"prompt": "naïve ☃", "seed": 3}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name.startswith(CODECS[suffix])
        times = [f.time for f in container.decode(stream)]
        resolution = {".mp4": 0, ".gif": 0.005}.get(suffix, 0.0005)  # the others count in 1/1000 s, GIF in 1/100
        assert np.abs(np.array(times) - np.arange(17) / fps).max() <= resolution + 1e-6
        assert container.duration is not None and abs(container.duration / 1e6 - 17 / fps) <= 2 * resolution + 1e-6
        if suffix != ".gif":
            assert stream.average_rate == fps
    decoded = read(path)
    assert decoded.shape == frames.shape
    assert psnr(decoded, frames) > (32 if suffix == ".gif" else 36)
    assert psnr(decoded[1:], frames[:-1]) < 28  # in their order: a frame late would be seen


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_player_may_jump_into_the_middle(tmp_path: Path, suffix: str) -> None:
    frames = natural(49, 80, 96)
    path = write(tmp_path / f"a{suffix}", frames, fps=8)
    with av.open(str(path)) as container:
        container.seek(5_000_000)  # microseconds
        first = next(container.decode(video=0))
        assert first.time is not None and 3 <= first.time <= 5  # the key frame before it, at most 2 s back
        assert psnr(first.to_ndarray(format="rgb24"), frames[round(first.time * 8)]) > 34


def test_an_mp4_plays_while_it_is_loaded_and_everywhere(tmp_path: Path) -> None:
    for quality in (None, 100):
        path = write(tmp_path / f"{quality}.mp4", natural(5, 64, 96), quality=quality)
        data = path.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.pix_fmt == "yuv420p" and stream.profile == "High"  # not the lossless one


@pytest.mark.parametrize("suffix", FORMATS)
def test_colours_are_those_that_the_file_says(tmp_path: Path, suffix: str) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (6, 80, 96, 3)).copy()
    path = write(tmp_path / f"a{suffix}", frames, quality=95)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (1, 1)  # BT.709, limited
    assert np.abs(read(path)[:, 40, 48].astype(int) - colours).max() <= 4


@pytest.mark.parametrize(("suffix", "kept"), [(".mp4", "yuv444p"), (".mkv", "yuv444p"), (".webm", "yuv420p")])
def test_odd_sizes_keep_every_pixel(tmp_path: Path, suffix: str, kept: str) -> None:
    frames = natural(5, 81, 97)
    frames[:, -1], frames[:, :, -1] = 230, 20  # an edge that scaling, cutting or padding would move
    path = write(tmp_path / f"a{suffix}", frames, quality=95)
    with av.open(str(path)) as container:
        assert container.streams.video[0].pix_fmt == kept
    decoded = read(path)
    assert decoded.shape == frames.shape
    assert np.abs(decoded[:, :, -1].astype(int) - frames[:, :, -1]).mean() < 12 and psnr(decoded, frames) > 32


def test_frames_that_do_not_change_are_still_frames(tmp_path: Path) -> None:
    frames = np.full((9, 80, 96, 3), 90, np.uint8)
    assert all(len(read(write(tmp_path / f"a{suffix}", frames))) == 9 for suffix in CLIPS)


@pytest.mark.parametrize("suffix", FORMATS)
def test_quality_trades_size_for_likeness(tmp_path: Path, suffix: str) -> None:
    frames = natural(9, 80, 128)
    paths = [write(tmp_path / f"{q}{suffix}", frames, quality=q) for q in (20, 75, 95)]
    sizes, likeness = [p.stat().st_size for p in paths], [psnr(read(p), frames) for p in paths]
    assert sizes == sorted(set(sizes)) and likeness == sorted(set(likeness))
    assert write(tmp_path / f"default{suffix}", frames).read_bytes() == paths[1].read_bytes()


def test_the_table_of_qualities() -> None:
    told = dict(re.findall(r"^ *(quality|H\.264/5|VP9) +([\d ]+)$", crf.__doc__ or "", re.MULTILINE))
    columns = {name: [int(number) for number in row.split()] for name, row in told.items()}
    assert columns["H.264/5"] == [crf(quality, 51) for quality in columns["quality"]]
    assert columns["VP9"] == [crf(quality, 63) for quality in columns["quality"]]


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="no ffprobe on this machine")
@pytest.mark.parametrize("suffix", CLIPS)
def test_ffprobe_agrees(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", natural(9, 80, 96), fps=8)
    asked = ["ffprobe", "-v", "error", "-count_frames", "-show_streams", "-of", "json", str(path)]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    (stream,) = json.loads(done.stdout)["streams"]
    assert done.stderr == "" and stream["codec_name"] == CODECS[suffix]
    assert (stream["width"], stream["height"], int(stream["nb_read_frames"])) == (96, 80, 9)
    assert suffix == ".gif" or Fraction(stream["avg_frame_rate"]) == 8


def test_the_content_is_that_of_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    from diffusers.utils import export_to_video

    frames = natural(9, 96, 160)
    export_to_video([f / 255 for f in frames], str(tmp_path / "theirs.mp4"), fps=16)
    theirs, ours = read(tmp_path / "theirs.mp4"), read(write(tmp_path / "ours.mp4", frames))
    assert theirs.shape == ours.shape and psnr(theirs, ours) > 30
    assert psnr(ours, frames) > psnr(theirs, frames)


# -- the same bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", CLIPS)
def test_chunks_do_not_show(tmp_path: Path, suffix: str) -> None:
    frames = natural(13, 80, 96)
    files = {write(tmp_path / f"{chunk}{suffix}", frames, chunk=chunk).read_bytes() for chunk in (1, 4, 13)}
    assert len(files) == 1


def test_what_is_in_memory_and_how_many_cores_there_are_do_not_show(tmp_path: Path) -> None:
    """Encoders have read memory that they had not written: fresh processes, whose memory holds something else."""
    script = """
import os, sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from test_video import FORMATS, noise, write
if sys.argv[3] == "one":
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
for suffix in FORMATS:
    write(Path(sys.argv[1]) / f"a{suffix}", noise(9, 30, 52).repeat(8, 1).repeat(8, 2))
"""
    found = []
    for perturb, cores in (("0", "all"), ("170", "one")):
        folder = tmp_path / perturb
        folder.mkdir()
        words = [sys.executable, "-c", script, str(folder), str(Path(__file__).parent), cores]
        subprocess.run(words, env={**os.environ, "MALLOC_PERTURB_": perturb}, check=True, cwd=ROOT)
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0].keys() == {f"a{suffix}" for suffix in FORMATS}
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


# -- how it is written ----------------------------------------------------------------------------


class Gated(np.ndarray[Any, np.dtype[np.uint8]]):
    """Frames that an encoder gets only once `open` is set."""

    open: threading.Event

    def __iter__(self) -> Iterator[Any]:
        assert self.open.wait(20), "nobody opened"
        return iter(np.asarray(self))


def test_encoding_happens_beside_the_caller(tmp_path: Path) -> None:
    frames = natural(4, 80, 96)
    gated = frames.view(Gated)
    gated.open = threading.Event()
    with ClipWriter(tmp_path / "a.mp4", size=(80, 96), fps=8, metadata={}) as clip:
        clip.write(gated)  # returns, though not a frame can be encoded
        gated.open.set()
    assert len(read(tmp_path / "a.mp4")) == 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encoder")]


@pytest.mark.parametrize("suffix", CLIPS)
def test_memory_holds_a_few_chunks(tmp_path: Path, suffix: str) -> None:
    chunks: list[weakref.ref[Frames]] = []
    with ClipWriter(tmp_path / f"a{suffix}", size=(80, 96), fps=8, metadata={}) as clip:
        for i in range(40):
            chunk = np.full((4, 80, 96, 3), i, np.uint8)
            chunks.append(weakref.ref(chunk))
            clip.write(chunk)
            assert sum(one() is not None for one in chunks) <= CHUNKS_AHEAD + 1


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", CLIPS)
@pytest.mark.parametrize("size", [100, 60_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, suffix: str, size: int) -> None:
    with disk_of(size), pytest.raises(RunFailure, match=rf"a\{suffix} cannot be written: File too large"):
        write(tmp_path / f"a{suffix}", noise(24, 120, 160))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_encoder_is_told_at_a_later_write(tmp_path: Path) -> None:
    written = 0
    with disk_of(1000), pytest.raises(RunFailure, match=r"a\.gif cannot be written: File too large"):  # noqa: SIM117
        with ClipWriter(tmp_path / "a.gif", size=(80, 96), fps=8, metadata={}) as clip:
            for _ in range(1000):
                clip.write(noise(2, 80, 96))
                written += 1
    assert 0 < written <= CHUNKS_AHEAD


@pytest.mark.parametrize("suffix", CLIPS)
@pytest.mark.parametrize("error", [KeyError, OSError])
def test_an_error_of_the_caller_stays_what_it_is_and_leaves_nothing(
    tmp_path: Path, suffix: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match="the decoder's own"):  # noqa: SIM117
        with ClipWriter(tmp_path / f"a{suffix}", size=(80, 96), fps=8, metadata={}) as clip:
            clip.write(natural(8, 80, 96))
            raise error("the decoder's own")
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("encoder")]


def test_a_file_of_that_name_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("the old one")
    with ClipWriter(path, size=(80, 96), fps=8, metadata={}) as clip:
        clip.write(natural(4, 80, 96))
        assert path.read_text() == "the old one"
    assert len(read(path)) == 4


@pytest.mark.parametrize("frames", [np.zeros((2, 80, 96, 4), np.uint8), np.zeros((2, 80, 96, 3), np.float32),
                                    np.zeros((80, 96, 3), np.uint8), np.zeros((2, 96, 80, 3), np.uint8)])  # fmt: skip
def test_what_are_not_frames_of_the_clip_is_refused(tmp_path: Path, frames: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a uint8 array of shape \(F, 80, 96, 3\)"):  # noqa: SIM117
        with ClipWriter(tmp_path / "a.mp4", size=(80, 96), fps=8, metadata={}) as clip:
            clip.write(frames)
    assert list(tmp_path.iterdir()) == []


def test_a_clip_without_frames_is_refused(tmp_path: Path) -> None:
    for suffix in CLIPS:
        with pytest.raises(ValueError, match="no frames"):  # noqa: SIM117
            with ClipWriter(tmp_path / f"a{suffix}", size=(80, 96), fps=8, metadata={}):
                pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "size", "fps", "told"), [
    ("a.mkv", (64, 96), 8, "output_file_name=a.mkv: .mkv takes frames from 65 pixels a side on"),
    ("a.gif", (64, 96), 51, "fps=51: .gif shows at most 50 frames a second"),
])  # fmt: skip
def test_what_a_format_cannot_hold_is_told_at_once(tmp_path: Path, name: str, size: Any, fps: int, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        ClipWriter(tmp_path / name, size=size, fps=fps, metadata={})


# -- raw frames -----------------------------------------------------------------------------------


def test_raw_frames_are_what_numpy_would_write(tmp_path: Path) -> None:
    frames = noise(123, 6, 10)
    np.save(tmp_path / "theirs.npy", frames)
    with frames_file(tmp_path / "ours.npy") as add:
        for start in range(0, 123, 4):
            add(frames[start : start + 4, :, :])
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


def test_raw_frames_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    def too_much(add: Callable[[Frames], None]) -> None:
        for _ in range(9):
            add(noise(4, 80, 96))

    def of_another_size(add: Callable[[Frames], None]) -> None:
        add(noise(1, 80, 96))
        add(noise(1, 96, 80))

    with disk_of(10_000), pytest.raises(RunFailure, match=r"a\.npy cannot be written: File too large"):  # noqa: SIM117
        with frames_file(tmp_path / "a.npy") as add:
            too_much(add)
    with pytest.raises(ValueError, match="one size"), frames_file(tmp_path / "a.npy") as add:
        of_another_size(add)
    assert list(tmp_path.iterdir()) == []
