"""What a request costs at least: FLOPs and bytes of every stage, and the time this device would need for them.

The work is counted on a shape-only twin of the pipeline, so that counting needs no memory and changes nothing. A call
of one of our kernels counts by the kernel's own formulas, whatever implementation runs: all it needs moves once. Other
operations count by PyTorch's formulas, and by the tensors they read and write. FLOPs are those of products and
convolutions; the arithmetic of all else is free beside its traffic.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.kernels.catalog import OPS
from sgl_diffusion.kernels.op import Op
from sgl_diffusion.models.family import Condition, Family
from sgl_diffusion.runtime.batch import encode, predictor_of
from sgl_diffusion.runtime.blueprint import AT_WORK, Blueprint
from sgl_diffusion.runtime.denoise import State, integrate
from sgl_diffusion.runtime.graphs import leaves, shape_class
from sgl_diffusion.runtime.limits import Limits, limits
from sgl_diffusion.runtime.plan import dtype_name
from sgl_diffusion.runtime.report import Accounting, ClassWork, DeviceLimits, Loss, StageAccount, StageTime
from sgl_diffusion.runtime.request import Job

# operations that launch nothing and move nothing: views and allocations
FREE = frozenset(
    """
    view _unsafe_view t transpose permute slice select unsqueeze squeeze expand split split_with_sizes chunk unbind
    alias detach as_strided reshape _reshape_alias view_as_real view_as_complex unflatten unfold diagonal real imag
    lift_fresh movedim narrow _conj resolve_conj resolve_neg
    empty empty_like new_empty empty_strided new_empty_strided is_same_size sym_size
    """.split()  # noqa: SIM905
)
GATHERS = frozenset(("embedding", "index", "index_select", "gather"))  # read as much as they write, not a whole table
CLASSES = {
    "gemm": (
        "gemm", "gemm_w4", "gemm_w8", "gemm_mx", "quantize_low_rank", "modulation", "mm", "addmm", "bmm", "baddbmm",
    ),
    "gemm_fp8": ("gemm_fp8",),
    "gemm_int8": ("gemm_int8",),
    "attention": ("attention", "attention_int8", "attention_fp8", "scaled_dot_product_attention"),
    "conv": ("convolution",),
    "other": (
        "patchify", "unpatchify", "upsample_nearest", "causal_pad", "cat", "stack", "copy_", "clone", "_to_copy",
        "fill_", "zero_", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "arange",
        "constant_pad_nd", *GATHERS,
    ),
}  # fmt: skip
CLASS_OF = {name: of for of, names in CLASSES.items() for name in names}
ELEMENTWISE = "norm/elementwise"  # all other operations
EIGHT_BIT = {
    "gemm_fp8": torch.float8_e4m3fn,
    "gemm_int8": torch.int8,
}  # classes whose arithmetic has a limit of its own
LOSSES_NAMED = 3
COUNTING = threading.Lock()  # launchers are watched by replacing them in the modules that call them


@dataclass
class Work:
    """FLOPs and bytes moved, by class of operation."""

    flops: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, operation: str, flops: int, moved: int) -> None:
        of = CLASS_OF.get(operation, ELEMENTWISE)
        self.flops[of] = self.flops.get(of, 0) + flops
        self.bytes[of] = self.bytes.get(of, 0) + moved

    def __add__(self, other: Work) -> Work:
        both = ((self.flops, other.flops), (self.bytes, other.bytes))
        return Work(*({of: a.get(of, 0) + b.get(of, 0) for of in a | b} for a, b in both))

    def times(self, n: int) -> Work:
        return Work({of: n * f for of, f in self.flops.items()}, {of: n * b for of, b in self.bytes.items()})


# -- counting -----------------------------------------------------------------------


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts PyTorch operations on shape-only tensors. Others are the host's, and stay out."""

    def __init__(self, work: Work) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work, self.inside_launcher = work, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "unique_consecutive" and args[0].is_meta:  # groups of rows are data: one run stands for them
            return torch.zeros(1, dtype=torch.int32), torch.empty(0), torch.tensor([len(args[0])])
        result = func(*args, **kwargs)
        if self.inside_launcher or name in FREE:
            return result
        read, written = ([x for x in leaves(of) if isinstance(x, Tensor)] for of in ((*args, *kwargs.values()), result))
        if any(x.is_meta for x in (*read, *written)):
            formula = flop_registry.get(func._overloadpacket)
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
            self.work.add(
                name, flops, sum(map(_nbytes, written if name in GATHERS else read)) + sum(map(_nbytes, written))
            )
        return result


