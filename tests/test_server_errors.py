"""What a server refuses, and how it says so: one shape, the right status, the name of what is wrong."""

from __future__ import annotations

import asyncio
import base64
import http.server
import io
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from server_process import ServerProcess, serving, start_server, wait_for

KEYS = ("sk-one", "sk-two", "sk-three")
FLAGS = (
    "--api-key", *KEYS[:2], "--max-queue-size", "2", "--max-upload-size", "1", "--max-input-pixels", "10000",
    "--allowed-input-hosts", "localhost", "--cors-origins", "https://pictures.example", "--request-timeout", "3",
)  # fmt: skip
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("errors"), FLAGS, env={"SGLANG_API_KEY": KEYS[2]}) as server:
        yield server
        said = "\n".join(server.lines)
    assert "Traceback" not in said and not any(key in said for key in KEYS)


@pytest.fixture(scope="module")
def http_client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEYS[0]}"}, timeout=60) as client:
        yield client


def error(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, whose shape is checked."""
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert isinstance(body["error"]["message"], str) and body["error"]["type"]
    found: dict[str, Any] = body["error"]
    return found


# -- keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "Bearer", "Bearer sk-on", "Bearer sk-onee", "Basic sk-one", "Bearer ñ"])
def test_without_a_key_nothing_is_told(server: ServerProcess, key: str | None) -> None:
    headers = {} if key is None else {"authorization": key.encode("latin-1")}
    for method, path in [
        ("GET", "/v1/models"), ("GET", "/v1/videos"), ("POST", "/v1/images/generations"), ("GET", "/server_info"),
        ("GET", "/metrics"), ("GET", f"/v1/images/img_{'0' * 32}/content"),
    ]:  # fmt: skip
        answer = httpx.request(method, server.url + path, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert error(answer)["code"] in ("missing_api_key", "invalid_api_key")


def test_every_key_opens_and_probes_need_none(server: ServerProcess) -> None:
    for key in KEYS:
        openai.OpenAI(api_key=key, base_url=server.api).models.list()
    for path in ("/health", "/ready", "/health_generate", "/"):
        assert httpx.get(server.url + path).status_code == 200


def test_a_job_is_seen_by_its_owner_alone(server: ServerProcess) -> None:
    clients = [openai.OpenAI(api_key=key, base_url=server.api, max_retries=0) for key in KEYS[:2]]
    fields: dict[str, Any] = {"response_format": "url", "extra_body": {"num_inference_steps": 1}}
    url = str(clients[0].images.generate(prompt="a cat", **fields).data[0].url)  # type: ignore[index]
    assert httpx.get(url, headers={"authorization": f"Bearer {KEYS[0]}"}).status_code == 200
    others = httpx.get(url, headers={"authorization": f"Bearer {KEYS[1]}"})
    assert others.status_code == 404 and error(others)["code"] == "not_found"
    job_id = url.split("/")[-2]
    cancelled = httpx.post(f"{server.api}/cancel/{job_id}", headers={"authorization": f"Bearer {KEYS[1]}"})
    assert cancelled.status_code == 404


def test_no_setting_is_a_secret(http_client: httpx.Client) -> None:
    told = http_client.get("/server_info").text + http_client.get("/metrics").text
    assert not any(key in told for key in KEYS)


# -- fields --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": ""}, "prompt", ""),
        ({"prompt": 5}, "prompt", "expected text"),
        ({"num_inference_step": 3}, "num_inference_step", "did you mean num_inference_steps?"),
        ({"num_inference_steps": "3"}, "num_inference_steps", "whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps", "at least 1"),
        ({"num_inference_steps": 10**6}, "num_inference_steps", "at most 1000"),
        ({"seed": -1}, "seed", "at least 0"),
        ({"seed": True}, "seed", "whole number"),
        ({"n": 11}, "n", "at most 10"),
        ({"n": 2, "num_outputs_per_prompt": 2}, "n", "num_outputs_per_prompt"),
        ({"size": "64"}, "size", ""),
        ({"size": "64x64", "width": 64}, "size", "width"),
        ({"size": "60x64"}, "size", "multiple of 16"),
        ({"width": 60}, "width", "multiple of 16"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"quality": "hd", "num_inference_steps": 3}, "quality", "num_inference_steps"),
        ({"quality": "best"}, "quality", "'auto'"),
        ({"style": "vivid"}, "style", "prompt"),
        ({"moderation": "low"}, "moderation", "auto"),
        ({"mask": "x"}, "mask", "takes none"),
        ({"partial_images": 2}, "partial_images", "stream"),
        ({"partial_images": 4, "stream": True}, "partial_images", "at most 3"),
        ({"output_format": "tiff"}, "output_format", "'png'"),
        ({"output_compression": 50}, "output_compression", "PNG"),
        ({"output_path": "/etc"}, "output_path", "server's"),
        ({"perf_dump_path": "/etc/x"}, "perf_dump_path", "server's"),
        ({"resume_latents": "/etc/passwd"}, "resume_latents", "server's"),
        ({"image_path": ["/etc/passwd"]}, "image_path", "of the client"),
        ({"image_path": ["file:///etc/passwd"]}, "image_path", "of the client"),
        ({"negative_prompt": "dogs"}, "negative_prompt", "true_cfg_scale"),
        ({"fps": 4}, "fps", "draws pictures"),
        ({"diffusers_kwargs": {"eta": 1}}, "diffusers_kwargs", "--backend diffusers"),
        ({"model": "dall-e-3"}, "model", "embedded"),
        ({"guidance_scale": "NaN"}, "guidance_scale", "number"),
        ({"extra_body": {"seeds": 1}}, "seeds", "did you mean seed?"),
        ({"seed": 1, "extra_body": {"seed": 1}}, "seed", "twice"),
        ({"extra_body": 3}, "extra_body", "keys and values"),
    ],
)
def test_a_field_is_refused_by_name(http_client: httpx.Client, fields: dict[str, Any], param: str, told: str) -> None:
    answer = http_client.post("/v1/images/generations", json={"prompt": "a cat", **fields})
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    found = error(answer)
    assert found["param"] == param and told in found["message"], found
    assert found["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'"text"', b'{"prompt": NaN}', b'{"prompt": "a", "seed": 1e999}',
        b'{"prompt": "\\ud800"}', b'{"prompt": "a\\u0000b"}', b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"prompt": "a", "diffusers_kwargs": ' + b'{"a":' * 50 + b"1" + b"}" * 51, b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_broken_json_is_a_clients_mistake(http_client: httpx.Client, body: bytes) -> None:
    answer = http_client.post("/v1/images/generations", content=body, headers=JSON)
    assert answer.status_code == 400 and error(answer)["code"] == "invalid_json"


def test_routes_and_methods(http_client: httpx.Client) -> None:
    for method, path, status in [
        ("GET", "/v1/chat/completions", 404), ("GET", "/v1/images/generations", 405), ("PUT", "/v1/videos", 405),
        ("GET", "/v1/videos/video_x", 404), ("GET", "/v1/videos/video_%00", 404), ("GET", "/v1/videos?limit=0", 400),
        ("GET", "/v1/videos?limit=x", 400), ("GET", "/v1/videos?order=up", 400), ("GET", "/v1/videos?after=%00", 400),
        ("GET", f"/v1/videos?after=video_{'0' * 32}", 400), ("POST", f"/v1/cancel/img_{'0' * 32}", 404),
        ("GET", "/page/../run.py", 404), ("GET", "/page/%2e%2e/run.py", 404),
    ]:  # fmt: skip
        answer = http_client.request(method, path)
        assert answer.status_code == status, (method, path, answer.text)
        error(answer)
    assert http_client.get("/v1/images/generations").headers["allow"] == "POST"
    assert http_client.put(f"/v1/videos/video_{'0' * 32}").headers["allow"] == "DELETE, GET"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_content_types_are_refused(http_client: httpx.Client, kind: str) -> None:
    answer = http_client.post("/v1/images/generations", content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 415 and error(answer)["param"] == "content-type"


def test_cors_is_for_the_named_origins_alone(http_client: httpx.Client) -> None:
    name = "access-control-allow-origin"
    assert http_client.get("/health", headers={"origin": "https://evil.example"}).headers.get(name) is None
    allowed = http_client.get("/health", headers={"origin": "https://pictures.example"})
    assert allowed.headers[name] == "https://pictures.example"


# -- uploads -------------------------------------------------------------------------------


def edit(client: httpx.Client, data: bytes, name: str = "image", file: str = "a.png", **fields: Any) -> httpx.Response:
    return client.post("/v1/images/edits", files={name: (file, data)}, data={"prompt": "a cat", **fields})


def file_of(kind: str, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "orange").save(file, kind)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of some hundred bytes that claims to be side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "not a picture"),
        (b"GIF89a nonsense", "not a picture"),
        (file_of("GIF"), "not a picture"),
        (file_of("TIFF"), "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (file_of("PNG", (101, 100)), "more than 10000 pixels"),
        (bomb(20_000), "pixels"),
        (bomb(2**31 - 1), "pixels"),
        (file_of("PNG", (100, 100))[:-40], "not a readable picture"),
    ],
)
def test_what_is_no_picture_is_refused(http_client: httpx.Client, data: bytes, told: str) -> None:
    answer = edit(http_client, data)
    assert answer.status_code == 400 and told in error(answer)["message"]
    assert error(answer)["param"] == "image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("name", ["image", "image[]"])
def test_pictures_get_as_far_as_the_model(
    server: ServerProcess, http_client: httpx.Client, kind: str, name: str
) -> None:
    told = error(edit(http_client, file_of(kind), name, "../../etc/passwd"))
    assert "draws from text alone" in told["message"] and told["param"] == "image"
    assert list((server.data_dir / "inputs").iterdir()) == []  # nothing is left of it


def test_a_mask_is_refused_as_a_file_too(http_client: httpx.Client) -> None:
    answer = http_client.post(
        "/v1/images/edits", files={"image": file_of("PNG"), "mask": file_of("PNG")}, data={"prompt": "x"}
    )
    assert error(answer)["param"] == "mask"
    assert error(edit(http_client, file_of("PNG"), "video"))["param"] == "video"
    assert error(http_client.post("/v1/images/edits", json={"prompt": "x"}))["param"] == "image"


def test_form_values_are_read_as_what_they_mean(http_client: httpx.Client) -> None:
    def told(**fields: Any) -> dict[str, Any]:
        return error(edit(http_client, file_of("PNG"), **fields))

    assert told(num_inference_steps="x")["param"] == "num_inference_steps"
    assert told(stream="maybe")["param"] == "stream"
    assert told(n="0")["param"] == "n"
    assert told(diffusers_kwargs="{")["code"] == "invalid_json"
    assert told(**{"diffusers_kwargs[eta]": "0.5", "n": "2", "stream": "true"})["param"] == "diffusers_kwargs"
    assert told(n="2", stream="true", seed="3", partial_images="1")["param"] == "image"  # its value is the only wrong
    assert told(extra_body='{"sede": 3}')["param"] == "sede"
    assert told(num_inference_steps=["1", "2"])["param"] == "num_inference_steps"


def test_a_body_is_cut_off_at_the_limit(http_client: httpx.Client, server: ServerProcess) -> None:
    large = edit(http_client, b"\x89PNG" * 300_000)
    assert large.status_code == 413 and error(large)["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(40):
            yield b"a" * 65536
        yield b'"}'

    chunked = http_client.post("/v1/images/generations", content=chunks(), headers=JSON)
    assert chunked.status_code == 413


def test_malformed_forms_are_a_clients_mistake(http_client: httpx.Client) -> None:
    """Seeded mutations of a good form: never a 5xx."""
    rng = random.Random(6)
    boundary = b"frontier"
    good = b"".join(
        b"--" + boundary + b'\r\nContent-Disposition: form-data; name="' + name + b"\r\n\r\n" + value + b"\r\n"
        for name, value in [
            (b'prompt"', b"a cat"), (b'n"', b"2"),
            (b'image"; filename="a.png"\r\nContent-Type: image/png', file_of("PNG")),
        ]
    ) + b"--" + boundary + b"--\r\n"  # fmt: skip
    kinds = [
        "multipart/form-data; boundary=frontier", "multipart/form-data; boundary=",
        "multipart/form-data; boundary=x" * 50,
        "multipart/form-data; boundary=frontier; charset=base64", "multipart/form-data",
        "multipart/form-data; boundary=frontier; charset=utf-8",
    ]  # fmt: skip
    for turn in range(150):
        body = bytearray(good)
        for _ in range(rng.randrange(0, 12)):
            where = rng.randrange(len(body))
            match rng.randrange(4):
                case 0:
                    body[where] = rng.randrange(256)
                case 1:
                    del body[where : where + rng.randrange(1, 30)]
                case 2:
                    body[where:where] = rng.randbytes(rng.randrange(1, 30))
                case 3:
                    body[where:where] = b"\r\n--" + boundary + b"\r\n"
        kind = kinds[0] if turn % 3 else rng.choice(kinds)
        answer = http_client.post("/v1/images/edits", content=bytes(body), headers={"content-type": kind})
        assert 400 <= answer.status_code < 500, (turn, answer.text)
        error(answer)


# -- pictures by reference -----------------------------------------------------------------


class Pictures(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        port = self.server.server_address[1]
        self.send_response(302 if self.path == "/elsewhere" else 200)
        if self.path == "/elsewhere":
            self.send_header("Location", f"http://127.0.0.1:{port}/a.png")
        self.end_headers()
        data = file_of("PNG") if self.path == "/a.png" else b"x" * (3 << 20) if self.path == "/large" else b"text"
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def pictures() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found.server_address[1]
        found.shutdown()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://localhost:{port}/a.png", "draws from text alone"),  # it got as far as the model
        ("http://LOCALHOST:{port}/a.png", "draws from text alone"),
        ("http://127.0.0.1:{port}/a.png", "is not one that this server fetches"),
        ("http://localhost.evil.example/a.png", "is not one that this server fetches"),
        ("http://localhost@evil.example/a.png", "is not one that this server fetches"),
        ("http://169.254.169.254/latest/meta-data", "is not one that this server fetches"),
        ("http://[::1]:{port}/a.png", "is not one that this server fetches"),
        ("ftp://localhost/a.png", "expected a data URI"),
        ("http://localhost:{port}/elsewhere", "status 302"),
        ("http://localhost:{port}/text", "not a picture"),
        ("http://localhost:{port}/large", "more than 1 MiB"),
        ("http://localhost:1/a.png", "could not be fetched"),
        ("http://localhost:99999/a.png", ""),
        ("http://[/a.png", ""),
        ("data:image/png;base64,!!", "base64"),
        ("data:image/png", "expected data:"),
    ],
)
def test_only_allowed_hosts_are_asked_for_pictures(
    http_client: httpx.Client, pictures: int, url: str, told: str
) -> None:
    for body in ({"image": url.format(port=pictures)}, {"image": [{"image_url": url.format(port=pictures)}]}):
        answer = http_client.post("/v1/images/edits", json={"prompt": "a cat", **body})
        assert answer.status_code == 400 and told in error(answer)["message"], answer.text
        assert error(answer)["param"] == "image"


def test_a_name_that_leads_inside_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allowed name whose address is a private one: somebody else's name server decided that."""
    from sgl_diffusion.server.errors import ApiError
    from sgl_diffusion.server.uploads import Uploads

    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.7", 80))]
    )
    uploads = Uploads(1, 1000, ["pictures.example"])
    with pytest.raises(ApiError, match="private network"):
        asyncio.run(uploads.store(["http://pictures.example/a.png"], Path("unused"), "image"))


