"""Pictures and clips -> files. Names are settled before the work begins; a file appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from sgl_diffusion.runtime.args import SamplingParams
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.request import Request

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CLIPS = (".mp4", ".mkv", ".webm", ".gif")
LOSSLESS = (".png", ".gif")  # formats without a quality to choose
SLUG_LENGTH = 80
METADATA_KEY = "sgl_diffusion"
EXIF_USER_COMMENT = 0x9286
EXIF_IFD = 0x8769
DEFAULT_PICTURE_QUALITY, DEFAULT_CLIP_QUALITY = 95, 75


@dataclass(frozen=True)
class Output:
    """One result: a picture, or the frames (F, H, W, 3) of a clip."""

    prompt: str
    seed: int
    index: int
    image: Image.Image | None
    frames: NDArray[np.uint8] | None
    fps: int | None


def plan_outputs(params: SamplingParams, request: Request, *, is_video: bool) -> list[Path]:
    """File names of a request's results, in a folder that exists and can be written.

    A name the user gave is replaced only if that file holds the same request; names of our own never collide.

    Raises:
        UserError: an unwritable folder, a suffix that is not written, a file of another run.
    """
    folder = Path(params.output_path)
    name = params.output_file_name or _default_name(request)
    if Path(name).name != name:
        raise UserError(f"output_file_name={name}: must not hold a folder; use output_path for it")
    suffix = Path(name).suffix.lower()
    allowed = CLIPS if is_video else PICTURES
    if suffix not in PICTURES + CLIPS:
        name, suffix = name + allowed[0], allowed[0]
    if suffix not in allowed:
        kind = "a video" if is_video else "a picture"
        raise UserError(f"output_file_name={name}: {kind} is written as one of {', '.join(allowed)}")
    if params.output_quality is not None and suffix in LOSSLESS:
        others = ", ".join(s for s in allowed if s not in LOSSLESS)
        raise UserError(f"output_quality={params.output_quality}: {suffix} has no quality; use one of {others}")
    stem = name[: -len(suffix)]
    names = [name] if request.count == 1 else [f"{stem}_{i}{suffix}" for i in range(request.count)]
    paths = [folder / n for n in names]
    for index, path in enumerate(paths):
        if path.exists() and (read_metadata(path) or {}).get("digest") != request_digest(request, index):
            raise UserError(f"output_file_name={path.name}: {path} holds another run; choose another name")
    _make_writable(folder)
    return paths


def request_digest(request: Request, index: int) -> str:
    """Names what was asked for one result: equal requests have equal digests."""
    asked = {
        "prompt": request.prompt_of(index),
        "negative_prompt": request.negative_prompt,
        "seed": request.seeds()[index],
        "given": dict(request.given),
        "diffusers_kwargs": dict(request.diffusers_kwargs),
        "model": dict(request.model),
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _default_name(request: Request) -> str:
    ascii_prompt = unicodedata.normalize("NFKD", request.prompts[0]).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", ascii_prompt).strip("-")[:SLUG_LENGTH] or "output"
    return f"{slug}_{datetime.now():%Y%m%d-%H%M%S-%f}_{request_digest(request, 0)[:8]}"


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f"output_path={folder}: cannot be written: {e.strerror}") from e


def save(output: Output, path: Path, metadata: Mapping[str, Any], quality: int | None) -> None:
    """Writes one result in the format of the suffix, with `metadata` inside. The same input gives the same bytes.

    Args:
        quality: 1..100 for JPEG, WebP (100 is lossless there) and video; PNG and GIF have none.
    """
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    try:
        note = json.dumps(dict(metadata), sort_keys=True, default=str)
        if output.frames is not None:
            _write_clip(output.frames, output.fps or 24, Path(part), note, quality)
        else:
            assert output.image is not None
            _write_picture(output.image, Path(part), note, quality)
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)  # gone already unless something failed


def save_frames(output: Output, path: Path) -> Path:
    """Writes the raw frames, uint8 (F, H, W, 3) with F = 1 for a picture, as NumPy's .npy."""
    frames = np.asarray(output.image)[None] if output.frames is None else output.frames
    part = path.with_name(f".{path.name}")
    with part.open("wb") as file:
        np.save(file, frames)
    os.replace(part, path)
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_picture(image: Image.Image, path: Path, note: str, quality: int | None) -> None:
    suffix = path.suffix.lower()
    if suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(METADATA_KEY, note)
        image.save(path, pnginfo=info)
        return
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[EXIF_USER_COMMENT] = b"UNICODE\0" + note.encode("utf-16-be")
    quality = DEFAULT_PICTURE_QUALITY if quality is None else quality
    if suffix == ".webp":
        image.save(path, exif=exif, quality=quality, lossless=quality == 100)
    else:
        image.save(path, exif=exif, quality=quality, subsampling=0)


def _write_clip(frames: NDArray[np.uint8], fps: int, path: Path, note: str, quality: int | None) -> None:
    """Encodes frame by frame. One thread and bit-exact flags: threads and build strings would change the bytes."""
    suffix = path.suffix.lower()
    height, width = frames.shape[1:3]
    even = height % 2 == 0 and width % 2 == 0
    codec, pixels = {".gif": ("gif", "rgb8"), ".webm": ("libvpx-vp9", "yuv420p" if even else "yuv444p")}.get(
        suffix, ("libx264", "yuv420p" if even else "yuv444p")
    )
    quality = DEFAULT_CLIP_QUALITY if quality is None else quality
    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
        container.metadata["comment"] = note
        stream: Any = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.thread_count = 1
        if codec != "gif":
            crf = (
                str(round((100 - quality) / 100 * 51)) if codec == "libx264" else str(round((100 - quality) / 100 * 63))
            )
            stream.options = {"crf": crf, "flags": "+bitexact", **({"b": "0"} if codec == "libvpx-vp9" else {})}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata `save` put into a file, None if there is none."""
    try:
        note = _note(path)
        value = json.loads(note) if note else None
    except (OSError, ValueError, UnidentifiedImageError, av.FFmpegError):
        return None
    return value if isinstance(value, dict) else None


def _note(path: Path) -> str | None:
    if path.suffix.lower() in CLIPS:
        with av.open(str(path)) as container:
            return container.metadata.get("comment") or container.metadata.get("COMMENT")
    with Image.open(path) as image:
        if METADATA_KEY in image.info:
            return str(image.info[METADATA_KEY])
        comment = image.getexif().get_ifd(EXIF_IFD).get(EXIF_USER_COMMENT)
    return comment.removeprefix(b"UNICODE\0").decode("utf-16-be") if isinstance(comment, bytes) else None
