"""What /metrics says after a script of events, read as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")
parser = pytest.importorskip("prometheus_client.parser")
openmetrics = pytest.importorskip("prometheus_client.openmetrics.parser")

from fastapi import APIRouter, FastAPI  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from sgl_diffusion.runtime.report import Report, StageTime, StepTime  # noqa: E402
from sgl_diffusion.server.database import StoreUnavailable  # noqa: E402
from sgl_diffusion.server.engine_process import EngineStatus  # noqa: E402
from sgl_diffusion.server.folders import REPORT, Folders  # noqa: E402
from sgl_diffusion.server.jobs import Failure, Job, Kind, ResultFile, Status  # noqa: E402
from sgl_diffusion.server.logs import RequestLog  # noqa: E402
from sgl_diffusion.server.metrics import Metrics  # noqa: E402

BEGAN = datetime(2026, 1, 31, 12, tzinfo=UTC)
COUNTS = {Status.QUEUED: 3, Status.IN_PROGRESS: 1, Status.COMPLETED: 5}


def report(job_id: str, *, denoising_ms: float = 500.0) -> Report:
    return Report(
        timestamp="2026-01-31T12:00:00+00:00",
        request_id=job_id,
        commit_hash=None,
        tag="serve",
        total_duration_ms=denoising_ms + 200,
        steps=[
            StageTime(name="denoising", duration_ms=denoising_ms),
            StageTime(name="decoding", duration_ms=200),
        ],
        denoise_steps_ms=[StepTime(step=i, duration_ms=denoising_ms / 4) for i in range(4)],
        memory_checkpoints={},
        meta={},
        effective={
            "compilations": {"triton": 2, "triton_from_disk": 7},
            "cuda_graph": {
                "denoising": {"captures": 1, "replays": 3, "eager": {}},
                "decoding": {"captures": 0, "replays": 0, "eager": {"one reason": 1, "another": 1}},
            },
        },
        versions={},
        outputs=[],
        error=None,
    )


def job(number: int, status: Status, kind: Kind = Kind.IMAGE, **more: Any) -> Job:
    """It came at 12:00:00, began 2 s later and ended 7 s after that."""
    times = {"created_at": BEGAN, "started_at": BEGAN + timedelta(seconds=2), "ended_at": BEGAN + timedelta(seconds=9)}
    if status is Status.COMPLETED:
        more["results"] = [ResultFile(f"{n}.png", "image/png", 10, n) for n in range(2)]
    prefix = "video" if kind is Kind.VIDEO else "img"
    return Job(
        f"{prefix}_{number:032x}",
        kind,
        status,
        {},
        {},
        tenant="",
        priority=0,
        work=1.0,
        batch_key=None,
        **times,
        **more,
    )


class Server:
    """Metrics, read over HTTP."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.engine, self.folders = EngineStatus(), Folders(folder)
        self.metrics = Metrics(self.engine, self.folders, more.pop("count_jobs", lambda: COUNTS), **more)
        videos = APIRouter()

        @videos.get("/videos/{id}")
        async def video(id: str) -> str:
            return id

        app = FastAPI()
        app.include_router(videos, prefix="/v1")
        app.include_router(self.metrics.make_router())
        self.client = TestClient(RequestLog(app, self.metrics.on_request))

    def ends(self, job: Job, report: Report | None = None) -> None:
        if report is not None:
            self.folders.results(job.id).mkdir()
            report.write(self.folders.results(job.id) / REPORT)
        self.metrics.on_end(job)

    def read(self) -> Mapping[tuple[str, frozenset[tuple[str, str]]], float]:
        answer = self.client.get("/metrics")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
        families = parser.text_string_to_metric_families(answer.text)
        return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}

    def value(self, name: str, **labels: str) -> float | None:
        return self.read().get((f"sglang_diffusion_{name}", frozenset(labels.items())))


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def test_the_queue_is_counted_in_the_store(server: Server) -> None:
    assert server.value("jobs", status="queued") == 3
    assert server.value("jobs", status="in_progress") == 1


def test_without_its_store_the_other_figures_are_there(tmp_path: Path) -> None:
    def away() -> Mapping[Status, int]:
        raise StoreUnavailable("away")

    server = Server(tmp_path, count_jobs=away)
    assert server.value("jobs", status="queued") is None
    assert server.value("engine_state", state="starting") == 1


def test_ended_jobs_are_counted_by_what_became_of_them(server: Server) -> None:
    server.ends(job(1, Status.COMPLETED), report("1"))
    failure = Failure("no memory", code="out_of_memory")
    for number in (2, 3):
        server.ends(job(number, Status.FAILED, Kind.VIDEO, failure=failure))
    assert server.value("jobs_ended_total", kind="image", status="completed", code="") == 1
    assert server.value("jobs_ended_total", kind="video", status="failed", code="out_of_memory") == 2
    assert server.value("results_total", kind="image") == 2
    assert server.value("job_wait_seconds_sum", kind="video") == 4
    assert server.value("job_duration_seconds_sum", kind="video", status="failed") == 14
    assert server.value("job_duration_seconds_bucket", kind="image", status="completed", le="5.0") == 0
    assert server.value("job_duration_seconds_bucket", kind="image", status="completed", le="10.0") == 1


