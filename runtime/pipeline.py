"""The native pipeline, for every family: encode -> prepare -> denoise -> decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sgl_diffusion.models.family import Family, Guidance, Size
from sgl_diffusion.models.text import HashTokenizer, PromptTooLong
from sgl_diffusion.runtime import denoise
from sgl_diffusion.runtime.accounting import Accountant
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.attention import Attention
from sgl_diffusion.runtime.blueprint import Blueprint
from sgl_diffusion.runtime.encoders import dummy_encoder, load_encoder, load_tokenizer
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.events import Event, StageFinished, StageStarted, StepDone
from sgl_diffusion.runtime.graphs import STAGES, CudaGraphs, capturing, make_graphs
from sgl_diffusion.runtime.latents import Latents
from sgl_diffusion.runtime.live_bytes import Gauge
from sgl_diffusion.runtime.memory import MemoryPlanner
from sgl_diffusion.runtime.offload import CudaStreams, DeviceStreams, Offload, fits_host_memory
from sgl_diffusion.runtime.plan import dtype_name
from sgl_diffusion.runtime.prewarm import compile_kernels
from sgl_diffusion.runtime.reading import LoadTimes
from sgl_diffusion.runtime.rehearsal import Workload
from sgl_diffusion.runtime.report import Accounting, ComponentLoad, MemoryReport, StageTime
from sgl_diffusion.runtime.request import Request, settle
from sgl_diffusion.runtime.tape import Tapes
from sgl_diffusion.runtime.trace import Stopwatch
from sgl_diffusion.runtime.weights import Source, fill_dummy, find_weights, load_weights, weight_files

CPU = torch.device("cpu")

Pixels = NDArray[np.uint8]
"""A picture (H, W, 3) or a clip (F, H, W, 3)."""

Record = Callable[[str, Tensor], None]
"""Is shown every intermediate tensor by name; `sglang verify` compares them between backends."""


def ignore(name: str, tensor: Tensor) -> None:
    """Records nothing."""


@dataclass(frozen=True)
class Decode:
    """A pure function of final states of one size, which can be captured."""

    family: Family
    vae: Any
    size: Size
    tiling: bool
    slicing: bool

    def __call__(self, x: Tensor) -> tuple[Tensor]:
        self.vae.tiling, self.vae.slicing = self.tiling, self.slicing
        return (self.family.decode(x, self.size),)


class DecodeFailure(RunFailure):
    """The pictures could not be decoded; `__cause__` says why. The finished latents are not lost."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__("the latents could not be decoded")
        self.latents = latents


