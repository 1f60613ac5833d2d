"""low = x down^T, and 8-bit codes of the rows of x / smooth: what a layer of 4 bits with a low-rank branch reads.

Shapes: x_MK, down_RK, smooth_K -> low_MR in the dtype of x, codes (..., K), scale_M in fp32, where M stands for any
leading dimensions. Products are summed in fp32; q = round(x / smooth / s), s = max |x / smooth| / largest code.
Why: the branch's projection is so narrow that it costs what reading x costs, and the quantiser reads x anyway. A row
comes from memory once, for its projection and its largest value, and once more from L2 for its codes; of `down`, all of
it is read from L2 for every BLOCK_M rows. Written are the codes, 2 R bytes of a row, and its scale.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.gemm_forms import FP32_PRODUCT
from sgl_diffusion.kernels.op import TOLERANCE, Inputs, Op, inside, noise, poisoned
from sgl_diffusion.kernels.quantize import (
    DTYPES,
    LARGEST,
    eager_quantize_rows,
    quantize_rows_reference,
    require_fp8,
    row_scale,
    to_code,
)

# M rows  K input columns  R columns of the branch

FORMATS = ("int8", "fp8")
LARGEST_RANK = 128


@triton.jit
def _smoothed(x, smooth_ptr, k, K):
    """x / smooth in fp32."""
    x = x.to(tl.float32)
    if smooth_ptr is not None:
        x *= (1.0 / tl.load(smooth_ptr + k, mask=k < K, other=1.0).to(tl.float32))[None, :]
    return x


@triton.jit
def _low_rank_kernel(
    x_ptr, down_ptr, smooth_ptr, codes_ptr, scale_ptr, low_ptr, x_stride_m, M, K,
    RANK: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """Some rows a program."""
    tl.assume(K > 0)  # or Triton waits after every wgmma: it sees a loop that may not run
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    # rows and columns past the end read others and are not stored
    x_ptrs = x_ptr + (m % M).to(tl.int64)[:, None] * x_stride_m
    down_ptrs = down_ptr + (r % RANK)[None, :] * K
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    largest = tl.zeros((BLOCK_M,), tl.float32)
    for first_k in range(0, K, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptrs + k[None, :]) if EVEN_K else tl.load(x_ptrs + k[None, :], mask=(k < K)[None, :], other=0.0)
        down = tl.load(down_ptrs + k[:, None]) if EVEN_K else tl.load(
            down_ptrs + k[:, None], mask=(k < K)[:, None], other=0.0
        )
        low = tl.dot(x, down, low, input_precision=PRECISION, out_dtype=tl.float32)
        if codes_ptr is not None:
            largest = tl.maximum(largest, tl.max(tl.abs(_smoothed(x, smooth_ptr, k, K)), axis=1))
    row = m.to(tl.int64)[:, None]
    live = (m < M)[:, None]
    tl.store(low_ptr + row * RANK + r[None, :], low.to(low_ptr.dtype.element_ty), mask=live & (r < RANK)[None, :])
    if codes_ptr is not None:
        scale = row_scale(largest, LARGEST)
        tl.store(scale_ptr + m, scale, mask=m < M)
        for first_k in range(0, K, BLOCK_K):
            k = first_k + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptrs + k[None, :], mask=live & (k < K)[None, :], other=0.0)
            codes = to_code(_smoothed(x, smooth_ptr, k, K), scale[:, None], INTEGER)
            tl.store(
                codes_ptr + row * K + k[None, :], codes.to(codes_ptr.dtype.element_ty), mask=live & (k < K)[None, :]
            )


def quantize_low_rank(
    x_MK: Tensor, down_RK: Tensor, *, smooth_K: Tensor | None = None, format: Literal["int8", "fp8"] | None = None,
    impl: launch.Impl = "auto",
) -> Any:  # fmt: skip
    """Codes in the shape of x, contiguous, a scale for every row, and the branch's (..., R); the last alone without a
    format.

    Args:
        x_MK: (..., K) with a contiguous last dimension and rows evenly apart.
        down_RK: contiguous, dtype of x; R a multiple of 16 up to 128. It projects x as it is.
        smooth_K: any float dtype; codes are of x divided by it.
        format: fp8 needs sm_89 or later.
    Raises:
        ValueError: a shape, dtype, device, stride or format that does not fit.
    Source: SVDQuant (Li et al. 2024, arXiv 2411.05007), whose kernels quantise to 4 bits in groups.
    """
    launch.check_ndim(2, down_RK=down_RK)
    launch.check_float(x_MK, x_MK=x_MK, down_RK=down_RK)
    launch.check_dtype(x_MK.dtype, down_RK=down_RK)
    R, K = down_RK.shape
    check_rank("down_RK", R)
    launch.check_shape((*x_MK.shape[:-1], K), x_MK=x_MK)
    launch.check_last_dim(x_MK=x_MK)
    x_stride = launch.row_stride("x_MK", x_MK)
    launch.check_contiguous(down_RK=down_RK)
    if smooth_K is not None:
        launch.check_float(x_MK, smooth_K=smooth_K)
        launch.check_shape((K,), smooth_K=smooth_K)
        launch.check_contiguous(smooth_K=smooth_K)
    if format is not None and format not in FORMATS:
        raise ValueError(f"format={format!r}: expected {', '.join(FORMATS)} or None")
    if not launch.runs_triton(impl, x_MK):
        return quantize_low_rank_reference(x_MK, down_RK, smooth_K=smooth_K, format=format)
    require_fp8(format)
    low = x_MK.new_empty(*x_MK.shape[:-1], R)
    codes = scale = None
    if format is not None:
        codes = torch.empty(x_MK.shape, dtype=DTYPES[format], device=x_MK.device)
        scale = x_MK.new_empty(x_MK.shape[:-1], dtype=torch.float32)
    M = x_MK.numel() // K
    tile = launch.tile("quantize_low_rank", itemsize=x_MK.element_size())
    with launch.on_device(x_MK):
        _low_rank_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
            x_MK, down_RK, smooth_K, codes, scale, low, x_stride, M, K,
            RANK=R, BLOCK_R=triton.next_power_of_2(R), LARGEST=LARGEST[format or "int8"], INTEGER=format == "int8",
            PRECISION=FP32_PRODUCT, EVEN_K=K % tile["BLOCK_K"] == 0, enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return low if format is None else (codes, scale, low)


def check_rank(name: str, R: int) -> None:
    """Raises ValueError for a rank that products of tiles do not take."""
    if R % 16 or not 0 < R <= LARGEST_RANK:
        raise ValueError(f"{name}: rank {R}, expected a multiple of 16 up to {LARGEST_RANK}")


def check_branch(x_MK: Tensor, N: int, dtype: torch.dtype, low_MR: Tensor | None, up_NR: Tensor | None) -> None:
    """Of a product of x with N columns and results in `dtype`: both factors of a low-rank branch, or none.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    if low_MR is None and up_NR is None:
        return
    if low_MR is None or up_NR is None:
        raise ValueError("low_MR, up_NR: expected both or none")
    launch.check_float(x_MK, low_MR=low_MR, up_NR=up_NR)
    launch.check_dtype(dtype, low_MR=low_MR, up_NR=up_NR)
    R = low_MR.shape[-1]
    check_rank("low_MR", R)
    launch.check_shape((*x_MK.shape[:-1], R), low_MR=low_MR)
    launch.check_shape((N, R), up_NR=up_NR)
    launch.check_last_dim(low_MR=low_MR)
    launch.check_contiguous(up_NR=up_NR)
    launch.row_stride("low_MR", low_MR)


