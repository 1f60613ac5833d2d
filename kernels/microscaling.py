"""Numbers of 8 or 4 bits with a scale for every few neighbours of a row: the formats MXFP8 and NVFP4.

    mxfp8  code * 2^(scale - 127)    codes e4m3 (.., D); scales e8m0, an exponent in uint8 for 32 columns (.., D / 32)
    nvfp4  code * scale * global     codes e2m1, two a byte, the even column in the low nibble: uint8 (.., D / 2);
                                     scales e4m3 for 16 columns (.., D / 16); global in fp32, of a tensor or of its rows

How scales are chosen, amax being the largest magnitude of a block:

    mxfp8  exponent = floor(log2(amax)) - 8; codes above 448 saturate (OCP Microscaling Formats v1.0, section 6.3)
    nvfp4  scale = amax / (6 * global) in e4m3, global = (amax of all) / (448 * 6) (NVIDIA: arXiv 2509.25149)

Codes are rounded to nearest, ties to even. A block of zeros, or one too small for its scale, has codes of zero.
Why: tensor cores of sm_100 multiply such blocks by themselves; weights in them take half or a quarter of the memory.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned
from sgl_diffusion.kernels.quantize import row_scale

# R rows, any leading dimensions  D width

MxFormat = Literal["mxfp8", "nvfp4"]
BLOCK = {"mxfp8": 32, "nvfp4": 16}  # columns that share a scale
CODE_DTYPES = {"mxfp8": torch.float8_e4m3fn, "nvfp4": torch.uint8}
SCALE_DTYPES = {"mxfp8": torch.uint8, "nvfp4": torch.float8_e4m3fn}
CODES_PER_BYTE = {"mxfp8": 1, "nvfp4": 2}
LARGEST_E4M3 = 448.0
LARGEST_E2M1 = 6.0
LARGEST_NVFP4 = LARGEST_E4M3 * LARGEST_E2M1
E4M3_EXPONENT = 8  # of 448


# -- codes and values, in integers: a GPU before sm_89 has no e4m3 ----------------
# fp16 has the fields of e4m3 and e2m1 at other places and with another bias, subnormal numbers included: read so, they
# are off by a power of two, which callers have in a scale.

E4M3_BIAS = tl.constexpr(256.0)
E2M1_BIAS = tl.constexpr(16384.0)


@triton.jit
def e4m3_over_bias(code):
    """Finite e4m3 codes in uint8 -> their values / E4M3_BIAS, in fp32."""
    code = code.to(tl.int16)
    return ((code & 0x80) << 8 | (code & 0x7F) << 7).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e2m1_over_bias(code):
    """e2m1 codes, in the low four bits of integers -> their values / E2M1_BIAS, in fp32."""
    code = code.to(tl.int16)
    return ((code & 0x8) << 12 | (code & 0x7) << 9).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e8m0_value(scale):
    """Exponents in uint8 -> 2^(scale - 127) in fp32."""
    scale = scale.to(tl.int32)
    # the least is subnormal in fp32; 255 is NaN
    bits = tl.where(scale == 0, 0x00400000, tl.where(scale == 255, 0x7FC00000, scale << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e4m3(x):
    """Codes in int32; too large numbers saturate, ties go to even."""
    a = tl.minimum(tl.abs(x), 448.0)
    # below 2^-6 come multiples of 2^-9: the last bit of a sum with 2^14, which rounds ties to even
    least = (a + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    # above, the upper three bits of the mantissa; the bias of fp32 is 120 more
    bits = a.to(tl.int32, bitcast=True)
    code = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    return tl.where(a < 0.015625, least, code) + tl.where(x < 0.0, 0x80, 0)


@triton.jit
def _e2m1(x):
    """Codes in int32. Midpoints go to the neighbour whose last bit is 0, so every other comparison is strict."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code + tl.where(x < 0.0, 8, 0)


# -- kernels ----------------------------------------------------------------------


