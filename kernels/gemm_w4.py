"""out = x weight^T + low up^T + bias and an epilogue, of weights that are codes and a scale for some columns of a row.

Shapes: x_MK, codes of 4 bits (N, K / 2) or of 8 (N, K), scale_NG -> out_MN, where M stands for any leading dimensions.
Products of half precision or fp32 are summed in fp32, those of 8-bit activations within a group of columns in int32.
Why: a weight of 4 bits and its scales take a quarter of one in bf16, and most released quantised checkpoints have such
weights. "pointer" decodes tiles inside the product. From a few thousand rows on decoding would keep tensor cores
waiting; "dequantize" decodes the layer in a pass of its own, then calls the library. "tma" is "pointer" for Hopper and
later: persistent programs, and weights that go from the decoder straight to the tensor cores. Which is a row of the
tile table.

    SVDQuant (Li et al. 2024): x weight^T is about (x / smooth) codes^T + (x down^T) up^T, and `low` is x down^T,
    which `low_rank.py` computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.activation import activation
from sgl_diffusion.kernels.gemm import (
    check_epilogue,
    eager_swiglu,
    gemm_reference,
    out_columns,
    results_width,
    with_epilogue,
    with_swiglu,
)
from sgl_diffusion.kernels.gemm_forms import fit_descriptors
from sgl_diffusion.kernels.gemm_w4_forms import launch_decode, launch_pointer, launch_tma
from sgl_diffusion.kernels.grouped import Grouped, check_grouped, decode
from sgl_diffusion.kernels.low_rank import check_branch
from sgl_diffusion.kernels.op import TOLERANCE, Inputs, Op, Size, inside, noise, poisoned

# M rows  N output columns  K input columns  G groups of columns that share a scale  R columns of the low-rank branch


def gemm_w4(
    x_MK: Tensor, codes: Tensor, scale_NG: Tensor, bias_N: Tensor | None = None,
    *, offset_NG: Tensor | None = None, table: Tensor | None = None, x_scale: Tensor | None = None,
    smooth_K: Tensor | None = None, low_MR: Tensor | None = None, up_NR: Tensor | None = None,
    gelu_from: int | None = None, swiglu_from: int | None = None, tail: Tensor | None = None,
    gate: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None,
    dtype: torch.dtype | None = None, impl: launch.Impl = "auto",
) -> Any:  # fmt: skip
    """A linear layer with a weight of 4 bits. Returns `out`, or a new contiguous tensor; with a tail, (out, tail).

    Args:
        x_MK: (..., K) with a contiguous last dimension and rows evenly apart. Or its int8 codes, beside `x_scale`.
        codes: uint8 (N, K / 2), contiguous; the even column in the low half of a byte.
        scale_NG: (N, G) in fp32, bf16, fp16 or e4m3, contiguous; groups are of 16, 32, 64, 128 or all K columns.
            weight = scale * (code - 8).
        offset_NG: likewise but no e4m3; weight = scale * code + offset.
        table: fp32 (16,), instead of offsets; weight = scale * table[code].
        x_scale: fp32, one for every row of codes. Weights have no table then, and groups of 32 columns or more.
        smooth_K: (K,), any float dtype; inputs are divided by it, which costs nothing, since the weights are instead.
            Codes are of inputs that were divided before.
        low_MR, up_NR: (..., R) and (N, R), R a multiple of 16 up to 128, in the dtype of the result;
            low_MR up_NR^T is added to the product.
        bias_N, gelu_from, swiglu_from, tail, gate, residual, out: as `gemm` takes them, in the dtype of the result.
        dtype: of a new result of codes; otherwise it is that of x.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; arguments that exclude each other.
    Source: SVDQuant, https://arxiv.org/abs/2411.05007; NF4, https://arxiv.org/abs/2305.14314.
    """
    weight = Grouped(codes, scale_NG, offset_NG, table, smooth_K)
    launch.check_ndim(2, codes=codes, scale_NG=scale_NG)
    launch.check_dtype(torch.uint8, codes=codes)
    if x_scale is not None:
        dtype = _check_codes(x_MK, x_scale, weight, out, dtype)
    else:
        launch.check_float(x_MK, x_MK=x_MK)
        launch.check_dtype(dtype or x_MK.dtype, x_MK=x_MK)
    return _product(
        "gemm_w4", x_MK, x_scale, weight, low_MR, up_NR, bias_N, gelu_from, swiglu_from, tail, gate, residual, out,
        dtype or x_MK.dtype, impl,
    )  # fmt: skip


def gemm_w8(
    x_MK: Tensor, codes: Tensor, scale_NG: Tensor, bias_N: Tensor | None = None,
    *, offset_NG: Tensor | None = None, smooth_K: Tensor | None = None,
    low_MR: Tensor | None = None, up_NR: Tensor | None = None,
    gelu_from: int | None = None, swiglu_from: int | None = None, tail: Tensor | None = None,
    gate: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None, impl: launch.Impl = "auto",
) -> Any:  # fmt: skip
    """The same with a weight of 5 to 8 bits: int8 codes (N, K), contiguous; weight = scale * code, + offset if given.

    Raises:
        ValueError: as `gemm_w4` does.
    """
    weight = Grouped(codes, scale_NG, offset_NG, None, smooth_K)
    launch.check_ndim(2, codes=codes, scale_NG=scale_NG)
    launch.check_dtype(torch.int8, codes=codes)
    launch.check_float(x_MK, x_MK=x_MK)
    return _product(
        "gemm_w8", x_MK, None, weight, low_MR, up_NR, bias_N, gelu_from, swiglu_from, tail, gate, residual, out,
        x_MK.dtype, impl,
    )  # fmt: skip


def _product(
    op: str, x_MK: Tensor, x_scale: Tensor | None, weight: Grouped, low_MR: Tensor | None, up_NR: Tensor | None,
    bias_N: Tensor | None, gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None, gate: Tensor | None,
    residual: Tensor | None, out: Tensor | None, dtype: torch.dtype, impl: launch.Impl,
) -> Any:  # fmt: skip
    check_grouped(x_MK, weight)
    N, K = weight.shape
    launch.check_shape((*x_MK.shape[:-1], K), x_MK=x_MK)
    launch.check_last_dim(x_MK=x_MK)
    launch.row_stride("x_MK", x_MK)
    check_branch(x_MK, N, dtype, low_MR, up_NR)
    check_epilogue(x_MK, N, dtype, bias_N, gelu_from, tail, gate, residual, out, swiglu_from)
    if out is None:
        columns = out_columns(N, gelu_from, swiglu_from, tail)
        out = torch.empty((*x_MK.shape[:-1], columns), dtype=dtype, device=x_MK.device)
    operands = x_MK, x_scale, weight, low_MR, up_NR, bias_N
    if not launch.runs_triton(impl, x_MK):
        launch.took(op, "torch", N, K)
        return _library(*operands, gelu_from, swiglu_from, tail, gate, residual, out)
    bulk = fit_descriptors(x_MK, weight.codes, low_MR, up_NR, residual, out, tail)
    tile = launch.tile(
        op, m=x_MK.numel() // K, itemsize=out.element_size(),
        codes=int(x_scale is not None), table=int(weight.table is not None), swiglu=int(swiglu_from is not None),
        bulk=int(bulk),
    )  # fmt: skip
    form = tile.pop("form")
    if form == "tma" and (not bulk or swiglu_from is not None):
        form = "pointer"
    launch.took(op, form, N, K)
    with launch.on_device(x_MK):
        if form == "dequantize":
            decoder = partial(launch_decode, tile=tile)
            if swiglu_from is None:
                return _library(*operands, gelu_from, None, tail, gate, residual, out, decoder)
            y = _library(*operands, None, None, None, None, None, out.new_empty(*x_MK.shape[:-1], N), decoder)
            return with_swiglu(y, partial(activation, impl=impl), swiglu_from, tail, out)
        if form == "tma":
            launch_tma(*operands, gelu_from, tail, gate, residual, out, tile)
        else:
            launch_pointer(*operands, gelu_from, swiglu_from, tail, gate, residual, out, tile)
    return out if tail is None else (out, tail)


def _library(
    x_MK: Tensor, x_scale: Tensor | None, weight: Grouped, low_MR: Tensor | None, up_NR: Tensor | None,
    bias_N: Tensor | None, gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None, gate: Tensor | None,
    residual: Tensor | None, out: Tensor, decoder: Callable[[Grouped, Tensor], None] = decode,
) -> Any:  # fmt: skip
    """Weights first, in the dtype of the product, then the product by PyTorch; codes of x are multiplied in fp32."""
    dtype = out.dtype if x_scale is None else torch.promote_types(out.dtype, torch.float32)
    x = x_MK if x_scale is None else x_MK.to(dtype) * x_scale.unsqueeze(-1)
    N, K = weight.shape
    dense_NK = x.new_empty(N, K if up_NR is None else K + up_NR.shape[1])
    decoder(weight, dense_NK[:, :K])
    if low_MR is not None and up_NR is not None:
        # more columns of one product: one sum, rounded once
        x = torch.cat([x, low_MR.to(dtype)], dim=-1)
        dense_NK[:, K:] = up_NR
    if x_scale is None:
        return gemm_reference(
            x, dense_NK, bias_N, gelu_from=gelu_from, swiglu_from=swiglu_from, tail=tail, gate=gate, residual=residual,
            out=out,
        )  # fmt: skip

    def product(columns: slice, out: Tensor | None) -> Tensor:
        y = F.linear(x, dense_NK[columns], None if bias_N is None else bias_N[columns].to(dtype))
        return y if out is None else out.copy_(y)

    return with_epilogue(product, gelu_from, tail, gate, residual, out, swiglu_from)


# -- arguments ----------------------------------------------------------------------


def _check_codes(
    x_MK: Tensor, x_scale: Tensor, weight: Grouped, out: Tensor | None, dtype: torch.dtype | None
) -> torch.dtype:
    """Of activations. Returns the dtype of the result."""
    launch.check_dtype(torch.int8, x_MK=x_MK)
    launch.check_float(x_MK, x_scale=x_scale)
    launch.check_dtype(torch.float32, x_scale=x_scale)
    launch.check_shape(tuple(x_MK.shape[:-1]), x_scale=x_scale)
    launch.check_contiguous(x_scale=x_scale)
    for name, value in (("table", weight.table), ("smooth_K", weight.smooth_K)):
        if value is not None:
            raise ValueError(f"{name}: expected none beside x_scale, whose codes are multiplied as integers")
    if weight.group < 32:
        raise ValueError(f"scale_NG: groups of {weight.group} columns, expected 32 or more beside x_scale")
    if dtype is None:
        if out is None:
            raise ValueError("dtype=None: expected that of the result beside x_scale, or out")
        dtype = out.dtype
    if dtype not in launch.FLOAT_DTYPES:
        raise ValueError(f"dtype={dtype}: expected {', '.join(map(str, launch.FLOAT_DTYPES))}")
    return dtype


# -- declaration --------------------------------------------------------------------


def gemm_w4_reference(
    x_MK: Tensor, codes: Tensor, scale_NG: Tensor, bias_N: Tensor | None = None,
    *, offset_NG: Tensor | None = None, table: Tensor | None = None, x_scale: Tensor | None = None,
    smooth_K: Tensor | None = None, low_MR: Tensor | None = None, up_NR: Tensor | None = None,
    gelu_from: int | None = None, swiglu_from: int | None = None, tail: Tensor | None = None,
    gate: Tensor | None = None, residual: Tensor | None = None, out: Tensor,
) -> Any:  # fmt: skip
    """What the CPU runs, of both widths of codes."""
    weight = Grouped(codes, scale_NG, offset_NG, table, smooth_K)
    return _library(
        x_MK, x_scale, weight, low_MR, up_NR, bias_N, gelu_from, swiglu_from, tail, gate, residual, out
    )


def eager_gemm_w4(
    x_MK: Tensor, codes: Tensor, scale_NG: Tensor, bias_N: Tensor,
    *, offset_NG: Tensor | None = None, table: Tensor | None = None, x_scale: Tensor | None = None,
    smooth_K: Tensor | None = None, low_MR: Tensor | None = None, up_NR: Tensor | None = None,
    gelu_from: int | None = None, swiglu_from: int | None = None, tail: Tensor | None = None,
    gate: Tensor | None = None, residual: Tensor | None = None, out: Tensor,
) -> object:  # fmt: skip
    """As weight-only layers are run without a kernel: the weights, the product, the branch and what follows it."""
    N, G = scale_NG.shape
    if codes.dtype == torch.uint8:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).view(N, -1)
        codes = codes if offset_NG is not None or table is not None else codes.to(torch.int8) - 8
    value = codes.to(out.dtype) if table is None else table[codes.int()].to(out.dtype)
    weight = value.view(N, G, -1) * scale_NG.to(out.dtype).unsqueeze(-1)
    if offset_NG is not None:
        weight = weight + offset_NG.to(out.dtype).unsqueeze(-1)
    x = x_MK if x_scale is None else (x_MK * x_scale.unsqueeze(-1)).to(out.dtype)
    y = F.linear(x if smooth_K is None else x / smooth_K, weight.view(N, -1), bias_N)
    if low_MR is not None and up_NR is not None:
        y = y + F.linear(low_MR, up_NR)
    if swiglu_from is not None:
        products = eager_swiglu(y[..., swiglu_from:])
        return out.copy_(products) if tail is None else (out.copy_(y[..., :swiglu_from]), tail.copy_(products))
    if tail is not None:
        tail.copy_(F.gelu(y[..., gelu_from:], approximate="tanh"))
        return out.copy_(y[..., :gelu_from]), tail
    if gelu_from is not None:
        y = F.gelu(y, approximate="tanh")
    if gate is not None and residual is not None:
        y = residual + gate.unsqueeze(1) * y
    return out.copy_(y)


def _inputs(
    device: str, dtype: torch.dtype, B: int, L: int, K: int, N: int, group: int, bits: int = 4,
    scale: torch.dtype = torch.float32, kind: str = "signed", int8: bool = False, smooth: bool = False,
    rank: int = 0, gelu_from: int | None = None, tail: bool = False, gated: bool = False,
    swiglu_from: int | None = None,
) -> Inputs:  # fmt: skip
    wider = poisoned((B, L, K + 16), dtype, device)
    buffer = poisoned((B, L, 2 * N), dtype, device)
    lows = poisoned((B, L, 2 * rank), dtype, device)
    gates = poisoned((B, 3 * N), dtype, device)
    values = noise((N, K * bits // 8), torch.float32, device, 1)
    width, head = results_width(N, swiglu_from), (gelu_from or swiglu_from or 0) if tail else 0
    inputs: Inputs = {
        "x_MK": inside(wider, noise((B, L, K), dtype, device), slice(16, K + 16)),
        "codes": (values * 48).to(torch.int8),
        "scale_NG": (noise((N, K // group), torch.float32, device, 2).abs() * K**-0.5 / 2).to(scale),
        "bias_N": noise((N,), dtype, device, 3),
        "smooth_K": noise((K,), dtype, device, 4).abs() + 0.5 if smooth else None,
        "low_MR": inside(lows, noise((B, L, rank), dtype, device, 5), slice(rank, 2 * rank)) if rank else None,
        "up_NR": noise((N, rank), dtype, device, 6) if rank else None,
        "offset_NG": noise((N, K // group), torch.float32, device, 7) / 8 if kind == "offset" else None,
        "gelu_from": gelu_from,
        "swiglu_from": swiglu_from,
        "tail": buffer[..., N + head : N + width] if tail else None,
        "gate": inside(gates, noise((B, N), dtype, device, 8), slice(N, 2 * N)) if gated else None,
        "residual": noise((B, L, N), dtype, device, 9) if gated else None,
        "out": buffer[..., : head or width],
    }
    if bits == 8:
        return inputs
    inputs["codes"] = inputs["codes"].view(torch.uint8)
    inputs["table"] = noise((16,), torch.float32, device, 10) * 4 if kind == "table" else None
    if int8:
        x_codes = (noise((B, L, K + 16), torch.float32, device) * 40).to(torch.int8)
        inputs["x_MK"] = x_codes[..., 16:]
        inputs["x_scale"] = noise((B, L), torch.float32, device, 11).abs() / 40
    return inputs


def _bytes(i: Inputs) -> int:
    read = ("x_MK", "codes", "scale_NG", "offset_NG", "low_MR", "up_NR", "residual", "tail", "out")
    given = sum(i[name].numel() * i[name].element_size() for name in read if i.get(name) is not None)
    if i["out"] is not None:
        return given
    x_MK, tail = i["x_MK"], 0 if i["tail"] is None else i["tail"].shape[-1]
    itemsize = x_MK.element_size() if i.get("dtype") is None else i["dtype"].itemsize
    width = results_width(len(i["codes"]), i["swiglu_from"])
    return given + x_MK.numel() // x_MK.shape[-1] * (width - tail) * itemsize


def _flops(i: Inputs) -> int:
    N, rank = len(i["codes"]), 0 if i.get("low_MR") is None else i["low_MR"].shape[-1]
    return 2 * (i["x_MK"].numel() // i["x_MK"].shape[-1]) * N * (i["x_MK"].shape[-1] + rank)


FORMS = (
    {"form": "dequantize", "BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4},
    {"form": "pointer", "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
    {"form": "tma", "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 4},
    {"form": "tma", "BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 4},
)

# a weight is rounded to the dtype of x, as if the checkpoint had it so; the library rounds the product before a gate
ROUNDED = {**TOLERANCE, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

FP4_WITH_BRANCH: Size = {
    "B": 1, "L": 512, "K": 3072, "N": 3072, "group": 16, "scale": torch.float8_e4m3fn, "kind": "table",
    "smooth": True, "rank": 32, "gelu_from": 0,
}  # fmt: skip

W4 = Op(
    name="gemm_w4",
    formula="x weight^T + low up^T + bias and the epilogues of gemm; weight of 4-bit codes and scales of groups",
    replaces="unpacking, sub or table, mul, add, linear; of a low-rank branch linear, add; gelu, cat, mul, add",
    launch=gemm_w4,
    reference=gemm_w4_reference,
    eager=eager_gemm_w4,
    inputs=_inputs,
    tiny=(
        {"B": 1, "L": 1, "K": 32, "N": 16, "group": 16, "scale": torch.float8_e4m3fn},
        {"B": 1, "L": 17, "K": 64, "N": 21, "group": 32, "kind": "offset", "gelu_from": 5, "tail": True},
        {"B": 2, "L": 9, "K": 50, "N": 24, "group": 50, "kind": "table", "smooth": True, "gelu_from": 0},
        {"B": 2, "L": 10, "K": 128, "N": 9, "group": 128, "smooth": True, "rank": 48, "gated": True},
        {"B": 1, "L": 21, "K": 96, "N": 40, "group": 16, "kind": "offset", "gelu_from": 8, "tail": True},
        {"B": 2, "L": 11, "K": 160, "N": 24, "group": 160, "kind": "table", "smooth": True, "rank": 48, "gated": True},
        {"B": 1, "L": 17, "K": 64, "N": 42, "group": 32, "kind": "offset", "swiglu_from": 0},
        {"B": 2, "L": 9, "K": 64, "N": 43, "group": 16, "kind": "table", "smooth": True, "rank": 16, "swiglu_from": 5,
         "tail": True},
        {"B": 1, "L": 19, "K": 128, "N": 24, "group": 64, "int8": True, "rank": 16, "gated": True},
        {"B": 1, "L": 19, "K": 96, "N": 40, "group": 32, "int8": True, "kind": "offset", "gelu_from": 8, "tail": True},
    ),
    production=(
        {"B": 1, "L": 4096, "K": 3072, "N": 12288, "group": 64, "scale": torch.bfloat16, "gelu_from": 0},
        {"B": 1, "L": 512, "K": 3072, "N": 12288, "group": 64, "scale": torch.bfloat16, "gelu_from": 0},
        FP4_WITH_BRANCH,
        {"B": 1, "L": 4608, "K": 3072, "N": 3072, "group": 64, "int8": True, "rank": 32, "gated": True},
        {"B": 1, "L": 4608, "K": 6144, "N": 55296, "group": 64, "int8": True, "rank": 32, "swiglu_from": 18432,
         "tail": True},
        {"B": 1, "L": 512, "K": 6144, "N": 36864, "group": 64, "swiglu_from": 0},
        {"B": 1, "L": 512, "K": 6144, "N": 36864, "group": 16, "scale": torch.float8_e4m3fn, "kind": "table",
         "swiglu_from": 0},
        {"B": 1, "L": 1, "K": 3072, "N": 18432, "group": 64, "scale": torch.bfloat16, "kind": "offset"},
    ),
    cpu=(
        {"B": 1, "L": 256, "K": 512, "N": 2048, "group": 64, "gelu_from": 0},
        {"B": 1, "L": 256, "K": 512, "N": 2048, "group": 64, "int8": True, "rank": 32},
    ),
    forms=FORMS,
    bytes=_bytes,
    flops=_flops,
    tolerance=ROUNDED,
    multiplied_with=("swiglu_from",),
)

W8 = Op(
    name="gemm_w8",
    formula="gemm_w4 with a weight of 8-bit codes",
    replaces="mul, add, linear; of a low-rank branch linear, add; gelu, cat, mul, add",
    launch=gemm_w8,
    reference=gemm_w4_reference,
    eager=eager_gemm_w4,
    inputs=_inputs,
    tiny=(
        {"B": 1, "L": 19, "K": 64, "N": 21, "group": 32, "bits": 8, "scale": torch.float16, "gelu_from": 0},
        {"B": 2, "L": 9, "K": 48, "N": 24, "group": 16, "bits": 8, "kind": "offset", "gated": True},
        {"B": 1, "L": 21, "K": 80, "N": 40, "group": 16, "bits": 8, "gelu_from": 8, "tail": True, "rank": 16},
        {"B": 1, "L": 21, "K": 80, "N": 40, "group": 16, "bits": 8, "swiglu_from": 8, "tail": True},
    ),
    production=(
        {"B": 1, "L": 4096, "K": 3072, "N": 12288, "group": 32, "bits": 8, "scale": torch.float16, "gelu_from": 0},
        {"B": 1, "L": 512, "K": 3072, "N": 12288, "group": 32, "bits": 8, "scale": torch.float16, "gelu_from": 0},
        {"B": 1, "L": 512, "K": 3840, "N": 20480, "group": 32, "bits": 8, "scale": torch.float16, "swiglu_from": 0},
        {"B": 1, "L": 1, "K": 3072, "N": 18432, "group": 32, "bits": 8, "scale": torch.float16},
    ),
    cpu=({"B": 1, "L": 256, "K": 512, "N": 2048, "group": 32, "bits": 8, "gelu_from": 0},),
    forms=FORMS,
    bytes=_bytes,
    flops=_flops,
    tolerance=ROUNDED,
    multiplied_with=("swiglu_from",),
)
