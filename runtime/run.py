"""One request on its way through an engine: from parameters to files and a report, whatever becomes of it."""

from __future__ import annotations

import datetime
import logging
import os
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.compilation import compilations
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.events import Drawn, Event, Finished, Result, StageFinished, StageStarted
from sgl_diffusion.runtime.latents import Latents, latents_path, resumed, save_latents
from sgl_diffusion.runtime.live_bytes import Gauge, module_bytes
from sgl_diffusion.runtime.output import check_outputs, plan_outputs, request_digest, save_trace, trace_path
from sgl_diffusion.runtime.pipeline import DecodeFailure, NativePipeline
from sgl_diffusion.runtime.report import (
    MIB,
    Accounting,
    Failure,
    MemoryReport,
    Report,
    StageTime,
    StepTime,
    commit_hash,
    memory_checkpoint,
    versions,
)
from sgl_diffusion.runtime.request import DEFAULT_FPS, Job, Request, resolve_request
from sgl_diffusion.runtime.resolve import Resolved
from sgl_diffusion.runtime.results import Results
from sgl_diffusion.runtime.snapshots import Snapshot
from sgl_diffusion.runtime.telemetry import Telemetry
from sgl_diffusion.runtime.trace import Span, Stopwatch, profiler

if TYPE_CHECKING:
    from sgl_diffusion.runtime.engine import Engine

log = logging.getLogger("sgl_diffusion")

TAG = "cli_generate"  # of reports