def quantize_low_rank_reference(
    x_MK: Tensor, down_RK: Tensor, *, smooth_K: Tensor | None, format: Literal["int8", "fp8"] | None
) -> Any:
    """PyTorch's product, then the quantiser's reference."""
    low = F.linear(x_MK, down_RK)
    if format is None:
        return low
    x = x_MK if smooth_K is None else launch.widen(x_MK) / launch.widen(smooth_K)
    return (*quantize_rows_reference(x, format), low)


def eager_quantize_low_rank(
    x_MK: Tensor, down_RK: Tensor, smooth_K: Tensor | None, format: Literal["int8", "fp8"] | None
) -> Any:
    """The branch and the quantiser as separate layers."""
    low = F.linear(x_MK, down_RK)
    if format is None:
        return low
    return (*eager_quantize_rows(x_MK if smooth_K is None else x_MK / smooth_K, format), low)


def _inputs(
    device: str, dtype: torch.dtype, B: int, L: int, K: int, R: int,
    format: Literal["int8", "fp8"] | None = None, smooth: bool = False,
) -> Inputs:  # fmt: skip
    x_BLK = noise((B, L, K), dtype, device)
    x_BLK[:, 0] = 0
    return {
        "x_MK": inside(poisoned((B, L, K + 16), dtype, device), x_BLK, slice(16, K + 16)),
        "down_RK": noise((R, K), dtype, device, 1) * K**-0.5,
        "smooth_K": noise((K,), dtype, device, 2).abs() + 0.5 if smooth else None,
        "format": format,
    }


def _bytes(i: Inputs) -> int:
    (R, K), itemsize = i["down_RK"].shape, i["x_MK"].element_size()
    rows = i["x_MK"].numel() // K
    quantised = 0 if i["format"] is None else rows * (K + 4)
    return (rows + R) * K * itemsize + rows * R * itemsize + quantised


OP = Op(
    name="quantize_low_rank",
    formula="x down^T, and x / smooth / s in 8 bits, s = max |x / smooth| / largest code",
    replaces="linear, div; quantise: 7 more",
    launch=quantize_low_rank,
    reference=quantize_low_rank_reference,
    eager=eager_quantize_low_rank,
    inputs=_inputs,
    tiny=(
        {"B": 1, "L": 2, "K": 32, "R": 16},
        {"B": 1, "L": 19, "K": 50, "R": 48, "format": "int8", "smooth": True},
        {"B": 2, "L": 5, "K": 96, "R": 128, "format": "fp8"},
    ),
    production=(
        {"B": 1, "L": 4608, "K": 3072, "R": 32, "format": "int8", "smooth": True},
        {"B": 1, "L": 4608, "K": 15360, "R": 128, "format": "int8", "smooth": True},
        {"B": 1, "L": 4608, "K": 3072, "R": 32},
    ),
    cpu=({"B": 1, "L": 2048, "K": 1536, "R": 32, "format": "int8", "smooth": True},),
    bytes=_bytes,
    flops=lambda i: 2 * i["x_MK"].numel() * len(i["down_RK"]),
    tolerance={**TOLERANCE, torch.float32: 2e-6},  # sums of thousands of products
)
