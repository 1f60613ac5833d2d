"""q = round(x / s), s = max |x| / largest code, for every row: what a GEMM of 8-bit numbers takes.

Shapes: x_RD -> q_RD in fp8 (e4m3) or int8, s_R in fp32, with x = q * s up to rounding. A row of zeros has s = 1.
Why: norms and activations quantise a row while they hold it in registers, with the function below; where no such pass
comes before a GEMM, this is that pass.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned

# R rows, any leading dimensions  D width

Format = Literal["fp8", "int8"]
DTYPES: dict[str, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {"fp8": 448.0, "int8": 127.0}


@triton.jit
def row_scale(amax, LARGEST: tl.constexpr):
    return tl.where(amax > 0.0, amax / LARGEST, 1.0)


@triton.jit
def to_code(y, scale, INTEGER: tl.constexpr):
    """fp32 numbers that a conversion to the format keeps, or rounds as it should."""
    code = y / scale
    if INTEGER:
        # 1.5 * 2^23: the sum has no room for a fraction, so it is rounded to the nearest integer, ties to even
        code = (code + 12582912.0) - 12582912.0
    return code


@triton.jit
def quantize_row(y, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    """Codes and scale of a row that a program holds: y in fp32, zeros where it has no element."""
    scale = row_scale(tl.max(tl.abs(y), axis=0), LARGEST)
    return to_code(y, scale, INTEGER), scale


@triton.jit
def _quantize_kernel(
    x_ptr, q_ptr, scale_ptr, x_stride, D, LARGEST: tl.constexpr, INTEGER: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
    codes, scale = quantize_row(x, LARGEST, INTEGER)
    tl.store(q_ptr + row * D + d, codes.to(q_ptr.dtype.element_ty), mask=d < D)
    tl.store(scale_ptr + row, scale)


def quantize_rows(x: Tensor, format: Format, *, impl: launch.Impl = "auto") -> tuple[Tensor, Tensor]:
    """Codes in the shape of x, contiguous, and a scale for every row, fp32 in the shape of x but the last dimension.

    Args:
        x: (..., D), rows evenly apart, contiguous last dimension.
        format: fp8 needs sm_89 or later.
    Raises:
        ValueError: a shape, dtype, stride or format that does not fit.
    """
    launch.check_float(x, x=x)
    launch.check_last_dim(x=x)
    check_format(format)
    if not launch.runs_triton(impl, x):
        return quantize_rows_reference(x, format)
    require_fp8(format)
    D = x.shape[-1]
    q = torch.empty(x.shape, dtype=DTYPES[format], device=x.device)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    with launch.on_device(x):
        _quantize_kernel[(scale.numel(),)](
            x, q, scale, launch.row_stride("x", x), D,
            LARGEST=LARGEST[format], INTEGER=format == "int8", BLOCK_D=triton.next_power_of_2(D),
            enable_fp_fusion=True, **launch.tile("quantize_rows", width=D),
        )  # fmt: skip
    return q, scale


def check_format(format: str | None) -> None:
    """Raises ValueError for a format that does not exist; None, no quantisation, is fine."""
    if format is not None and format not in DTYPES:
        raise ValueError(f"format={format!r}: expected {' or '.join(DTYPES)}")


def require_fp8(format: str | None) -> None:
    """Raises launch.Unsupported where Triton has no fp8."""
    if format == "fp8" and launch.architecture() == "sm_80":
        raise launch.Unsupported("format='fp8': needs a GPU of sm_89 or later")


def quantize_rows_reference(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    x = launch.widen(x)
    amax = x.abs().amax(-1, keepdim=True)
    scale = torch.where(amax > 0, amax / LARGEST[format], 1.0)
    codes = x / scale
    if format == "int8":
        codes = codes.round_()
    return codes.to(DTYPES[format]), scale.squeeze(-1).float()


def eager_quantize_rows(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """As quantised checkpoints are run without a fused kernel."""
    amax = x.abs().amax(-1, keepdim=True).float()
    scale = torch.where(amax > 0, amax / LARGEST[format], 1.0)
    codes = x.float() / scale
    codes = codes.round() if format == "int8" else codes
    return codes.clamp(-LARGEST[format], LARGEST[format]).to(DTYPES[format]), scale.squeeze(-1)


def _inputs(device: str, dtype: torch.dtype, R: int, D: int, format: Format, zeros: bool = False) -> Inputs:
    x_RD = noise((R, D), dtype, device) * 3
    if zeros:
        x_RD[0] = 0
    return {"x": inside(poisoned((R, 2 * D), dtype, device), x_RD, slice(D, 2 * D)), "format": format}


OP = Op(
    name="quantize_rows",
    formula="x / s, s = max |x| / 448 in fp8, / 127 in int8",
    replaces="abs, amax, div, div, round, clamp, to",
    launch=quantize_rows,
    reference=quantize_rows_reference,
    eager=eager_quantize_rows,
    inputs=_inputs,
    tiny=(
        {"R": 1, "D": 64, "format": "int8"},
        {"R": 3, "D": 33, "format": "int8", "zeros": True},
        {"R": 5, "D": 96, "format": "fp8", "zeros": True},
    ),
    production=(
        {"R": 4608, "D": 3072, "format": "fp8"},
        {"R": 4608, "D": 3072, "format": "int8"},
        {"R": 8192, "D": 5120, "format": "int8"},
        {"R": 512, "D": 1024, "format": "int8"},
    ),
    cpu=({"R": 1024, "D": 768, "format": "int8"},),
    bytes=lambda i: i["x"].nbytes + i["x"].numel() + 4 * (i["x"].numel() // i["x"].shape[-1]),
)
