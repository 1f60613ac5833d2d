"""The native pipeline, for every family: encode -> prepare -> denoise -> decode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sgl_diffusion.kernels.launch import Products, noting
from sgl_diffusion.models.family import ENCODERS, Condition, Phase
from sgl_diffusion.models.text import PromptTooLong
from sgl_diffusion.runtime import denoise
from sgl_diffusion.runtime.accounting import Accountant
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.batch import Neighbours, encode, finished
from sgl_diffusion.runtime.blueprint import AT_WORK, Blueprint
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.events import Drawn, Event, Pixels, StageFinished, StageStarted, StepDone
from sgl_diffusion.runtime.graphs import CAPTURED, CudaGraphs, capturing, make_graphs
from sgl_diffusion.runtime.latents import Latents
from sgl_diffusion.runtime.live_bytes import Gauge
from sgl_diffusion.runtime.memory import MemoryPlanner
from sgl_diffusion.runtime.offload import DeviceStreams, Offload
from sgl_diffusion.runtime.parallel.lockstep import ALONE, DrawOrder, Lockstep, Stopped
from sgl_diffusion.runtime.parallel.tensor import receipt
from sgl_diffusion.runtime.parts import load_parts
from sgl_diffusion.runtime.pixels import to_pixels
from sgl_diffusion.runtime.plan import Plan, dtype_name
from sgl_diffusion.runtime.prewarm import compile_kernels
from sgl_diffusion.runtime.rehearsal import Workload
from sgl_diffusion.runtime.report import Accounting, MemoryReport, StageTime
from sgl_diffusion.runtime.request import Job, Request
from sgl_diffusion.runtime.snapshots import Snapshot, digests
from sgl_diffusion.runtime.tape import Tapes
from sgl_diffusion.runtime.trace import Stopwatch

CPU = torch.device("cpu")

Record = Callable[[str, Tensor], None]
"""Is shown every intermediate tensor by name; `sglang verify` compares them between backends."""


def ignore(name: str, tensor: Tensor) -> None:
    """Records nothing."""


class DecodeFailure(RunFailure):
    """The pictures could not be decoded; `__cause__` says why. The finished latents are not lost."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__("the latents could not be decoded")
        self.latents = latents


@dataclass(frozen=True)
class BetweenSteps:
    """A request after one of its steps: an `events.Drawing`."""

    pipeline: NativePipeline
    job: Job
    conditions: Sequence[Condition]
    step: denoise.Step

    @torch.inference_mode()
    def preview(self) -> list[Pixels]:
        family = self.pipeline.family
        with self.pipeline.offload.on_device("vae"):
            decoded = next(family.decode(finished(family, self.step.picture, self.conditions), self.job.size))
            pixels = to_pixels(decoded)
        return [frames[0] for frames in pixels] if family.draws_video else pixels

    def snapshot(self) -> Snapshot:
        x, *history = (states.cpu() for states in (self.step.x, *self.step.state.history))
        return Snapshot(self.step.state.done, x, tuple(history), digests(self.job.request))


