"""Log lines and traces of requests and jobs; traces are received over HTTP and decoded."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi import APIRouter, FastAPI, HTTPException, Request  # noqa: E402
from fastapi.responses import StreamingResponse  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from sgl_diffusion.runtime.errors import UserError  # noqa: E402
from sgl_diffusion.server.jobs import Failure, Job, Kind, Progress, Status  # noqa: E402
from sgl_diffusion.server.logs import JobLog, RequestLog, origin, set_up_logs  # noqa: E402
from sgl_diffusion.server.tracing import open_tracing  # noqa: E402

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET, PROMPT = "sk-very-secret", "a cat in the rain"
BEGAN = datetime(2026, 1, 31, 12, tzinfo=UTC)
MS = 1_000_000  # ns


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What the log has written since it was last asked; how logging was set up is restored."""
    root, ours = logging.getLogger(), logging.getLogger("sgl_diffusion")
    before = root.handlers[:], root.level, ours.level
    yield lambda: capsys.readouterr().err
    root.handlers[:], root.level, ours.level = before


def app() -> FastAPI:
    served, videos = FastAPI(), APIRouter()

    @videos.get("/videos/{id}")
    async def video(id: str, request: Request) -> dict[str, Any]:
        request.state.tenant = "0123456789abcdef"
        logging.getLogger("sgl_diffusion.somewhere").info("looking for it")
        return dict(origin.get())

    @videos.get("/broken")
    async def broken() -> None:
        raise RuntimeError("two\nlines")

    @videos.get("/refused")
    async def refused() -> None:
        raise HTTPException(409)

    @videos.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(iter(["a", "b"]))

    @served.get("/health")
    async def health() -> None: ...

    served.include_router(videos, prefix="/v1")
    return served


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def job(status: Status, **more: Any) -> Job:
    more = {"presentation": {}, "created_at": BEGAN} | more
    return Job(
        "img_1", Kind.IMAGE, status, {"prompt": [PROMPT]}, tenant="", priority=0, work=1.0, batch_key=None, **more
    )


def ended(status: Status, **more: Any) -> Job:
    return job(status, started_at=BEGAN + timedelta(seconds=2), ended_at=BEGAN + timedelta(seconds=9), **more)


# -- lines ---------------------------------------------------------------------------------


def test_every_request_is_a_line(stderr: Callable[[], str]) -> None:
    set_up_logs("info", "json")
    client = TestClient(RequestLog(app()))
    headers = {"x-request-id": "client.1_a-B", "authorization": f"Bearer {SECRET}"}
    answer = client.get(f"/v1/videos/video_1?key={SECRET}", headers=headers)
    assert answer.headers["x-request-id"] == "client.1_a-B" and answer.json() == {"request_id": "client.1_a-B"}
    assert SECRET not in (text := stderr())
    inner, line = lines(text)
    assert inner["message"] == "looking for it" and inner["request_id"] == "client.1_a-B"
    assert line.pop("ms") >= 0 and line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "sgl_diffusion.http",
        "message": "request",
        "method": "GET",
        "path": "/v1/videos/video_1",
        "route": "/v1/videos/{id}",
        "status": 200,
        "tenant": "0123456789abcdef",
        "request_id": "client.1_a-B",
    }


