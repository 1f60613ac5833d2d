"""Traces of requests and of the jobs they make, sent to an OpenTelemetry collector. Imported by `tracing.py` alone.

A request is a span, which goes on from the client's `traceparent`. A job is a span below that of its request, whichever
server draws it and whenever: the job keeps the `traceparent`. Below it are `queued` and the stages, and denoising steps
are events. A job's spans are made when it ends; what the engine has told of it until then is kept here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgl_diffusion.server import jobs
from sgl_diffusion.server.jobs import Job, JobEvent, Progress
from sgl_diffusion.server.logs import PROBES, origin, route_of

SERVICE = "sglang-diffusion"  # unless OTEL_SERVICE_NAME says otherwise
CARRIED = ("traceparent", "tracestate")

_w3c = TraceContextTextMapPropagator()


@dataclass
class _Stage:
    name: str
    began_ns: int
    steps: list[tuple[int, int]] = field(default_factory=list)  # number, when in ns


def open_spans(environment: Mapping[str, str]) -> Tracing:
    """Spans go out in batches, from a thread; addresses, headers, sampling are the SDK's to read from OTEL_*."""
    named = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create(None if named else {SERVICE_NAME: SERVICE}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Tracing:
    """Makes the spans. Requests come through `TracedRequests`, jobs through the dispatcher's hooks."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self.tracer = provider.get_tracer("sgl_diffusion")
        self._stages: dict[str, list[_Stage]] = {}

    def close(self) -> None:
        """Sends what is left. Blocks, for some seconds where nobody listens."""
        self._provider.shutdown()

    def on_event(self, job_id: str, event: JobEvent) -> None:
        if not isinstance(event, Progress):
            return
        now, stages = time.time_ns(), self._stages.setdefault(job_id, [])
        if not stages or stages[-1].name != event.stage:
            stages.append(_Stage(event.stage, now))
        if event.step and (not stages[-1].steps or stages[-1].steps[-1][0] != event.step):
            stages[-1].steps.append((event.step, now))

    def on_end(self, job: Job) -> None:
        stages = self._stages.pop(job.id, [])
        end_ns = _ns(job.ended_at) if job.ended_at is not None else time.time_ns()
        begin_ns = _ns(job.started_at) if job.started_at is not None else end_ns
        request = _w3c.extract(job.presentation.get("origin", {}), Context())
        attributes = {"job.id": job.id, "job.kind": job.kind.value, "job.status": job.status.value}
        span = self.tracer.start_span("job", request, start_time=_ns(job.created_at), attributes=attributes)
        inside = set_span_in_context(span, Context())
        self.tracer.start_span("queued", inside, start_time=_ns(job.created_at)).end(begin_ns)
        ends_ns = [after.began_ns for after in stages[1:]] + [end_ns]
        for stage, stage_end_ns in zip(stages, ends_ns, strict=False):
            part = self.tracer.start_span(stage.name, inside, start_time=stage.began_ns)
            for step, when_ns in stage.steps:
                part.add_event("step", {"step": step}, timestamp=when_ns)
            part.end(max(stage_end_ns, stage.began_ns))  # a database's clock may be behind ours
        if job.status is jobs.Status.FAILED and job.failure is not None:  # by its code: messages may quote a prompt
            span.set_attribute("error.type", job.failure.code or job.failure.type)
            span.set_status(Status(StatusCode.ERROR))
        span.end(end_ns)


def _ns(time: datetime) -> int:
    return int(time.timestamp() * 1e9)


class TracedRequests:
    """ASGI middleware, inside `RequestLog`: a span for every request but those of probes."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app, self._tracer = app, tracing.tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        client = _w3c.extract({name: given[name] for name in CARRIED if name in given}, Context())
        span = self._tracer.start_span(scope["method"], client, kind=SpanKind.SERVER)
        carrier: dict[str, str] = {}
        _w3c.inject(carrier, set_span_in_context(span, Context()))

        async def send_and_see(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(Status(StatusCode.ERROR))
            await send(message)

        token = origin.set({**origin.get(), **carrier})
        try:
            await self._app(scope, receive, send_and_see)
        finally:
            _describe(span, scope)
            span.end()
            origin.reset(token)


def _describe(span: Span, scope: Scope) -> None:
    """In the names of OpenTelemetry's conventions for HTTP; never the query, where some clients put keys."""
    route = route_of(scope)
    span.update_name(f"{scope['method']} {route}")
    span.set_attribute("http.request.method", scope["method"])
    span.set_attribute("http.route", route)
    span.set_attribute("url.path", scope["path"])
    span.set_attribute("request_id", origin.get().get("request_id", ""))
