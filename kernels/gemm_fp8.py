"""out = x weight^T + bias with weights, and as a rule inputs, in fp8 (e4m3), and the epilogues of `gemm`.

    row scales    out = x_scale * weight_scale * (sum of products of codes)
    block scales  out = sum over blocks of 128 columns of x_scale * weight_scale * (their sum)
    no x_scale    x is numbers and codes of the weight are decoded on the way: any GPU, for the sake of memory

Shapes: x_MK, weight_NK, bias_N -> out_MN, where M stands for any leading dimensions. Scaled sums are in fp32.
Why: tensor cores multiply 8-bit numbers twice as fast as 16-bit ones, and weights take half the memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.gemm import with_epilogue
from sgl_diffusion.kernels.gemm_8bit import (
    LIBRARY_ALIGNMENT,
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
from sgl_diffusion.kernels.gemm_forms import as_rows, fit_descriptors
from sgl_diffusion.kernels.op import TOLERANCE, Inputs, Op, inside, noise, poisoned
from sgl_diffusion.kernels.quantize import SCALE_BLOCK, Format, require_fp8

# M rows  N output columns  K input columns

CODES = torch.float8_e4m3fn


def gemm_fp8(
    x_MK: Tensor, x_scale: Tensor | None, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor | None = None,
    *, gelu_from: int | None = None, swiglu_from: int | None = None, tail: Tensor | None = None,
    gate: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None,
    code_scale: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, impl: launch.Impl = "auto",
) -> Any:  # fmt: skip
    """Returns `out`, or a new contiguous tensor in `dtype`; with a tail, (out, tail). All that is fp32, bf16 or fp16.

    Args:
        x_MK: (..., K) with a contiguous last dimension and rows evenly apart: e4m3 codes, which need sm_89 or later,
            or, without x_scale, fp32, bf16 or fp16 numbers.
        x_scale: fp32 (...), a scale a row, as `quantize_rows` and others return it; (1,), one for all; or, beside
            block scales of the weight, (..., ceil(K / 128)).
        weight_NK: e4m3 codes, contiguous. weight_scale: fp32 (N,), or of blocks (ceil(N / 128), ceil(K / 128)).
        bias_N, gelu_from, swiglu_from, tail, gate, residual, out: as of `gemm`, in the dtype of the result.
        code_scale: fp32; beside it the last result, tail or out, is e4m3 codes, rows evenly apart. (1,) is the scale of
            all of them, to which they saturate; (..., ceil(columns / 128)) is where scales of blocks go, rows evenly
            apart, and gelu_from is a multiple of 128 then.
        dtype: of a new result; `out` has its own.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; a gate without a residual; two epilogues.
        launch.Unsupported: codes on a GPU before sm_89.
    """
    check_operands(x_MK, x_scale, weight_NK, weight_scale, CODES)
    N, K = weight_NK.shape
    if weight_scale.ndim != 1:
        blocks = -(-K // SCALE_BLOCK)
        launch.check_shape((-(-N // SCALE_BLOCK), blocks), weight_scale=weight_scale)
        if x_scale is not None:
            launch.check_shape((*x_MK.shape[:-1], blocks), x_scale=x_scale)
    given = out
    out = result(x_MK, weight_NK, bias_N, gelu_from, swiglu_from, tail, gate, residual, out, code_scale, dtype)
    if launch.runs_triton(impl, x_MK):
        if x_scale is not None:
            require_fp8("fp8")
        if launch_form(
            "gemm_fp8", x_MK, x_scale, weight_NK, weight_scale, bias_N, gelu_from, swiglu_from, tail, gate, residual,
            out, code_scale,
        ):
            return out if tail is None else (out, tail)
        if swiglu_from is not None:
            product = partial(gemm_fp8, x_MK, x_scale, weight_NK, weight_scale, bias_N)
            return swiglu_pass(product, bias_N, swiglu_from, tail, given, code_scale, dtype, impl)
    return gemm_fp8_reference(
        x_MK, x_scale, weight_NK, weight_scale, bias_N, gelu_from=gelu_from, swiglu_from=swiglu_from, tail=tail,
        gate=gate, residual=residual, out=out, code_scale=code_scale,
    )  # fmt: skip


def gemm_fp8_reference(
    x_MK: Tensor, x_scale: Tensor | None, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor | None,
    *, gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None, gate: Tensor | None,
    residual: Tensor | None, out: Tensor, code_scale: Tensor | None,
) -> Any:  # fmt: skip
    """A product of numbers in fp32, and passes over it. Also the "blas" form on a GPU: cuBLASLt's where that fits."""
    wide = weight_scale.dtype
    if blocked := weight_scale.ndim == 2:
        x_MK, weight_NK = _numbers(x_MK, x_scale, weight_NK, weight_scale)

    def product(columns: slice, place: Tensor | None) -> Tensor:
        weight, bias = weight_NK[columns], None if bias_N is None else bias_N[columns]
        form = "torch"
        if blocked:
            y = F.linear(x_MK, weight)
            y = y if bias is None else y.add_(bias)
        elif x_scale is not None and out.dtype == torch.bfloat16 and _library_takes(x_MK, weight):
            form = "blas"
            y = _library_product(x_MK, x_scale, weight, weight_scale[columns], bias, out.dtype)
        else:
            # numbers of 16 bits stay as they are on a GPU, which multiplies them ten times as fast as wider ones
            x = x_MK if x_scale is None and not launch.on_cpu(x_MK) else x_MK.to(wide)
            y = scale_sums(F.linear(x, _weight_numbers(weight, x.dtype)).to(wide), x_scale, weight_scale[columns], bias)
        launch.took("gemm_fp8", form, *weight.shape)
        return y if place is None else place.copy_(y)

    if code_scale is not None:
        return with_coded_epilogue(product, gelu_from, tail, out, code_scale, swiglu_from)
    return with_epilogue(product, gelu_from, tail, gate, residual, out, swiglu_from)


