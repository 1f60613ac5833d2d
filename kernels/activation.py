"""y = f(x + bias) of a feed-forward's hidden layer; in fp32.

    gelu_tanh  x / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)       (Hendrycks & Gimpel 2016)
    gelu_erf   x / 2 * (1 + erf(x / sqrt(2)))
    silu       x / (1 + exp(-x))
    swiglu     silu(a) * b with a and b the halves of x; geglu: a * gelu_erf(b)   (Shazeer 2020)

Shapes: x (..., D), or (..., 2 D) for the gated ones -> y (..., D), or its 8-bit codes and their scales.
Why: reads and writes slices of wider buffers, so that a block's [attention, MLP] is never concatenated, and quantises a
row where it is made.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned
from sgl_diffusion.kernels.pointwise import gelu_erf, gelu_tanh, silu
from sgl_diffusion.kernels.quantize import (
    DTYPES,
    SCALE_BLOCK,
    Format,
    check_format,
    check_scale,
    constants,
    eager_quantize_rows,
    known_codes,
    new_scales,
    quantize_blocks,
    quantize_rows_reference,
    require_fp8,
    row_scale,
    scale_stride,
    some_scale,
    to_code,
)

# M rows, any leading dimensions  D width of the result

Kind = Literal["gelu_tanh", "gelu_erf", "silu", "swiglu", "geglu"]
KINDS = ("gelu_tanh", "gelu_erf", "silu", "swiglu", "geglu")
GATED = ("swiglu", "geglu")


@triton.jit
def _activated(x_ptr, bias_ptr, d, live, D, KIND: tl.constexpr):
    """f of the elements d of a row, or of some rows."""
    x = tl.load(x_ptr + d, mask=live, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    if KIND == "gelu_tanh":
        return gelu_tanh(x)
    elif KIND == "gelu_erf":
        return gelu_erf(x)
    elif KIND == "silu":
        return silu(x)
    else:
        b = tl.load(x_ptr + D + d, mask=live, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            b += tl.load(bias_ptr + D + d, mask=d < D, other=0.0).to(tl.float32)
        return silu(x) * b if KIND == "swiglu" else x * gelu_erf(b)


@triton.jit
def _activation_kernel(
    x_ptr, bias_ptr, y_ptr, x_stride_m, y_stride_m, M, D,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    live = (m < M) & (d < D)
    y = _activated(x_ptr + m * x_stride_m, bias_ptr, d, live, D, KIND)
    tl.store(y_ptr + m * y_stride_m + d, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _quantized_activation_kernel(
    x_ptr, bias_ptr, y_ptr, scale_ptr, x_stride_m, y_stride_m, scale_stride_m, D,
    KIND: tl.constexpr, KNOWN_SCALE: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
    SCALE_BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """A row a program, too wide for registers: once for its largest value, and again, from L2, for its codes.

    Blocks of columns with scales of their own are held whole, and need the one pass, as does a scale that is known.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride_m
    y_ptr += row * y_stride_m
    scale_ptr += row * scale_stride_m
    if KNOWN_SCALE:
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            code = known_codes(_activated(x_ptr, bias_ptr, d, d < D, D, KIND), scale_ptr, LARGEST, INTEGER)
            tl.store(y_ptr + d, code.to(y_ptr.dtype.element_ty), mask=d < D)
    elif SCALE_BLOCK:
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            y = tl.where(d < D, _activated(x_ptr, bias_ptr, d, d < D, D, KIND), 0.0)
            code = quantize_blocks(y, scale_ptr + start // SCALE_BLOCK, D - start, LARGEST, SCALE_BLOCK)
            tl.store(y_ptr + d, code.to(y_ptr.dtype.element_ty), mask=d < D)
    else:
        largest = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            y = tl.where(d < D, _activated(x_ptr, bias_ptr, d, d < D, D, KIND), 0.0)
            largest = tl.maximum(largest, tl.abs(y))
        scale = row_scale(tl.max(largest, axis=0), LARGEST)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            code = to_code(_activated(x_ptr, bias_ptr, d, d < D, D, KIND), scale, INTEGER)
            tl.store(y_ptr + d, code.to(y_ptr.dtype.element_ty), mask=d < D)
        tl.store(scale_ptr, scale)


def activation(
    x: Tensor, kind: Kind, *, bias: Tensor | None = None, out: Tensor | None = None,
    quantize: Format | None = None, code_scale: Tensor | None = None, impl: launch.Impl = "auto",
) -> Any:  # fmt: skip
    """Returns `out`, or a new contiguous tensor; quantised, codes and fp32 scales.

    Args:
        x: (..., D) or, of gated kinds, (..., 2 D), contiguous last dimension, rows evenly apart.
        bias: added first; as wide as x, any float dtype.
        out: (..., D); may be a slice of a wider buffer, or x itself where that is not gated. In the dtype of x, or of
            the codes.
        quantize: "fp8" or "fp8_block" (sm_89 and later), or "int8", as `quantize_rows` would after it.
        code_scale: fp32 (1,), the one scale of "fp8" or "int8"; or (..., ceil(D / 128)), rows evenly apart, where those
            of "fp8_block" go.
    Raises:
        ValueError: a shape, dtype, device, stride or name that does not fit.
    Source: `GELU` and `GEGLU` of diffusers; its transformers differ in which half of x a SwiGLU's SiLU takes.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected {', '.join(KINDS)}")
    check_format(quantize)
    launch.check_float(x, x=x)
    width = x.shape[-1]
    if kind in GATED and width % 2:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected an even width for {kind}")
    D = width // 2 if kind in GATED else width
    if bias is not None:
        launch.check_float(x, bias=bias)
        launch.check_shape((width,), bias=bias)
        launch.check_contiguous(bias=bias)
    if out is None:
        out = torch.empty((*x.shape[:-1], D), dtype=DTYPES[quantize] if quantize else x.dtype, device=x.device)
    launch.check_shape((*x.shape[:-1], D), out=out)
    launch.check_dtype(DTYPES[quantize] if quantize else x.dtype, out=out)
    launch.check_last_dim(x=x, out=out)
    check_scale(x, D, code_scale, quantize)
    x_stride, out_stride = launch.row_stride("x", x), launch.row_stride("out", out)
    if not launch.runs_triton(impl, x):
        return activation_reference(x, kind, bias=bias, out=out, quantize=quantize, code_scale=code_scale)
    M = x.numel() // width
    tiles = launch.tile("activation", quantized=int(quantize is not None), blocked=int(quantize == "fp8_block"))
    with launch.on_device(x):
        if quantize is None:
            grid = (triton.cdiv(M, tiles["BLOCK_M"]), triton.cdiv(D, tiles["BLOCK_D"]))
            _activation_kernel[grid](
                x, bias, out, x_stride, out_stride, M, D, KIND=kind, enable_fp_fusion=True, **tiles
            )
            return out
        require_fp8(quantize)
        scale = new_scales(x, D, quantize) if code_scale is None else code_scale
        _quantized_activation_kernel[(M,)](
            x, bias, out, scale, x_stride, out_stride, scale_stride(scale, quantize), D,
            KIND=kind, **constants(quantize, code_scale), enable_fp_fusion=True, **tiles,
        )  # fmt: skip
    return out, scale


def activation_reference(
    x: Tensor, kind: Kind, *, bias: Tensor | None = None, out: Tensor, quantize: Format | None = None,
    code_scale: Tensor | None = None,
) -> Any:  # fmt: skip
    """PyTorch's own functions, which compute in fp32 inside for half precision."""
    if bias is not None:
        x = launch.widen(x) + launch.widen(bias)
    elif quantize or kind in GATED:
        x = launch.widen(x)
    a, b = x.chunk(2, dim=-1) if kind in GATED else (x, x)
    y = out if x.dtype == out.dtype else torch.empty_like(a)
    if kind in ("silu", "swiglu"):
        torch.ops.aten.silu.out(a, out=y)
    else:
        torch.ops.aten.gelu.out(b, approximate="tanh" if kind == "gelu_tanh" else "none", out=y)
    if kind in GATED:
        y.mul_(b if kind == "swiglu" else a)
    if quantize is None:
        return y if y is out else out.copy_(y)
    return quantize_rows_reference(y, quantize, scale=code_scale, out=out)


def eager_activation(
    x: Tensor, kind: Kind, bias: Tensor | None, out: Tensor, quantize: Format | None, code_scale: Tensor | None
) -> Any:
    """As diffusers runs it."""
    x = x if bias is None else x + bias
    a, b = x.chunk(2, dim=-1) if kind in GATED else (x, x)
    if kind in ("gelu_tanh", "gelu_erf"):
        y = F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    else:
        y = F.silu(x) if kind == "silu" else F.silu(a) * b if kind == "swiglu" else a * F.gelu(b)
    if quantize is None:
        return out.copy_(y)
    return eager_quantize_rows(y, quantize, code_scale, out)


def _inputs(
    device: str, dtype: torch.dtype, B: int, L: int, D: int, kind: Kind,
    biased: bool = False, in_place: bool = False, quantize: Format | None = None, known: bool = False,
    placed: bool = False,
) -> Inputs:  # fmt: skip
    width = 2 * D if kind in GATED else D
    # four standard deviations: both tails as well as the bend around zero
    x_BLD = noise((B, L, width), dtype, device) * 4
    x = inside(poisoned((B, L, 2 * width), dtype, device), x_BLD, slice(width, 2 * width))
    codes = torch.zeros((B, L, 2 * D), dtype=DTYPES[quantize], device=device)[..., D:] if quantize else None
    blocks = -(-D // SCALE_BLOCK)
    code_scale = some_scale(device, quantize, 4) if known else None
    if placed:
        code_scale = poisoned((B, L, 2 * blocks), torch.float32, device)[..., blocks:]
    return {
        "x": x,
        "kind": kind,
        "code_scale": code_scale,
        "bias": noise((width,), dtype, device, 1) if biased else None,
        "out": x if in_place else poisoned((B, L, 2 * D), dtype, device)[..., D:] if codes is None else codes,
        "quantize": quantize,
    }


def _bytes(i: Inputs) -> int:
    written: int = i["x"].nbytes // (2 if i["kind"] in GATED else 1) if i["out"] is None else i["out"].nbytes
    return i["x"].nbytes + written


OP = Op(
    name="activation",
    formula="GELU (tanh or erf), SiLU, SwiGLU or GEGLU of x + bias, in the dtype of x or in 8 bits",
    replaces="add, gelu or silu, mul, cat; quantise: 7 more",
    launch=activation,
    reference=activation_reference,
    eager=eager_activation,
    inputs=_inputs,
    tiny=(
        {"B": 1, "L": 1, "D": 64, "kind": "gelu_tanh"},
        {"B": 2, "L": 3, "D": 33, "kind": "gelu_tanh", "biased": True, "in_place": True},
        {"B": 2, "L": 3, "D": 40, "kind": "gelu_erf"},
        {"B": 1, "L": 5, "D": 33, "kind": "silu", "biased": True},
        {"B": 2, "L": 2, "D": 48, "kind": "swiglu", "biased": True},
        {"B": 1, "L": 3, "D": 33, "kind": "geglu"},
        {"B": 2, "L": 2, "D": 40, "kind": "gelu_tanh", "biased": True, "quantize": "int8"},
        {"B": 1, "L": 3, "D": 33, "kind": "swiglu", "quantize": "fp8"},
        {"B": 1, "L": 2, "D": 300, "kind": "swiglu", "quantize": "fp8_block"},
        {"B": 2, "L": 2, "D": 300, "kind": "swiglu", "quantize": "fp8_block", "placed": True},
        {"B": 1, "L": 3, "D": 33, "kind": "swiglu", "quantize": "fp8", "known": True},
        {"B": 2, "L": 2, "D": 40, "kind": "gelu_tanh", "quantize": "int8", "known": True},
    ),
    production=(
        {"B": 1, "L": 4096, "D": 12288, "kind": "gelu_tanh"},
        {"B": 1, "L": 512, "D": 12288, "kind": "gelu_erf", "biased": True},
        {"B": 1, "L": 4224, "D": 10240, "kind": "swiglu"},
        {"B": 1, "L": 4096, "D": 12288, "kind": "gelu_tanh", "quantize": "fp8"},
        {"B": 1, "L": 4224, "D": 10240, "kind": "swiglu", "quantize": "int8"},
        {"B": 1, "L": 4224, "D": 10240, "kind": "swiglu", "quantize": "fp8", "known": True},
        {"B": 1, "L": 4096, "D": 12288, "kind": "gelu_tanh", "quantize": "fp8_block"},
    ),
    cpu=(
        {"B": 1, "L": 1024, "D": 3072, "kind": "gelu_tanh"},
        {"B": 1, "L": 1024, "D": 1536, "kind": "swiglu"},
        {"B": 1, "L": 1024, "D": 1536, "kind": "geglu"},
    ),
    bytes=_bytes,
)
