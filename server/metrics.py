"""Figures for Prometheus at `/metrics`: of requests, jobs, what their reports say, the engine, the GPUs. Torch-free.

Counters begin at 0 with the process. What can be asked (queue, engine, snapshots, GPUs) is asked when they are read.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.report import Report
from sgl_diffusion.server.cloud import Uploader
from sgl_diffusion.server.database import StoreUnavailable
from sgl_diffusion.server.folders import REPORT, Folders
from sgl_diffusion.server.jobs import Job, Status
from sgl_diffusion.server.replicas import Replicas

PREFIX = "sglang_diffusion"
REQUEST_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
JOB_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
STAGE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
ENGINE_STATES = ("starting", "ready", "restarting", "failed")
RECENT_BATCHES = 64

log = logging.getLogger("sgl_diffusion.metrics")


class Metrics:
    """All figures of one server, in a registry of their own.

    Args:
        count_jobs: of every status, in the store that servers may share.
        count_uploads: completed jobs whose results are still to be uploaded; None without cloud storage, as `uploader`.
    """

    def __init__(
        self,
        engine: Replicas,
        folders: Folders,
        count_jobs: Callable[[], Mapping[Status, int]],
        uploader: Uploader | None = None,
        count_uploads: Callable[[], int] | None = None,
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self._folders = folders
        self._recent_batches: deque[tuple[str, float]] = deque(maxlen=RECENT_BATCHES)
        ProcessCollector(registry=registry)
        for collector in (_Queue(count_jobs), _Engine(engine), _Snapshots(folders), _Gpus()):
            registry.register(collector)
        if uploader is not None and count_uploads is not None:
            registry.register(_Uploads(uploader, count_uploads))

        def named(kind: type[Any], name: str, help: str, labels: Iterable[str] = (), **more: Any) -> Any:
            return kind(f"{PREFIX}_{name}", help, labels, registry=registry, **more)

        named(Info, "build", "Version of the server.").info({"version": _version()})
        self._requests: Histogram = named(
            Histogram,
            "http_request_duration_seconds",
            "From a request's head to the end of its answer, which a stream holds open.",
            ("method", "route", "status"),
            buckets=REQUEST_BUCKETS_S,
        )
        self._ended: Counter = named(
            Counter, "jobs_ended", "Jobs that ended here; code: why they failed.", ("kind", "status", "code")
        )
        self._waited: Histogram = named(
            Histogram, "job_wait_seconds", "From a job's arrival to its start.", ("kind",), buckets=JOB_BUCKETS_S
        )
        self._took: Histogram = named(
            Histogram,
            "job_duration_seconds",
            "From a job's start to its end.",
            ("kind", "status"),
            buckets=JOB_BUCKETS_S,
        )
        self._results: Counter = named(Counter, "results", "Pictures and clips that were drawn.", ("kind",))
        self._stages: Histogram = named(
            Histogram,
            "stage_duration_seconds",
            "Of a batch, on the clock of the device, by stage.",
            ("stage",),
            buckets=STAGE_BUCKETS_S,
        )
        self._steps: Counter = named(Counter, "denoising_steps", "Of completed batches; a batch does a step once.")
        self._step_seconds: Counter = named(Counter, "denoising_seconds", "Time that those steps took.")
        self._speed: Gauge = named(
            Gauge, "denoising_steps_per_second", "Of the batch that was completed last; NaN before the first."
        )
        self._speed.set(float("nan"))
        self._compilations: Counter = named(
            Counter,
            "compilations",
            "Done, or loaded from disk, while a request waited; the warm-up's are not among them.",
            ("what",),
        )
        self._graph_calls: Counter = named(
            Counter,
            "graph_calls",
            "How work of a stage that can be captured as a graph was done: captured, replayed, or eagerly.",
            ("stage", "how"),
        )

    # -- what is told ------------------------------------------------------------------

    def on_request(self, method: str, route: str, status: int | None, seconds: float) -> None:
        """A request was answered; see `logs.Observe`."""
        method = method if method in METHODS else "other"
        self._requests.labels(method, route, "none" if status is None else status).observe(seconds)

    def on_end(self, job: Job) -> None:
        """A job has ended. Reads its report, if it has one."""
        code = (job.failure.code or job.failure.type) if job.failure else ""
        self._ended.labels(job.kind.value, job.status.value, code).inc()
        if job.started_at is not None and job.ended_at is not None:
            self._waited.labels(job.kind.value).observe((job.started_at - job.created_at).total_seconds())
            took = (job.ended_at - job.started_at).total_seconds()
            self._took.labels(job.kind.value, job.status.value).observe(took)
        if job.status is Status.COMPLETED:
            self._results.labels(job.kind.value).inc(len(job.results))
            self._read(self._folders.results(job.id) / REPORT)

    def _read(self, path: Path) -> None:
        try:
            report = Report.read(path)
        except UserError as e:  # removed by its client already, for example
            log.warning("no figures of a job", extra={"fields": {"error": str(e)}})
            return
        # The jobs of a batch have a report each, of the same work.
        batch = report.timestamp, report.total_duration_ms
        if batch not in self._recent_batches:
            self._recent_batches.append(batch)
            self._count(report)

    def _count(self, report: Report) -> None:
        for stage in report.steps:
            self._stages.labels(stage.name).observe(stage.duration_ms / 1000)
        if report.denoise_steps_ms:
            steps, seconds = len(report.denoise_steps_ms), sum(s.duration_ms for s in report.denoise_steps_ms) / 1000
            self._steps.inc(steps)
            self._step_seconds.inc(seconds)
            self._speed.set(steps / seconds if seconds else float("nan"))
        for what, count in report.effective.get("compilations", {}).items():
            self._compilations.labels(what).inc(count)
        for name, calls in report.effective.get("cuda_graph", {}).items():
            for how, count in (
                ("captured", calls["captures"]),
                ("replayed", calls["replays"]),
                ("eager", sum(calls["eager"].values())),
            ):
                self._graph_calls.labels(name, how).inc(count)

    # -- what is asked -----------------------------------------------------------------

    def make_router(self) -> APIRouter:
        """GET /metrics, in the text format or in OpenMetrics, as the reader prefers."""
        router = APIRouter()

        @router.get("/metrics", include_in_schema=False)
        def metrics(request: Request) -> Response:  # not async: it asks the store and the driver, in a thread
            encode, media_type = choose_encoder(request.headers.get("accept", ""))
            return Response(encode(self.registry), headers={"content-type": media_type})

        return router


class _Queue(Collector):
    def __init__(self, count: Callable[[], Mapping[Status, int]]) -> None:
        self._count = count

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily(
            f"{PREFIX}_jobs", "Jobs in the store by status; queued is the queue.", labels=["status"]
        )
        with suppress(StoreUnavailable):  # the others are all the more of interest
            for status, count in self._count().items():
                jobs.add_metric([status.value], count)
        yield jobs


class _Engine(Collector):
    def __init__(self, engine: Replicas) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(f"{PREFIX}_engine_state", "1 for the state it is in.", labels=["state"])
        for name in ENGINE_STATES:
            state.add_metric([name], float(self._engine.state == name))
        yield state
        yield CounterMetricFamily(
            f"{PREFIX}_engine_restarts",
            "Of the engine process, after deaths.",
            value=self._engine.restarts,
        )


class _Snapshots(Collector):
    def __init__(self, folders: Folders) -> None:
        self._folder = folders.root / "snapshots"

    def collect(self) -> Iterator[Metric]:
        sizes = []
        for file in self._folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # its job has ended just now
                sizes.append(file.stat().st_size)
        yield GaugeMetricFamily(f"{PREFIX}_snapshots", "Kept states of unfinished jobs.", value=len(sizes))
        yield GaugeMetricFamily(f"{PREFIX}_snapshots_bytes", "Their size on disk.", value=sum(sizes))


class _Uploads(Collector):
    def __init__(self, uploader: Uploader, count_waiting: Callable[[], int]) -> None:
        self._uploader, self._count_waiting = uploader, count_waiting

    def collect(self) -> Iterator[Metric]:
        tries = CounterMetricFamily(f"{PREFIX}_uploads", "Attempts to upload a job's results.", labels=["outcome"])
        tries.add_metric(["uploaded"], self._uploader.uploaded)
        tries.add_metric(["failed"], self._uploader.failures)
        yield tries
        with suppress(StoreUnavailable):
            waiting = self._count_waiting()
            yield GaugeMetricFamily(f"{PREFIX}_uploads_waiting", "Jobs whose results are not there yet.", value=waiting)


class _Gpus(Collector):
    """What the driver says of every GPU it shows this process. Nothing, where there is none."""

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            found = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:
            found = []
        self._gpus = [(str(i), gpu) for i, gpu in enumerate(found)]

    def collect(self) -> Iterator[Metric]:
        if not self._gpus:
            return
        nvml = self._nvml
        reads: list[tuple[str, str, Callable[[Any], float]]] = [
            (
                "gpu_memory_used_bytes",
                "Memory in use, by any process.",
                lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
            ),
            ("gpu_memory_total_bytes", "Memory there is.", lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total),
            ("gpu_power_watts", "Power drawn now.", lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
            (
                "gpu_utilization_ratio",
                "Share of the driver's last sampling period in which a kernel ran.",
                lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
            ),
        ]
        for name, help, read in reads:
            family = GaugeMetricFamily(f"{PREFIX}_{name}", help, labels=["gpu"])
            for index, gpu in self._gpus:
                with suppress(nvml.NVMLError):  # a GPU without this sensor, or a slice of one
                    family.add_metric([index], read(gpu))
            yield family


def _version() -> str:
    try:
        return version("sgl-diffusion")
    except PackageNotFoundError:
        return "unknown"