class _SdpaCalls(TorchFunctionMode):
    """Counts PyTorch's attention as one operation, which shape-only tensors would take apart."""

    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        if not q.is_meta:
            return func(*args, **kwargs)
        # heads last in memory, as PyTorch's kernels leave it: what follows then copies nothing
        out = q.new_empty(*q.transpose(-3, -2).shape[:-1], v.shape[-1]).transpose(-3, -2)
        if not self.operations.inside_launcher:
            flops = 2 * q.numel() * k.shape[-2] + 2 * out.numel() * k.shape[-2]
            self.operations.work.add("scaled_dot_product_attention", flops, sum(map(_nbytes, (q, k, v, out))))
        return out


def _nbytes(x: Tensor) -> int:
    """Of an expanded tensor, what is there."""
    return min(x.nbytes, x.untyped_storage().nbytes())


def _launcher_work(op: Op, call: inspect.BoundArguments) -> tuple[int, int]:
    """FLOPs and bytes of a call by the op's own formulas, which want optional arguments left out and None."""
    flops = op.flops(call.arguments) if op.flops else 0
    if op.name == "modulation":  # a product bound by memory, which is why its op has no formula
        flops = 2 * call.arguments["e_MK"].numel() * call.arguments["weight_NK"].shape[0]
    call.apply_defaults()
    return flops, op.bytes(call.arguments)