def _numbers(x_MK: Tensor, x_scale: Tensor | None, weight_NK: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """What codes with block scales stand for, in the dtype of the scales."""
    N, K = weight_NK.shape
    by_column = weight_scale.repeat_interleave(SCALE_BLOCK, dim=1)[:, :K]
    weight = _weight_numbers(weight_NK, weight_scale.dtype) * by_column.repeat_interleave(SCALE_BLOCK, dim=0)[:N]
    x = x_MK.to(weight_scale.dtype)
    return x if x_scale is None else x * x_scale.repeat_interleave(SCALE_BLOCK, dim=-1)[..., :K], weight


def _weight_numbers(codes: Tensor, dtype: torch.dtype) -> Tensor:
    if codes.dtype != CODES or not launch.on_cpu(codes):
        return codes.to(dtype)
    # that takes five times as long on a CPU; fp16 has the fields of finite codes seven bits higher, and a larger bias
    fields = (codes.view(torch.int8).to(torch.int16) << 7) & ~0x4000
    return fields.view(torch.float16).to(dtype).mul_(256)


def _library_takes(x_MK: Tensor, weight_NK: Tensor) -> bool:
    aligned = all(size % LIBRARY_ALIGNMENT == 0 for size in weight_NK.shape)
    return not launch.on_cpu(x_MK) and aligned and fit_descriptors(x_MK, weight_NK)


def _library_product(
    x_MK: Tensor, x_scale: Tensor, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    x = as_rows(x_MK)
    row_scales = x_scale.reshape(-1, 1).expand(len(x), 1).contiguous()
    # "fast" sums are those of tensor cores, of 13 or 14 bits
    y = torch._scaled_mm(
        x, weight_NK.mT, scale_a=row_scales, scale_b=weight_scale[None], bias=bias_N, out_dtype=dtype,
        use_fast_accum=False,
    )  # fmt: skip
    return y.view(*x_MK.shape[:-1], -1)


def eager_gemm_fp8(
    x_MK: Tensor, x_scale: Tensor | None, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor,
    gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None, gate: Tensor | None, residual: Tensor | None,
    out: Tensor, code_scale: Tensor | None,
) -> object:  # fmt: skip
    """As quantised checkpoints are run without kernels of their own: PyTorch's product, or widened weights."""
    if x_scale is not None and weight_scale.ndim == 1:
        y = _library_product(x_MK, x_scale, weight_NK, weight_scale, None, bias_N.dtype) + bias_N
    else:
        scale = weight_scale if weight_scale.ndim == 2 else weight_scale[:, None]
        if weight_scale.ndim == 2:
            x, weight = _numbers(x_MK, x_scale, weight_NK, weight_scale)
        else:
            x, weight = x_MK, weight_NK.to(scale.dtype) * scale
        y = F.linear(x.to(bias_N.dtype), weight.to(bias_N.dtype), bias_N)
    return eager_epilogue(y, gelu_from, swiglu_from, tail, gate, residual, out, code_scale)


def _inputs(
    device: str, dtype: torch.dtype, B: int, L: int, K: int, N: int, scales: Literal["row", "tensor", "block"] = "row",
    decoded: bool = False, gelu_from: int | None = None, tail: bool = False, gated: bool = False,
    coded: Format | None = None, swiglu_from: int | None = None,
) -> Inputs:  # fmt: skip
    x_dtype = dtype if decoded else CODES
    blocks = (-(-N // SCALE_BLOCK), -(-K // SCALE_BLOCK))
    x_shape = {"row": (B, L), "tensor": (1,), "block": (B, L, blocks[1])}[scales]
    weight_shape = blocks if scales == "block" else (N,)
    wider = poisoned((B, L, K + 16), x_dtype, device)
    return {
        "x_MK": inside(wider, (noise((B, L, K), torch.float32, device) * 8).to(x_dtype), slice(16, K + 16)),
        "x_scale": None if decoded else noise(x_shape, torch.float32, device, 5).abs() / 8,
        "weight_NK": (noise((N, K), torch.float32, device, 1) * 8).to(CODES),
        "weight_scale": noise(weight_shape, torch.float32, device, 6).abs() * K**-0.5 / 8,
        **epilogue_inputs(device, dtype, B, L, N, gelu_from, swiglu_from, tail, gated, coded),
    }


OP = Op(
    name="gemm_fp8",
    formula="gemm of e4m3 codes, with scales of rows, or of blocks of 128; or of numbers and e4m3 weights",
    replaces="_scaled_mm or a widened weight and linear, then what gemm replaces",
    launch=gemm_fp8,
    reference=gemm_fp8_reference,
    eager=eager_gemm_fp8,
    inputs=_inputs,
    written=("code_scale",),
    tiny=(
        {"B": 1, "L": 1, "K": 16, "N": 16},
        {"B": 1, "L": 33, "K": 48, "N": 48, "gelu_from": 0, "scales": "tensor"},
        {"B": 2, "L": 9, "K": 32, "N": 64, "gelu_from": 32, "tail": True},
        {"B": 2, "L": 20, "K": 48, "N": 48, "gated": True},
        {"B": 1, "L": 17, "K": 33, "N": 21, "gelu_from": 5, "tail": True},
        {"B": 1, "L": 17, "K": 208, "N": 144, "gelu_from": 16, "tail": True, "scales": "block"},
        {"B": 2, "L": 5, "K": 200, "N": 136, "gated": True, "scales": "block"},
        {"B": 2, "L": 9, "K": 40, "N": 24, "gated": True, "decoded": True},
        {"B": 1, "L": 5, "K": 136, "N": 130, "gelu_from": 10, "tail": True, "decoded": True, "scales": "block"},
        {"B": 1, "L": 17, "K": 208, "N": 272, "gelu_from": 0, "scales": "block", "coded": "fp8_block"},
        {"B": 2, "L": 9, "K": 48, "N": 400, "gelu_from": 256, "tail": True, "coded": "fp8_block"},
        {"B": 1, "L": 19, "K": 33, "N": 70, "gelu_from": 30, "tail": True, "coded": "fp8"},
        {"B": 1, "L": 20, "K": 48, "N": 144, "gelu_from": 0, "coded": "fp8"},
        {"B": 1, "L": 33, "K": 48, "N": 96, "swiglu_from": 0},
        {"B": 1, "L": 17, "K": 33, "N": 43, "swiglu_from": 5, "tail": True},
        {"B": 1, "L": 17, "K": 208, "N": 512, "swiglu_from": 256, "tail": True, "scales": "block"},
        {"B": 1, "L": 5, "K": 136, "N": 256, "swiglu_from": 0, "scales": "block", "decoded": True},
        {"B": 1, "L": 5, "K": 136, "N": 130, "swiglu_from": 10, "tail": True, "scales": "block"},
        {"B": 1, "L": 17, "K": 208, "N": 768, "swiglu_from": 256, "tail": True, "scales": "block",
         "coded": "fp8_block"},
        {"B": 2, "L": 9, "K": 48, "N": 352, "swiglu_from": 0, "coded": "fp8_block"},
        {"B": 1, "L": 19, "K": 32, "N": 80, "swiglu_from": 16, "tail": True, "coded": "fp8"},
    ),
    production=(
        {"B": 1, "L": 4096, "K": 3072, "N": 12288, "gelu_from": 0},
        {"B": 1, "L": 4608, "K": 3072, "N": 21504, "gelu_from": 9216, "tail": True},
        {"B": 1, "L": 4608, "K": 15360, "N": 3072, "gated": True},
        {"B": 1, "L": 4608, "K": 3072, "N": 9216},
        {"B": 1, "L": 4096, "K": 3072, "N": 12288, "gelu_from": 0, "scales": "block"},
        {"B": 1, "L": 4096, "K": 3072, "N": 12288, "gelu_from": 0, "scales": "block", "coded": "fp8_block"},
        {"B": 1, "L": 4608, "K": 3072, "N": 21504, "gelu_from": 9216, "tail": True, "scales": "block",
         "coded": "fp8_block"},
        {"B": 1, "L": 4096, "K": 3072, "N": 12288, "gelu_from": 0, "coded": "fp8"},
        {"B": 1, "L": 32, "K": 3072, "N": 3072},
        {"B": 1, "L": 32, "K": 3072, "N": 12288, "gelu_from": 0, "scales": "block", "coded": "fp8_block"},
        {"B": 1, "L": 32, "K": 3072, "N": 3072, "scales": "block"},
        {"B": 1, "L": 4096, "K": 3072, "N": 12288, "gelu_from": 0, "decoded": True},
        {"B": 1, "L": 4608, "K": 6144, "N": 55296, "swiglu_from": 18432, "tail": True},
        {"B": 1, "L": 4608, "K": 6144, "N": 55296, "swiglu_from": 18432, "tail": True, "coded": "fp8"},
        {"B": 1, "L": 4608, "K": 6144, "N": 55296, "swiglu_from": 18432, "tail": True, "scales": "block",
         "coded": "fp8_block"},
        {"B": 1, "L": 4096, "K": 6144, "N": 36864, "swiglu_from": 0},
        {"B": 1, "L": 4128, "K": 3840, "N": 20480, "swiglu_from": 0, "scales": "block", "coded": "fp8_block"},
        {"B": 1, "L": 4128, "K": 3840, "N": 20480, "swiglu_from": 0, "scales": "block"},
        {"B": 1, "L": 32, "K": 3840, "N": 20480, "swiglu_from": 0, "scales": "block", "coded": "fp8_block"},
        {"B": 1, "L": 32, "K": 3840, "N": 20480, "swiglu_from": 0, "scales": "block"},
        {"B": 1, "L": 4128, "K": 3840, "N": 20480, "swiglu_from": 0, "decoded": True},
    ),
    cpu=(
        {"B": 1, "L": 256, "K": 512, "N": 2048, "gelu_from": 0},
        {"B": 1, "L": 256, "K": 512, "N": 2048, "swiglu_from": 0},
        {"B": 2, "L": 128, "K": 1024, "N": 512, "gated": True},
    ),
    forms=(
        {"form": "blas"},
        {"form": "tma", "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8, "num_warps": 8, "num_stages": 4},
    ),
    bytes=moved_bytes,
    flops=lambda i: 2 * i["x_MK"].numel() * i["weight_NK"].shape[0],
    # sums of thousands of products; the "blas" form rounds the product before its epilogue
    tolerance={**TOLERANCE, torch.float32: 2e-6},
    multiplied_with=("swiglu_from",),
)
