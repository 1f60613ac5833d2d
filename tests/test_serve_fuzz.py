"""Whatever is sent: an answer in the documented shape, never a 5xx but for time and absence, and the server lives.

SGLANG_FUZZ_EXAMPLES=200 tries more of every operation.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import random
import socket
import zlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from PIL import Image
from server_process import ServerProcess, serving

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance  # noqa: E402

EXAMPLES = int(os.environ.get("SGLANG_FUZZ_EXAMPLES", "6"))
FLAGS = (
    "--request-timeout", "0.5", "--device", "cpu", "--device-memory-limit-mb", "100", "--max-upload-size", "1",
    "--max-input-pixels", "10000",
)  # fmt: skip
"""A picture of any size is asked for: large ones are refused, and those that take long time out."""
MAY_FAIL = {503, 504}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("fuzz"), FLAGS) as server:
        yield server
        assert server.get("/ready") == {"status": "ready"} and server.get("/server_info")["engine"]["restarts"] == 0
        said = "\n".join(server.lines)
    assert "Traceback" not in said and " ERROR " not in said, said[-5000:]


def assert_answered(status: int, body: bytes, kind: str, allowed: set[int] = MAY_FAIL) -> None:
    assert status < 500 or status in allowed, (status, body[:500])
    if status >= 400:
        assert kind == "application/json", (status, kind)
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], error


# -- by the schema -----------------------------------------------------------------------


EXPECTED = {
    "POST /v1/images/generations", "POST /v1/images/edits", "POST /v1/videos", "GET /v1/videos", "GET /v1/models",
    "GET /v1/images/{id}/content", "DELETE /v1/videos/{id}", "GET /server_info", "POST /v1/cancel/{id}",
}  # fmt: skip


def test_every_operation_answers_as_it_is_documented(server: ServerProcess) -> None:
    openapi = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in openapi.get_all_operations()]
    assert {operation.label for operation in operations} >= EXPECTED
    for operation in operations:
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=EXAMPLES,
                derandomize=True,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def answers(case: Any) -> None:
                answer = case.call(timeout=60)
                kind = (answer.headers.get("content-type") or [""])[0].partition(";")[0]
                assert_answered(answer.status_code, answer.content, kind)
                case.validate_response(answer, checks=[response_schema_conformance, content_type_conformance])

            # nothing can be wrong where nothing is said
            with suppress(Unsatisfiable) if mode.is_negative else nullcontext():
                answers()


# -- by hand -------------------------------------------------------------------------------


def raw(server: ServerProcess, data: bytes, *, close: bool = False) -> tuple[int, bytes, str] | None:
    """What a connection is answered on which exactly these bytes are sent; None if it is closed without a word.

    Args:
        close: our end, once all is sent.
    """
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
        connection.settimeout(30)
        try:
            connection.sendall(data)
            if close:
                connection.shutdown(socket.SHUT_WR)
            answer = HTTPResponse(connection)
            answer.begin()
            return answer.status, answer.read(), answer.getheader("content-type", "")
        except (ConnectionError, HTTPException):
            return None


def post(path: str, body: bytes, *headers: bytes, length: int | None = None) -> bytes:
    head = [f"POST {path} HTTP/1.1".encode(), b"Host: x", b"Connection: close", *headers]
    head.append(f"Content-Length: {len(body) if length is None else length}".encode())
    return b"\r\n".join(head) + b"\r\n\r\n" + body


JSON = b"Content-Type: application/json"
FORM = b"Content-Type: multipart/form-data; boundary=b"
GENERATE, EDIT, CLIP = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
PROMPT = b'{"prompt": "a cat"}'


def part(name: bytes, value: bytes, more: bytes = b"") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="' + name + b'"' + more + b"\r\n\r\n" + value + b"\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + b"\0" * 100,  # the beginning of TLS
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2**20 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"GET /v1/videos/" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /v1/videos/%00%ff%fe HTTP/1.1\r\nHost: \xff\r\nConnection: close\r\n\r\n",
        b"GET /v1/videos?after=%ff&limit=%f0%9f HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        post(GENERATE, PROMPT, JSON, length=-1),
        post(GENERATE, PROMPT, JSON, length=10**30),
        post(GENERATE, PROMPT, JSON, b"Content-Length: 3"),
        post(GENERATE, PROMPT, JSON, b"Transfer-Encoding: chunked"),
        post(GENERATE, PROMPT, b"Content-Type: application/json; charset=\xff\xfe"),
        post(GENERATE, PROMPT, JSON, b"Idempotency-Key: " + b"k" * 10_000),
        post(GENERATE, PROMPT, JSON, b"Idempotency-Key: \xff\x01"),
        post(GENERATE, PROMPT, JSON, b"Authorization: Bearer " + b"\xff" * 5000),
        post(GENERATE, gzip.compress(b"[" * 10**7), JSON, b"Content-Encoding: gzip"),
        post(GENERATE, b'{"prompt": "\xff"}', JSON),
        post(GENERATE, b"\xff\xfe" + '{"prompt": "a"}'.encode("utf-16-le"), JSON),
        post(GENERATE, b'{"prompt":' * 50_000, JSON),
        post(GENERATE, b'{"prompt": "a", "user": ' + b"[" * 900_000, JSON),
        post(GENERATE, b'{"a\\u0000b": 1}', JSON),
        post(GENERATE, b'{"prompt": "a", "prompt\\ud800": 1}', JSON),
        post(EDIT, part(b"prompt", b"a") + part(b"image", b"x", b'; filename="\0/../../etc/passwd"') + b"--b--", FORM),
        post(EDIT, part(b"prompt\0", b"a") + b"--b--\r\n", FORM),
        post(EDIT, part(b"prompt", b"\xff\xfe\0") + b"--b--\r\n", FORM),
        post(EDIT, part(b"a[" * 5000, b"a") + b"--b--\r\n", FORM),
        post(EDIT, part(b"image", b"x") * 5000 + b"--b--\r\n", FORM),
        post(EDIT, part(b"prompt", b"a")[:-20], FORM),
        post(EDIT, part(b"prompt", b"a", b"\r\nX: " + b"y" * 100_000) + b"--b--\r\n", FORM),
        post(EDIT, b"", FORM),
        post(CLIP, part(b"prompt", b"a") + part(b"input_reference", b"\x89PNG", b'; filename=""') + b"--b--", FORM),
        post(CLIP, b"--b" * 100_000, FORM),
    ],
    ids=range(33),
)
def test_what_is_not_quite_http(server: ServerProcess, sent: bytes) -> None:
    """Some of it is answered in uvicorn's own words, before it is a request; then it is 400."""
    answer = raw(server, sent)
    if answer is not None and answer[2].startswith("text/plain"):
        assert answer[0] == 400
    elif answer is not None:
        assert_answered(*answer)
    assert server.call("GET", "/health")[0] == 200


