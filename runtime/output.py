"""Results -> files: names, which are settled before the work begins, pictures, and what a file tells about itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from sgl_diffusion.runtime.args import SamplingParams
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.files import whole
from sgl_diffusion.runtime.request import Request
from sgl_diffusion.runtime.video import CLIPS, ClipWriter, check_clip, frames_file

if TYPE_CHECKING:
    import torch

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LOSSLESS = (".png", ".gif")  # formats without a quality to choose
CRAMPED = (".jpg", ".jpeg")  # formats that may have no room for a prompt
SLUG_LENGTH = 80
NAME_BYTES = 255  # the longest file name that common file systems take
JPEG_NOTE_BYTES = 60_000  # a JPEG segment ends at 64 KiB; the rest is for the other parameters
METADATA_KEY = "sgl_diffusion"
EXIF_USER_COMMENT = 0x9286
EXIF_IFD = 0x8769
DEFAULT_PICTURE_QUALITY = 95


@dataclass(frozen=True)
class Output:
    """A picture, or a clip, whose frames (F, H, W, 3) are held if it was not written, or by return_frames."""

    prompt: str
    seed: int
    index: int
    image: Image.Image | None
    frames: NDArray[np.uint8] | None
    fps: int | None


def plan_outputs(params: SamplingParams, request: Request, *, is_video: bool) -> list[Path]:
    """File names of a request's results, in a folder that exists and can be written.

    Raises:
        UserError: an unwritable folder; what `check_outputs` raises.
    """
    paths = check_outputs(params, request, is_video=is_video)
    _make_writable(Path(params.output_path))
    return paths


def check_outputs(params: SamplingParams, request: Request, *, is_video: bool) -> list[Path]:
    """File names of a request's results, of which nothing is made yet.

    A name the user gave is replaced only if that file holds the same request; names of our own never collide.

    Raises:
        UserError: a name or suffix that cannot be written, a quality the format does not have, a file of another run.
    """
    folder = Path(params.output_path)
    paths = [folder / name for name in output_names(params, request, is_video=is_video)]
    try:
        paths[0].exists()
    except OSError as e:  # a folder that cannot be: its name is too long
        raise UserError(f"output_path={folder}: cannot be written: {e.strerror}") from e
    for index, path in enumerate(paths):
        if path.exists():
            if (read_metadata(path) or {}).get("digest") != request_digest(request, index):
                raise UserError(f"output_file_name={path.name}: {path} holds another run; choose another name")
        elif params.return_frames and frames_path(path).exists():
            raise UserError(f"output_file_name={path.name}: {frames_path(path)} exists already; choose another name")
    if params.profile and not paths[0].exists() and trace_path(paths).exists():
        raise UserError(f"output_file_name={paths[0].name}: {trace_path(paths)} exists already; choose another name")
    return paths


def output_names(params: SamplingParams, request: Request, *, is_video: bool) -> list[str]:
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
    if is_video:
        sides = [request.given[side] for side in ("height", "width") if side in request.given]
        check_clip(Path(name), sides, request.given.get("fps"))
    if suffix in CRAMPED:
        _demand_room_for_prompts(request)
    stem = name[: -len(suffix)]
    names = [name] if request.count == 1 else [f"{stem}_{i}{suffix}" for i in range(request.count)]
    if "\0" in name or len(os.fsencode(names[-1])) > NAME_BYTES:
        raise UserError(f"output_file_name={name[:40]!r}...: expected at most {NAME_BYTES} bytes, none of them null")
    return names


def _demand_room_for_prompts(request: Request) -> None:
    """A JPEG has little room for its parameters; that must not be found out when the picture is drawn."""
    longest = max(request.prompts, key=len) + (request.negative_prompt or "")
    if len(json.dumps(longest, ensure_ascii=False).encode("utf-16-be")) > JPEG_NOTE_BYTES:
        raise UserError(f"prompt={longest[:40]!r}...: too long to be kept inside a .jpg file; name a .png or .webp one")


def request_digest(request: Request, index: int) -> str:
    """Names what was asked for one result: equal requests have equal digests."""
    asked = {
        "prompt": request.prompt_of(index),
        "negative_prompt": request.negative_prompt,
        "seed": request.seeds[index],
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
    except (OSError, ValueError) as e:  # ValueError: a null byte
        why = e.strerror if isinstance(e, OSError) else e
        raise UserError(f"output_path={folder}: cannot be written: {why}") from e


def save(output: Output, path: Path, metadata: Mapping[str, Any], quality: int | None) -> None:
    """Writes one result in the format of the suffix, with `metadata` inside. The same input gives the same bytes.

    Args:
        quality: 1..100 for JPEG, WebP (100 is lossless there) and video; PNG and GIF have none.

    Raises:
        RunFailure: the disk does not take the file.
    """
    if output.frames is not None:
        assert output.fps is not None
        size = (output.frames.shape[1], output.frames.shape[2])
        with ClipWriter(path, size=size, fps=output.fps, metadata=metadata, quality=quality) as clip:
            clip.write(output.frames)
        return
    assert output.image is not None
    note = json.dumps(dict(metadata), sort_keys=True, default=str, ensure_ascii=False)
    with whole(path) as part:
        _write_picture(output.image, part, note, parameters(metadata, output.image.size), quality)


def parameters(metadata: Mapping[str, Any], size: tuple[int, int]) -> str:
    """The metadata as picture viewers and galleries show them: the prompt, what to avoid, and one line of settings."""
    settings = {
        "Steps": metadata.get("num_inference_steps"),
        "CFG scale": metadata.get("guidance_scale"),
        "Seed": metadata.get("seed"),
        "Size": f"{size[0]}x{size[1]}",
        "Model": metadata.get("model"),
    }
    lines = [str(metadata.get("prompt", ""))]
    if metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def frames_path(path: Path) -> Path:
    """Where the raw frames of the result at `path` go."""
    return path.with_suffix(".npy")


def save_frames(output: Output, path: Path) -> Path:
    """Writes the raw frames, uint8 (F, H, W, 3) with F = 1 for a picture, as NumPy's .npy."""
    frames = np.asarray(output.image)[None] if output.frames is None else output.frames
    with frames_file(path) as write:
        write(frames)
    return path


def trace_path(paths: Sequence[Path]) -> Path:
    """Where the trace of the request with these results goes: beside the first."""
    return paths[0].with_suffix(".trace.json.gz")


def save_trace(profile: torch.profiler.profile, path: Path) -> Path:
    """Writes a trace for chrome://tracing, Perfetto and the like, compressed."""
    with whole(path) as part:
        profile.export_chrome_trace(str(part))
    return path


def _write_picture(image: Image.Image, path: Path, note: str, shown: str, quality: int | None) -> None:
    suffix = path.suffix.lower()
    if suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text("parameters", shown)
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


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata `save` put into a file, None if there is none."""
    try:
        note = _note(path)
        value = json.loads(note) if note else None
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError, av.FFmpegError):
        return None
    return value if isinstance(value, dict) else None


def _note(path: Path) -> str | None:
    if path.suffix.lower() in CLIPS and path.suffix.lower() != ".gif":
        with av.open(str(path)) as container:
            return container.metadata.get("comment") or container.metadata.get("COMMENT")
    with Image.open(path) as image:
        if METADATA_KEY in image.info:
            return str(image.info[METADATA_KEY])
        if isinstance(note := image.info.get("comment"), bytes):
            return note.decode()
        comment = image.getexif().get_ifd(EXIF_IFD).get(EXIF_USER_COMMENT)
    return comment.removeprefix(b"UNICODE\0").decode("utf-16-be") if isinstance(comment, bytes) else None
