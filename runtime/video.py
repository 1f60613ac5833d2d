"""Clips -> files, chunk by chunk: what is held at a time is a chunk or two, however long the clip.

with ClipWriter(path, size=(480, 832), fps=16, metadata=metadata) as clip:
    for frames in chunks:  # uint8 (F, H, W, 3), as the decoder makes them
        clip.write(frames)
"""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from struct import pack
from types import TracebackType
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.files import whole

Frames = NDArray[np.uint8]  # (F, H, W, 3) RGB
Write = Callable[[Frames], None]


@dataclass(frozen=True)
class Format:
    """How FFmpeg writes the clips of one suffix."""

    codec: str
    worst_crf: int
    options: Mapping[str, str]
    container: Mapping[str, str] = field(default_factory=dict)
    takes_odd_sizes: bool = False  # with colours at half the resolution
    smallest: int = 1  # pixels of a side


# One codec a suffix, at a pace that keeps up with a decoder on a GPU. The same frames have to give the same bytes: a
# fixed number of threads everywhere; x264's mbtree reads memory that nobody wrote (its results differ by a few bytes),
# and so does all of x265 when one 64 x 64 block covers the frame.
FORMATS = {
    ".mp4": Format("libx264", 51, {"preset": "fast", "x264-params": "mbtree=0"}, {"movflags": "+faststart"}),
    ".mkv": Format(
        "libx265", 51, {"preset": "fast", "x265-params": "pools=4:frame-threads=2:info=0:log-level=none"}, smallest=65
    ),
    ".webm": Format(
        "libvpx-vp9", 63, {"b": "0", "cpu-used": "4", "row-mt": "1", "tile-columns": "2"}, takes_odd_sizes=True
    ),
}
THREADS = 4
CLIPS = (*FORMATS, ".gif")
DEFAULT_CLIP_QUALITY = 75
GIF_MAX_FPS = 50  # viewers take a shorter time than 2/100 s for a mistake, and show the frame for 1/10 s
SEEK_SECONDS = 2  # at most this far to the next frame that needs no other
CHUNKS_AHEAD = 2  # what the encoder may be behind before `write` waits for it
BT709, LIMITED_RANGE = 1, 1  # FFmpeg's numbers, the same for matrix, primaries and transfer


