"""The Triton kernels of `gemm_mx.py`: weights decoded as they are read, and codes times codes.

Both run one tile a program. The first reads by pointers, as every GPU can; the second by the bulk copy engine, which is
there wherever tensor cores know the formats.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.gemm_forms import FP32_PRODUCT, as_rows, finish, row_stride, tile_at
from sgl_diffusion.kernels.microscaling import (
    CODES_PER_BYTE,
    E2M1_BIAS,
    E4M3_BIAS,
    MxFormat,
    e2m1_over_bias,
    e4m3_over_bias,
    e8m0_value,
)

# M rows  N output columns  K input columns

E4M3 = tl.constexpr("e4m3")
E2M1 = tl.constexpr("e2m1")


@triton.jit
def _times_global_scales(
    acc, x_scale_ptr, weight_scale_ptr, m, n, M, N, X_STRIDE: tl.constexpr, W_STRIDE: tl.constexpr
):
    """Of rows and of columns, each one for all (stride 0) or one for each."""
    if x_scale_ptr is not None:
        acc *= tl.load(x_scale_ptr + m * X_STRIDE, mask=m < M, other=0.0)[:, None]
    if weight_scale_ptr is not None:
        acc *= tl.load(weight_scale_ptr + n * W_STRIDE, mask=n < N, other=0.0)[None, :]
    return acc


@triton.jit
def _decoded(codes, scale, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NVFP4: tl.constexpr):
    """A tile of weights (BLOCK_N, BLOCK_K) in fp32."""
    if NVFP4:
        step = (e4m3_over_bias(scale) * (E4M3_BIAS * E2M1_BIAS))[:, :, None]
        codes = tl.reshape(codes, (BLOCK_N, BLOCK_K // 16, 8))
        return tl.reshape(
            tl.join(e2m1_over_bias(codes & 0xF) * step, e2m1_over_bias(codes >> 4) * step), (BLOCK_N, BLOCK_K)
        )
    else:
        step = (e8m0_value(scale) * E4M3_BIAS)[:, :, None]
        codes = tl.reshape(codes, (BLOCK_N, BLOCK_K // 32, 32))
        return tl.reshape(e4m3_over_bias(codes) * step, (BLOCK_N, BLOCK_K))


@triton.jit
def _decode_kernel(
    x_ptr, codes_ptr, scale_ptr, global_ptr, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr,
    x_stride_m, codes_stride_n, scale_stride_n, gate_stride_g, residual_stride_m, out_stride_m, tail_stride_m,
    M, N, K, gelu_from, rows_per_gate,
    NVFP4: tl.constexpr, GLOBAL_STRIDE: tl.constexpr, GELU: tl.constexpr, ONE_GATE: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """One tile a program. Codes and scales come as uint8: sm_80 has no e4m3."""
    PACKED: tl.constexpr = 2 if NVFP4 else 1
    SCALED: tl.constexpr = 16 if NVFP4 else 32
    tl.assume(K > 0)  # or Triton 3.6 waits after every wgmma: it sees a loop that may not run
    first_m, first_n = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BLOCK_K // PACKED)
    block = tl.arange(0, BLOCK_K // SCALED)
    # rows and columns past the end read others and are not stored: no masks in the loop
    row = (n % N).to(tl.int64)[:, None]
    x_ptrs = x_ptr + (m % M).to(tl.int64)[:, None] * x_stride_m + k[None, :]
    codes_ptrs = codes_ptr + row * codes_stride_n + byte[None, :]
    scale_ptrs = scale_ptr + row * scale_stride_n + block[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_k in range(0, K, BLOCK_K):
        if EVEN_K:
            x, codes, scale = tl.load(x_ptrs), tl.load(codes_ptrs), tl.load(scale_ptrs)
        else:
            left = K - first_k
            x = tl.load(x_ptrs, mask=(k < left)[None, :], other=0.0)
            codes = tl.load(codes_ptrs, mask=(byte < left // PACKED)[None, :], other=0)
            scale = tl.load(scale_ptrs, mask=(block < left // SCALED)[None, :], other=0)
        weight = _decoded(codes, scale, BLOCK_N, BLOCK_K, NVFP4).to(x.dtype)
        acc = tl.dot(x, weight.T, acc, input_precision=PRECISION, out_dtype=tl.float32)
        x_ptrs += BLOCK_K
        codes_ptrs += BLOCK_K // PACKED
        scale_ptrs += BLOCK_K // SCALED
    acc = _times_global_scales(acc, None, global_ptr, m, n, M, N, 0, GLOBAL_STRIDE)
    finish(
        acc, m, n, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr,
        gate_stride_g, residual_stride_m, out_stride_m, tail_stride_m, M, N, gelu_from, rows_per_gate, GELU, ONE_GATE,
    )


@triton.jit
def _scaled_kernel(
    x, weight, x_scale_ptr, weight_scale_ptr, x_global_ptr, weight_global_ptr,
    bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr,
    x_scale_stride_m, weight_scale_stride_n, gate_stride_g, residual_stride_m, out_stride_m, tail_stride_m,
    M, N, K, gelu_from, rows_per_gate,
    NVFP4: tl.constexpr, X_GLOBAL_STRIDE: tl.constexpr, W_GLOBAL_STRIDE: tl.constexpr,
    GELU: tl.constexpr, ONE_GATE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """One tile a program; x and weight are descriptors of codes, which read zeros past the end."""
    PACKED: tl.constexpr = 2 if NVFP4 else 1
    SCALED: tl.constexpr = 16 if NVFP4 else 32
    FORMAT: tl.constexpr = E2M1 if NVFP4 else E4M3
    first_m, first_n = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    block = tl.arange(0, BLOCK_K // SCALED)
    x_scale_ptrs = x_scale_ptr + (m % M).to(tl.int64)[:, None] * x_scale_stride_m + block[None, :]
    weight_scale_ptrs = weight_scale_ptr + (n % N).to(tl.int64)[:, None] * weight_scale_stride_n + block[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_k in range(0, K, BLOCK_K):
        if EVEN_K:
            x_scale, weight_scale = tl.load(x_scale_ptrs), tl.load(weight_scale_ptrs)
        else:
            live = (block < (K - first_k) // SCALED)[None, :]
            x_scale = tl.load(x_scale_ptrs, mask=live, other=0.0)
            weight_scale = tl.load(weight_scale_ptrs, mask=live, other=0.0)
        byte = first_k // PACKED
        acc = tl.dot_scaled(
            x.load([first_m, byte]), x_scale, FORMAT, weight.load([first_n, byte]).T, weight_scale, FORMAT, acc
        )
        x_scale_ptrs += BLOCK_K // SCALED
        weight_scale_ptrs += BLOCK_K // SCALED
    # in halves: a whole tile's epilogue holds accumulator and result in registers at once
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    n = first_n + tl.arange(0, BLOCK_N // 2)
    left = _times_global_scales(left, x_global_ptr, weight_global_ptr, m, n, M, N, X_GLOBAL_STRIDE, W_GLOBAL_STRIDE)
    finish(
        left, m, n, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr,
        gate_stride_g, residual_stride_m, out_stride_m, tail_stride_m, M, N, gelu_from, rows_per_gate, GELU, ONE_GATE,
    )
    n += BLOCK_N // 2
    right = _times_global_scales(right, x_global_ptr, weight_global_ptr, m, n, M, N, X_GLOBAL_STRIDE, W_GLOBAL_STRIDE)
    finish(
        right, m, n, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr,
        gate_stride_g, residual_stride_m, out_stride_m, tail_stride_m, M, N, gelu_from, rows_per_gate, GELU, ONE_GATE,
    )


# -- launching --------------------------------------------------------------------


def launch_decoding(
    x_MK: Tensor, weight_codes: Tensor, weight_scales: Tensor, weight_global_scale: Tensor | None,
    bias_N: Tensor | None, gelu_from: int | None, tail: Tensor | None, gate: Tensor | None, residual: Tensor | None,
    out: Tensor, format: MxFormat, tile: launch.Tile,
) -> None:  # fmt: skip
    grid, sizes, constants = _of_launch(x_MK, weight_codes, gelu_from, gate, format, tile)
    _decode_kernel[grid](
        x_MK, weight_codes.view(torch.uint8), weight_scales.view(torch.uint8), weight_global_scale,
        bias_N, gate, residual, out, tail,
        *map(row_stride, (x_MK, weight_codes, weight_scales, gate, residual, out, tail)), *sizes,
        GLOBAL_STRIDE=_step(weight_global_scale), PRECISION=FP32_PRODUCT, **constants,
    )  # fmt: skip


def launch_scaled(
    x_MK: Tensor, x_scales: Tensor, x_global_scale: Tensor | None,
    weight_codes: Tensor, weight_scales: Tensor, weight_global_scale: Tensor | None,
    bias_N: Tensor | None, gelu_from: int | None, tail: Tensor | None, gate: Tensor | None, residual: Tensor | None,
    out: Tensor, format: MxFormat, tile: launch.Tile,
) -> None:  # fmt: skip
    grid, sizes, constants = _of_launch(x_MK, weight_codes, gelu_from, gate, format, tile)

    def descriptor(codes: Tensor, rows: int) -> TensorDescriptor:
        block = [rows, tile["BLOCK_K"] // CODES_PER_BYTE[format]]
        return TensorDescriptor(codes, list(as_rows(codes).shape), [row_stride(codes), 1], block)

    _scaled_kernel[grid](
        descriptor(x_MK, tile["BLOCK_M"]), descriptor(weight_codes, tile["BLOCK_N"]),
        x_scales, weight_scales, x_global_scale, weight_global_scale, bias_N, gate, residual, out, tail,
        *map(row_stride, (x_scales, weight_scales, gate, residual, out, tail)), *sizes,
        X_GLOBAL_STRIDE=_step(x_global_scale), W_GLOBAL_STRIDE=_step(weight_global_scale), **constants,
    )  # fmt: skip


def _of_launch(
    x_MK: Tensor, weight_codes: Tensor, gelu_from: int | None, gate: Tensor | None, format: MxFormat, tile: launch.Tile
) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """What both kernels take: grid, sizes and constants."""
    M, (N, packed) = as_rows(x_MK).shape[0], weight_codes.shape
    K, groups = packed * CODES_PER_BYTE[format], 1 if gate is None else gate.shape[0]
    grid = (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)
    constants = {
        "NVFP4": format == "nvfp4", "GELU": gelu_from is not None, "ONE_GATE": groups == 1,
        "EVEN_K": K % tile["BLOCK_K"] == 0, "enable_fp_fusion": True, **tile,
    }  # fmt: skip
    return grid, (M, N, K, gelu_from or 0, M // groups), constants


def _step(scale: Tensor | None) -> int:
    """Between the global scales of neighbours."""
    return int(scale is not None and scale.numel() > 1)
