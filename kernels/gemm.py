"""out = x weight^T + bias, and what follows it in a block: GELU or SwiGLU of some columns, or residual + gate * out.

Shapes: x_MK, weight_NK, bias_N -> out_MN, where M stands for any leading dimensions. Products are summed in fp32.
Why: a pass over a GEMM's output costs up to a tenth of the GEMM, and none is left. `tail` lets the one GEMM of a block
whose attention and MLP are parallel write QKV to one place and the MLP's share of the next GEMM's input to another.
A SwiGLU's products are half as many as its columns: a tile multiplies rows of both halves of the weight.
Which form is fastest, cuBLAS and separate passes ("blas") or a kernel of `gemm_forms.py`, is a row of the tile table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.activation import activation, activation_reference
from sgl_diffusion.kernels.gemm_forms import TMA_ALIGNMENT, fit_descriptors, launch_pointer, launch_tma
from sgl_diffusion.kernels.op import TOLERANCE, Inputs, Op, inside, noise, poisoned

# M rows  N output columns  K input columns  G groups of consecutive rows that share a gate
# columns from `gelu_from` or `swiglu_from` on are the tail, those before it the head


@overload
def gemm(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None,
    *, gelu_from: int | None = None, swiglu_from: int | None = None, tail: None = None, gate: Tensor | None = None,
    residual: Tensor | None = None, out: Tensor | None = None, impl: launch.Impl = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def gemm(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None,
    *, gelu_from: int | None = None, swiglu_from: int | None = None, tail: Tensor, gate: None = None,
    residual: None = None, out: Tensor | None = None, impl: launch.Impl = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def gemm(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None,
    *, gelu_from: int | None = None, swiglu_from: int | None = None, tail: Tensor | None = None,
    gate: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None, impl: launch.Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """A linear layer and its epilogue. Returns `out`, or a new contiguous tensor; with a tail, (out, tail).

    Args:
        x_MK: (..., K) with a contiguous last dimension and rows evenly apart.
        weight_NK: contiguous, as `nn.Linear` keeps it; a range of rows of a wider one is fine. bias_N: likewise.
        gelu_from: GELU, by its tanh approximation, of the output columns from here on; 0 is all of them.
        swiglu_from: silu(gate) * value of the output columns from here on: gates, then as many values. 0 is all of
            them, and `out` is (..., N / 2) then; from another column on, there is a tail.
        tail: (..., N - gelu_from) or (..., (N - swiglu_from) / 2), where what comes of those columns goes; may be a
            slice of a wider buffer. `out` has the rest, and beside a SwiGLU may be new as a slice of a wider tensor.
        residual: (..., N), added to the product; may be `out` itself.
        gate: (G, N) in any float dtype; multiplies the product before the residual is added. G divides the rows:
            the first rows / G share the first gate, and so on.
        out: dtype of x, rows evenly apart.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; a gate without a residual; two epilogues.
    """
    _check(x_MK, weight_NK, bias_N, gelu_from, swiglu_from, tail, gate, residual, out)
    N, K = weight_NK.shape
    form, tile = "blas", {}
    if launch.runs_triton(impl, x_MK):
        tile = launch.tile(
            "gemm", m=x_MK.numel() // K, n=N, k=K, itemsize=x_MK.element_size(),
            gelu=int(gelu_from is not None), swiglu=int(swiglu_from is not None), gated=int(residual is not None),
        )  # fmt: skip
        form = tile.pop("form")
    columns = out_columns(N, gelu_from, swiglu_from, tail)
    if form == "tma" and not (
        fit_descriptors(x_MK, weight_NK, residual, out, tail)
        and (out is not None or columns * x_MK.element_size() % TMA_ALIGNMENT == 0)
    ):
        form = "blas"
    launch.took("gemm", form if launch.runs_triton(impl, x_MK) else "torch", N, K)
    if form == "blas":
        if swiglu_from is not None and launch.runs_triton(impl, x_MK):
            y = _product(x_MK, weight_NK, bias_N)
            return with_swiglu(y, partial(activation, impl=impl), swiglu_from, tail, out)
        return gemm_reference(
            x_MK, weight_NK, bias_N, gelu_from=gelu_from, swiglu_from=swiglu_from, tail=tail, gate=gate,
            residual=residual, out=out,
        )  # fmt: skip
    if out is None:
        out = x_MK.new_empty(*x_MK.shape[:-1], columns)
    launch_form = {"pointer": launch_pointer, "tma": launch_tma}[form]
    with launch.on_device(x_MK):
        launch_form(x_MK, weight_NK, bias_N, gelu_from, swiglu_from, tail, gate, residual, out, tile)
    return out if tail is None else (out, tail)


def _check(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, gelu_from: int | None, swiglu_from: int | None,
    tail: Tensor | None, gate: Tensor | None, residual: Tensor | None, out: Tensor | None,
) -> None:  # fmt: skip
    launch.check_ndim(2, weight_NK=weight_NK)
    launch.check_float(x_MK, x_MK=x_MK, weight_NK=weight_NK)
    launch.check_dtype(x_MK.dtype, weight_NK=weight_NK)
    launch.check_shape((*x_MK.shape[:-1], weight_NK.shape[1]), x_MK=x_MK)
    launch.check_contiguous(weight_NK=weight_NK)
    launch.check_last_dim(x_MK=x_MK)
    launch.row_stride("x_MK", x_MK)
    check_epilogue(x_MK, weight_NK.shape[0], x_MK.dtype, bias_N, gelu_from, tail, gate, residual, out, swiglu_from)


def results_width(N: int, swiglu_from: int | None) -> int:
    """Columns of all results."""
    return N if swiglu_from is None else (N + swiglu_from) // 2


def out_columns(N: int, gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None) -> int:
    """Those before the tail, or all."""
    return results_width(N, swiglu_from) if tail is None else gelu_from or swiglu_from or 0


def check_columns(N: int, gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None) -> None:
    """Where the activation of a product with N columns begins.

    Raises:
        ValueError: as `gemm` does.
    """
    if swiglu_from is not None and gelu_from is not None:
        raise ValueError(f"{swiglu_from=}: expected none beside {gelu_from=}")
    name, first = ("gelu_from", gelu_from) if swiglu_from is None else ("swiglu_from", swiglu_from)
    if first is not None and not 0 <= first < N:
        raise ValueError(f"{name}={first}: expected 0 to {N - 1}, a column of the output")
    if tail is not None and not first:
        raise ValueError(f"{name}={first}: expected 1 to {N - 1}, the first column of tail")
    if swiglu_from is not None and (N - swiglu_from) % 2:
        raise ValueError(f"{swiglu_from=}: {N - swiglu_from} columns from there on, expected as many gates as values")
    if swiglu_from and tail is None:
        raise ValueError(f"{swiglu_from=}: expected 0, or a tail, where the products go")


def check_epilogue(
    x_MK: Tensor, N: int, dtype: torch.dtype, bias_N: Tensor | None, gelu_from: int | None, tail: Tensor | None,
    gate: Tensor | None, residual: Tensor | None, out: Tensor | None, swiglu_from: int | None = None,
) -> None:  # fmt: skip
    """Of a product with N columns and results in `dtype`; the same for every kind of weight.

    Raises:
        ValueError: as `gemm` does.
    """
    rows = tuple(x_MK.shape[:-1])
    check_columns(N, gelu_from, swiglu_from, tail)
    head = out_columns(N, gelu_from, swiglu_from, tail)
    if tail is not None:
        launch.check_shape((*rows, results_width(N, swiglu_from) - head), tail=tail)
    if residual is not None and (gelu_from is not None or swiglu_from is not None):
        raise ValueError(f"residual: expected none beside {'gelu_from' if swiglu_from is None else 'swiglu_from'}")
    if gate is not None:
        if residual is None:
            raise ValueError("gate: expected a residual beside it")
        if gate.ndim != 2 or gate.shape[1] != N or not gate.shape[0] or math.prod(rows) % gate.shape[0]:
            raise ValueError(
                f"gate: shape {tuple(gate.shape)}, expected (G, {N}) where G divides the {math.prod(rows)} rows of x_MK"
            )
        launch.check_float(x_MK, gate=gate)
        launch.check_last_dim(gate=gate)
    optional = {"bias_N": bias_N, "tail": tail, "residual": residual, "out": out}
    given = {name: t for name, t in optional.items() if t is not None}
    launch.check_float(x_MK, **given)
    launch.check_dtype(dtype, **given)
    if bias_N is not None:
        launch.check_shape((N,), bias_N=given.pop("bias_N"))
        launch.check_contiguous(bias_N=bias_N)
    if residual is not None:
        launch.check_shape((*rows, N), residual=residual)
    if out is not None:
        launch.check_shape((*rows, head), out=out)
    launch.check_last_dim(**given)
    for name, t in given.items():
        launch.row_stride(name, t)


def gemm_reference(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None,
    *, gelu_from: int | None = None, swiglu_from: int | None = None, tail: Tensor | None = None,
    gate: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """PyTorch's product, summed in fp32 for half precision too, then a pass over it. Also the "blas" form on a GPU,
    but for a SwiGLU's pass.
    """

    def product(columns: slice, out: Tensor | None) -> Tensor:
        return _product(x_MK, weight_NK[columns], None if bias_N is None else bias_N[columns], out)

    return with_epilogue(product, gelu_from, tail, gate, residual, out, swiglu_from)


def with_epilogue(
    product: Callable[[slice, Tensor | None], Tensor], gelu_from: int | None, tail: Tensor | None,
    gate: Tensor | None, residual: Tensor | None, out: Tensor | None, swiglu_from: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """A product and passes over it, for references.

    Args:
        product: called with a range of output columns and where they go; without a place, a new tensor that may have
            more precision than the result. The bias is part of it.
    """
    if swiglu_from is not None:
        return with_swiglu(product(slice(None), None), activation_reference, swiglu_from, tail, out)
    if tail is not None:
        activation_reference(product(slice(gelu_from, None), None), "gelu_tanh", out=tail)
        return product(slice(gelu_from), out), tail
    if residual is None:
        y = product(slice(None), out)
        if gelu_from is not None:
            activation_reference(y[..., gelu_from:], "gelu_tanh", out=y[..., gelu_from:])
        return y
    y = product(slice(None), None)
    out = y if out is None else out
    if gate is None:
        return torch.add(y, residual, out=out)
    y, residual, grouped = (t.view(gate.shape[0], -1, gate.shape[1]) for t in (y, residual, out))
    if launch.on_cpu(y):
        # `addcmul` with a broadcast factor leaves the vectorised path there and takes three times as long
        torch.add(launch.widen(y).mul_(launch.widen(gate)[:, None]), residual, out=grouped)
    else:
        torch.addcmul(residual, y, gate[:, None], out=grouped)
    return out


def with_swiglu(
    y: Tensor, activate: Callable[..., Any], swiglu_from: int, tail: Tensor | None = None, out: Tensor | None = None
) -> Any:
    """A SwiGLU as a pass over a product (..., N). What is new of the head is a slice of it.

    Args:
        activate: `activation`, or what takes its arguments.
    """
    head, both = y[..., :swiglu_from], y[..., swiglu_from:]
    place = out if tail is None else tail
    if place is None:
        place = y.new_empty(*both.shape[:-1], both.shape[-1] // 2)
    activate(both, "swiglu", out=place)
    if tail is None:
        return place
    return head if out is None else out.copy_(head), tail


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    if out is None:
        return F.linear(x, weight, bias)
    x_MK, out_MN = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if bias is None:
        torch.mm(x_MK, weight.mT, out=out_MN)
    else:
        torch.addmm(bias, x_MK, weight.mT, out=out_MN)
    return out


def eager_gemm(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor, gelu_from: int | None, tail: Tensor | None,
    gate: Tensor | None, residual: Tensor | None, out: Tensor | None, swiglu_from: int | None = None,
) -> object:  # fmt: skip
    """As diffusers runs it: a projection of its own for the tail of a GELU, and copies that stand for their shares of
    `cat`.
    """
    if swiglu_from is not None:
        y = F.linear(x_MK, weight_NK, bias_N)
        head, products = y[..., :swiglu_from], eager_swiglu(y[..., swiglu_from:])
        if tail is not None:
            return head, tail.copy_(products)
        return products if out is None else out.copy_(products)
    if tail is not None:
        head = F.linear(x_MK, weight_NK[:gelu_from], bias_N[:gelu_from])
        mlp = F.gelu(F.linear(x_MK, weight_NK[gelu_from:], bias_N[gelu_from:]), approximate="tanh")
        return head, tail.copy_(mlp)
    y = F.linear(x_MK, weight_NK, bias_N)
    if gelu_from is not None:
        y = F.gelu(y, approximate="tanh")
    if gate is not None and residual is not None:
        y = residual + gate.unsqueeze(1) * y
    return y if out is None else out.copy_(y)


def eager_swiglu(y: Tensor) -> Tensor:
    gate, value = y.chunk(2, dim=-1)
    return F.silu(gate) * value


def _inputs(
    device: str, dtype: torch.dtype, B: int, L: int, K: int, N: int,
    gelu_from: int | None = None, tail: bool = False, gated: bool = False, swiglu_from: int | None = None,
) -> Inputs:  # fmt: skip
    wider = poisoned((B, L, K + 16), dtype, device)
    buffer = poisoned((B, L, 2 * N), dtype, device)
    gates = poisoned((B, 3 * N), dtype, device)
    return {
        "x_MK": inside(wider, noise((B, L, K), dtype, device), slice(16, K + 16)),
        "weight_NK": noise((N, K), dtype, device, 1) * K**-0.5,
        "bias_N": noise((N,), dtype, device, 2),
        "gelu_from": gelu_from,
        "swiglu_from": swiglu_from,
        "tail": tail_columns(buffer[..., N:], gelu_from, swiglu_from) if tail else None,
        "gate": inside(gates, noise((B, N), dtype, device, 3), slice(N, 2 * N)) if gated else None,
        "residual": noise((B, L, N), dtype, device, 4) if gated else None,
        "out": None if tail else buffer[..., : N if swiglu_from is None else N // 2],
    }


def tail_columns(place: Tensor, gelu_from: int | None, swiglu_from: int | None) -> Tensor:
    """Where cases have a product's tail: as many columns as it needs, at the end of a place for all."""
    N = place.shape[-1]
    return place[..., (gelu_from or 0) if swiglu_from is None else (N + swiglu_from) // 2 :]


def _bytes(i: Inputs) -> int:
    rows, (N, K) = i["x_MK"].numel() // i["x_MK"].shape[-1], i["weight_NK"].shape
    moved = rows * K + N * K + rows * results_width(N, i["swiglu_from"]) * (1 if i["residual"] is None else 2)
    return moved * i["x_MK"].element_size()


OP = Op(
    name="gemm",
    formula="x weight^T + bias, then GELU or SwiGLU of the columns from some one on, or residual + gate * it",
    replaces="linear, gelu or silu, cat, mul, add",
    launch=gemm,
    reference=gemm_reference,
    eager=eager_gemm,
    inputs=_inputs,
    tiny=(
        {"B": 1, "L": 1, "K": 16, "N": 16},
        {"B": 1, "L": 33, "K": 40, "N": 48, "gelu_from": 0},
        {"B": 2, "L": 9, "K": 24, "N": 64, "gelu_from": 32, "tail": True},
        {"B": 2, "L": 20, "K": 40, "N": 48, "gated": True},
        {"B": 1, "L": 17, "K": 33, "N": 21, "gelu_from": 5, "tail": True},
        {"B": 1, "L": 19, "K": 32, "N": 56, "gelu_from": 24, "tail": True},
        {"B": 1, "L": 33, "K": 40, "N": 48, "swiglu_from": 0},
        {"B": 2, "L": 20, "K": 24, "N": 136, "swiglu_from": 40, "tail": True},
        {"B": 1, "L": 17, "K": 33, "N": 43, "swiglu_from": 5, "tail": True},
    ),
    production=(
        {"B": 1, "L": 4096, "K": 3072, "N": 12288, "gelu_from": 0},
        {"B": 1, "L": 4608, "K": 3072, "N": 21504, "gelu_from": 9216, "tail": True},
        {"B": 1, "L": 4096, "K": 12288, "N": 3072, "gated": True},
        {"B": 1, "L": 4608, "K": 3072, "N": 3072, "gated": True},
        {"B": 2, "L": 4096, "K": 3072, "N": 3072, "gated": True},
        {"B": 1, "L": 512, "K": 3072, "N": 12288, "gelu_from": 0},
        {"B": 1, "L": 32760, "K": 5120, "N": 13824, "gelu_from": 0},
        {"B": 1, "L": 4096, "K": 6144, "N": 36864, "swiglu_from": 0},
        {"B": 1, "L": 4608, "K": 6144, "N": 55296, "swiglu_from": 18432, "tail": True},
        {"B": 1, "L": 4128, "K": 3840, "N": 20480, "swiglu_from": 0},
        {"B": 1, "L": 512, "K": 6144, "N": 36864, "swiglu_from": 0},
    ),
    cpu=(
        {"B": 1, "L": 256, "K": 512, "N": 2048, "gelu_from": 0},
        {"B": 1, "L": 256, "K": 512, "N": 3584, "gelu_from": 1536, "tail": True},
        {"B": 1, "L": 256, "K": 512, "N": 4608, "swiglu_from": 1536, "tail": True},
        {"B": 2, "L": 128, "K": 1024, "N": 512, "gated": True},
    ),
    forms=(
        {"form": "blas"},
        {"form": "tma", "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
        {"form": "tma", "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 4},
    ),
    bytes=_bytes,
    flops=lambda i: 2 * i["x_MK"].numel() * i["weight_NK"].shape[0],
    # sums of thousands of products; the "blas" form rounds the product before its epilogue
    tolerance={**TOLERANCE, torch.float32: 2e-6},
    multiplied_with=("swiglu_from",),
)