@triton.jit
def _quantize_mxfp8_kernel(
    x_ptr, codes_ptr, scale_ptr, x_stride, D, LARGEST_EXPONENT: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + row * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), axis=1)
    # floor(log2) is the exponent field of fp32, which has the bias of e8m0 as well
    scale = tl.maximum((amax.to(tl.int32, bitcast=True) >> 23) - LARGEST_EXPONENT, 0)
    reciprocal = ((254 - scale) << 23).to(tl.float32, bitcast=True)
    tl.store(codes_ptr + row * D + d, _e4m3(x * reciprocal[:, None]).to(tl.uint8), mask=d < D)
    block = tl.arange(0, BLOCK_D // 32)
    tl.store(scale_ptr + row * (D // 32) + block, scale.to(tl.uint8), mask=block < D // 32)


@triton.jit
def _quantize_nvfp4_kernel(
    x_ptr, codes_ptr, scale_ptr, global_ptr, row_scale_ptr, x_stride, D,
    LARGEST_CODE: tl.constexpr, LARGEST: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Without a global scale every row has one of its own, and writes it."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + row * x_stride + d, mask=d < D, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(x), axis=1)
    if row_scale_ptr is None:
        whole = tl.load(global_ptr)
    else:
        whole = row_scale(tl.max(amax, axis=0), LARGEST)
        tl.store(row_scale_ptr + row, whole)
    scale = _e4m3(tl.math.div_rn(amax, LARGEST_CODE * whole)).to(tl.uint8)
    block = tl.arange(0, BLOCK_D // 16)
    tl.store(scale_ptr + row * (D // 16) + block, scale, mask=block < D // 16)
    step = e4m3_over_bias(scale) * E4M3_BIAS * whole
    reciprocal = tl.math.div_rn(1.0, tl.where(step > 0.0, step, float("inf")))
    even, odd = tl.split(tl.reshape(_e2m1(x * reciprocal[:, None]), (BLOCK_D // 2, 2)))
    byte = tl.arange(0, BLOCK_D // 2)
    tl.store(codes_ptr + row * (D // 2) + byte, (even | odd << 4).to(tl.uint8), mask=byte < D // 2)


# -- launching --------------------------------------------------------------------


def quantize_mx(
    x: Tensor, format: MxFormat, *, global_scale: Tensor | None = None, impl: launch.Impl = "auto"
) -> tuple[Tensor, ...]:
    """(codes, scales), contiguous; of nvfp4 without a global scale (codes, scales, row_scale): every row has one.

    Args:
        x: (..., D), finite; rows evenly apart, contiguous last dimension; D a multiple of the format's block.
        global_scale: fp32 (1,), of nvfp4: of a weight its amax / (448 * 6), of activations a calibrated one, beyond
            which they saturate.
    Returns:
        codes: mxfp8: e4m3 (..., D); nvfp4: uint8 (..., D / 2). scales: uint8 (..., D / 32), e4m3 (..., D / 16).
        row_scale: fp32 (...), row amax / (448 * 6), or 1 of a row of zeros.
    Raises:
        ValueError: a shape, dtype, stride or format that does not fit.
    """
    check_mx_format(format)
    launch.check_float(x, x=x)
    launch.check_last_dim(x=x)
    D, block = x.shape[-1], BLOCK[format]
    if D % block:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected a width that is a multiple of {block} for {format}")
    if global_scale is not None:
        check_global_scale(x, format, global_scale=global_scale)
        launch.check_shape((1,), global_scale=global_scale)
    stride = launch.row_stride("x", x)
    if not launch.runs_triton(impl, x):
        return quantize_mx_reference(x, format, global_scale=global_scale)
    rows = x.shape[:-1]
    codes = torch.empty((*rows, D // CODES_PER_BYTE[format]), dtype=CODE_DTYPES[format], device=x.device)
    scale = torch.empty((*rows, D // block), dtype=SCALE_DTYPES[format], device=x.device)
    grid, options = (rows.numel(),), {"enable_fp_fusion": True, **launch.tile("quantize_mx", width=D)}
    with launch.on_device(x):
        if format == "mxfp8":
            _quantize_mxfp8_kernel[grid](
                x, codes.view(torch.uint8), scale, stride, D,
                LARGEST_EXPONENT=E4M3_EXPONENT, BLOCK_D=triton.next_power_of_2(D), **options,
            )  # fmt: skip
            return codes, scale
        row_scale = None if global_scale is not None else x.new_empty(rows, dtype=torch.float32)
        _quantize_nvfp4_kernel[grid](
            x, codes, scale.view(torch.uint8), global_scale, row_scale, stride, D,
            LARGEST_CODE=LARGEST_E2M1, LARGEST=LARGEST_NVFP4, BLOCK_D=triton.next_power_of_2(D), **options,
        )  # fmt: skip
    return (codes, scale) if row_scale is None else (codes, scale, row_scale)


def check_mx_format(format: str) -> None:
    if format not in BLOCK:
        raise ValueError(f"format={format!r}: expected {' or '.join(BLOCK)}")


def check_global_scale(like: Tensor, format: str, **scales: Tensor) -> None:
    for name, scale in scales.items():
        if format != "nvfp4":
            raise ValueError(f"{name}: expected none for {format}")
        launch.check_float(like, **{name: scale})
        launch.check_dtype(torch.float32, **{name: scale})
        launch.check_contiguous(**{name: scale})


def quantize_mx_reference(x: Tensor, format: MxFormat, *, global_scale: Tensor | None = None) -> tuple[Tensor, ...]:
    x = launch.widen(x)
    blocks = x.unflatten(-1, (-1, BLOCK[format]))
    amax = blocks.abs().amax(-1)
    if format == "mxfp8":
        scale = ((amax.float().view(torch.int32) >> 23) - E4M3_EXPONENT).clamp_min_(0)
        reciprocal = ((254 - scale) << 23).view(torch.float32)
        codes = (blocks * reciprocal.unsqueeze(-1)).clamp_(-LARGEST_E4M3, LARGEST_E4M3)
        return codes.flatten(-2).to(torch.float8_e4m3fn), scale.to(torch.uint8)
    whole = global_scale
    if whole is None:
        largest = amax.amax(-1, keepdim=True)
        whole = torch.where(largest > 0, largest / LARGEST_NVFP4, 1.0)
    scale = (amax / (LARGEST_E2M1 * whole)).clamp_max_(LARGEST_E4M3).to(torch.float8_e4m3fn)
    step = scale.to(x.dtype) * whole
    scaled = blocks * torch.where(step > 0, step, torch.inf).reciprocal_().unsqueeze(-1)
    a = scaled.abs().clamp_max_(LARGEST_E2M1)
    # steps of 1/2, 1 and 2 between numbers; `round` takes ties to even
    code = torch.where(a < 2, (a * 2).round(), torch.where(a < 4, a.round() + 2, (a / 2).round() + 4))
    code = torch.where(scaled < 0, code + 8, code).to(torch.uint8).flatten(-2)
    codes = code[..., ::2] | code[..., 1::2] << 4
    return (codes, scale) if global_scale is not None else (codes, scale, whole.squeeze(-1).float())


def dequantize_mx(
    codes: Tensor, scales: Tensor, format: MxFormat, global_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """The numbers (..., D) that codes and scales stand for.

    Products of code and scale are exact; the global scale, (1,) or one for every row, is multiplied in fp32, or in
    float64 if that is the dtype. The result is rounded once more if the dtype is narrower.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if format == "mxfp8":
        values, scale = codes.to(wide), scales.view(torch.float8_e8m0fnu).to(wide)
    else:
        values, scale = _e2m1_values(codes).to(wide), scales.to(wide)
    if global_scale is not None:
        values = values.unflatten(-1, (-1, BLOCK[format])) * scale.unsqueeze(-1)
        return (values.flatten(-2) * global_scale.to(wide).unsqueeze(-1)).to(dtype)
    return (values.unflatten(-1, (-1, BLOCK[format])) * scale.unsqueeze(-1)).flatten(-2).to(dtype)


def _e2m1_values(codes: Tensor) -> Tensor:
    """Bytes (..., D / 2) -> fp16 (..., D), by the bits that fp16 has for the same number."""
    code = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2).to(torch.int16)
    magnitude = ((code & 0x7) << 9).view(torch.float16) * E2M1_BIAS.value
    return torch.where(code >= 8, -magnitude, magnitude)


def eager_quantize_mx(x: Tensor, format: MxFormat, global_scale: Tensor | None) -> Any:
    """In steps, as a checkpoint is quantised by PyTorch: the exponent by logarithm, codes by the nearest in a table."""
    blocks = x.float().unflatten(-1, (-1, BLOCK[format]))
    amax = blocks.abs().amax(-1)
    if format == "mxfp8":
        exponent = (torch.frexp(amax).exponent - 1 - E4M3_EXPONENT).clamp(-127, 127)
        exponent = torch.where(amax > 0, exponent, -127)
        codes = torch.ldexp(blocks, -exponent.unsqueeze(-1)).clamp(-LARGEST_E4M3, LARGEST_E4M3)
        return codes.flatten(-2).to(torch.float8_e4m3fn), (exponent + 127).to(torch.uint8)
    largest = amax.amax(-1, keepdim=True)
    whole = torch.where(largest > 0, largest / LARGEST_NVFP4, 1.0) if global_scale is None else global_scale
    scale = (amax / (LARGEST_E2M1 * whole)).clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn)
    step = (scale.float() * whole).unsqueeze(-1)
    scaled = torch.where(step > 0, blocks / step, 0.0)
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=x.device)
    code = torch.bucketize(scaled.abs(), midpoints) + torch.where(scaled < 0, 8, 0)
    even, odd = code.flatten(-2).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (even | odd << 4, scale) if global_scale is not None else (even | odd << 4, scale, whole.squeeze(-1))


def _inputs(
    device: str, dtype: torch.dtype, R: int, D: int, format: MxFormat, calibrated: bool = False, zeros: bool = False
) -> Inputs:
    x_RD = noise((R, D), dtype, device) * 3
    if zeros:
        x_RD[0] = 0
        x_RD[-1, :32] = 0
    x = inside(poisoned((R, 2 * D), dtype, device), x_RD, slice(D, 2 * D))
    # 9 standard deviations or none: blocks at the ends of the range are seen to saturate
    whole = torch.full((1,), 4.0 / LARGEST_NVFP4, device=device) if calibrated else None
    return {"x": x, "format": format, "global_scale": whole}


def _bytes(i: Inputs) -> int:
    numbers = i["x"].numel()
    return i["x"].nbytes + numbers // CODES_PER_BYTE[i["format"]] + numbers // BLOCK[i["format"]]


OP = Op(
    name="quantize_mx",
    formula="x as e4m3 codes with a power of two for 32 columns, or e2m1 codes with an e4m3 scale for 16",
    replaces="abs, amax, frexp or div, clamp, cast, mul, round, cast, pack",
    launch=quantize_mx,
    reference=quantize_mx_reference,
    eager=eager_quantize_mx,
    inputs=_inputs,
    tiny=(
        {"R": 3, "D": 96, "format": "mxfp8", "zeros": True},
        {"R": 3, "D": 80, "format": "nvfp4", "zeros": True},
        {"R": 2, "D": 48, "format": "nvfp4", "calibrated": True},
    ),
    production=(
        {"R": 4608, "D": 3072, "format": "mxfp8"},
        {"R": 4096, "D": 12288, "format": "nvfp4"},
        {"R": 512, "D": 1024, "format": "nvfp4", "calibrated": True},
    ),
    cpu=({"R": 1024, "D": 768, "format": "mxfp8"},),
    bytes=_bytes,
    # bytes of codes and exponents are compared as numbers: a step here and there, where a tie falls otherwise
    tolerance={torch.float32: 1e-6, torch.float8_e4m3fn: 1e-3, torch.uint8: 1e-4},
)
