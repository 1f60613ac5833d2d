"""How much memory a request takes: predicted from configs alone, and counted while it runs.

A request is rehearsed with tensors that are shapes alone. Whatever it makes is followed from the operation that made it
until nothing holds it any more, so that the prediction follows the code that runs, and no formula has to be kept in
step with it. The same counter follows a real run on a CPU; a GPU's allocator counts by itself.

What is counted is tensors. Scratch that a library takes inside of one operation is not seen, neither in a rehearsal nor
on a CPU: the columns of an unfolded convolution there were up to two fifths on top of a small model's decode. A GPU's
allocator does see that of cuBLAS, for which there is a constant, and of cuDNN, for which there is none yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from sgl_diffusion.kernels.launch import rehearsing
from sgl_diffusion.models.family import Execute, Family, Guidance, Size, eager
from sgl_diffusion.models.text import HashTokenizer
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.blueprint import Blueprint
from sgl_diffusion.runtime.denoise import euler
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.graphs import Graphs, leaves
from sgl_diffusion.runtime.offload import Parcel, find_layers, layers_ahead, partition
from sgl_diffusion.runtime.plan import dtype_name
from sgl_diffusion.runtime.report import MIB, ComponentMemory, MemoryReport, StageMemory
from sgl_diffusion.runtime.request import Request, settle
from sgl_diffusion.runtime.tape import Tapes

STAGES = {  # stage -> the kind of component at work
    "text_encoding": "text_encoder",
    "latent_preparation": "denoiser",
    "denoising": "denoiser",
    "decoding": "vae",
}
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)
CUDA_GRANULARITY = 512  # bytes; blocks of PyTorch's allocator are multiples
CUBLAS_WORKSPACE = 32 * MIB  # PyTorch's own default on sm_90, the largest there is


# -- counting -------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Memory of tensors that were made on a kind of device inside of the mode, for as long as something holds it.

    What an operation takes and gives back inside of itself is not seen.
    """

    def __init__(self, device_type: str, granularity: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type, self.granularity = device_type, granularity
        self.now = self.peak = 0
        self._held: set[int] = set()
        self._values = WeakIdKeyDictionary()  # of small integer tensors that are now shapes alone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose():  # inference mode hands composite operations over as a whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        given = list(_tensors((*args, *kwargs.values())))
        if func is torch.ops.aten.unique_consecutive.default and args[0].is_meta:  # its result's shape is data
            return func(self._values[args[0]], *args[1:], **kwargs)
        if func is torch.ops.aten.equal.default and args[0].is_meta:  # a tape asks whether an input is what it was
            return True
        result = func(*args, **kwargs)
        outside = {x.untyped_storage()._cdata for x in given}
        for x in _tensors((result,)):
            if x.is_meta and func in COPIES and not args[0].is_floating_point():
                self._values[x] = self._values.get(args[0], args[0])  # type: ignore[no-untyped-call]
            if x.device.type == self.device_type and x.untyped_storage()._cdata not in outside:
                self._hold(x.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // self.granularity) * self.granularity
        if key not in self._held:
            self._held.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in leaves(tree) if isinstance(x, Tensor))


class Gauge:
    """The most memory that each stage of one run needed, in bytes.

    On a CPU, steps that an earlier run has captured do not count: the first run of a shape tells all.

    Args:
        counting: on a CPU, follow every tensor, which takes time; a GPU's allocator counts in any case.
        weights: bytes that lie on the device all the time, where no allocator counts them.
    """

    def __init__(self, device: torch.device, *, counting: bool = False, weights: int = 0) -> None:
        self.device, self.weights = device, weights
        self.live = LiveBytes(device.type) if counting and device.type == "cpu" else None
        self.peaks: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the work inside of the block, which must not be left and entered again by a generator."""
        if self.live is not None:
            self.live.peak = self.live.now
            with self.live:
                yield
            self._add(name, self.live.peak + self.weights)
        elif self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self._add(name, torch.cuda.max_memory_allocated(self.device))
        else:
            yield

    def _add(self, name: str, peak: int) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0), peak)


def module_bytes(parts: Iterable[Any]) -> int:
    """Of the weights of those parts that are modules."""
    return sum(t.nbytes for part in parts if isinstance(part, nn.Module) for t in (*part.parameters(), *part.buffers()))


# -- rehearsing -----------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What of a request its memory depends on."""

    prompts: int
    outputs_per_prompt: int
    negative: bool
    size: Size
    guidance: Guidance = field(compare=False)
    steps: int
    text_length: int
    decode_only: bool  # the latents are there already

    @property
    def pictures(self) -> int:
        return self.prompts * self.outputs_per_prompt

    @classmethod
    def of(
        cls,
        request: Request,
        size: Size,
        guidance: Guidance,
        steps: int,
        text_length: int,
        *,
        decode_only: bool = False,
    ) -> Workload:
        prompts, negative = len(request.prompts), request.negative_prompt is not None
        return cls(prompts, request.outputs_per_prompt, negative, size, guidance, steps, text_length, decode_only)


class _Sdpa(TorchFunctionMode):
    """PyTorch's attention on shapes alone as its fused kernels do it: a result with heads last and fp32 log-sums.

    Without this, shapes would go through a matrix of all scores.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, _, v = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        # computed as far as a tape can tell, which takes no notice of memory that is only allocated
        log_sums = q.new_zeros(q.shape[:-1], dtype=torch.float32)
        out = q.new_zeros(*q.transpose(-3, -2).shape[:-1], v.shape[-1]).transpose(-3, -2)
        del log_sums
        return out


@dataclass(frozen=True)
class Weights:
    """Bytes of a component on the device while it works and while it does not, and of the host's copy."""

    at_work: int
    at_rest: int
    host: int


class MemoryPlanner:
    """Predicts what requests to a native pipeline need, refuses those that cannot fit, and chooses how to decode."""

    def __init__(self, blueprint: Blueprint, args: ServerArgs) -> None:
        self.blueprint, self.plan = blueprint, blueprint.plan
        self.limit_mb, self.dummy = args.device_memory_limit_mb, args.load_format == "dummy"
        # a captured step keeps its memory for itself; those of a compiled or an offloaded denoiser are not captured
        still = all(self.plan.offload[k] == "resident" for k, kind in blueprint.kinds.items() if kind == "denoiser")
        on_gpu = self.plan.device.type == "cuda"
        self.captures = args.enable_cuda_graph != "false" and not args.enable_torch_compile and still
        self.on_gpu = on_gpu
        self.workspace = CUBLAS_WORKSPACE if on_gpu else 0
        self.granularity = CUDA_GRANULARITY if on_gpu else 1
        self._rehearsed: dict[Hashable, dict[str, int]] = {}

    @cached_property
    def parts(self) -> dict[str, Any]:
        """Components as shapes alone; tokenizers that need no file."""
        configs, kinds = self.blueprint.configs, self.blueprint.kinds
        tokenizers = {
            key: HashTokenizer.for_encoder(configs[key.replace("tokenizer", "text_encoder")])
            for key, kind in kinds.items()
            if kind == "tokenizer"
        }
        parts = self.blueprint.shape_only_parts(self.blueprint.attention_on(self.plan.device))
        for key, part in parts.items():
            if kinds[key] == "text_encoder" and self.plan.dtypes[key] == torch.float16 and not self.dummy:
                _keep_in_fp32(part)
        return {**tokenizers, **parts}

    @cached_property
    def weights(self) -> dict[str, Weights]:
        """Of every component that has any, by where the plan keeps them."""
        modules = {key: part for key, part in self.parts.items() if isinstance(part, nn.Module)}
        return {key: self._weights(key, module) for key, module in modules.items()}

    def _weights(self, key: str, module: nn.Module) -> Weights:
        residency = self.plan.offload[key]
        if residency == "resident":
            g = self.granularity
            size = sum(-(-t.nbytes // g) * g for t in (*module.parameters(), *module.buffers()))
            return Weights(size, size, 0)
        layers = find_layers(module) if residency == "layerwise" else []
        stem, *parcels = [Parcel(tensors, {}).size for tensors in partition(module, layers)]
        window = (layers_ahead(self.plan.prefetch, len(layers)) + 1) * max(parcels) if parcels else 0
        return Weights(stem + window, 0, stem + sum(parcels))

    def workload(self, request: Request, *, decode_only: bool = False) -> Workload:
        """Of a request to a model that may not be loaded yet. Raises UserError if the model cannot honour it."""
        family = self.blueprint.family(self.parts)
        settled = settle(request, self.blueprint.defaults, family, self.blueprint.scheduler())
        return Workload.of(request, *settled, decode_only=decode_only)

    def activations(self, work: Workload, tiling: bool) -> Mapping[str, int]:
        """Bytes of each stage beside the weights, what earlier stages left included."""
        key = work, tiling
        if key not in self._rehearsed:
            self._rehearsed[key] = self._rehearse(work, tiling)
        return self._rehearsed[key]

    @torch.inference_mode()
    def _rehearse(self, work: Workload, tiling: bool) -> dict[str, int]:
        """The stages as the pipeline runs them."""
        family, live = self.blueprint.family(self.parts), LiveBytes("meta", self.granularity)
        peaks: dict[str, int] = {}

        @contextmanager
        def stage(name: str) -> Iterator[None]:
            live.peak = live.now
            with live, _Sdpa():
                yield
            peaks[name] = live.peak

        # a GPU's graph takes memory beside the allocator's count; a tape holds tensors, which are followed
        execute = Graphs(Tapes()) if self.captures and not self.on_gpu else eager
        with rehearsing(self.plan.device.type):
            if work.decode_only:
                with live:
                    x = family.noise(work.size, [torch.Generator()] * work.pictures)
            else:
                x = _draw(family, work, stage, execute)
            vae = self.parts["vae"]
            vae.tiling, vae.slicing = tiling, self.plan.vae_slicing
            with stage("decoding"):
                family.decode(x, work.size)
        return peaks

    # -- against what there is --------------------------------------------------------

    def available(self) -> int | None:
        """Bytes of the device that a request may take, weights included; None where nothing says."""
        if self.limit_mb is not None:
            return self.limit_mb * MIB
        if self.plan.device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self.plan.device)
        return free + torch.cuda.memory_reserved(self.plan.device)

    def choose(self, work: Workload) -> tuple[bool, str]:
        """Whether a request is decoded in tiles (as asked for, else by size, else because a whole one does not fit),
        and why it cannot fit at all; empty if it can."""
        tiling, available = self.plan.tiles(work.size), self.available()
        if available is None:
            return tiling, ""
        needed = self._needed(work, tiling)
        if needed["decoding"] > available and self.plan.vae_tiling is None and not tiling:
            tiling, needed = True, self._needed(work, True)
        stage = max(needed, key=lambda name: needed[name])
        if needed[stage] <= available:
            return tiling, ""
        numbers = f"{stage} needs {_mib(needed[stage])} (weights {_mib(self._weights_at(stage))})"
        return tiling, (
            f"height={work.size.height}, width={work.size.width}, pictures={work.pictures}: cannot fit on "
            f"{self.plan.device}: {numbers}, {_mib(available)} are available; smaller or fewer pictures"
            f"{self._advice()} need less"
        )

    def tiling(self, work: Workload) -> bool:
        """Whether a request will be decoded in tiles.

        Raises:
            UserError: the request cannot fit, with the numbers.
        """
        tiling, refusal = self.choose(work)
        if refusal:
            raise UserError(refusal)
        return tiling

    def check_weights(self) -> None:
        """Raises UserError if the weights alone cannot fit, whatever a request asks for."""
        available = self.available()
        if available is None:
            return
        needed = max(self._weights_at(stage) for stage in STAGES)
        if needed > available:
            raise UserError(
                f"the weights cannot fit on {self.plan.device}: they need {_mib(needed)}, {_mib(available)} are "
                f"available{self._advice(', use')}"
            )

    def _advice(self, joined: str = " or") -> str:
        """Offload helps where there is something to offload to."""
        on_gpu = self.plan.device.type == "cuda" and "resident" in self.plan.offload.values()
        return f"{joined} --performance-mode memory" if on_gpu else ""

    def _weights_at(self, stage: str) -> int:
        kinds = self.blueprint.kinds
        return sum(w.at_work if kinds[k] == STAGES[stage] else w.at_rest for k, w in self.weights.items())

    def _graphs(self, work: Workload, tiling: bool) -> int:
        return self.activations(work, tiling).get("denoising", 0) if self.captures and self.on_gpu else 0

    def _needed(self, work: Workload, tiling: bool) -> dict[str, int]:
        """Bytes that have to be there in each stage. A captured step's own stay taken in the others."""
        graphs = self._graphs(work, tiling)
        return {
            stage: self._weights_at(stage) + size + self.workspace + (0 if stage == "denoising" else graphs)
            for stage, size in self.activations(work, tiling).items()
        }

    def reserve_decode(self, work: Workload, tiling: bool) -> None:
        """Makes a GPU's allocator hold the memory of the decode before the first step, so that no one else takes it.

        Offloaded weights make room for it in the meantime, so that there is nothing to reserve beside them.

        Raises:
            torch.OutOfMemoryError: it is not there.
        """
        resident = set(self.plan.offload.values()) == {"resident"}
        if self.plan.device.type == "cuda" and resident:
            torch.empty(self.activations(work, tiling)["decoding"], dtype=torch.uint8, device=self.plan.device)

    def report(self, work: Workload, tiling: bool, measured: Mapping[str, int] | None = None) -> MemoryReport:
        """The prediction, beside what was measured of each stage."""
        available, plan = self.available(), self.plan
        stages = [
            StageMemory(
                name=stage,
                weights_mb=self._weights_at(stage) / MIB,
                activations_mb=size / MIB,
                predicted_mb=(self._weights_at(stage) + size + self.workspace) / MIB,
                measured_mb=measured[stage] / MIB if measured and stage in measured else None,
            )
            for stage, size in self.activations(work, tiling).items()
        ]
        components = {
            key: ComponentMemory(
                dtype=dtype_name(plan.dtypes[key]),
                residency=plan.offload[key],
                weights_mb=module_bytes([self.parts[key]]) / MIB,
                device_mb=w.at_work / MIB,
            )
            for key, w in self.weights.items()
        }
        host = sum(w.host for w in self.weights.values()) / MIB
        return MemoryReport(
            components=components,
            stages=stages,
            workspace_mb=self.workspace / MIB,
            graphs_mb=self._graphs(work, tiling) / MIB,
            peak_mb=max(stage.predicted_mb for stage in stages),
            measured_peak_mb=max(measured.values()) / MIB if measured else None,
            pinned_host_mb=host if plan.pin_memory else 0.0,
            pageable_host_mb=0.0 if plan.pin_memory else host,
            available_mb=None if available is None else available / MIB,
            decode="tiles" if tiling else "whole",
        )


def _draw(
    family: Family, work: Workload, stage: Callable[[str], AbstractContextManager[None]], execute: Execute
) -> Tensor:
    """All that comes before a decode; a second step stands for those that follow."""
    prompts, sigmas = [""] * work.prompts, [1 - i / work.steps for i in range(work.steps + 1)]
    with stage("text_encoding"):
        branches = 2 if work.negative else 1
        conditions = [family.encode(prompts, work.text_length).repeat(work.outputs_per_prompt) for _ in range(branches)]
    with stage("latent_preparation"):
        x = family.noise(work.size, [torch.Generator()] * work.pictures)
        predictors = [family.predictor(condition, work.size, work.guidance, sigmas) for condition in conditions]
    with stage("denoising"):
        negative = predictors[1] if work.negative else None
        loop = euler(x, sigmas, predictors[0], negative, work.guidance.true_cfg, execute)
        for _ in range(min(work.steps, 2)):
            step = next(loop)
    return step.x


def _keep_in_fp32(encoder: Any) -> None:
    """What transformers does as it reads a checkpoint in fp16: layers that would overflow stay wide."""
    kept = encoder._keep_in_fp32_modules or ()
    for name, module in encoder.named_modules():
        if name.rpartition(".")[2] in kept:
            module.float()


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
