"""Input pictures: reading them, and the sizes and tensors that models make of them."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import struct
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageOps, UnidentifiedImageError

from sgl_diffusion.runtime.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # some others that Pillow knows start programs to read a file
WIDE_MODES = ("I", "F")  # how Pillow's names of them start: 16 and 32 bits, which it would cut off at 255
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 2**20  # 8192 x 8192; a few kilobytes can claim to be any number of pixels
DOWNLOAD_SECONDS = 30  # without an answer
# what Pillow raises on broken files, by format and by where they are broken
BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)


def read_pictures(paths: Sequence[str]) -> list[Image.Image]:
    """Input pictures as RGB: upright as their EXIF says, the colours under transparency, the first of an animation.

    Args:
        paths: of files, http(s) URLs, or data URIs, of the formats in `FORMATS`.
    Returns:
        The same pixels as diffusers' `load_image`.
    Raises:
        UserError: one that cannot be read, or holds more than `MAX_BYTES` or `MAX_PIXELS`.
    """
    return [_read_picture(path) for path in paths]


def is_url(path: str) -> bool:
    """Whether it has to be fetched."""
    return path.startswith(("http://", "https://"))


def _read_picture(path: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on odd metadata and on sizes that are refused below
            picture = Image.open(io.BytesIO(_read_bytes(path)), formats=FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width}x{picture.height} are more than {MAX_PIXELS} pixels")
            if picture.mode.startswith(WIDE_MODES):
                raise ValueError(f"its values are not of 8 bits (Pillow's mode {picture.mode})")
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (*BROKEN, http.client.HTTPException, Image.DecompressionBombError) as e:
        raise UserError(f"image_path={_shown(path)}: not a readable picture: {_reason(e)}") from e


def _read_bytes(path: str) -> bytes:
    if path.startswith("data:"):
        data = decode_data_uri(path)
    elif is_url(path):
        with urllib.request.urlopen(path, timeout=DOWNLOAD_SECONDS) as answer:
            data = _read_bounded(answer)
    else:
        with Path(path).open("rb") as file:
            data = _read_bounded(file)
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES // 2**20} MiB")
    return data


def _read_bounded(file: BinaryIO) -> bytes:
    return file.read(MAX_BYTES + 1)


def decode_data_uri(uri: str) -> bytes:
    """The bytes of `data:<type>[;base64],<data>` (RFC 2397). Raises ValueError."""
    kind, comma, data = uri.partition(",")
    if not comma:
        raise ValueError("expected data:<type>;base64,<data>")
    if not kind.endswith(";base64"):
        return unquote_to_bytes(data)
    try:
        return base64.b64decode(unquote_to_bytes(data), validate=True)
    except binascii.Error as e:
        raise ValueError(f"its base64 is broken: {e}") from e


def _shown(path: str) -> str:
    """A path as it fits into a message: a data URI is a picture long."""
    return path if len(path) <= 200 else f"{path[:40]}... ({len(path)} characters)"


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"none of {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