def compile_blocks(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Regional compilation: every block of a denoiser's block lists. Component -> number of blocks."""
    compiled = {}
    for key, module in modules.items():
        lists = [m for m in module.children() if isinstance(m, nn.ModuleList)]
        blocks = [block for blocks in lists for block in blocks]
        for block in blocks:
            block.compile()
        if blocks:
            compiled[key] = len(blocks)
    return compiled


def uncaptured(plan: Plan, offload: Offload) -> dict[str, str]:
    """Stages that cannot be captured, and why."""
    prevented = {"denoising": "torch.compile has graphs of its own"} if plan.compile else {}
    moving = [stage for stage in CAPTURED if any(map(offload.moves, AT_WORK[stage]))]
    prevented |= dict.fromkeys(moving, "offloaded weights have no fixed address")
    if plan.sharded:
        prevented["denoising"] = "sharded weights have no fixed address"
    if plan.layout.ranks > 1 and plan.device.type == "cpu":
        prevented |= dict.fromkeys(CAPTURED, "a CPU tape holds no messages between processes")
    return prevented


def ranks_share(blueprint: Blueprint, parts: Mapping[str, Any]) -> dict[str, Any]:
    """What ranks share beside tokens, branches and results, for the report."""
    plan, kinds = blueprint.plan, blueprint.kinds
    shared: dict[str, Any] = {"vae_sp": plan.vae_sp, "sp_communication": plan.sp_communication}
    if plan.layout.tp > 1:
        keys = [key for key, kind in kinds.items() if kind == "denoiser" or kind in ENCODERS]
        shared["layers"] = {key: receipt(parts[key]) for key in keys}
    if plan.sharded:
        from sgl_diffusion.runtime.parallel import sharded  # takes most of a second

        shared["weights"] = {key: sharded.report(parts[key]) for key, kind in kinds.items() if kind == "denoiser"}
    return shared


class NativePipeline:
    """A loaded family.

    Args:
        folders: of the components; None where weights are dummies.
        streams: the device that offloaded weights come to; None for the plan's GPU.
        memory: a planner that has looked at the blueprint already.
        lockstep: of the ranks in the blueprint's mesh.
    """

    name = "sglang"

    def __init__(
        self, blueprint: Blueprint, folders: Mapping[str, Path] | None, args: ServerArgs,
        streams: DeviceStreams | None = None, memory: MemoryPlanner | None = None, lockstep: Lockstep = ALONE,
    ) -> None:  # fmt: skip
        self.blueprint, self.plan, self.defaults = blueprint, blueprint.plan, blueprint.defaults
        self.folders, self.mesh, self.lockstep, plan = folders, blueprint.mesh, lockstep, blueprint.plan
        self.memory = memory or MemoryPlanner(blueprint, args)
        self.last_run: tuple[Workload, bool] | None = None  # and whether it was decoded in tiles
        self.products: Products = {}  # of all denoising so far: a captured step is replayed without a word
        loaded = load_parts(blueprint, folders, args)
        self.parts, self.loaded, self.quantization = loaded.parts, loaded.reports, loaded.quantization
        self.attention, self.encoder_attention = loaded.attention, loaded.encoder_attention
        self.memory.mapped = [key for key, found in loaded.mapped.items() if found]
        self.family = blueprint.family_of(self.parts)
        self.draws_video = self.family.draws_video
        self.offload = Offload(self.parts, blueprint.kinds, plan, loaded.mapped, streams)
        self.compiled = compile_blocks({key: self.parts[key] for key in self.attention}) if plan.compile else {}
        recorder = CudaGraphs() if plan.device.type == "cuda" else Tapes()
        self.graphs = make_graphs(args.enable_cuda_graph, recorder, uncaptured(plan, self.offload))
        tokenizers = {key: self.parts[key] for key, kind in blueprint.kinds.items() if kind == "tokenizer"}
        self.accountant = Accountant(blueprint, tokenizers)
        together = {"denoising": self.mesh.branch} | ({"decoding": self.mesh.world} if plan.vae_sp else {})
        agree = {stage: partial(ranks.all_agree, device=plan.device) for stage, ranks in together.items()}
        # all ranks gather a layer together, whichever branch they compute, and so as often
        self.neighbours = Neighbours(agree, steps_apart="weights are sharded" if plan.sharded else "")

    # -- a request ----------------------------------------------------------------

    def prepare(self, request: Request) -> Job:
        """What a request comes to here. Raises UserError if it cannot be honoured."""
        return self.blueprint.settle(request, self.parts)

    @torch.inference_mode()
    def run(
        self,
        job: Job,
        watch: Stopwatch,
        record: Record = ignore,
        *,
        gauge: Gauge | None = None,
        latents: Latents | None = None,
        resume: Snapshot | None = None,
    ) -> Generator[Event, None, None]:
        """Yields progress, and the results as they are decoded (`Drawn`), the frames of a clip in chunks.

        Args:
            latents, resume: of an earlier run of the request, which are decoded, or gone on with.
        Raises:
            UserError: the request cannot be honoured, or not in the memory there is; the snapshot is not of it.
            DecodeFailure: the latents are finished, but not the pictures.
        """
        work = Workload.of(job, decode_only=latents is not None)
        order = DrawOrder(job, self.memory.tiling(work), latents, resume)
        if latents is None or self.plan.vae_sp:
            self.lockstep.give(order)
        self.last_run = work, order.tiling
        return (yield from self._follow(order, watch, gauge or Gauge(self.plan.device), record))

    @torch.inference_mode()
    def follow(self, order: DrawOrder) -> None:
        """This rank's part of what the first one draws."""
        watch, gauge = Stopwatch(self.plan.device, annotate=False), Gauge(self.plan.device)
        with suppress(UserError, Stopped):  # the first rank tells
            for _ in self._follow(order, watch, gauge, ignore):
                pass

    def _follow(self, order: DrawOrder, watch: Stopwatch, gauge: Gauge, record: Record) -> Generator[Event, None, None]:
        job, latents = order.job, order.latents
        work = Workload.of(job, decode_only=latents is not None)
        self.neighbours.took.clear()
        vae = self.parts["vae"]  # which encodes given pictures, too
        vae.tiling, vae.slicing = order.tiling, self.plan.vae_slicing
        if latents is None:
            self.memory.reserve_decode(work, order.tiling)
            x = yield from self.lockstep.in_step(self._draw(job, watch, gauge, record, order.resume))
        else:
            generators = [torch.Generator()] * job.request.count
            x = latents.of_shape(self.family.noise(work.size, generators).shape).to(self.plan.device)
        if self.plan.vae_sp:
            yield from self.lockstep.in_step(self._decode(x, order, watch, gauge, record))
        elif self.lockstep.is_first:
            yield from self._decode(x, order, watch, gauge, record)

    def _decode(
        self, x: Tensor, order: DrawOrder, watch: Stopwatch, gauge: Gauge, record: Record
    ) -> Generator[Event, None, None]:
        yield StageStarted("decoding")
        with watch.span("decoding"), self.offload.on_device("vae"):
            try:
                together = partial(self.neighbours.decode, self.family, tiling=order.tiling)
                decode = self.family.decode if self.plan.vae_slicing else together  # slices are one by one as it is
                chunks = decode(x, order.job.size, self.graphs["decoding"])
                while (pixels := self._next_pixels(chunks, gauge, record)) is not None:
                    yield Drawn(pixels, x)
            except (torch.OutOfMemoryError, RunFailure) as e:
                raise DecodeFailure(x) from e
        yield StageFinished("decoding")

    def _next_pixels(self, chunks: Iterator[Tensor], gauge: Gauge, record: Record) -> list[Pixels] | None:
        """Of every result of the request, the next frames of a clip, or the picture; None after the last."""
        with gauge.stage("decoding"):
            decoded = next(chunks, None)
            if decoded is None:
                return None
            record("pixels", decoded)
            return to_pixels(decoded)

    def _draw(
        self, job: Job, watch: Stopwatch, gauge: Gauge, record: Record, resume: Snapshot | None
    ) -> Generator[Event, None, Tensor]:
        """Yields progress and returns the finished latents; all that led to them is free when the decode begins."""
        family, schedule, own = self.family, job.schedule, self.mesh.dp.own(job.request.count)
        branches = [branch[own] for branch in (yield from self._encode(job, watch, gauge, record))]
        with gauge.stage("latent_preparation"):
            generators = [torch.Generator().manual_seed(seed) for seed in job.request.seeds[own]]
            # it is made where the denoiser's weights are, which may be the host
            x, *noise = [family.noise(job.size, generators).to(self.plan.device) for _ in range(1 + schedule.noises)]
            state = denoise.State.start(x, schedule) if resume is None else resume.state(job.request, x, schedule)
            del x
        record("initial_latents", state.x)
        record("timesteps", torch.tensor(schedule.timesteps))
        for phase in family.phases(schedule.timesteps, job.guidance):
            if not state.left(phase.steps):
                continue
            with self.offload.on_device("denoiser", phase.denoiser):
                state = yield from self._take(phase, job, branches, state, noise, watch, gauge, record)
        record("final_latents", state.x)
        return self.mesh.dp.join(finished(family, state.x, branches[0]), job.request.count)

    def _take(
        self, phase: Phase, job: Job, branches: Sequence[Sequence[Condition]], state: denoise.State,
        noise: Sequence[Tensor], watch: Stopwatch, gauge: Gauge, record: Record,
    ) -> Generator[Event, None, denoise.State]:  # fmt: skip
        """Takes the steps of one denoiser, and returns the state after them."""
        schedule = job.schedule
        yield StageStarted("latent_preparation")
        with watch.span("latent_preparation"), gauge.stage("latent_preparation"):
            timesteps = schedule.timesteps[phase.steps.start : phase.steps.stop]
            here = branches if self.mesh.cfg.size == 1 else [branches[self.mesh.cfg.rank]]
            positive, *negative = [
                self.neighbours.predictor(
                    self.family, state.x, conditions, job.size, job.guidance, timesteps, phase.denoiser
                )
                for conditions in here
            ]
        yield StageFinished("latent_preparation")

        yield StageStarted("denoising")
        with watch.span("denoising"):
            against, execute = negative[0] if negative else None, self.graphs["denoising"]
            loop = denoise.integrate(
                state, schedule, phase.steps, positive, against, phase.scale, noise, execute,
                keeps_norm=self.family.keeps_norm, gather=self.mesh.cfg.all_gather if here is not branches else None,
            )  # fmt: skip
            for i in state.left(phase.steps):
                with watch.span("denoise_step"), gauge.stage("denoising"), noting(self.products):
                    step = next(loop)
                record(f"prediction_{i}", step.velocity)
                yield StepDone(i + 1, schedule.steps, BetweenSteps(self, job, branches[0], step))
        yield StageFinished("denoising")
        return step.state

    def _encode(
        self, job: Job, watch: Stopwatch, gauge: Gauge, record: Record
    ) -> Generator[Event, None, list[list[Condition]]]:
        """Yields progress and returns what the model is told of every result: in the positive branch, and in the
        negative if there is one."""
        family, request = self.family, job.request
        texts = request.prompts, job.negative_prompt, request.outputs_per_prompt, job.text_length
        yield StageStarted("text_encoding")
        with watch.span("text_encoding"), gauge.stage("text_encoding"), self.offload.on_device("text_encoder"):
            try:
                branches = encode(family, *texts, job.pictures, self.graphs["text_encoding"])
            except PromptTooLong as e:
                raise UserError(str(e)) from e
        yield StageFinished("text_encoding")
        if job.pictures:
            yield StageStarted("picture_encoding")
            encoders = self.offload.on_device("image_encoder"), self.offload.on_device("vae")
            with watch.span("picture_encoding"), gauge.stage("picture_encoding"), encoders[0], encoders[1]:
                seen = family.encode_pictures(job.pictures, job.size)
            branches = [[condition | seen for condition in branch] for branch in branches]
            yield StageFinished("picture_encoding")
        for name in branches[0][0].tensors:  # of shorter prompts with zeros behind them
            record(name, pad_sequence([condition.tensors[name][0] for condition in branches[0]], batch_first=True))
        return branches

    @contextmanager
    def warming_up(self, shapes: int) -> Iterator[None]:
        """Compiles kernels for all sizes. Inside the `with`, shapes are captured, and after it no others."""
        if self.plan.device.type == "cuda":
            compile_kernels(self.blueprint)
        denoisers = list(self.blueprint.kinds.values()).count("denoiser")
        with capturing(self.graphs, shapes * denoisers):
            yield

    def account(self, job: Job, stages: Sequence[StageTime], total_ms: float) -> Accounting:
        """The times of a request's stages beside what this device could do. Raises as `Accountant.account`."""
        return self.accountant.account(self.accountant.work(job), stages, total_ms)

    def memory_report(self, measured: Mapping[str, int]) -> MemoryReport | None:
        """Of the last run, if it was measured or had to fit."""
        if self.last_run is None or (not measured and self.memory.available() is None):
            return None
        return self.memory.report(*self.last_run, measured)

    def effective(self, job: Job) -> dict[str, Any]:
        """What took effect, for the report."""
        guidance, steps = job.guidance, Counter[str]()
        for phase in self.family.phases(job.schedule.timesteps, guidance):
            steps[phase.denoiser] += len(phase.steps)
        used = {key: a.used or "not run" for key, a in self.attention.items()}
        return {
            "attention": {**used, **self.encoder_attention},
            "precision": {key: dtype_name(d) for key, d in self.plan.dtypes.items()},
            "quantization": self.quantization,
            "products": {op: {form: sorted(sizes) for form, sizes in by.items()} for op, by in self.products.items()},
            "vae": {"tiling": self.last_run is not None and self.last_run[1], "slicing": self.plan.vae_slicing},
            "compile": self.compiled,
            "offload": self.offload.report(steps),
            "parallel": self.mesh.report() | ranks_share(self.blueprint, self.parts),
            "cuda_graph": {stage: graphs.report() for stage, graphs in self.graphs.items()},
            "guidance": asdict(guidance),
            "scheduler": type(self.blueprint.sampler()).__name__,
            "batch": dict(self.neighbours.took),
            "size": [job.size.height, job.size.width],
            "num_frames": job.size.frames,
            "num_inference_steps": job.steps,
            "max_sequence_length": job.text_length,
            "dummy_weights": self.folders is None,
        }
