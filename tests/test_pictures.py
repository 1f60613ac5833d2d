"""Input pictures: the pixels that diffusers would read, and one line for whatever cannot be read."""

from __future__ import annotations

import base64
import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from diffusers.utils import load_image
from diffusers.video_processor import VideoProcessor
from forks import sglang
from PIL import Image

from sgl_diffusion.models.pictures import area_size, fit
from sgl_diffusion.runtime import pictures
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.pictures import read_pictures

ORIENTATION = 0x0112
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8).repeat(8, 0).repeat(8, 1)


def encoded(kind: str, mode: str = "RGB", **settings: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(file, kind, **settings)
    return file.getvalue()


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def refused(path: str) -> str:
    """What is told about a picture that cannot be read."""
    with pytest.raises(UserError) as told:
        read_pictures([path])
    (line,) = str(told.value).splitlines()
    assert line.startswith("image_path=") and ": not a readable picture: " in line and len(line) < 400
    return line.partition(": not a readable picture: ")[2]


# -- reading ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "mode"), [
    ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1"), ("JPEG", "RGB"),
    ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"),
])  # fmt: skip
def test_files_give_the_pixels_of_diffusers(tmp_path: Path, kind: str, mode: str) -> None:
    path = tmp_path / "a picture"
    path.write_bytes(encoded(kind, mode))
    (picture,) = read_pictures([str(path)])
    assert picture.mode == "RGB" and np.array_equal(picture, load_image(str(path)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "a"
    path.write_bytes(encoded(kind, exif=exif))
    (picture,) = read_pictures([str(path)])
    assert picture.size == ((40, 56) if orientation > 4 else (56, 40))
    assert np.array_equal(picture, load_image(str(path)))


def test_several_keep_their_order(tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
    first, second = read_pictures([str(tmp_path / "blue.png"), str(tmp_path / "red.png")])
    assert (first.getpixel((0, 0)), second.getpixel((0, 0))) == ((0, 0, 255), (255, 0, 0))


def test_data_uris() -> None:
    for uri in (data_uri(encoded("PNG")), data_uri(encoded("PNG")).replace("image/png", ""),
                "data:image/png," + "".join(f"%{byte:02x}" for byte in encoded("PNG"))):  # fmt: skip
        assert np.array_equal(read_pictures([uri])[0], PIXELS[..., :3])
    assert refused("data:image/png;base64") == "expected data:<type>;base64,<data>"
    assert refused("data:image/png;base64,*&").startswith("its base64 is broken")
    assert refused("data:image/png;base64," + "A" * 4000).startswith("none of PNG, JPEG")


@pytest.fixture
def web() -> Iterator[str]:
    """A web server with pictures, on this machine."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/a.png")
                self.end_headers()
                return
            found = {"/a.png": encoded("PNG"), "/page": b"<html>"}.get(self.path)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls(web: str) -> None:
    for address in ("/a.png", "/moved"):
        assert np.array_equal(read_pictures([web + address])[0], PIXELS[..., :3])
    assert refused(web + "/page").startswith("none of PNG, JPEG")
    assert "404" in refused(web + "/none.png")
    assert "refused" in refused("http://127.0.0.1:9/a.png")
    assert refused("http://")


# -- what cannot be read ------------------------------------------------------------------------


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.png").touch()
    (tmp_path / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    assert refused(str(tmp_path / "none.png")) == "No such file or directory"
    assert refused(str(tmp_path)) == "Is a directory"
    assert "null byte" in refused("a\0b")
    for name in ("a.txt", "empty.png", "program.eps"):
        assert refused(str(tmp_path / name)) == "none of PNG, JPEG, WEBP, BMP, GIF, TIFF"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_broken_files_are_refused_or_read_but_nothing_else(kind: str) -> None:
    whole = encoded(kind)
    rng = np.random.default_rng(0)
    for cut in (1, 10, 50, len(whole) // 2):
        assert refused(data_uri(whole[:cut]))
    for _ in range(300):
        broken = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 400), 3):
            broken[place] = rng.integers(256)
        try:
            read_pictures([data_uri(bytes(broken))])
        except UserError as e:
            assert len(str(e).splitlines()) == 1


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bombs_are_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for side in (8193, 12_000, 60_000):  # the second makes Pillow warn, the third makes it refuse
        assert "pixels" in refused(data_uri(png_that_claims(side, side)))
    assert "more than" not in refused(data_uri(png_that_claims(8192, 8192)))
    monkeypatch.setattr(pictures, "MAX_BYTES", 2**20)
    (tmp_path / "large").write_bytes(encoded("BMP") + bytes(2**20))
    assert refused(str(tmp_path / "large")) == "more than 1 MiB"


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_wide_values_are_refused_rather_than_cut_off(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (8, 8), 300).save(tmp_path / "a.tiff")
    assert refused(str(tmp_path / "a.tiff")).startswith("its values are not of 8 bits")


def test_the_command_line_tells_it_in_one_line(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    words = ["generate", "--model-path", tiny("sdxl"), "--pipeline", "StableDiffusionXLImg2ImgPipeline",
             "--prompt", "a circle", "--output-path", tmp_path / "out", "--image-path", "none.png"]  # fmt: skip
    done = sglang(*words, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "image_path=none.png: not a readable picture: No such file or directory" in done.stderr


# -- as models take them ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(40, 56), (64, 96), (32, 32), (480, 832)])
def test_fit_is_that_of_diffusers(size: tuple[int, int]) -> None:
    picture = Image.fromarray(PIXELS[..., :3])
    ours, theirs = fit(picture, *size), VideoProcessor(vae_scale_factor=8).preprocess(picture, *size)
    assert ours.dtype == torch.float32 and ours.shape == (1, 3, *size)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [(1024, 1024), (832, 480), (3000, 2001), (719, 1283), (100, 3)])
@pytest.mark.parametrize("area", [1024 * 1024, 384 * 384])
def test_area_size_is_that_of_diffusers(size: tuple[int, int], area: int) -> None:
    width, height = calculate_dimensions(area, size[0] / size[1])
    assert area_size(Image.new("RGB", size), area, 32) == (height, width)
    assert height * width == pytest.approx(area, rel=0.1)


def test_area_size_of_a_thread_is_not_empty() -> None:
    assert area_size(Image.new("RGB", (5000, 1)), 128 * 128, 32)[0] == 32