class Run:
    """What is known of a request so far, so that a failure can be reported with it."""

    def __init__(self, engine: Engine, params: SamplingParams, resume: Snapshot | None) -> None:
        self.engine, self.params, self.resume = engine, params, resume
        self.watch = Stopwatch(engine.device, annotate=params.profile)
        self.gauge: Gauge | None = None
        self.started, self.compiled_before = time.perf_counter(), compilations()
        self.memory = {"before_forward": memory_checkpoint(engine.device)}
        self.request_id = uuid.uuid4().hex
        self.request: Request | None = None
        self.job: Any = None  # as the backend prepares a request
        self.plan: Sequence[Path] = ()  # the results' files
        self.paths: list[Path] = []
        self.latents: Tensor | None = None  # finished ones, that this run has made
        self.telemetry: Telemetry | None = None
        self.finished = False

    def events(self) -> Generator[Event, None, None]:
        engine = self.engine
        self.params, latents = resumed(self.params, engine.args)
        params = self.params
        if params.perf_dump_path is not None:
            _demand_writable("perf_dump_path", Path(params.perf_dump_path))
        self.request = request = resolve_request(params, engine.model.sampling_defaults, engine.args)
        self.job = job = engine.backend.prepare(request)
        plan = plan_outputs(params, request, is_video=engine.backend.draws_video) if params.save_output else []
        self.plan = plan
        trace = trace_path(plan) if params.profile else None
        with Results(request, params, self._fps(request), plan, self._metadata) as results:
            with self._observed(trace):
                for event in self._events_of(request, job, latents):
                    if isinstance(event, Drawn):
                        self.latents = None if latents else event.latents
                        results.add(event.pixels)
                    else:
                        yield event
            if plan:
                yield StageStarted("saving")
            with self.watch.span("saving") if plan else nullcontext():
                outputs, paths = results.finish()
            self.paths += paths
            if plan:
                yield StageFinished("saving")
        if trace is not None:
            self.paths.append(trace)
        report = self._report(error=None)
        self.finished = True
        if params.perf_dump_path is not None:
            report.write(Path(params.perf_dump_path))
        yield Finished(Result(outputs, self.paths, report))

    def _events_of(self, request: Request, job: Any, latents: Latents | None) -> Generator[Event, None, None]:
        """Draws the request, or decodes its latents."""
        backend, params = self.engine.backend, self.params
        if not isinstance(backend, NativePipeline):
            for name in ("resume_latents", "measure_memory"):
                if value := getattr(params, name):
                    raise UserError(f"{name}={str(value).lower()}: the diffusers backend cannot do it")
            if self.resume is not None:
                raise UserError("resume: the diffusers backend takes no snapshots")
            yield from backend.run(request, self.watch)
            return
        if params.measure_memory and backend.compiled:
            raise UserError("measure_memory=true: not with enable_torch_compile, whose memory cannot be followed")
        counting = params.measure_memory
        self.gauge = Gauge(backend.plan.device, counting=counting, weights=module_bytes(backend.parts.values()))
        try:
            yield from backend.run(job, self.watch, gauge=self.gauge, latents=latents, resume=self.resume)
        except DecodeFailure as e:
            why = "out of memory" if isinstance(e.__cause__, torch.OutOfMemoryError) else str(e.__cause__)
            self.latents = None if latents else e.latents
            raise RunFailure(f"the decode failed: {why}") from e

    def failure(self, why: str) -> RunFailure:
        """Says why. Latents that are finished but not decoded, or not written, are kept beside the planned results, if
        another decode could help.
        """
        if self.latents is None or not self.plan or self.request is None or not torch.isfinite(self.latents).all():
            return RunFailure(why)
        try:
            path = save_latents(self.latents, self.request, self.engine.args, latents_path(self.plan))
        except RunFailure as e:
            return RunFailure(f"{why}; nor are its latents kept: {e}")
        self.paths.append(path)
        return RunFailure(
            f"{why}. The finished latents are kept: --resume-latents {path} decodes them, "
            "for example with --vae-tiling or to another folder"
        )

    def _fps(self, request: Request) -> int | None:
        """Frames per second of the clips; None for pictures."""
        if isinstance(self.job, Job):
            return self.job.fps
        return request.given.get("fps", DEFAULT_FPS) if self.engine.backend.draws_video else None

    @contextmanager
    def _observed(self, trace: Path | None) -> Iterator[None]:
        """Watches the work inside: a GPU's clocks and power for a perf dump, every operation for a trace."""
        device, profile = self.engine.device, None
        with ExitStack() as observers:
            if device.type == "cuda" and self.params.perf_dump_path is not None:
                uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                self.telemetry = observers.enter_context(Telemetry(uuid))
            if trace is not None:
                profile = observers.enter_context(profiler(device))
            yield
        if trace is not None and profile is not None:
            with self.watch.span("trace_writing"):
                save_trace(profile, trace)

    def close(self, error: BaseException | None) -> None:
        """Writes the perf dump of a request that did not finish."""
        path = self.params.perf_dump_path
        if not self.finished and path is not None and Path(path).parent.is_dir():
            self._report(error).write(Path(path))

    def _metadata(self, index: int) -> dict[str, Any]:
        """What is needed to draw a result again."""
        request = self.request
        assert request is not None
        return {
            "prompt": request.prompt_of(index),
            "negative_prompt": request.negative_prompt,
            "seed": request.seeds[index],
            "model": self.engine.args.model_path,
            "pipeline_class": self.engine.model.pipeline_class,
            "backend": self.engine.backend.name,
            "digest": request_digest(request, index),
            **request.given,
        }

    def _report(self, error: BaseException | None) -> Report:
        engine, request = self.engine, self.request
        try:
            spans = self.watch.finish()
        except RuntimeError:  # a broken GPU answers every call with the error that broke it: report without times
            if error is None:
                raise
            spans = []
        measured = {} if self.gauge is None else self.gauge.peaks
        self.memory["after_forward"] = memory_checkpoint(engine.device)
        if engine.device.type == "cuda" and measured:  # the allocator's own peak is that of the last stage
            self.memory["after_forward"].peak_allocated_mb = max(measured.values()) / MIB
        total_ms = (time.perf_counter() - self.started) * 1000
        stages = [StageTime(name=s.name, duration_ms=s.duration_ms) for s in spans if s.depth == 0]
        effective: dict[str, Any] = {
            "backend": engine.backend.name,
            "backend_reason": engine.model.why,
            "pipeline_class": engine.model.pipeline_class,
            "device": str(engine.device),
            "performance_mode": {"mode": engine.args.performance_mode, "chose": dict(engine.backend.plan.chosen)},
            "warmup": engine.warmed_up,
            "resumed_after_step": None if self.resume is None else self.resume.step,
            "compilations": asdict(compilations() - self.compiled_before),
            "ignored": [],
        }
        meta: dict[str, Any] = {"model": engine.args.model_path}
        if request is not None:
            meta |= {
                "prompt": list(request.prompts),
                "negative_prompt": request.negative_prompt,
                "seed": request.seeds,
                **request.given,
            }
            if error is None:
                backend = engine.backend
                native = isinstance(backend, NativePipeline)
                effective |= backend.effective(self.job if native else request)  # type: ignore[arg-type]
        return Report(
            timestamp=_now(),
            request_id=self.request_id,
            commit_hash=commit_hash(),
            tag=TAG,
            total_duration_ms=total_ms,
            steps=stages,
            denoise_steps_ms=[StepTime(step=i, duration_ms=s.duration_ms) for i, s in enumerate(_steps(spans))],
            memory_checkpoints=self.memory,
            meta=meta,
            effective=effective,
            versions=versions(engine.device),
            outputs=[str(p) for p in self.paths],
            error=None if error is None else Failure(type=type(error).__name__, message=str(error)),
            accounting=None if error is not None else self._accounting(stages, total_ms),
            telemetry=None if self.telemetry is None else self.telemetry.ranges(),
            load=engine.load_report,
            memory=self._memory_report(measured) if error is None else None,
        )

    def _memory_report(self, measured: Mapping[str, int]) -> MemoryReport | None:
        backend = self.engine.backend
        return backend.memory_report(measured) if isinstance(backend, NativePipeline) else None

    def _accounting(self, stages: Sequence[StageTime], total_ms: float) -> Accounting | None:
        """Counted and measured after the request, and only if someone will read it."""
        backend = self.engine.backend
        if self.request is None or self.params.perf_dump_path is None or not isinstance(backend, NativePipeline):
            return None
        if self.params.resume_latents is not None or self.resume is not None:  # some of the work was another run's
            return None
        try:
            return backend.account(self.job, stages, total_ms)
        except torch.OutOfMemoryError:  # the pictures are drawn: they are not lost for this
            log.warning("no accounting in the report: the device has no room to measure its limits")
            return None


