"""sum_i c_i x_i in fp32, rounded once.

Shapes: 1 to 6 tensors of any one shape; c_i are numbers.
Why: the update of a multistep sampler in one launch instead of two for each tensor; c_i may live on the GPU, so that a
captured step replays with those of another step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, noise, poisoned

MAX_TENSORS = 6  # a third-order corrector reads x, three predictions and two differences


@triton.jit
def _linear_combination_kernel(
    x_ptrs,  # a tuple of pointers
    coefficients,  # a tuple of as many numbers, or a pointer to them
    out_ptr, N,
    IN_MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < N
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(len(x_ptrs)):
        coefficient = tl.load(coefficients + j) if IN_MEMORY else coefficients[j]
        total += coefficient * tl.load(x_ptrs[j] + i, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=live)


def linear_combination(
    tensors: Sequence[Tensor], coefficients: Sequence[float] | Tensor,
    *, out: Tensor | None = None, impl: launch.Impl = "auto",
) -> Tensor:  # fmt: skip
    """sum_i c_i x_i in fp32: contiguous, in the dtype of the first tensor, or written to `out`.

    Args:
        tensors: 1 to 6 of one shape, any float dtypes and strides.
        coefficients: as many numbers, or an fp32 tensor of them on the device of the tensors.
        out: contiguous, any float dtype; may be one of the tensors.
    Raises:
        ValueError: a number of tensors or coefficients, shape, dtype, device or stride that does not fit.
    Source: the updates of `UniPCMultistepScheduler` and `DPMSolverMultistepScheduler` of diffusers.
    """
    _check_combination(tensors, coefficients, out)
    first = tensors[0]
    if not launch.runs_triton(impl, first):
        return linear_combination_reference(tensors, coefficients, out=out)
    rows = tuple(t.contiguous() for t in tensors)
    if out is None:
        out = torch.empty_like(rows[0])
    in_memory = isinstance(coefficients, Tensor)
    tiles = launch.tile("linear_combination")
    with launch.on_device(first):
        _linear_combination_kernel[(triton.cdiv(first.numel(), tiles["BLOCK"]),)](
            rows, coefficients if in_memory else tuple(map(float, coefficients)), out, first.numel(),
            IN_MEMORY=in_memory, enable_fp_fusion=True, **tiles,
        )  # fmt: skip
    return out


def _check_combination(
    tensors: Sequence[Tensor], coefficients: Sequence[float] | Tensor, out: Tensor | None
) -> None:
    if not 1 <= len(tensors) <= MAX_TENSORS:
        raise ValueError(f"tensors: {len(tensors)} of them, expected 1 to {MAX_TENSORS}")
    first = tensors[0]
    given = {f"tensors[{i}]": t for i, t in enumerate(tensors)} | ({} if out is None else {"out": out})
    launch.check_float(first, **given)
    launch.check_shape(tuple(first.shape), **given)
    if out is not None:
        launch.check_contiguous(out=out)
    if isinstance(coefficients, Tensor):
        launch.check_float(first, coefficients=coefficients)
        launch.check_dtype(torch.float32, coefficients=coefficients)
        launch.check_shape((len(tensors),), coefficients=coefficients)
        launch.check_contiguous(coefficients=coefficients)
    elif len(coefficients) != len(tensors):
        raise ValueError(f"coefficients: {len(coefficients)} of them, expected {len(tensors)}, one for each tensor")


def linear_combination_reference(
    tensors: Sequence[Tensor], coefficients: Sequence[float] | Tensor, *, out: Tensor | None = None
) -> Tensor:
    total = launch.widen(tensors[0]) * coefficients[0]
    for x, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        if isinstance(coefficient, Tensor):
            total.addcmul_(launch.widen(x), coefficient)
        else:
            total.add_(launch.widen(x), alpha=coefficient)
    return total.to(tensors[0].dtype).contiguous() if out is None else out.copy_(total)


def eager_linear_combination(
    tensors: Sequence[Tensor], coefficients: Sequence[float] | Tensor, *, out: Tensor | None
) -> Tensor:
    """As diffusers runs it: products and sums."""
    total = coefficients[0] * tensors[0]
    for x, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total = total + coefficient * x
    return total.to(tensors[0].dtype) if out is None else out.copy_(total)


def _inputs(
    device: str, dtype: torch.dtype, N: tuple[int, ...], count: int, on: str = "host", out: bool = True
) -> Inputs:
    values = [1.07, -0.31, 0.53, -0.11, 0.029, -0.7][:count]
    return {
        "tensors": [noise(N, dtype, device, i) for i in range(count)],
        "coefficients": values if on == "host" else torch.tensor(values, device=device),
        "out": poisoned(N, dtype, device) if out else None,
    }


OP = Op(
    name="linear_combination",
    formula="sum of c_i x_i",
    replaces="a mul and an add for each tensor",
    launch=linear_combination,
    reference=linear_combination_reference,
    eager=eager_linear_combination,
    inputs=_inputs,
    tiny=(
        {"N": (1,), "count": 1},
        {"N": (2, 5, 33), "count": 2, "on": "device", "out": False},
        {"N": (2, 5, 33), "count": 3},
        {"N": (1, 3, 64), "count": 6},
    ),
    production=(
        {"N": (1, 4096, 64), "count": 3},
        {"N": (1, 16, 21, 60, 104), "count": 4, "on": "device"},
        {"N": (1, 16, 21, 60, 104), "count": 6},
    ),
    cpu=({"N": (1, 16384, 64), "count": 3}, {"N": (1, 16384, 64), "count": 4, "on": "device"}),
    written=("out",),
    bytes=lambda i: sum(t.nbytes for t in i["tensors"]) + i["tensors"][0].nbytes,
)