def test_reports_are_added_up(server: Server) -> None:
    server.ends(job(1, Status.COMPLETED), report("1"))
    server.ends(job(2, Status.COMPLETED), report("2", denoising_ms=1000.0))
    assert server.value("stage_duration_seconds_count", stage="denoising") == 2
    assert server.value("stage_duration_seconds_sum", stage="denoising") == 1.5
    assert server.value("stage_duration_seconds_sum", stage="decoding") == 0.4
    assert server.value("denoising_steps_total") == 8
    assert server.value("denoising_seconds_total") == 1.5
    assert server.value("denoising_steps_per_second") == 4
    assert server.value("compilations_total", what="triton") == 4
    assert server.value("compilations_total", what="triton_from_disk") == 14
    assert server.value("graph_calls_total", stage="denoising", how="replayed") == 6
    assert server.value("graph_calls_total", stage="denoising", how="captured") == 2
    assert server.value("graph_calls_total", stage="decoding", how="eager") == 4


def test_work_of_a_batch_is_counted_once(server: Server) -> None:
    for number in range(3):
        server.ends(job(number, Status.COMPLETED), report(str(number)))
    assert server.value("jobs_ended_total", kind="image", status="completed", code="") == 3
    assert server.value("denoising_steps_total") == 4


def test_a_report_that_is_gone_costs_no_other_figure(server: Server) -> None:
    server.ends(job(1, Status.COMPLETED))
    assert server.value("jobs_ended_total", kind="image", status="completed", code="") == 1
    assert server.value("denoising_steps_total") == 0


def test_the_engine_is_shown_as_it_is(server: Server) -> None:
    server.engine.state, server.engine.restarts = "restarting", 2
    states = {s: server.value("engine_state", state=s) for s in ("starting", "ready", "restarting", "failed")}
    assert states == {"starting": 0, "ready": 0, "restarting": 1, "failed": 0}
    assert server.value("engine_restarts_total") == 2


def test_snapshots_are_those_on_disk(server: Server) -> None:
    assert server.value("snapshots") == 0
    server.folders.snapshot("img_1").write_bytes(b"12345")
    assert (server.value("snapshots"), server.value("snapshots_bytes")) == (1, 5)


def test_uploads_are_shown_where_there_are_any(server: Server, tmp_path: Path) -> None:
    assert server.value("uploads_waiting") is None
    uploader: Any = SimpleNamespace(uploaded=4, failures=2)
    with_cloud = Server(tmp_path / "other", uploader=uploader, count_uploads=lambda: 7)
    assert with_cloud.value("uploads_waiting") == 7
    assert with_cloud.value("uploads_total", outcome="uploaded") == 4
    assert with_cloud.value("uploads_total", outcome="failed") == 2


def test_requests_are_told_apart_by_route_not_by_path(server: Server) -> None:
    for n in range(3):
        server.client.get(f"/v1/videos/video_{n}")
    for n in range(3):
        server.client.get(f"/random/{n}")
    count = "http_request_duration_seconds_count"
    assert server.value(count, method="GET", route="/v1/videos/{id}", status="200") == 3
    assert server.value(count, method="GET", route="unmatched", status="404") == 3


def test_the_process_tells_when_it_began(server: Server) -> None:
    values = server.read()
    assert values[("process_start_time_seconds", frozenset())] > 1.7e9
    assert values[("process_resident_memory_bytes", frozenset())] > 1e6


def test_two_servers_of_a_process_share_nothing(tmp_path: Path) -> None:
    first, second = Server(tmp_path / "1"), Server(tmp_path / "2")
    first.ends(job(1, Status.CANCELLED))
    assert first.value("jobs_ended_total", kind="image", status="cancelled", code="") == 1
    assert second.value("jobs_ended_total", kind="image", status="cancelled", code="") is None


def test_openmetrics_is_spoken_to_who_asks_for_it(server: Server) -> None:
    answer = server.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics.text_string_to_metric_families(answer.text)}
    assert {"sglang_diffusion_jobs", "sglang_diffusion_engine_state", "process_start_time_seconds"} <= names


def test_gpus_are_shown_as_the_driver_sees_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that tells everything, and one whose power is no one's business."""
    pynvml = pytest.importorskip("pynvml")

    def power(gpu: int) -> int:
        if gpu == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 350_000

    fake = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=2**30, total=2**37),
        "nvmlDeviceGetPowerUsage": power,
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=25),
    }
    for name, function in fake.items():
        monkeypatch.setattr(pynvml, name, function)
    server = Server(tmp_path)
    assert server.value("gpu_memory_used_bytes", gpu="0") == 2**30
    assert server.value("gpu_memory_total_bytes", gpu="1") == 2**37
    assert server.value("gpu_power_watts", gpu="0") == 350
    assert server.value("gpu_power_watts", gpu="1") is None
    assert server.value("gpu_utilization_ratio", gpu="1") == 0.25
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 0)
    assert Server(tmp_path).value("gpu_memory_used_bytes", gpu="0") is None
