"""out = x weight^T + bias of int8 codes with scales of rows, and the epilogues of `gemm`.

    out = x_scale * weight_scale * (sum of products of codes), a sum that int32 holds exactly

Shapes: x_MK, weight_NK, bias_N -> out_MN, where M stands for any leading dimensions. Scaled sums are in fp32.
Why: as `gemm_fp8`, and on every GPU: Ampere has no fp8.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.gemm import with_epilogue
from sgl_diffusion.kernels.gemm_8bit import (
    check_operands,
    eager_epilogue,
    epilogue_inputs,
    launch_form,
    moved_bytes,
    result,
    scale_sums,
    swiglu_pass,
    with_coded_epilogue,
)
from sgl_diffusion.kernels.gemm_forms import as_rows
from sgl_diffusion.kernels.op import TOLERANCE, Inputs, Op, inside, noise
from sgl_diffusion.kernels.quantize import Format

# M rows  N output columns  K input columns

MAX_COLUMNS = 2**31 // 128**2 - 1  # sums of more products could be beyond int32
EXACT_COLUMNS = 2**24 // 128**2  # sums of so many products are whole numbers that fp32 holds


def gemm_int8(
    x_MK: Tensor, x_scale: Tensor, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor | None = None,
    *, gelu_from: int | None = None, swiglu_from: int | None = None, tail: Tensor | None = None,
    gate: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None,
    code_scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, impl: launch.Impl = "auto",
) -> Any:  # fmt: skip
    """Returns `out`, or a new contiguous tensor in `dtype`; with a tail, (out, tail). All that is fp32, bf16 or fp16.

    Args:
        x_MK: int8 codes (..., K), K below 131072, with a contiguous last dimension and rows evenly apart.
        x_scale: fp32 (...), a scale a row, as `quantize_rows` and others return it; or (1,), one for all.
        weight_NK: int8 codes, contiguous. weight_scale: fp32 (N,).
        bias_N, gelu_from, swiglu_from, tail, gate, residual, out: as of `gemm`, in the dtype of the result.
        code_scale: fp32 (1,); beside it the last result, tail or out, is int8 codes, rows evenly apart, of this scale,
            to which they saturate.
        dtype: of a new result; `out` has its own.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; a gate without a residual; two epilogues.
    """
    check_operands(x_MK, x_scale, weight_NK, weight_scale, torch.int8)
    launch.check_ndim(1, weight_scale=weight_scale)
    K = weight_NK.shape[1]
    if K > MAX_COLUMNS:
        raise ValueError(f"weight_NK: {K} columns, expected at most {MAX_COLUMNS}, whose sums int32 holds")
    given = out
    out = result(x_MK, weight_NK, bias_N, gelu_from, swiglu_from, tail, gate, residual, out, code_scale, dtype)
    if launch.runs_triton(impl, x_MK):
        if launch_form(
            "gemm_int8", x_MK, x_scale, weight_NK, weight_scale, bias_N, gelu_from, swiglu_from, tail, gate, residual,
            out, code_scale,
        ):
            return out if tail is None else (out, tail)
        if swiglu_from is not None:
            product = partial(gemm_int8, x_MK, x_scale, weight_NK, weight_scale, bias_N)
            return swiglu_pass(product, bias_N, swiglu_from, tail, given, code_scale, dtype, impl)
    return gemm_int8_reference(
        x_MK, x_scale, weight_NK, weight_scale, bias_N, gelu_from=gelu_from, swiglu_from=swiglu_from, tail=tail,
        gate=gate, residual=residual, out=out, code_scale=code_scale,
    )  # fmt: skip


def gemm_int8_reference(
    x_MK: Tensor, x_scale: Tensor, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor | None,
    *, gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None, gate: Tensor | None,
    residual: Tensor | None, out: Tensor, code_scale: Tensor | None,
) -> Any:  # fmt: skip
    """PyTorch's product of int8, and passes over it. Also the "blas" form on a GPU."""

    def product(columns: slice, place: Tensor | None) -> Tensor:
        bias = None if bias_N is None else bias_N[columns]
        sums = _sums(x_MK, weight_NK[columns]).to(weight_scale.dtype)
        y = scale_sums(sums, x_scale, weight_scale[columns], bias)
        return y if place is None else place.copy_(y)

    if code_scale is not None:
        return with_coded_epilogue(product, gelu_from, tail, out, code_scale, swiglu_from)
    return with_epilogue(product, gelu_from, tail, gate, residual, out, swiglu_from)