class ClipWriter:
    """One clip on its way into a file. The file appears whole when the block ends well, and not at all otherwise.

    A thread of its own encodes, so that it works while the next chunk is decoded. The suffix is the format: .mp4 is
    H.264, .mkv H.265, .webm VP9 and .gif a GIF with a palette for each frame. Colours are BT.709, marked as such, at
    half the resolution (4:2:0), which every player shows. Pixels are never scaled, cut or padded: H.264 and H.265 of
    an odd width or height keep colours at full resolution (4:4:4), which desktop players show and browsers do not.
    The same frames give the same bytes, however they are cut into chunks.
    """

    def __init__(
        self, path: Path, *, size: tuple[int, int], fps: int, metadata: Mapping[str, Any], quality: int | None = None
    ) -> None:
        """
        Args:
            size: height and width of the frames, pixels.
            metadata: kept inside the file as JSON; `output.read_metadata` gives it back.
            quality: 1..100, 75 unless given; see `crf`. GIF has none.
        Raises:
            UserError: a size or a rate that the format cannot hold.
        """
        check_clip(path, size, fps)
        self.path, self.size = path, size
        note = json.dumps(dict(metadata), sort_keys=True, default=str, ensure_ascii=False)
        self._encoder: Callable[[Path], AbstractContextManager[Write]]
        if path.suffix.lower() == ".gif":
            assert quality is None, "refused by plan_outputs"
            self._encoder = partial(_gif, size=size, fps=fps, note=note)
        else:
            self._encoder = partial(_video, size=size, fps=fps, note=note, quality=quality)
        self._frames = 0
        self._behind: deque[Future[None]] = deque()
        self._block = self._opened()

    def write(self, frames: Frames) -> None:
        """Adds frames, uint8 (F, H, W, 3). They are read after this returns: do not change them.

        Raises:
            RunFailure: the encoder or the disk failed on frames before these.
            ValueError: not frames of this clip.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*self.size, 3):
            raise ValueError(f"expected a uint8 array of shape (F, {self.size[0]}, {self.size[1]}, 3), "
                             f"got {frames.dtype} {frames.shape}")  # fmt: skip
        self._wait(CHUNKS_AHEAD - 1)
        self._frames += len(frames)
        self._behind.append(self._thread.submit(self._encode_all, frames))

    def _wait(self, chunks: int) -> None:
        """Until at most so many chunks are not encoded yet."""
        while len(self._behind) > chunks:
            with _failing_as(self.path):
                self._behind.popleft().result()

    def _encode_all(self, frames: Frames) -> None:
        for frame in frames:
            self._encode(frame)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        with whole(self.path) as part, _failing_as(self.path), self._encoder(part) as self._encode:
            with ThreadPoolExecutor(1, "encoder") as self._thread:
                try:
                    yield
                    self._wait(0)
                finally:
                    self._thread.shutdown(wait=False, cancel_futures=True)  # after a failure nobody wants the rest
            if not self._frames:
                raise ValueError(f"no frames were written to {self.path}")

    def __enter__(self) -> ClipWriter:
        self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._block.__exit__(None, None, None)
        else:
            with suppress(RunFailure):  # what else fails as the file is given up; `error` is what is told
                self._block.__exit__(kind, error, trace)


def check_clip(path: Path, sides: Iterable[int], fps: int | None) -> None:
    """Finds out early whether a format can hold a clip, from what is known of it.

    Raises:
        UserError: it cannot.
    """
    suffix = path.suffix.lower()
    if suffix == ".gif":
        if fps is not None and fps > GIF_MAX_FPS:
            raise UserError(f"fps={fps}: .gif shows at most {GIF_MAX_FPS} frames a second")
    elif min(sides, default=FORMATS[suffix].smallest) < FORMATS[suffix].smallest:
        raise UserError(
            f"output_file_name={path.name}: {suffix} takes frames from {FORMATS[suffix].smallest} pixels a side on"
        )


@contextmanager
def _failing_as(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, av.FFmpegError) as e:  # some of FFmpeg's errors are no OSError
        raise RunFailure(f"{path} cannot be written: {e.strerror or e}") from e


def crf(quality: int | None, worst: int) -> int:
    """The constant rate factor of a quality, from 1 to the codec's worst: a percentage of the scale.

    =======  ====  ===  ===  ===  ===  ===  ===
    quality   100   95   90   75   50   25    1
    H.264/5     1    3    5   13   26   38   50
    VP9         1    3    6   16   32   47   62
    =======  ====  ===  ===  ===  ===  ===  ===

    0 is left out: it makes H.264 a lossless profile that browsers do not play.
    """
    percent = 100 - (DEFAULT_CLIP_QUALITY if quality is None else quality)
    return max(1, round(percent / 100 * worst))


@contextmanager
def _video(path: Path, size: tuple[int, int], fps: int, note: str, quality: int | None) -> Iterator[Write]:
    """Encodes with FFmpeg. The bit-exact flags keep the build and the time out of the file."""
    form = FORMATS[path.suffix.lower()]
    height, width = size
    halves = form.takes_odd_sizes or (height % 2 == 0 and width % 2 == 0)
    with av.open(str(path), "w", container_options={"fflags": "+bitexact", **form.container}) as container:
        container.metadata["comment"] = note
        stream: Any = container.add_stream(form.codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p" if halves else "yuv444p"
        stream.thread_count = THREADS
        stream.options = {"crf": str(crf(quality, form.worst_crf)), "flags": "+bitexact", **form.options}
        codec = stream.codec_context
        codec.time_base, codec.gop_size = Fraction(1, fps), SEEK_SECONDS * fps
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = LIMITED_RANGE
        frames = 0

        def encode(frame: Frames) -> None:
            nonlocal frames
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            yuv = rgb.reformat(format=stream.pix_fmt, dst_colorspace=BT709, interpolation="BICUBIC")
            yuv.pts, yuv.time_base = frames, codec.time_base
            container.mux(stream.encode(yuv))
            frames += 1

        yield encode
        container.mux(stream.encode())


@contextmanager
def _gif(path: Path, size: tuple[int, int], fps: int, note: str) -> Iterator[Write]:
    """Pictures by Pillow, put together here: FFmpeg has no room for the parameters, Pillow holds all frames at once.

    The layout is https://www.w3.org/Graphics/GIF/spec-gif89a.txt. Each frame has a palette of its own.
    """
    height, width = size
    with path.open("wb") as file:
        file.write(b"GIF89a" + pack("<HHBBB", width, height, 0, 0, 0))
        file.write(b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")  # repeats for ever
        comment = note.encode()
        parts = [comment[i : i + 255] for i in range(0, len(comment), 255)]
        file.write(b"!\xfe" + b"".join(bytes([len(part)]) + part for part in parts) + b"\0")
        frames = 0

        def encode(frame: Frames) -> None:
            nonlocal frames
            start, frames = frames, frames + 1
            hundredths = round(frames * 100 / fps) - round(start * 100 / fps)  # no error adds up
            file.write(b"!\xf9\x04" + pack("<BHBB", 4, hundredths, 0, 0))
            file.write(_gif_image(frame))

        yield encode
        file.write(b";")


def _gif_image(frame: Frames) -> bytes:
    """A picture as an image block with a local palette, out of a GIF file of this picture alone."""
    alone = io.BytesIO()
    Image.fromarray(frame).save(alone, "GIF", interlace=False)
    data = alone.getvalue()
    screen, has_palette = 13, 0x80
    colours = data[10] & 7  # 2^(colours + 1) entries
    image = screen + 3 * 2 ** (colours + 1)
    assert data[10] & has_palette and data[image : image + 1] == b",", "Pillow puts the palette first, then the image"
    return data[image : image + 9] + bytes([has_palette | colours]) + data[screen:image] + data[image + 10 : -1]


@contextmanager
def frames_file(path: Path) -> Iterator[Write]:
    """A .npy file for raw frames. Gives what adds chunks to it, uint8 (F, H, W, 3), all of one size.

    The file holds all of them as one array, with the bytes that `np.save` would write, and appears whole or not at all.
    """
    with whole(path) as part, part.open("wb") as file:
        shape: tuple[int, ...] = ()

        def write_header() -> None:
            """NumPy pads it so that the length stays the same whatever the first axis grows to."""
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})

        def write(frames: Frames) -> None:
            nonlocal shape
            if frames.dtype != np.uint8 or frames.ndim != 4 or (shape and frames.shape[1:] != shape[1:]):
                raise ValueError(f"expected uint8 frames of one size, got {frames.dtype} {frames.shape}")
            if not shape:
                shape = (0, *frames.shape[1:])
                write_header()
            file.write(np.ascontiguousarray(frames).data)
            shape = (shape[0] + len(frames), *shape[1:])

        yield write
        write_header()