# -- load ----------------------------------------------------------------------------------


def test_what_takes_too_long_is_cancelled(http_client: httpx.Client) -> None:
    body = {"prompt": "a cat", "num_inference_steps": 1000, "size": "256x256"}
    answer = http_client.post("/v1/images/generations", json=body)
    assert answer.status_code == 504 and error(answer)["type"] == "timeout_error"
    wait_for(lambda: not http_client.get("/server_info").json()["jobs"]["in_progress"])


def test_a_full_queue_says_when_to_come_back(server: ServerProcess, http_client: httpx.Client) -> None:
    body = {"prompt": "a cat", "num_inference_steps": 1000, "size": "256x256"}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(http_client.post("/v1/images/generations", json=body))

    def jobs() -> dict[str, int]:
        found: dict[str, int] = http_client.get("/server_info").json()["jobs"]
        return found

    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads[0].start()
    wait_for(lambda: jobs()["in_progress"] == 1)
    for thread in threads[1:]:
        thread.start()
    wait_for(lambda: jobs()["queued"] == 2)
    full = http_client.post("/v1/images/generations", json=body)
    assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
    assert error(full)["type"] == "rate_limit_error"
    assert http_client.get("/health").status_code == 200
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {504}


# -- starting ------------------------------------------------------------------------------