def _sums(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Exact sums of products: int32 (..., N)."""
    library = _library_takes(x_MK, weight_NK)
    launch.took("gemm_int8", "blas" if library else "torch", *weight_NK.shape)
    if library:
        return torch._int_mm(as_rows(x_MK), weight_NK.mT).view(*x_MK.shape[:-1], -1)
    pairs = zip(x_MK.split(EXACT_COLUMNS, dim=-1), weight_NK.split(EXACT_COLUMNS, dim=-1), strict=True)
    first, *rest = (F.linear(x.float(), weight.float()).int() for x, weight in pairs)
    for part in rest:
        first += part
    return first


def _library_takes(x_MK: Tensor, weight_NK: Tensor) -> bool:
    """Whether PyTorch's product of int8 takes these, and is exact."""
    N, K = weight_NK.shape
    if launch.on_cpu(x_MK):
        # oneDNN saturates sums of pairs at 16 bits where a CPU has no VNNI, and mistakes the layout of one column
        return torch.cpu._is_vnni_supported() and K > 1
    return x_MK.numel() // K > 16 and N % 8 == 0 and K % 8 == 0


def eager_gemm_int8(
    x_MK: Tensor, x_scale: Tensor, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor,
    gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None, gate: Tensor | None, residual: Tensor | None,
    out: Tensor, code_scale: Tensor | None,
) -> object:  # fmt: skip
    """As quantised checkpoints are run without kernels of their own."""
    row_scale = x_scale if x_scale.shape == (1,) else x_scale[..., None]
    y = (_sums(x_MK, weight_NK) * row_scale * weight_scale).to(bias_N.dtype) + bias_N
    return eager_epilogue(y, gelu_from, swiglu_from, tail, gate, residual, out, code_scale)


def _inputs(
    device: str, dtype: torch.dtype, B: int, L: int, K: int, N: int,
    one_scale: bool = False, gelu_from: int | None = None, tail: bool = False, gated: bool = False,
    coded: Format | None = None, swiglu_from: int | None = None,
) -> Inputs:  # fmt: skip
    wider = torch.full((B, L, K + 16), 101, dtype=torch.int8, device=device)
    return {
        "x_MK": inside(wider, _codes((B, L, K), device, 0), slice(16, K + 16)),
        "x_scale": noise((1,) if one_scale else (B, L), torch.float32, device, 5).abs() / 40,
        "weight_NK": _codes((N, K), device, 1),
        "weight_scale": noise((N,), torch.float32, device, 6).abs() * K**-0.5 / 40,
        **epilogue_inputs(device, dtype, B, L, N, gelu_from, swiglu_from, tail, gated, coded),
    }


def _codes(shape: tuple[int, ...], device: str, seed: int) -> Tensor:
    return (noise(shape, torch.float32, device, seed) * 40).round().clamp(-127, 127).to(torch.int8)


OP = Op(
    name="gemm_int8",
    formula="gemm of int8 codes, with scales of rows",
    replaces="_int_mm, 2 mul, to, then what gemm replaces",
    launch=gemm_int8,
    reference=gemm_int8_reference,
    eager=eager_gemm_int8,
    inputs=_inputs,
    written=("code_scale",),
    tiny=(
        {"B": 1, "L": 1, "K": 16, "N": 16},
        {"B": 1, "L": 33, "K": 48, "N": 48, "gelu_from": 0, "one_scale": True},
        {"B": 2, "L": 9, "K": 32, "N": 64, "gelu_from": 32, "tail": True},
        {"B": 2, "L": 20, "K": 48, "N": 48, "gated": True},
        {"B": 1, "L": 17, "K": 33, "N": 21, "gelu_from": 5, "tail": True},
        {"B": 1, "L": 19, "K": 33, "N": 70, "gelu_from": 30, "tail": True, "coded": "int8"},
        {"B": 1, "L": 20, "K": 48, "N": 144, "gelu_from": 0, "coded": "int8"},
        {"B": 1, "L": 33, "K": 48, "N": 96, "swiglu_from": 0},
        {"B": 1, "L": 17, "K": 33, "N": 43, "swiglu_from": 5, "tail": True},
        {"B": 1, "L": 19, "K": 32, "N": 80, "swiglu_from": 16, "tail": True, "coded": "int8"},
    ),
    production=(
        {"B": 1, "L": 4096, "K": 3072, "N": 12288, "gelu_from": 0},
        {"B": 1, "L": 4608, "K": 3072, "N": 21504, "gelu_from": 9216, "tail": True},
        {"B": 1, "L": 4608, "K": 15360, "N": 3072, "gated": True},
        {"B": 1, "L": 4096, "K": 3072, "N": 12288, "gelu_from": 0, "coded": "int8"},
        {"B": 1, "L": 32, "K": 3072, "N": 3072},
        {"B": 1, "L": 4608, "K": 6144, "N": 55296, "swiglu_from": 18432, "tail": True},
        {"B": 1, "L": 4608, "K": 6144, "N": 55296, "swiglu_from": 18432, "tail": True, "coded": "int8"},
        {"B": 1, "L": 4096, "K": 6144, "N": 36864, "swiglu_from": 0},
        {"B": 1, "L": 4128, "K": 3840, "N": 20480, "swiglu_from": 0, "coded": "int8"},
        {"B": 1, "L": 32, "K": 3840, "N": 20480, "swiglu_from": 0},
    ),
    cpu=(
        {"B": 1, "L": 256, "K": 512, "N": 2048, "gelu_from": 0},
        {"B": 1, "L": 256, "K": 512, "N": 2048, "swiglu_from": 0},
        {"B": 2, "L": 128, "K": 1024, "N": 512, "gated": True},
    ),
    forms=(
        {"form": "blas"},
        {"form": "tma", "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
        {"form": "tma", "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8, "num_warps": 8, "num_stages": 4},
    ),
    bytes=moved_bytes,
    flops=lambda i: 2 * i["x_MK"].numel() * i["weight_NK"].shape[0],
    # sums of thousands of products; the "blas" form rounds the product before its epilogue
    tolerance={**TOLERANCE, torch.float32: 2e-6},
    multiplied_with=("swiglu_from",),
)
