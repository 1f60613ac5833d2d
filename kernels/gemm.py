"""out = x weight^T + bias, and what follows it in a block: GELU of some columns, or residual + gate * out.

Shapes: x_MK, weight_NK, bias_N -> out_MN, where M stands for any leading dimensions. Products are summed in fp32.
Why: a pass over a GEMM's output costs up to a tenth of the GEMM, and none is left. `tail` lets the one GEMM of a block
whose attention and MLP are parallel write QKV to one place and the MLP's share of the next GEMM's input to another.
Which form is fastest, cuBLAS and separate passes ("blas") or a kernel of `gemm_forms.py`, is a row of the tile table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.activation import activation_reference
from sgl_diffusion.kernels.gemm_forms import TMA_ALIGNMENT, fit_descriptors, launch_pointer, launch_tma
from sgl_diffusion.kernels.op import TOLERANCE, Inputs, Op, inside, noise, poisoned

# M rows  N output columns  K input columns  G groups of consecutive rows that share a gate
# columns from `gelu_from` on are the tail, those before it the head


@overload
def gemm(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None,
    *, gelu_from: int | None = None, tail: None = None, gate: Tensor | None = None, residual: Tensor | None = None,
    out: Tensor | None = None, impl: launch.Impl = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def gemm(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None,
    *, gelu_from: int, tail: Tensor, gate: None = None, residual: None = None,
    out: Tensor | None = None, impl: launch.Impl = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def gemm(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None,
    *, gelu_from: int | None = None, tail: Tensor | None = None, gate: Tensor | None = None,
    residual: Tensor | None = None, out: Tensor | None = None, impl: launch.Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """A linear layer and its epilogue. Returns `out`, or a new contiguous tensor; with a tail, (out, tail).

    Args:
        x_MK: (..., K) with a contiguous last dimension and rows evenly apart.
        weight_NK: contiguous, as `nn.Linear` keeps it; a range of rows of a wider one is fine. bias_N: likewise.
        gelu_from: GELU, by its tanh approximation, of the output columns from here on; 0 is all of them.
        tail: (..., N - gelu_from), where those columns go; may be a slice of a wider buffer. `out` has the rest.
        residual: (..., N), added to the product; may be `out` itself.
        gate: (G, N) in any float dtype; multiplies the product before the residual is added. G divides the rows:
            the first rows / G share the first gate, and so on.
        out: dtype of x, rows evenly apart.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; a gate without a residual; both epilogues.
    """
    _check(x_MK, weight_NK, bias_N, gelu_from, tail, gate, residual, out)
    N, K = weight_NK.shape
    form, tile = "blas", {}
    if launch.runs_triton(impl, x_MK):
        tile = launch.tile(
            "gemm", m=x_MK.numel() // K, n=N, k=K, itemsize=x_MK.element_size(),
            gelu=int(gelu_from is not None), gated=int(residual is not None),
        )  # fmt: skip
        form = tile.pop("form")
    columns = N if tail is None else N - tail.shape[-1]
    if form == "tma" and not (
        fit_descriptors(x_MK, weight_NK, residual, out, tail)
        and (out is not None or columns * x_MK.element_size() % TMA_ALIGNMENT == 0)
    ):
        form = "blas"
    if form == "blas":
        return gemm_reference(
            x_MK, weight_NK, bias_N, gelu_from=gelu_from, tail=tail, gate=gate, residual=residual, out=out
        )
    if out is None:
        out = x_MK.new_empty(*x_MK.shape[:-1], columns)
    launch_form = {"pointer": launch_pointer, "tma": launch_tma}[form]
    with launch.on_device(x_MK):
        launch_form(x_MK, weight_NK, bias_N, gelu_from, tail, gate, residual, out, tile)
    return out if tail is None else (out, tail)


def _check(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, gelu_from: int | None, tail: Tensor | None,
    gate: Tensor | None, residual: Tensor | None, out: Tensor | None,
) -> None:  # fmt: skip
    launch.check_ndim(2, weight_NK=weight_NK)
    launch.check_float(x_MK, x_MK=x_MK, weight_NK=weight_NK)
    launch.check_dtype(x_MK.dtype, weight_NK=weight_NK)
    launch.check_shape((*x_MK.shape[:-1], weight_NK.shape[1]), x_MK=x_MK)
    launch.check_contiguous(weight_NK=weight_NK)
    launch.check_last_dim(x_MK=x_MK)
    launch.row_stride("x_MK", x_MK)
    check_epilogue(x_MK, weight_NK.shape[0], x_MK.dtype, bias_N, gelu_from, tail, gate, residual, out)


def check_epilogue(
    x_MK: Tensor, N: int, dtype: torch.dtype, bias_N: Tensor | None, gelu_from: int | None, tail: Tensor | None,
    gate: Tensor | None, residual: Tensor | None, out: Tensor | None,
) -> None:  # fmt: skip
    """Of a product with N columns and results in `dtype`; the same for every kind of weight.

    Raises:
        ValueError: as `gemm` does.
    """
    rows = tuple(x_MK.shape[:-1])
    head = N
    if gelu_from is not None and not 0 <= gelu_from < N:
        raise ValueError(f"gelu_from={gelu_from}: expected 0 to {N - 1}, a column of the output")
    if tail is not None:
        if not gelu_from:
            raise ValueError(f"gelu_from={gelu_from}: expected 1 to {N - 1}, the first column of tail")
        head = gelu_from
        launch.check_shape((*rows, N - head), tail=tail)
    if residual is not None and gelu_from is not None:
        raise ValueError("residual: expected none beside gelu_from")
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
    *, gelu_from: int | None = None, tail: Tensor | None = None, gate: Tensor | None = None,
    residual: Tensor | None = None, out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """PyTorch's product, summed in fp32 for half precision too, then a pass over it. Also the "blas" form on a GPU."""

    def product(columns: slice, out: Tensor | None) -> Tensor:
        return _product(x_MK, weight_NK[columns], None if bias_N is None else bias_N[columns], out)

    return with_epilogue(product, gelu_from, tail, gate, residual, out)