def _steps(spans: list[Span]) -> list[Span]:
    return [s for s in spans if s.name == "denoise_step"]


def _demand_writable(field: str, path: Path) -> None:
    """Finds out before the work whether the file can be written, without leaving one behind."""
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{field}={path}: the folder {folder} does not exist or is not writable")
    if path.is_dir():
        raise UserError(f"{field}={path}: is a folder; expected a file name")


def check_files(params: SamplingParams, model: Resolved, args: ServerArgs) -> None:
    """Whether the files of a request can be written, as far as that can be told before its model is loaded.

    Raises:
        UserError: not so.
    """
    if params.perf_dump_path is not None:
        _demand_writable("perf_dump_path", Path(params.perf_dump_path))
    if params.save_output and model.native:  # what diffusers' draw is known when they are loaded
        assert model.blueprint is not None
        request = resolve_request(params, model.sampling_defaults, args)
        check_outputs(params, request, is_video=model.blueprint.family.draws_video)


def report_failed_load(params: SamplingParams, args: ServerArgs, seconds: float, error: UserError | RunFailure) -> None:
    """Writes the perf dump of a request whose model could not be loaded, or not for it."""
    path = None if params.perf_dump_path is None else Path(params.perf_dump_path)
    if path is None or not path.parent.is_dir():
        return
    report = Report(
        timestamp=_now(),
        request_id=uuid.uuid4().hex,
        commit_hash=commit_hash(),
        tag=TAG,
        total_duration_ms=seconds * 1000,
        steps=[],
        denoise_steps_ms=[],
        memory_checkpoints={},
        meta={"model": args.model_path},
        effective={"ignored": []},
        versions=versions(torch.device("cpu")),
        outputs=[],
        error=Failure(type=type(error).__name__, message=str(error)),
    )
    report.write(path)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
