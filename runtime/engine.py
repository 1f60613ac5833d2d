"""The file to read first: a loaded model, and what happens to a request.

engine = Engine.load(ServerArgs(model_path="..."))
for event in engine.generate(SamplingParams(prompt="a red circle on a blue background")):
    ...  # the last one is Finished(result)
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.compilation import compilations, keep_compiled_code
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.events import Drawn, Event, Finished, Result, StageFinished, StageStarted
from sgl_diffusion.runtime.latents import Latents, latents_path, resumed, save_latents
from sgl_diffusion.runtime.live_bytes import Gauge, module_bytes
from sgl_diffusion.runtime.memory import MemoryPlanner
from sgl_diffusion.runtime.output import (
    plan_outputs,
    request_digest,
    save_trace,
    trace_path,
)
from sgl_diffusion.runtime.parallel.lockstep import ALONE, DrawOrder, Lockstep, WarmUpOrder
from sgl_diffusion.runtime.parallel.machines import machine_of
from sgl_diffusion.runtime.parallel.mesh import Mesh, process_group
from sgl_diffusion.runtime.parallel.ranks import speaks, started_ranks
from sgl_diffusion.runtime.parallel.steps import denoiser_dtype, warning_of
from sgl_diffusion.runtime.pipeline import DecodeFailure, NativePipeline
from sgl_diffusion.runtime.prewarm import throw_away_requests
from sgl_diffusion.runtime.reading import READERS
from sgl_diffusion.runtime.report import (
    MIB,
    Accounting,
    Failure,
    LoadReport,
    MemoryReport,
    Report,
    StageTime,
    StepTime,
    commit_hash,
    memory_checkpoint,
    versions,
)
from sgl_diffusion.runtime.request import DEFAULT_FPS, Job, Request, resolve_request
from sgl_diffusion.runtime.resolve import Resolved, resolve
from sgl_diffusion.runtime.results import Results
from sgl_diffusion.runtime.snapshots import Snapshot
from sgl_diffusion.runtime.telemetry import Telemetry
from sgl_diffusion.runtime.trace import Span, Stopwatch, profiler

if TYPE_CHECKING:
    from sgl_diffusion.runtime.diffusers_backend import DiffusersPipeline

log = logging.getLogger("sgl_diffusion")


class Engine:
    """A model ready to draw. `backend` is the native pipeline or the diffusers one; both answer to the same calls."""

    def __init__(
        self,
        args: ServerArgs,
        model: Resolved,
        backend: NativePipeline | DiffusersPipeline,
        lockstep: Lockstep = ALONE,
        ranks: ExitStack | None = None,
    ) -> None:
        self.args, self.model, self.backend = args, model, backend
        self.lockstep, self._ranks = lockstep, ranks or ExitStack()
        self.device = backend.plan.device
        self.warmed_up: dict[str, Any] | None = None  # what a warm-up did, for the report
        self.load_report: LoadReport | None = None

    @classmethod
    def load(cls, args: ServerArgs, like: SamplingParams | None = None) -> Engine:
        """Loads the model the arguments name. Of several ranks, all call this, and all but the first then `follow`.

        Args:
            like: the request that has to fit into memory beside the weights, and that a warm-up takes after, if there
                is to be one; only its results are not written.
        Raises:
            UserError: the model cannot be found, read or run as asked.
        """
        if args.num_gpus is None and started_ranks() > 1:
            args = args.model_copy(update={"num_gpus": started_ranks()})
        started = time.perf_counter()
        first, latents = (None, None) if like is None else resumed(like, args)
        throw_away = throw_away_requests(args, first or SamplingParams(prompt=["a warm-up"]))
        keep_compiled_code()
        compilations()  # counted from here on
        model = resolve(args, ([first] if first else []) + throw_away)
        memory = _plan_memory(model, args, first, latents is not None)
        if memory is not None and memory.plan.layout.ranks > 1 and memory.plan.device.type == "cuda" and speaks():
            _warn_of_slowness(model, memory, args, first)
        with ExitStack() as ranks:
            lockstep, model = _join(model, args, ranks)
            engine = cls(args, model, _build(model, args, memory, lockstep), lockstep, ranks.pop_all())
        backend, now = engine.backend, time.perf_counter()
        components = backend.loaded if isinstance(backend, NativePipeline) else {}
        engine.load_report = load = LoadReport(
            wall_ms=(now - started) * 1000, warm_up_ms=0.0, readers=READERS, components=components
        )
        log.info("loaded %s with the %s backend (%s): %s", args.model_path, backend.name, model.why, load.summary())
        if throw_away and lockstep.is_first:
            engine.warm_up(throw_away)
            load.wall_ms = (time.perf_counter() - started) * 1000
            load.warm_up_ms = (time.perf_counter() - now) * 1000
        return engine

    def warm_up(self, requests: Sequence[SamplingParams]) -> None:
        """Draws what is thrown away, so that requests of these shapes compile, capture and tune nothing.

        Raises:
            UserError: a request that this model cannot honour.
        """
        started, before = time.perf_counter(), compilations()
        self.lockstep.give(WarmUpOrder(len(requests)))
        with self.backend.warming_up(len(requests)):
            reports = [self.run(request).report for request in requests]
        self.lockstep.give(WarmUpOrder(None))
        self.warmed_up = {
            "sizes": [report.effective.get("size") for report in reports],
            "duration_ms": (time.perf_counter() - started) * 1000,
            "compilations": asdict(compilations() - before),
        }
        log.info("warmed up in %.1f s: %s", time.perf_counter() - started, self.warmed_up["compilations"])

    # -- several ranks --------------------------------------------------------------

    def follow(self) -> None:
        """What all ranks but the first do: their part of its requests, until it closes."""
        assert isinstance(self.backend, NativePipeline), "diffusers' has one rank"
        with ExitStack() as warming_up:
            while (order := self.lockstep.take()) is not None:
                if isinstance(order, DrawOrder):
                    self.backend.follow(order)
                elif order.shapes is None:
                    warming_up.close()
                else:
                    warming_up.enter_context(self.backend.warming_up(order.shapes))

    def close(self) -> None:
        """Lets other ranks go. One that failed before them is not waited for."""
        if self.lockstep.broken:
            return
        if self.lockstep.is_first:
            self.lockstep.give(None)
        self._ranks.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    # -- a request ------------------------------------------------------------------

    def generate(self, params: SamplingParams, resume: Snapshot | None = None) -> Generator[Event, None, None]:
        """Draws a request. The last event is `Finished`; files and the perf dump are written before it.

        Closing the iterator ends the work where it is.

        Args:
            resume: taken between two steps of the same request, which goes on from there to the same bytes.
        Raises:
            UserError: a request that cannot be honoured, found before any work is done. The perf dump is still written.
            RunFailure: memory ran out, or the model drew something that is not a picture.
        """
        run = _Run(self, params, resume)
        try:
            yield from run.events()
        except RunFailure as e:
            raise run.failure(str(e)) from e
        except torch.OutOfMemoryError as e:
            told = str(e).splitlines()[0]
            raise RunFailure(f"out of device memory: {told} Try --performance-mode memory or a smaller picture.") from e
        finally:
            run.close(sys.exc_info()[1])

    def run(self, params: SamplingParams) -> Result:
        """Draws a request without progress."""
        for event in self.generate(params):
            if isinstance(event, Finished):
                return event.result
        raise AssertionError("generate ends with Finished")


class _Run:
    """One request on its way: what is known so far, so that a failure can be reported with it."""

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
            timestamp=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            request_id=self.request_id,
            commit_hash=commit_hash(),
            tag="cli_generate",
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


def _plan_memory(
    model: Resolved, args: ServerArgs, first: SamplingParams | None, decode_only: bool
) -> MemoryPlanner | None:
    """Plans before anything is loaded.

    Raises:
        UserError: the weights cannot fit, or the first request beside them.
    """
    if not model.native:
        if args.device_memory_limit_mb is not None:
            raise UserError(f"device_memory_limit_mb={args.device_memory_limit_mb}: the diffusers backend has no limit")
        return None
    memory = model.memory
    assert memory is not None
    memory.check_weights()
    if first is not None and memory.available() is not None:
        request = resolve_request(first, model.sampling_defaults, args)
        memory.tiling(memory.rehearsal.workload(request, decode_only=decode_only))
    return memory


def _warn_of_slowness(model: Resolved, memory: MemoryPlanner, args: ServerArgs, first: SamplingParams | None) -> None:
    """Says so where fewer GPUs are predicted to be faster."""
    if first is None:
        work = memory.rehearsal.usual_workload(memory.blueprint.defaults)
    else:
        work = memory.rehearsal.workload(resolve_request(first, model.sampling_defaults, args))
    machine = machine_of(args, memory.plan.layout.ranks, memory.plan.device, denoiser_dtype(memory))
    if told := warning_of(memory, work, machine):
        log.warning("%s", told)


def _join(model: Resolved, args: ServerArgs, ranks: ExitStack) -> tuple[Lockstep, Resolved]:
    """Finds the other ranks, until `ranks` is closed. Raises UserError if more or fewer were started than asked for."""
    layout, started = model.plan.layout, started_ranks()
    if layout.ranks != started:
        hint = "; use `sglang`, or torchrun for a program of your own" if started == 1 else ""
        raise UserError(f"num_gpus={layout.ranks} ({layout}): processes that were started: {started}{hint}")
    if layout.ranks == 1 or model.blueprint is None:
        return ALONE, model
    ranks.enter_context(process_group(model.plan.device, args.dist_timeout))
    mesh = Mesh.join(layout, model.plan.device, args.dist_timeout)
    return Lockstep.of_all(args.dist_timeout), replace(model, blueprint=replace(model.blueprint, mesh=mesh))


def _build(
    model: Resolved, args: ServerArgs, memory: MemoryPlanner | None, lockstep: Lockstep
) -> NativePipeline | DiffusersPipeline:
    if model.native:
        assert model.blueprint is not None
        return NativePipeline(model.blueprint, model.folders, args, memory=memory, lockstep=lockstep)
    # diffusers takes long to import: a native run does without
    from sgl_diffusion.runtime.diffusers_backend import DiffusersPipeline
    from sgl_diffusion.runtime.diffusers_loader import dummy_pipe, load_pipe

    if model.checkpoint is not None and not model.dummy:
        pipe = load_pipe(model.checkpoint, args, model.plan, model.pipeline_class)
    else:
        assert model.blueprint is not None
        pipe = dummy_pipe(model.pipeline_class, model.kinds, model.blueprint.configs, model.plan)
    return DiffusersPipeline(pipe, model.kinds, args, model.plan, model.pipeline_class)