def with_epilogue(
    product: Callable[[slice, Tensor | None], Tensor], gelu_from: int | None, tail: Tensor | None,
    gate: Tensor | None, residual: Tensor | None, out: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """A product and passes over it, for references.

    Args:
        product: called with a range of output columns and where they go; without a place, a new tensor that may have
            more precision than the result. The bias is part of it.
    """
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
    gate: Tensor | None, residual: Tensor | None, out: Tensor | None,
) -> object:  # fmt: skip
    """As diffusers runs it: a projection of its own for the tail, and copies that stand for their shares of `cat`."""
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


def _inputs(
    device: str, dtype: torch.dtype, B: int, L: int, K: int, N: int,
    gelu_from: int | None = None, tail: bool = False, gated: bool = False,
) -> Inputs:  # fmt: skip
    wider = poisoned((B, L, K + 16), dtype, device)
    buffer = poisoned((B, L, 2 * N), dtype, device)
    gates = poisoned((B, 3 * N), dtype, device)
    return {
        "x_MK": inside(wider, noise((B, L, K), dtype, device), slice(16, K + 16)),
        "weight_NK": noise((N, K), dtype, device, 1) * K**-0.5,
        "bias_N": noise((N,), dtype, device, 2),
        "gelu_from": gelu_from,
        "tail": buffer[..., N + (gelu_from or 0) :] if tail else None,
        "gate": inside(gates, noise((B, N), dtype, device, 3), slice(N, 2 * N)) if gated else None,
        "residual": noise((B, L, N), dtype, device, 4) if gated else None,
        "out": None if tail else buffer[..., :N],
    }


def _bytes(i: Inputs) -> int:
    rows, (N, K) = i["x_MK"].numel() // i["x_MK"].shape[-1], i["weight_NK"].shape
    moved = rows * K + N * K + rows * N * (1 if i["residual"] is None else 2)
    return moved * i["x_MK"].element_size()


OP = Op(
    name="gemm",
    formula="x weight^T + bias, then GELU of the columns from `gelu_from` on, or residual + gate * it",
    replaces="linear, gelu, cat, mul, add",
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
    ),
    production=(
        {"B": 1, "L": 4096, "K": 3072, "N": 12288, "gelu_from": 0},
        {"B": 1, "L": 4608, "K": 3072, "N": 21504, "gelu_from": 9216, "tail": True},
        {"B": 1, "L": 4096, "K": 12288, "N": 3072, "gated": True},
        {"B": 1, "L": 4608, "K": 3072, "N": 3072, "gated": True},
        {"B": 2, "L": 4096, "K": 3072, "N": 3072, "gated": True},
        {"B": 1, "L": 512, "K": 3072, "N": 12288, "gelu_from": 0},
        {"B": 1, "L": 32760, "K": 5120, "N": 13824, "gelu_from": 0},
    ),
    cpu=(
        {"B": 1, "L": 256, "K": 512, "N": 2048, "gelu_from": 0},
        {"B": 1, "L": 256, "K": 512, "N": 3584, "gelu_from": 1536, "tail": True},
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
)
