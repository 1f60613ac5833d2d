"""What the server writes to stderr: a line for every request, for every job that begins or ends, for what goes wrong.

Lines are text (`message key=value ...`) or JSON objects. Neither prompts nor keys are in them. Torch-free.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgl_diffusion.server.jobs import Job, JobEvent, Progress

REQUEST_ID = b"x-request-id"
SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
PLAIN_WORD = re.compile(r"[^\s\"=\\\x00-\x1f\x7f]+")
PROBES = frozenset({"/health", "/health_generate", "/ready", "/metrics"})  # asked every few seconds: lines for `debug`
NO_ROUTE = "unmatched"

log = logging.getLogger("sgl_diffusion.http")
job_log = logging.getLogger("sgl_diffusion.jobs")

origin: ContextVar[Mapping[str, str]] = ContextVar("origin", default={})  # noqa: B039 (never changed in place)
"""Of the request that is being answered: its `request_id`, and `traceparent` where there are traces.

A job keeps it as `presentation["origin"]`, so that what is told of the job can be found from the request.
"""


# -- lines ---------------------------------------------------------------------------------


def set_up_logs(level: str, format: Literal["text", "json"]) -> None:
    """Sends all log lines of this process to stderr: ours from `level` on, those of libraries that warn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("sgl_diffusion").setLevel(level.upper())


class TextLines(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO request method=GET path=/v1/models status=200 ms=1.2 request_id=...`"""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")  # one record, one line
        words = [f"{name}={_word(value)}" for name, value in _fields(record).items()]
        line = " ".join([_time(record), record.levelname, message, *words])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonLines(logging.Formatter):
    """Objects with `time`, `level`, `logger`, `message`, and what there is to say beside it."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        line |= {"message": record.getMessage()} | _fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Those given as `extra={"fields": {...}}`, and the request that is being answered. None is left out."""
    fields = {name: value for name, value in getattr(record, "fields", {}).items() if value is not None}
    if (request_id := origin.get().get("request_id")) is not None:
        fields.setdefault("request_id", request_id)
    return fields


def _word(value: object) -> str:
    return str(value) if PLAIN_WORD.fullmatch(str(value)) else json.dumps(str(value))


# -- requests ------------------------------------------------------------------------------

Observe = Callable[[str, str, int | None, float], None]
"""Method, route, status (None: the client left before there was one), seconds."""


class RequestLog:
    """ASGI middleware, the outermost: one line for every request, and an id for it.

    The id is the client's `X-Request-ID` if that is 1 to 64 letters, digits, `.`, `_` or `-`, else a new one. It is in
    the answer's header, in `origin`, and so in every line that is logged while the request is answered.

    Args:
        observe: told of every request as well.
    """

    def __init__(self, app: ASGIApp, observe: Observe | None = None) -> None:
        self._app, self._observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _given_id(scope) or uuid.uuid4().hex.encode()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (REQUEST_ID, request_id)]}
            await send(message)

        began = time.perf_counter()
        token = origin.set({"request_id": request_id.decode()})
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._tell(scope, status, time.perf_counter() - began)
            origin.reset(token)

    def _tell(self, scope: Scope, status: int | None, seconds: float) -> None:
        route = route_of(scope)
        if self._observe is not None:
            self._observe(scope["method"], route, status, seconds)
        level = logging.DEBUG if route in PROBES and status is not None and status < 500 else logging.INFO
        if log.isEnabledFor(level):
            fields = {
                "method": scope["method"],
                # as sent, still percent-encoded; never the query, where some clients put keys
                "path": scope.get("raw_path", b"").decode("ascii", "replace"),
                "route": route,
                "status": status,
                "ms": round(seconds * 1000, 1),
                "tenant": scope.get("state", {}).get("tenant") or None,
            }
            log.log(level, "request", extra={"fields": fields})


def _given_id(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == REQUEST_ID and SANE_ID.fullmatch(value):
            return bytes(value)
    return None


def route_of(scope: Scope) -> str:
    """The path with its parameters by name, `/v1/videos/{id}`: there are few of them, whatever clients ask for.

    Known once the request was routed.
    """
    template: str | None = getattr(scope.get("route"), "path_format", None)
    if template is None:
        return NO_ROUTE
    # A router that is included under a prefix does not know of it; the rest of the path is the prefix.
    written = template
    for name, value in scope.get("path_params", {}).items():
        written = written.replace(f"{{{name}}}", str(value))
    path: str = scope["path"]
    return path.removesuffix(written) + template if path.endswith(written) else template


# -- jobs ----------------------------------------------------------------------------------


class JobLog:
    """One line when a job has been queued, one when the engine has begun it, one for its end."""

    def __init__(self) -> None:
        self._begun: set[str] = set()

    def queued(self, job: Job) -> None:
        job_log.info("job", extra={"fields": _known(job)})

    def on_event(self, job_id: str, event: JobEvent) -> None:
        if isinstance(event, Progress) and job_id not in self._begun:
            self._begun.add(job_id)
            job_log.info("job", extra={"fields": {"job": job_id, "status": "in_progress"}})

    def on_end(self, job: Job) -> None:
        self._begun.discard(job.id)
        fields = _known(job)
        if job.ended_at is not None:
            started_at = job.started_at or job.ended_at
            fields["waited_s"] = round((started_at - job.created_at).total_seconds(), 3)
            fields["took_s"] = round((job.ended_at - started_at).total_seconds(), 3)
        if job.failure is not None:
            fields |= {"code": job.failure.code, "error": _without_prompt(job.failure.message, job)}
        job_log.log(logging.WARNING if job.failure else logging.INFO, "job", extra={"fields": fields})


def _known(job: Job) -> dict[str, Any]:
    return {
        "job": job.id,
        "status": job.status.value,
        "kind": job.kind.value,
        "tenant": job.tenant or None,
        "request_id": job.presentation.get("origin", {}).get("request_id"),
    }


def _without_prompt(message: str, job: Job) -> str:
    """Some complaints quote what they complain of."""
    given = [job.sampling.get("prompt", ()), job.sampling.get("negative_prompt") or ()]
    for text in [t for texts in given for t in ([texts] if isinstance(texts, str) else texts)]:
        if text:
            message = message.replace(text, "(prompt)")
    return message