@contextmanager
def counted() -> Iterator[Work]:
    """Counts what is called with shape-only tensors inside the `with`."""
    work = Work()
    operations = _Operations(work)

    def watched(op: Op) -> Callable[..., Any]:
        signature = inspect.signature(op.launch)

        @wraps(op.launch)
        def launch(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            if not any(isinstance(x, Tensor) and x.is_meta for x in leaves(tuple(call.arguments.values()))):
                return op.launch(*args, **kwargs)  # another thread's
            work.add(op.name, *_launcher_work(op, call))
            operations.inside_launcher = True
            try:
                return op.launch(*args, **{**kwargs, "impl": "torch"})
            finally:
                operations.inside_launcher = False

        return launch

    ops = {op.launch: watched(op) for op in OPS.values()}
    callers = [
        m for name, m in sys.modules.items() if name.startswith(("sgl_diffusion.models", "sgl_diffusion.runtime"))
    ]
    with COUNTING, ExitStack() as patches:
        for module in callers:
            for name, value in list(vars(module).items()):
                if inspect.isfunction(value) and value in ops:
                    patches.enter_context(mock.patch.object(module, name, ops[value]))
        patches.enter_context(torch.no_grad())
        patches.enter_context(_SdpaCalls(operations))
        patches.enter_context(operations)
        yield work


def attend(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None, code_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Any:  # fmt: skip
    """The twin's attention, whichever backend the pipeline has: they all do this work, log-sums or not."""
    result = attention(q_BLHK, k_BLHK, v_BLHK, out=out, code_scale=code_scale)
    B, L, H, _ = q_BLHK.shape
    return (result, q_BLHK.new_empty(B, H, L, dtype=torch.float32)) if return_lse else result


class Accountant:
    """Counts the work of requests to a native pipeline. Nothing is built or counted before it is asked for.

    Args:
        tokenizers: the pipeline's own, by component.
    """

    def __init__(self, blueprint: Blueprint, tokenizers: Mapping[str, Any]) -> None:
        self.blueprint, self.plan = blueprint, blueprint.plan
        self.tokenizers = tokenizers
        self._counted: dict[Hashable, dict[str, Work]] = {}

    @cached_property
    def parts(self) -> dict[str, Any]:
        """Components of the true shapes and dtypes, without memory."""
        return {**self.tokenizers, **self.blueprint.shape_only_parts(lambda key: attend)}

    @cached_property
    def family(self) -> Family:
        return self.blueprint.family_of(self.parts)

    def dtypes(self, stage: str) -> set[torch.dtype]:
        """Of the components at work in a stage."""
        return {self.plan.dtypes[key] for key, kind in self.blueprint.kinds.items() if kind in AT_WORK[stage]}

    def account(self, work: Mapping[str, Work], stages: Sequence[StageTime], total_ms: float) -> Accounting:
        """Times of stages beside what this device could do with the work.

        Raises:
            torch.OutOfMemoryError: the device has no room for the measurement of its limits.
        """
        device = self.plan.device
        dtypes = {
            s: self.dtypes(s) | {EIGHT_BIT[of] for of in done.flops if of in EIGHT_BIT} for s, done in work.items()
        }
        return account(work, {s: {d: limits(device, d) for d in dtypes[s]} for s in work}, stages, total_ms)

    def work(self, job: Job) -> dict[str, Work]:
        """The work of each stage of a request."""
        family, request, vae = self.family, job.request, self.parts["vae"]
        vae.tiling, vae.slicing = self.plan.tiles(job.size), self.plan.vae_slicing
        with counted() as encoding:
            texts = request.prompts, job.negative_prompt, request.outputs_per_prompt, job.text_length
            branches = encode(family, *texts, job.pictures)
        work = {"text_encoding": encoding}
        if job.pictures:
            with counted() as work["picture_encoding"]:
                seen = family.encode_pictures(job.pictures, job.size)
            branches = [[condition | seen for condition in branch] for branch in branches]
        shapes = shape_class([[list(c.tensors.values()) for c in branch] for branch in branches])
        key = shapes, job.size, job.guidance, job.schedule
        if key not in self._counted:
            self._counted[key] = self._after_encoding(job, branches)
        return work | self._counted[key]

    def _after_encoding(self, job: Job, branches: Sequence[Sequence[Condition]]) -> dict[str, Work]:
        family, schedule = self.family, job.schedule
        with counted() as preparation:
            generators = [torch.Generator() for _ in range(job.request.count)]
            state = State.start(family.noise(job.size, generators), schedule)
            noise = [family.noise(job.size, generators) for _ in range(schedule.noises)]
        denoising = Work()
        for phase in family.phases(schedule.timesteps, job.guidance):
            timesteps = schedule.timesteps[phase.steps.start : phase.steps.stop]
            with counted() as once:
                positive, *negative = [
                    predictor_of(family, conditions, job.size, job.guidance, timesteps, phase.denoiser)
                    for conditions in branches
                ]
            against = negative[0] if negative else None
            with counted() as step:
                steps = integrate(
                    state, schedule, phase.steps, positive, against, phase.scale, noise, keeps_norm=family.keeps_norm
                )
                state = next(steps).state
            preparation, denoising = preparation + once, denoising + step.times(len(phase.steps))
        with counted() as decoding:
            for chunk in family.decode(state.x, job.size):
                del chunk
        return {"latent_preparation": preparation, "denoising": denoising, "decoding": decoding}


# -- beside what was measured --------------------------------------------------------


def account(
    work: Mapping[str, Work],
    reached: Mapping[str, Mapping[torch.dtype, Limits]],
    stages: Iterable[StageTime],
    total_ms: float,
) -> Accounting:
    """Every stage's time beside its bound.

    Args:
        reached: the device's limits in each stage's dtypes; where it has several, the fastest bounds it, but for
            products of 8-bit codes, which their own bounds.
        stages: as they were measured; one may come several times, once for each batch.
    """
    measured: dict[str, float] = {}
    for stage in stages:
        measured[stage.name] = measured.get(stage.name, 0.0) + stage.duration_ms
    accounts: list[StageAccount] = []
    seen: dict[torch.dtype, Limits] = {}
    for name, of in work.items():
        seen |= reached[name]
        wide = max(
            limit.matmul_tflop_per_s for dtype, limit in reached[name].items() if dtype not in EIGHT_BIT.values()
        )
        arithmetic = sum(
            flops / (reached[name][EIGHT_BIT[c]].matmul_tflop_per_s if c in EIGHT_BIT else wide) / 1e9
            for c, flops in of.flops.items()
        )
        traffic = sum(of.bytes.values()) / max(limit.copy_gb_per_s for limit in reached[name].values()) / 1e6
        accounts.append(
            StageAccount(
                name=name,
                classes={c: ClassWork(flops=of.flops[c], bytes=of.bytes[c]) for c in of.bytes},
                bound_ms=max(arithmetic, traffic),
                bound_by="compute" if arithmetic > traffic else "memory",
                measured_ms=measured.get(name, 0.0),
            )
        )
    losses = {a.name: a.measured_ms - a.bound_ms for a in accounts}
    losses |= {name: ms for name, ms in measured.items() if name not in losses}
    losses["between the stages"] = total_ms - sum(measured.values())
    largest = sorted(losses.items(), key=lambda loss: -loss[1])[:LOSSES_NAMED]
    return Accounting(
        limits=DeviceLimits(
            copy_gb_per_s=max(limit.copy_gb_per_s for limit in seen.values()),
            matmul_tflop_per_s={_name(dtype): limit.matmul_tflop_per_s for dtype, limit in seen.items()},
        ),
        stages=accounts,
        largest_losses=[Loss(where=where, ms=ms) for where, ms in largest if ms > 0],
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.") if dtype in EIGHT_BIT.values() else dtype_name(dtype)