@pytest.mark.parametrize("given", [None, "", "x" * 65, "a b", 'a"b', "a\\nb", "ä".encode()])
def test_an_odd_request_id_is_not_taken_over(given: str | bytes | None) -> None:
    client = TestClient(RequestLog(app()))
    headers = {} if given is None else {"x-request-id": given}
    made = [client.get("/health", headers=headers).headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and all(len(id) == 32 and id.isalnum() for id in made)


def test_failures_are_lines_too(stderr: Callable[[], str]) -> None:
    set_up_logs("info", "json")
    seen = []
    asgi = RequestLog(app(), lambda method, route, status, seconds: seen.append((route, status)))
    client = TestClient(asgi, raise_server_exceptions=False)
    for path in ("/v1/refused", "/v1/broken", "/nowhere", "/v1/stream"):
        assert "x-request-id" in client.get(path).headers
    told = [(line["path"], line["status"]) for line in lines(stderr()) if line["message"] == "request"]
    assert told == [("/v1/refused", 409), ("/v1/broken", 500), ("/nowhere", 404), ("/v1/stream", 200)]
    assert seen == [("/v1/refused", 409), ("/v1/broken", 500), ("unmatched", 404), ("/v1/stream", 200)]


def test_probes_are_lines_for_debugging(stderr: Callable[[], str]) -> None:
    set_up_logs("info", "text")
    client = TestClient(RequestLog(app()))
    client.get("/health")
    assert not stderr()
    set_up_logs("debug", "text")
    client.get("/health")
    assert "path=/health" in stderr()


def test_text_stays_on_its_line(stderr: Callable[[], str]) -> None:
    set_up_logs("info", "text")
    client = TestClient(RequestLog(app()))
    client.get("/v1/videos/a%0AERROR%20forged", headers={"x-request-id": "1"})
    logging.getLogger("sgl_diffusion").warning("one\ntwo", extra={"fields": {"why": 'a "b"\nc', "no": None}})
    _, request, warning = stderr().splitlines()
    assert "INFO request method=GET path=/v1/videos/a%0AERROR%20forged route=/v1/videos/{id} status=200 ms=" in request
    assert request.endswith("tenant=0123456789abcdef request_id=1")
    assert warning.endswith(r'WARNING one\ntwo why="a \"b\"\nc"')


def test_jobs_are_lines_from_queue_to_end(stderr: Callable[[], str]) -> None:
    set_up_logs("info", "json")
    log, of_request = JobLog(), {"presentation": {"origin": {"request_id": "r1"}}}
    log.queued(job(Status.QUEUED, **of_request))
    for step in range(3):
        log.on_event("img_1", Progress("denoising", step, 3))
    log.on_end(ended(Status.COMPLETED, **of_request))
    assert PROMPT not in (text := stderr())
    queued, begun, done = lines(text)
    assert (queued["status"], queued["request_id"], begun["status"]) == ("queued", "r1", "in_progress")
    assert (done["status"], done["waited_s"], done["took_s"], done["request_id"]) == ("completed", 2.0, 7.0, "r1")


def test_a_failure_is_told_without_the_prompt(stderr: Callable[[], str]) -> None:
    set_up_logs("info", "json")
    JobLog().on_end(ended(Status.FAILED, failure=Failure(f"prompt={PROMPT}: too long", code="invalid_value")))
    (line,) = lines(stderr())
    assert (line["level"], line["code"], line["error"]) == ("warning", "invalid_value", "prompt=(prompt): too long")


# -- traces --------------------------------------------------------------------------------


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        self.spans: dict[str, Any] = {}
        self.resource: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                sent = service.ExportTraceServiceRequest.FromString(
                    self.rfile.read(int(self.headers["content-length"]))
                )
                for of_resource in sent.resource_spans:
                    outer.resource |= {a.key: a.value.string_value for a in of_resource.resource.attributes}
                    outer.spans |= {span.name: span for scope in of_resource.scope_spans for span in scope.spans}
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    yield collector
    collector.stop()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_trace_goes_from_the_client_to_the_steps(collector: Collector) -> None:
    from sgl_diffusion.server.spans import TracedRequests

    tracing = open_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})
    assert tracing is not None
    client = TestClient(RequestLog(TracedRequests(app(), tracing)))
    headers = {"traceparent": TRACEPARENT, "x-request-id": "r1"}
    kept = client.get(f"/v1/videos/video_1?key={SECRET}", headers=headers).json()
    client.get("/health")
    for stage, step in [("text_encoding", 0), ("denoising", 0), ("denoising", 1), ("denoising", 2), ("decoding", 0)]:
        tracing.on_event("img_1", Progress(stage, step, 2))
    now = datetime.now(UTC)
    times = {"created_at": now - timedelta(seconds=3), "started_at": now - timedelta(seconds=1), "ended_at": now}
    tracing.on_end(job(Status.COMPLETED, presentation={"origin": kept}, **times))
    tracing.close()

    spans = collector.spans
    assert set(spans) == {"GET /v1/videos/{id}", "job", "queued", "text_encoding", "denoising", "decoding"}
    assert collector.resource["service.name"] == "sglang-diffusion"
    request, done = spans["GET /v1/videos/{id}"], spans["job"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACEPARENT.split("-")[1]}
    assert request.parent_span_id.hex() == TRACEPARENT.split("-")[2]
    assert done.parent_span_id == request.span_id
    assert all(spans[n].parent_span_id == done.span_id for n in ("queued", "text_encoding", "denoising", "decoding"))
    assert [attributes(event) for event in spans["denoising"].events] == [{"step": 1}, {"step": 2}]
    assert spans["text_encoding"].end_time_unix_nano == spans["denoising"].start_time_unix_nano
    waited = spans["queued"].end_time_unix_nano - spans["queued"].start_time_unix_nano
    assert abs(waited - 2000 * MS) < MS
    told = attributes(request)
    assert (told["http.route"], told["http.response.status_code"]) == ("/v1/videos/{id}", 200)
    assert told["request_id"] == "r1"
    assert attributes(done) == {"job.id": "img_1", "job.kind": "image", "job.status": "completed"}
    assert SECRET not in str(spans) and PROMPT not in str(spans)


def test_a_failed_job_is_an_error_by_its_code(collector: Collector) -> None:
    tracing = open_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url})
    assert tracing is not None
    tracing.on_end(ended(Status.FAILED, failure=Failure(f"{PROMPT}: too long", code="invalid_value")))
    tracing.close()
    span = collector.spans["job"]
    assert span.status.code == 2 and attributes(span)["error.type"] == "invalid_value"
    assert not span.parent_span_id, "a job without a request begins a trace"
    assert PROMPT not in str(collector.spans)


@pytest.mark.parametrize("off", [{}, {"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_nothing_is_imported_unless_traces_are_wanted(off: dict[str, str]) -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"} | off if off else {}
    code = (
        "import sys; from sgl_diffusion.server.tracing import open_tracing\n"
        f"assert open_tracing({environment}) is None\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL=grpc: expected http/protobuf"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER=zipkin: expected otlp or none"),
    ],
)
def test_other_protocols_are_refused_by_name(change: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        open_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"} | change)


def test_without_opentelemetry_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sgl_diffusion.server.spans", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UserError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT is set.*pip install 'sgl-diffusion\[tracing\]'"):
        open_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