@pytest.mark.parametrize("path", [GENERATE, EDIT, CLIP])
@pytest.mark.parametrize("close", [True, False])
def test_a_body_that_does_not_come(server: ServerProcess, path: str, close: bool) -> None:
    """It ends early, or keeps the server waiting: that has a limit."""
    for kind, body in ((JSON, PROMPT[:9]), (FORM, part(b"prompt", b"a"))):
        answer = raw(server, post(path, body, kind, length=len(body) + 10), close=close)
        if answer is not None:
            assert_answered(*answer, allowed=set())
        assert close or (answer is not None and answer[0] in (408, 415))


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def pictures() -> dict[str, bytes]:
    """Small files that are large once they are read."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    head, rest = file.getvalue()[:33], file.getvalue()[33:]
    text = b"a\0\0" + zlib.compress(b"\0" * 100 * 2**20)
    icc = b"a\0\0" + zlib.compress(b"\0" * 100 * 2**20)
    wide = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(wide, "PNG")
    frames = io.BytesIO()
    still = [Image.new("P", (90, 90), color) for color in range(200)]
    still[0].save(frames, "WEBP", save_all=True, append_images=still[1:])
    return {
        "a compressed text": head + chunk(b"zTXt", text) + rest,
        "a compressed profile": head + chunk(b"iCCP", icc) + rest,
        "many pixels": wide.getvalue(),
        "many frames": frames.getvalue(),
        "no data": head + chunk(b"IEND", b""),
        "a compressed svg": gzip.compress(b"<svg>" + b" " * 10**7),
    }


def test_bombs_do_not_go_off(server: ServerProcess) -> None:
    """The model takes no pictures, so all are refused: as what they are, or for that."""
    for name, data in pictures().items():
        assert len(data) < 2**20, name
        before = psutil.Process(server.process.pid).memory_info().rss
        uri = "data:image/png;base64," + base64.b64encode(data).decode()[: 10**6]
        for body, kind in (
            (part(b"prompt", b"a") + part(b"image", data, b'; filename="a.png"') + b"--b--\r\n", FORM),
            (json.dumps({"prompt": "a", "image": uri}).encode(), JSON),
        ):
            answer = raw(server, post(EDIT, body, kind))
            assert answer is not None and answer[0] in (400, 413), (name, answer)
            assert_answered(*answer)
        assert psutil.Process(server.process.pid).memory_info().rss - before < 50 * 2**20, name


def test_mutations_of_good_requests(server: ServerProcess) -> None:
    """Bytes that are changed, lost, repeated and inserted, in bodies and heads."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    form = (
        part(b"prompt", b"a cat") + part(b"n", b"1") + part(b"image", file.getvalue(), b'; filename="a.png"') + b"--b--"
    )
    good = [
        (GENERATE, b'{"prompt": "a cat", "n": 1, "num_inference_steps": 1, "extra_body": {"seed": 3}}', JSON),
        (EDIT, form, FORM),
        (CLIP, form.replace(b'"image"', b'"input_reference"'), FORM),
        (CLIP, b'{"prompt": "a cat", "seconds": "4", "size": "64x64"}', JSON),
    ]
    rng = random.Random(3)
    for turn in range(25 * EXAMPLES):
        path, body, kind = good[turn % len(good)]
        sent = post(path, mutated(body, rng), kind)
        answer = raw(server, sent)
        assert answer is not None, sent
        assert_answered(*answer)
        raw(server, mutated(sent, rng), close=True)  # not a request any more, perhaps


def mutated(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        start = rng.randrange(len(found))
        end = start + rng.randrange(1, 20)
        match rng.randrange(4):
            case 0:
                found[start] = rng.randrange(256)
            case 1 if len(found) > 40:
                del found[start:end]
            case 2:
                found[start:start] = rng.randbytes(rng.randrange(1, 20))
            case _:
                found[start:start] = found[start:end]
    return bytes(found)