class NativePipeline:
    """A loaded family.

    Args:
        folders: of the components; None where weights are dummies.
        streams: the device that offloaded weights come to; None for the plan's GPU.
        memory: a planner that has looked at the blueprint already.
    """

    name = "sglang"
    draws_video = False

    def __init__(
        self,
        blueprint: Blueprint,
        folders: Mapping[str, Path] | None,
        args: ServerArgs,
        streams: DeviceStreams | None = None,
        memory: MemoryPlanner | None = None,
    ) -> None:
        self.blueprint, self.plan, self.defaults = blueprint, blueprint.plan, blueprint.defaults
        self.folders, plan = folders, blueprint.plan
        self.memory = memory or MemoryPlanner(blueprint, args)
        self.last_run: tuple[Workload, bool] | None = None  # and whether it was decoded in tiles
        self.attention: dict[str, Attention] = {}
        self.encoder_attention: dict[str, str] = {}
        self.scheduler = blueprint.scheduler()
        self.parts: dict[str, Any] = {}
        self.loaded: dict[str, ComponentLoad] = {}
        mapped: dict[str, Sequence[Source]] = {}  # weights that stay in their files
        for key, kind in blueprint.kinds.items():
            started = time.perf_counter()
            if kind in ("denoiser", "vae"):
                config = args.attention_backend_config if kind == "denoiser" else {}
                self.attention[key] = Attention(key, plan.attention[key], plan.device, plan.dtypes[key], config)
                self.parts[key] = blueprint.module(key, self.attention[key])
                times, mapped[key] = self._fill(key, must_pin=args.pin_cpu_memory is True)
                self.loaded[key] = self._component_load(started, times, is_mapped=bool(mapped[key]))
            elif kind == "text_encoder":
                times, self.parts[key] = self._encoder(key)
                self.loaded[key] = self._component_load(started, times)
            elif kind == "tokenizer":
                self.parts[key] = self._tokenizer(key)
        self.memory.mapped = [key for key, found in mapped.items() if found]
        self.family = blueprint.family(self.parts)
        self.offload = Offload(self.parts, blueprint.kinds, plan, mapped, streams)
        self.compiled = self._compile() if plan.compile else {}
        prevented = {"denoising": "torch.compile has graphs of its own"} if self.compiled else {}
        moving = [stage for stage, kind in STAGES.items() if self.offload.moves(kind)]
        prevented |= dict.fromkeys(moving, "offloaded weights have no fixed address")
        recorder = CudaGraphs() if plan.device.type == "cuda" else Tapes()
        self.graphs = make_graphs(args.enable_cuda_graph, recorder, prevented)
        tokenizers = {key: self.parts[key] for key, kind in blueprint.kinds.items() if kind == "tokenizer"}
        self.accountant = Accountant(blueprint, tokenizers)

    def _home(self, key: str) -> torch.device:
        """Where a component's weights are loaded to."""
        return self.plan.device if self.plan.offload[key] == "resident" else CPU

    def _uploads(self, key: str) -> CudaStreams | None:
        """What a component's weights are uploaded through."""
        home = self._home(key)
        return CudaStreams(home) if home.type == "cuda" else None

    def _component_load(self, started: float, times: LoadTimes, *, is_mapped: bool = False) -> ComponentLoad:
        weights: Literal["read", "mapped", "dummy"] = "mapped" if is_mapped else "read"
        wall_ms = (time.perf_counter() - started) * 1000
        return ComponentLoad(weights="dummy" if self.folders is None else weights, wall_ms=wall_ms, **asdict(times))

    def _fill(self, key: str, *, must_pin: bool) -> tuple[LoadTimes, Sequence[Source]]:
        """Loads a module's weights, or finds them in their files where host memory has no room for a copy."""
        module, home, dtype = self.parts[key], self._home(key), self.plan.dtypes[key]
        if self.folders is None:
            fill_dummy(module, home, dtype, drawn_on=self.plan.device)
            return LoadTimes(), ()
        files = weight_files(self.folders[key])
        if self.plan.offload[key] == "resident" or fits_host_memory(module, dtype):
            return load_weights(module, files, home, dtype, self._uploads(key)), ()
        if must_pin:
            raise UserError(f"pin_cpu_memory=true: host memory has no room for {key}; left out, it stays in its files")
        found = find_weights(module, files)
        module.to(dtype).to_empty(device=CPU)  # takes no memory before it is written to
        return LoadTimes(), found

    def _encoder(self, key: str) -> tuple[LoadTimes, Any]:
        home, dtype, requested = self._home(key), self.plan.dtypes[key], self.plan.attention[key]
        config = self.blueprint.configs[key]
        encoder: Any
        times = LoadTimes()
        if self.folders is None:
            encoder = dummy_encoder(key, config, home, dtype, requested)
            fill_dummy(encoder, home, dtype, drawn_on=self.plan.device)
        else:
            folder, streams = self.folders[key], self._uploads(key)
            times, encoder = load_encoder(key, config, folder, home, dtype, requested, streams)
        self.encoder_attention[key] = str(encoder.config._attn_implementation)
        return times, encoder.eval().requires_grad_(False)

    def _tokenizer(self, key: str) -> Any:
        if self.folders is not None:
            return load_tokenizer(self.folders[key])
        return HashTokenizer.for_encoder(self.blueprint.configs[key.replace("tokenizer", "text_encoder")])

    def _compile(self) -> dict[str, int]:
        """Regional compilation: every block of a denoiser's block lists. Component -> number of blocks."""
        compiled = {}
        for key in self.attention:
            lists = [m for m in self.parts[key].children() if isinstance(m, nn.ModuleList)]
            blocks = [block for blocks in lists for block in blocks]
            for block in blocks:
                block.compile()
            if blocks:
                compiled[key] = len(blocks)
        return compiled

    # -- a request ----------------------------------------------------------------

    def prepare(self, request: Request) -> tuple[Size, Guidance, int, int]:
        """Size, guidance, steps and text length of a request.

        Raises:
            UserError: anything this family or checkpoint cannot honour.
        """
        return settle(request, self.defaults, self.family, self.scheduler)

    @torch.inference_mode()
    def run(
        self,
        request: Request,
        watch: Stopwatch,
        record: Record = ignore,
        *,
        gauge: Gauge | None = None,
        latents: Latents | None = None,
    ) -> Generator[Event, None, list[Pixels]]:
        """Yields progress and returns the pictures of the request in order.

        Args:
            latents: of an earlier run of the request, which are decoded.
        Raises:
            UserError: the request cannot be honoured, or not in the memory there is.
            DecodeFailure: the latents are finished, but not the pictures.
        """
        gauge = gauge or Gauge(self.plan.device)
        work = Workload.of(request, *self.prepare(request), decode_only=latents is not None)
        tiling = self.memory.tiling(work)
        self.last_run = work, tiling
        if latents is None:
            self.memory.reserve_decode(work, tiling)
            x = yield from self._draw(request, watch, gauge, record)
        else:
            x = latents.of_shape(self.family.noise(work.size, [torch.Generator()] * request.count).shape)
            x = x.to(self.plan.device)

        yield StageStarted("decoding")
        with watch.span("decoding"), gauge.stage("decoding"), self.offload.on_device("vae"):
            try:
                decode = Decode(self.family, self.parts["vae"], work.size, tiling, self.plan.vae_slicing)
                (pictures,) = self.graphs["decoding"](decode, x)
                pixels = to_pixels(pictures)
            except (torch.OutOfMemoryError, RunFailure) as e:
                raise DecodeFailure(x) from e
        record("pixels", pictures)
        yield StageFinished("decoding")
        return pixels

    def _draw(self, request: Request, watch: Stopwatch, gauge: Gauge, record: Record) -> Generator[Event, None, Tensor]:
        """Yields progress and returns the finished latents; all that led to them is free when the decode begins."""
        size, guidance, steps, text_length = self.prepare(request)
        family, n = self.family, request.outputs_per_prompt

        yield StageStarted("text_encoding")
        with watch.span("text_encoding"), gauge.stage("text_encoding"), self.offload.on_device("text_encoder"):
            try:
                encode, length = self.graphs["text_encoding"], text_length
                condition = family.encode(request.prompts, length, encode).repeat(n)
                negative = None
                if request.negative_prompt is not None:
                    unwanted = [request.negative_prompt] * len(request.prompts)
                    negative = family.encode(unwanted, length, encode).repeat(n)
            except PromptTooLong as e:
                raise UserError(str(e)) from e
        for name, tensor in condition.tensors.items():
            record(name, tensor)
        yield StageFinished("text_encoding")

        with ExitStack() as at_work:
            yield StageStarted("latent_preparation")
            with watch.span("latent_preparation"), gauge.stage("latent_preparation"):
                at_work.enter_context(self.offload.on_device("denoiser"))  # to the end of the loop
                x = family.noise(size, [torch.Generator().manual_seed(s) for s in request.seeds()])
                sigmas = self.scheduler.sigmas(steps, family.image_tokens(size))
                positive = family.predictor(condition, size, guidance, sigmas)
                against = None if negative is None else family.predictor(negative, size, guidance, sigmas)
            record("initial_latents", x)
            record("timesteps", torch.tensor(sigmas[:-1]) * 1000)
            yield StageFinished("latent_preparation")

            yield StageStarted("denoising")
            with watch.span("denoising"):
                loop = denoise.euler(x, sigmas, positive, against, guidance.true_cfg, self.graphs["denoising"])
                for i in range(steps):
                    with watch.span("denoise_step"), gauge.stage("denoising"):
                        step = next(loop)
                    record(f"prediction_{i}", step.velocity)
                    yield StepDone(i + 1, steps)
                x = step.x
            record("final_latents", x)
            yield StageFinished("denoising")
        return x

    @contextmanager
    def warming_up(self, shapes: int) -> Iterator[None]:
        """Compiles kernels for all sizes. Inside the `with`, shapes are captured, and after it no others."""
        if self.plan.device.type == "cuda":
            compile_kernels(self.blueprint)
        with capturing(self.graphs, shapes):
            yield

    def account(self, request: Request, stages: Sequence[StageTime], total_ms: float) -> Accounting:
        """The times of a request's stages beside what this device could do. Raises as `Accountant.account`."""
        return self.accountant.account(self.accountant.work(request, *self.prepare(request)), stages, total_ms)

    def memory_report(self, measured: Mapping[str, int]) -> MemoryReport | None:
        """Of the last run, if it was measured or had to fit."""
        if self.last_run is None or (not measured and self.memory.available() is None):
            return None
        return self.memory.report(*self.last_run, measured)

    def effective(self, request: Request) -> dict[str, Any]:
        """What took effect, for the report."""
        size, guidance, steps, text_length = self.prepare(request)
        used = {key: a.used or "not run" for key, a in self.attention.items()}
        return {
            "attention": {**used, **self.encoder_attention},
            "precision": {key: dtype_name(d) for key, d in self.plan.dtypes.items()},
            "vae": {"tiling": self.last_run is not None and self.last_run[1], "slicing": self.plan.vae_slicing},
            "compile": self.compiled,
            "offload": self.offload.report(steps),
            "cuda_graph": {stage: graphs.report() for stage, graphs in self.graphs.items()},
            "guidance": {"embedded": guidance.embedded, "true_cfg": guidance.true_cfg},
            "scheduler": type(self.scheduler).__name__,
            "size": [size.height, size.width],
            "num_inference_steps": steps,
            "max_sequence_length": text_length,
            "dummy_weights": self.folders is None,
        }


def to_pixels(pictures_BCHW: Tensor) -> list[Pixels]:
    """[-1, 1] -> rounded 8-bit pictures.

    Raises:
        RunFailure: not a number in a picture, as fp16 overflow gives.
    """
    if not torch.isfinite(pictures_BCHW).all():
        raise RunFailure("the decoded pictures hold NaN or infinity; try a wider --precision")
    unit = (pictures_BCHW.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return list((unit * 255).round().astype(np.uint8))