def test_a_server_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        started = [
            (start_server(tmp_path / name, *flags, wait=False), told)
            for name, flags, told in [
                ("a", ("--port", port), f"port={port}"),
                ("b", ("--data-dir", str(tmp_path / "file" / "x")), "data_dir="),
                ("c", ("--model-path", str(tmp_path / "nowhere")), "nowhere"),
                ("d", ("--max-queue-size", "0"), "max_queue_size=0: must be at least 1"),
                ("e", ("--databse-url", "x"), "did you mean --database-url?"),
                ("f", ("--database-url", "nonsense"), "database_url:"),
            ]
        ]
        for server, told in started:
            assert server.process.wait(60) == 2, told
            wait_for(lambda lines=server.lines: lines)
            (line,) = [line for line in server.lines if line.startswith("error:")]
            assert told in line and not any("Traceback" in line for line in server.lines)


def test_a_signal_while_the_model_loads_ends_the_server(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", "--host", "0.0.0.0", wait=False)
    wait_for(lambda: any("without an API key" in line for line in server.lines))
    wait_for(lambda: (tmp_path / "data" / "jobs.sqlite").exists())
    second = start_server(tmp_path / "data", wait=False)
    assert second.process.wait(60) == 2
    assert any("another server works in it" in line for line in second.lines)
    assert server.stop() == 0


def test_a_shared_config_file_serves_both_commands(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"port": 1, "served_model_name": "x", "seed": 3}))
    command = [sys.executable, "-P", "-m", "sgl_diffusion.cli.main"]
    drawn = subprocess.run(
        [*command, "generate", "--config", str(tmp_path / "config.json"), "--host", "0.0.0.0", "--prompt", "a cat",
         "--num-inference-steps", "1", "--output-path", str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    (line,) = [line for line in drawn.stderr.splitlines() if "ignored" in line]
    assert all(flag in line for flag in ("--port", "--served-model-name", "--host"))
    refused = subprocess.run(
        [*command, "serve", "--config", str(tmp_path / "config.json")], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and "unknown key seed" in refused.stderr


def test_base64_is_not_mistaken(http_client: httpx.Client) -> None:
    uri = "data:image/png;base64," + base64.b64encode(file_of("PNG")).decode()
    told = error(http_client.post("/v1/images/edits", json={"prompt": "a cat", "image": [uri, uri]}))
    assert "2 given" in told["message"]
