"""q = round(x / s), s = max |x| / largest code, for every row: what a GEMM of 8-bit numbers takes.

Shapes: x_RD -> q_RD in fp8 (e4m3) or int8, s_R in fp32, with x = q * s up to rounding; in "fp8_block" s_RC, one for
every 128 columns of a row, as in DeepSeek-V3 (arXiv 2412.19437, section 3.3). Where all are zeros, s = 1.
Why: norms and activations quantise a row while they hold it in registers, with the functions below; where no such pass
comes before a GEMM, this is that pass.
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

# R rows, any leading dimensions  D width  C blocks of columns

Format = Literal["fp8", "fp8_block", "int8"]
DTYPES: dict[str, torch.dtype] = {"fp8": torch.float8_e4m3fn, "fp8_block": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {"fp8": 448.0, "fp8_block": 448.0, "int8": 127.0}
SCALE_BLOCK = 128  # columns that share a scale in a blocked format


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
def known_codes(y, scale_ptr, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    """Codes of the one scale that is there, to which they saturate."""
    codes = to_code(y, tl.load(scale_ptr), INTEGER)
    return tl.clamp(codes, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_blocks(y, scale_ptr, columns, LARGEST: tl.constexpr, SCALE_BLOCK: tl.constexpr):
    """Codes of neighbouring columns that a program holds: y in fp32, zeros from `columns` on. Stores their scales."""
    WIDTH: tl.constexpr = min(y.shape[0], SCALE_BLOCK)
    blocks = tl.reshape(y, (y.shape[0] // WIDTH, WIDTH))
    scale = row_scale(tl.max(tl.abs(blocks), axis=1), LARGEST)
    c = tl.arange(0, y.shape[0] // WIDTH)
    tl.store(scale_ptr + c, scale, mask=c * WIDTH < columns)
    return tl.reshape(to_code(blocks, scale[:, None], False), (y.shape[0],))


@triton.jit
def quantize_tile(
    y, scale_ptr, scale_stride, m, column, M, columns,
    CODE_BLOCK: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
):
    """Codes of rows m that a program holds from `column` on, of so many `columns`.

    With blocks the tile is one, and each row's scale is stored, unless the tile is before the first column. Without,
    there is one scale, which is known.
    """
    if CODE_BLOCK:
        tl.static_assert(y.shape[1] == CODE_BLOCK, "a tile of codes is a block")
        y = tl.where((column + tl.arange(0, CODE_BLOCK) < columns)[None, :], y, 0.0)
        scale = row_scale(tl.max(tl.abs(y), axis=1), LARGEST)
        rows = scale_ptr + m.to(tl.int64) * scale_stride
        tl.store(rows + column // CODE_BLOCK, scale, mask=m < tl.where(column >= 0, M, 0))
        return to_code(y, scale[:, None], INTEGER)
    else:
        return known_codes(y, scale_ptr, LARGEST, INTEGER)


@triton.jit
def quantize_row(
    y, scale_ptr, row, D,
    KNOWN_SCALE: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr, SCALE_BLOCK: tl.constexpr,
):
    """Codes of a row that a program holds: y in fp32, zeros where it has no element. Stores its scale or scales, unless
    the one of all rows is known.
    """
    if KNOWN_SCALE:
        return known_codes(y, scale_ptr, LARGEST, INTEGER)
    elif SCALE_BLOCK:
        return quantize_blocks(y, scale_ptr + row * tl.cdiv(D, SCALE_BLOCK), D, LARGEST, SCALE_BLOCK)
    else:
        scale = row_scale(tl.max(tl.abs(y), axis=0), LARGEST)
        tl.store(scale_ptr + row, scale)
        return to_code(y, scale, INTEGER)


@triton.jit
def _quantize_kernel(
    x_ptr, q_ptr, scale_ptr, x_stride, q_stride, scale_stride, D,
    KNOWN_SCALE: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr, SCALE_BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
    codes = quantize_row(x, scale_ptr + row * scale_stride, 0, D, KNOWN_SCALE, LARGEST, INTEGER, SCALE_BLOCK)
    tl.store(q_ptr + row * q_stride + d, codes.to(q_ptr.dtype.element_ty), mask=d < D)


def quantize_rows(
    x: Tensor, format: Format, *, scale: Tensor | None = None, out: Tensor | None = None, impl: launch.Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Codes in the shape of x, contiguous or in `out`, and fp32 scales: (...), of fp8_block (..., ceil(D / 128)), or
    `scale`.

    Args:
        x: (..., D), rows evenly apart, contiguous last dimension.
        format: fp8 and fp8_block need sm_89 or later.
        scale: fp32 (1,), a calibrated scale of all rows; codes saturate. Of fp8_block, whose blocks have their own:
            where those go, rows evenly apart.
        out: where codes go, rows evenly apart; of fp8_block beside scale.
    Raises:
        ValueError: a shape, dtype, device, stride or format that does not fit.
    """
    launch.check_float(x, x=x)
    launch.check_last_dim(x=x)
    check_format(format)
    D = x.shape[-1]
    if format == "fp8_block" and (scale is None) != (out is None):
        raise ValueError("scale, out: expected both of format='fp8_block', or none")
    check_scale(x, D, scale, format)
    if out is not None:
        launch.check_device(x, out=out)
        launch.check_dtype(DTYPES[format], out=out)
        launch.check_shape(tuple(x.shape), out=out)
        launch.check_last_dim(out=out)
    if not launch.runs_triton(impl, x):
        return quantize_rows_reference(x, format, scale=scale, out=out)
    require_fp8(format)
    q = torch.empty(x.shape, dtype=DTYPES[format], device=x.device) if out is None else out
    scales = new_scales(x, D, format) if scale is None else scale
    strides = (launch.row_stride("x", x), launch.row_stride("out", q), scale_stride(scales, format))
    with launch.on_device(x):
        _quantize_kernel[(x.numel() // D,)](
            x, q, scales, *strides, D, **constants(format, scale),
            BLOCK_D=triton.next_power_of_2(D), enable_fp_fusion=True, **launch.tile("quantize_rows", width=D),
        )  # fmt: skip
    return q, scales


def new_scales(x: Tensor, D: int, format: Format) -> Tensor:
    """Where a kernel stores the scales of rows of D codes, as many as x has rows."""
    blocks = (-(-D // SCALE_BLOCK),) if format == "fp8_block" else ()
    return x.new_empty((*x.shape[:-1], *blocks), dtype=torch.float32)


def quantize_heads(x_BLHK: Tensor, out_BLHK: Tensor, scale: Tensor) -> Tensor:
    """`out`: codes of what an attention without codes returned, with the scales that `attention` would leave."""
    x, out = x_BLHK.flatten(2), out_BLHK.flatten(2)
    quantize_rows(x, code_format(out, scale), scale=scale, out=out)
    return out_BLHK


def scale_stride(scales: Tensor, format: Format) -> int:
    """From a row's scales to the next row's; (1,) is of all rows, or of the one there is."""
    return launch.row_stride("scale", scales) if format == "fp8_block" else int(scales.shape != (1,))


def check_scale(x: Tensor, D: int, scale: Tensor | None, format: Format | None) -> None:
    """Of rows of D codes, as many as x has rows, if there is one: the one that is given, or where those of blocks go.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; a scale of no codes.
    """
    if scale is None:
        return
    if format is None:
        raise ValueError("code_scale: expected none without codes")
    launch.check_device(x, scale=scale)
    launch.check_dtype(torch.float32, scale=scale)
    launch.check_shape((*x.shape[:-1], -(-D // SCALE_BLOCK)) if format == "fp8_block" else (1,), scale=scale)
    launch.check_last_dim(scale=scale)


def code_format(codes: Tensor, scale: Tensor) -> Format:
    """Of codes with one scale, or with those of blocks."""
    if codes.dtype == torch.int8:
        return "int8"
    return "fp8_block" if scale.ndim > 1 else "fp8"


def constants(format: Format | None, given: Tensor | None = None) -> dict[str, Any]:
    """Constexprs of a kernel that quantises with `quantize_row`, if a format is asked for; a scale that is given is
    known, but for those of blocks, whose place it is.
    """
    return {
        "KNOWN_SCALE": given is not None and format != "fp8_block",
        "LARGEST": LARGEST[format] if format else 0.0,
        "INTEGER": format == "int8",
        "SCALE_BLOCK": SCALE_BLOCK if format == "fp8_block" else 0,
    }


def check_format(format: str | None) -> None:
    """Raises ValueError for a format that does not exist; None, no quantisation, is fine."""
    if format is not None and format not in DTYPES:
        raise ValueError(f"format={format!r}: expected {', '.join(DTYPES)}")


def require_fp8(format: str | None) -> None:
    """Raises launch.Unsupported where Triton has no fp8."""
    if format in ("fp8", "fp8_block") and launch.architecture() == "sm_80":
        raise launch.Unsupported(f"format={format!r}: needs a GPU of sm_89 or later")


def quantize_rows_reference(
    x: Tensor, format: Format, *, scale: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if out is not None:
        codes, scales = quantize_rows_reference(x, format, scale=None if format == "fp8_block" else scale)
        return out.copy_(codes), scales if format != "fp8_block" or scale is None else scale.copy_(scales)
    x = launch.widen(x)
    D = x.shape[-1]
    if scale is not None:
        return _codes(x / scale, format).clamp_(-LARGEST[format], LARGEST[format]).to(DTYPES[format]), scale
    if format == "fp8_block":
        x = F.pad(x, (0, -D % SCALE_BLOCK)).unflatten(-1, (-1, SCALE_BLOCK))
    amax = x.abs().amax(-1, keepdim=True)
    scales = torch.where(amax > 0, amax / LARGEST[format], 1.0)
    codes = _codes(x / scales, format).to(DTYPES[format])
    if format == "fp8_block":
        codes = codes.flatten(-2)[..., :D].contiguous()
    return codes, scales.squeeze(-1).float()


def _codes(x: Tensor, format: Format) -> Tensor:
    return x.round_() if format == "int8" else x


def eager_quantize_rows(
    x: Tensor, format: Format, scale: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As quantised checkpoints are run without a fused kernel."""
    D, fixed = x.shape[-1], scale
    if format == "fp8_block":
        x, scale = F.pad(x, (0, -D % SCALE_BLOCK)).unflatten(-1, (-1, SCALE_BLOCK)), None
    if scale is None:
        amax = x.abs().amax(-1, keepdim=True).float()
        scale = torch.where(amax > 0, amax / LARGEST[format], 1.0)
    codes = x.float() / scale
    codes = codes.round() if format == "int8" else codes
    codes = codes.clamp(-LARGEST[format], LARGEST[format]).to(DTYPES[format])
    if format == "fp8_block":
        codes = codes.flatten(-2)[..., :D]
        fixed = None if fixed is None else fixed.copy_(scale.squeeze(-1))
    return codes if out is None else out.copy_(codes), scale.squeeze(-1) if fixed is None else fixed


def some_scale(device: str, format: Format | None, largest: float = 2.0) -> Tensor:
    """Known, of numbers up to so large a one: what is beyond saturates."""
    return torch.full((1,), largest / LARGEST[format or "fp8"], device=device)


def _inputs(
    device: str, dtype: torch.dtype, R: int, D: int, format: Format,
    zeros: bool = False, fixed: bool = False, placed: bool = False,
) -> Inputs:  # fmt: skip
    x_RD = noise((R, D), dtype, device) * 3
    if zeros:
        x_RD[0] = 0
    # two standard deviations: a part of the codes saturates
    scale = some_scale(device, format, 6) if fixed else None
    if placed and not fixed:
        scale = poisoned((R, 2 * -(-D // SCALE_BLOCK)), torch.float32, device)[:, -(-D // SCALE_BLOCK) :]
    return {
        "x": inside(poisoned((R, 2 * D), dtype, device), x_RD, slice(D, 2 * D)),
        "format": format,
        "scale": scale,
        "out": torch.empty(R, 2 * D, dtype=DTYPES[format], device=device)[:, D:] if placed else None,
    }


def _bytes(i: Inputs) -> int:
    D = i["x"].shape[-1]
    R = i["x"].numel() // D
    scales = -(-D // SCALE_BLOCK) if i["format"] == "fp8_block" else 1
    return i["x"].nbytes + R * D + (4 if i["scale"] is not None and i["scale"].ndim == 1 else 4 * R * scales)


OP = Op(
    name="quantize_rows",
    formula="x / s, s = max |x| / 448 in fp8, / 127 in int8, of rows or of 128 columns of them",
    replaces="abs, amax, div, div, round, clamp, to",
    launch=quantize_rows,
    reference=quantize_rows_reference,
    eager=eager_quantize_rows,
    inputs=_inputs,
    tiny=(
        {"R": 1, "D": 64, "format": "int8"},
        {"R": 3, "D": 33, "format": "int8", "zeros": True},
        {"R": 5, "D": 96, "format": "fp8", "zeros": True},
        {"R": 3, "D": 300, "format": "fp8_block", "zeros": True},
        {"R": 2, "D": 50, "format": "fp8_block"},
        {"R": 4, "D": 72, "format": "int8", "fixed": True},
        {"R": 4, "D": 72, "format": "fp8", "fixed": True},
        {"R": 4, "D": 72, "format": "int8", "fixed": True, "placed": True},
        {"R": 3, "D": 300, "format": "fp8_block", "placed": True},
    ),
    production=(
        {"R": 4608, "D": 3072, "format": "fp8"},
        {"R": 4608, "D": 3072, "format": "int8"},
        {"R": 8192, "D": 5120, "format": "int8"},
        {"R": 512, "D": 1024, "format": "int8"},
        {"R": 4608, "D": 15360, "format": "fp8"},
        {"R": 4608, "D": 15360, "format": "fp8_block"},
        {"R": 4608, "D": 3072, "format": "int8", "fixed": True},
    ),
    cpu=({"R": 1024, "D": 768, "format": "int8"},),
    bytes=_bytes,
)
