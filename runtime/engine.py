"""The file to read first: a loaded model, and what happens to a request.

engine = Engine.load(ServerArgs(model_path="..."))
for event in engine.generate(SamplingParams(prompt="a red circle on a blue background")):
    ...  # the last one is Finished(result)
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.compilation import compilations, keep_compiled_code
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.events import Event, Finished, Result
from sgl_diffusion.runtime.latents import resumed
from sgl_diffusion.runtime.memory import MemoryPlanner
from sgl_diffusion.runtime.parallel.lockstep import ALONE, DrawOrder, Lockstep, WarmUpOrder
from sgl_diffusion.runtime.parallel.machines import machine_of
from sgl_diffusion.runtime.parallel.mesh import Mesh, process_group
from sgl_diffusion.runtime.parallel.ranks import speaks, started_ranks
from sgl_diffusion.runtime.parallel.steps import denoiser_dtype, warning_of
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.prewarm import throw_away_requests
from sgl_diffusion.runtime.reading import READERS
from sgl_diffusion.runtime.report import LoadReport
from sgl_diffusion.runtime.request import resolve_request
from sgl_diffusion.runtime.resolve import Resolved, resolve
from sgl_diffusion.runtime.run import Run, check_files, report_failed_load
from sgl_diffusion.runtime.snapshots import Snapshot

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
            UserError: the model cannot be found, read or run as asked, or not draw `like`, as far as that can be told
                before it is loaded. The perf dump that `like` asks for is still written.
        """
        started = time.perf_counter()
        try:
            return cls._load(args, like, started)
        except (UserError, RunFailure) as e:
            if like is not None and speaks():
                report_failed_load(like, args, time.perf_counter() - started, e)
            raise

    @classmethod
    def _load(cls, args: ServerArgs, like: SamplingParams | None, started: float) -> Engine:
        if args.num_gpus is None and started_ranks() > 1:
            args = args.model_copy(update={"num_gpus": started_ranks()})
        first, latents = (None, None) if like is None else resumed(like, args)
        throw_away = throw_away_requests(args, first or SamplingParams(prompt=["a warm-up"]))
        keep_compiled_code()
        compilations()  # counted from here on
        model = resolve(args, ([first] if first else []) + throw_away)
        if first is not None:
            check_files(first, model, args)
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
        run = Run(self, params, resume)
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
