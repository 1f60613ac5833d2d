"""The Triton kernels of `gemm_w4.py`: codes in groups of columns, decoded inside the product or before it.

"pointer" multiplies what it decodes, one tile a program. "tma" does so in persistent programs, whose operands the bulk
copy engine reads. `launch_decode` writes the layer's weights once, for the library.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.gemm_forms import (
    FP32_PRODUCT,
    as_rows,
    finish_tile,
    finish_tma,
    gated,
    processors,
    row_stride,
    tile_at,
    tile_columns,
    tiled_columns,
    tiles_across,
    with_bias_and_gelu,
)
from sgl_diffusion.kernels.grouped import Grouped
from sgl_diffusion.kernels.microscaling import E4M3_BIAS, e4m3_over_bias

# M rows  N output columns  K input columns  G groups of columns that share a scale  R columns of the low-rank branch

UNENDING = 1 << 30  # columns of a group that is a whole row


@triton.jit
def _unpacked(packed, BITS: tl.constexpr):
    """A column a code; of 4 bits, the even column is the low half of a byte."""
    if BITS == 4:
        return tl.reshape(tl.join(packed & 15, packed >> 4), (packed.shape[0], 2 * packed.shape[1]))
    else:
        return packed


@triton.jit
def _numbers(packed, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """Codes in fp32."""
    # as the last bits of 2^23, whose unit is 1: a GPU does fewer conversions at once than logic and sums
    if BITS == 4:
        code = _unpacked(packed.to(tl.int32), BITS)
        return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388616.0 if SIGNED else 8388608.0)
    else:
        return ((packed.to(tl.int32) & 255) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _of_groups(ptrs, live=None):
    """Scales or offsets, in fp32."""
    value = tl.load(ptrs) if live is None else tl.load(ptrs, mask=live, other=0)
    if ptrs.dtype.element_ty == tl.uint8:
        return e4m3_over_bias(value) * E4M3_BIAS  # sm_80 has no such type
    else:
        return value.to(tl.float32)


@triton.jit
def _weights(
    packed, scale_ptr, offset_ptr, table_ptr, smooth_ptr, n, k, first_k, K, G,
    BITS: tl.constexpr, SIGNED: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
):
    """Rows n and columns k of the weight over smooth, in fp32."""
    value = _numbers(packed, BITS, SIGNED) if table_ptr is None else _unpacked(packed, BITS)
    ROWS: tl.constexpr = value.shape[0]
    COLUMNS: tl.constexpr = value.shape[1]
    GROUPS: tl.constexpr = max(COLUMNS // GROUP, 1)
    value = tl.reshape(value, (ROWS, GROUPS, COLUMNS // GROUPS))
    if table_ptr is not None:
        value = tl.load(table_ptr + value)
    g = first_k // GROUP + tl.arange(0, GROUPS)[None, :]
    live = None if EVEN_K else g < G
    value *= _of_groups(scale_ptr + n[:, None] * G + g, live)[:, :, None]
    if offset_ptr is not None:
        value += _of_groups(offset_ptr + n[:, None] * G + g, live)[:, :, None]
    weight = tl.reshape(value, (ROWS, COLUMNS))
    if smooth_ptr is not None:
        weight *= (1.0 / tl.load(smooth_ptr + k, mask=k < K, other=1.0).to(tl.float32))[None, :]
    return weight


@triton.jit
def _add_integers(
    acc, x, packed, scale_ptr, offset_ptr, n, first_k, G, BITS: tl.constexpr, SIGNED: tl.constexpr, GROUP: tl.constexpr
):
    """acc + the product of codes by codes of one group, whose scale is that of the sum.

    Transposed: a thread has few rows of a tile but many columns, whose scales would not fit.
    """
    group = n * G + first_k // GROUP
    code = _unpacked(packed, BITS).to(tl.int8)
    sums = tl.dot(code - 8 if SIGNED else code, x.T, out_dtype=tl.int32)
    acc += sums.to(tl.float32) * _of_groups(scale_ptr + group)[:, None]
    if offset_ptr is not None:
        acc += _of_groups(offset_ptr + group)[:, None] * tl.sum(x.to(tl.int32), axis=1).to(tl.float32)[None, :]
    return acc


@triton.jit
def _grouped_gemm_kernel(
    x_ptr, x_scale_ptr, codes_ptr, scale_ptr, offset_ptr, table_ptr, smooth_ptr, low_ptr, up_ptr,
    bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr,
    codes_stride_n, x_stride_m, low_stride_m, gate_stride_g, residual_stride_m, out_stride_m, tail_stride_m,
    M, N, K, G, activated_from, rows_per_gate,
    BITS: tl.constexpr, SIGNED: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    GELU: tl.constexpr, SWIGLU: tl.constexpr, ONE_GATE: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """One tile a program."""
    tl.assume(K > 0)  # or Triton waits after every wgmma: it sees a loop that may not run
    columns = tiled_columns(N, activated_from, BLOCK_N, SWIGLU)
    first_m, first_n = tile_at(tl.program_id(0), M, columns, BLOCK_M, BLOCK_N, GROUP_M)
    m = first_m + tl.arange(0, BLOCK_M)
    n = tile_columns(first_n, N, activated_from, BLOCK_N, SWIGLU)
    k = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, BLOCK_K * BITS // 8)
    # rows and columns past the end read others and are not stored: no masks in the loop
    inside_m, inside_n = (m % M).to(tl.int64), (n % N).to(tl.int64)
    x_ptrs = x_ptr + inside_m[:, None] * x_stride_m + k[None, :]
    codes_ptrs = codes_ptr + inside_n[:, None] * codes_stride_n + byte[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N) if x_scale_ptr is None else (BLOCK_N, BLOCK_M), tl.float32)
    for first_k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs) if EVEN_K else tl.load(x_ptrs, mask=(k < K - first_k)[None, :], other=0.0)
        live = (byte < codes_stride_n - first_k * BITS // 8)[None, :]
        packed = tl.load(codes_ptrs) if EVEN_K else tl.load(codes_ptrs, mask=live, other=0)
        if x_scale_ptr is None:
            weight = _weights(
                packed, scale_ptr, offset_ptr, table_ptr, smooth_ptr, inside_n, first_k + k, first_k, K, G,
                BITS, SIGNED, GROUP, EVEN_K,
            )
            acc = tl.dot(x, weight.to(x.dtype).T, acc, input_precision=PRECISION, out_dtype=tl.float32)
        else:
            acc = _add_integers(acc, x, packed, scale_ptr, offset_ptr, inside_n, first_k, G, BITS, SIGNED, GROUP)
        x_ptrs += BLOCK_K
        codes_ptrs += BLOCK_K * BITS // 8

    if x_scale_ptr is not None:
        acc = acc.T * tl.load(x_scale_ptr + inside_m)[:, None]
    if low_ptr is not None:
        low_ptrs = low_ptr + inside_m[:, None] * low_stride_m + tl.arange(0, BLOCK_R)[None, :]
        up_ptrs = up_ptr + inside_n[None, :] * RANK + tl.arange(0, BLOCK_R)[:, None]
        for r in tl.static_range(0, RANK, BLOCK_R):
            acc = tl.dot(
                tl.load(low_ptrs + r), tl.load(up_ptrs + r), acc, input_precision=PRECISION, out_dtype=tl.float32
            )
    finish_tile(
        acc, first_m, first_n, m, n, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr, gate_stride_g,
        residual_stride_m, out_stride_m, tail_stride_m, M, N, activated_from, rows_per_gate, GELU, SWIGLU, ONE_GATE,
    )


@triton.jit
def _grouped_gemm_tma_kernel(
    x, x_scale_ptr, codes, scale_ptr, offset_ptr, table_ptr, smooth_ptr, low, up,
    bias_ptr, gate_ptr, residual, out, tail, gate_stride_g, M, N, K, G, gelu_from, rows_per_gate,
    BITS: tl.constexpr, SIGNED: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    GELU: tl.constexpr, ONE_GATE: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """Every program takes many tiles, and loads of the next tile start under the epilogue of the last.

    The product is transposed: wgmma takes only its first operand from registers, which is where weights are decoded.
    As its second they would be stored and read again, and Triton would wait for every product before it decoded the
    next weights, which it now does under half of one. On sm_100 weights are in tensor memory instead of shared.
    """
    HALF_M: tl.constexpr = BLOCK_M // 2
    tl.assume(K > 0)  # or Triton 3.6 waits after every wgmma: it sees a loop that may not run
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_m, first_n = tile_at(number, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        inside_n = ((first_n + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for first_k in range(0, K, BLOCK_K):
            packed, x_MK = codes.load([first_n, first_k * BITS // 8]), x.load([first_m, first_k])
            if x_scale_ptr is None:
                weight = _weights(
                    packed, scale_ptr, offset_ptr, table_ptr, smooth_ptr, inside_n, first_k + tl.arange(0, BLOCK_K),
                    first_k, K, G, BITS, SIGNED, GROUP, EVEN_K,
                )
                acc = tl.dot(weight.to(x_MK.dtype), x_MK.T, acc, input_precision=PRECISION, out_dtype=tl.float32)
            else:
                acc = _add_integers(acc, x_MK, packed, scale_ptr, offset_ptr, inside_n, first_k, G, BITS, SIGNED, GROUP)

        if x_scale_ptr is not None:
            acc *= tl.load(x_scale_ptr + (first_m + tl.arange(0, BLOCK_M)) % M)[None, :]
        if low is not None:
            for r in tl.static_range(0, RANK, BLOCK_R):
                acc = tl.dot(
                    up.load([first_n, r]), low.load([first_m, r]).T, acc,
                    input_precision=PRECISION, out_dtype=tl.float32,
                )
        m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        acc = with_bias_and_gelu(acc.T, bias_ptr, n, N, gelu_from, GELU)
        acc = gated(acc, gate_ptr, m, n, M, N, gate_stride_g, rows_per_gate, ONE_GATE)
        # the rest in halves of rows, which share bias and gate: whole, it would hold accumulator and result at once
        top_and_bottom = tl.split(tl.permute(tl.reshape(acc, (2, HALF_M, BLOCK_N)), (1, 2, 0)))
        for half in tl.static_range(2):
            finish_tma(
                top_and_bottom[half], first_m + half * HALF_M, first_n, None, None, residual, out, tail,
                M, N, gelu_from, gate_stride_g, rows_per_gate, False, ONE_GATE, HALF_M, BLOCK_N,
            )


@triton.jit
def _decode_kernel(
    codes_ptr, scale_ptr, offset_ptr, table_ptr, smooth_ptr, out_ptr, codes_stride_n, out_stride_n, N, K, G,
    BITS: tl.constexpr, SIGNED: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_k = tl.program_id(1) * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    byte = first_k * BITS // 8 + tl.arange(0, BLOCK_K * BITS // 8)
    inside_n = (n % N).to(tl.int64)
    codes_ptrs = codes_ptr + inside_n[:, None] * codes_stride_n + byte[None, :]
    packed = tl.load(codes_ptrs) if EVEN_K else tl.load(codes_ptrs, mask=(byte < codes_stride_n)[None, :], other=0)
    weight = _weights(
        packed, scale_ptr, offset_ptr, table_ptr, smooth_ptr, inside_n, k, first_k, K, G, BITS, SIGNED, GROUP, EVEN_K
    )
    live = (n < N)[:, None] & (k < K)[None, :]
    tl.store(out_ptr + n.to(tl.int64)[:, None] * out_stride_n + k[None, :], weight.to(out_ptr.dtype.element_ty), live)


# -- launching --------------------------------------------------------------------


def _group_columns(weight: Grouped) -> int:
    return UNENDING if weight.scale_NG.shape[1] == 1 else weight.group


def _operands(weight: Grouped) -> tuple[Tensor | None, ...]:
    scale_NG = weight.scale_NG
    if scale_NG.dtype == torch.float8_e4m3fn:
        scale_NG = scale_NG.view(torch.uint8)
    return weight.codes, scale_NG, weight.offset_NG, weight.table, weight.smooth_K


def launch_pointer(
    x_MK: Tensor, x_scale: Tensor | None, weight: Grouped, low_MR: Tensor | None, up_NR: Tensor | None,
    bias_N: Tensor | None, gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None,
    gate: Tensor | None, residual: Tensor | None, out: Tensor, tile: launch.Tile,
) -> None:  # fmt: skip
    sizes, constants = _of_launch(x_MK, x_scale, weight, up_NR, gelu_from, swiglu_from, gate, tile)
    strides = map(row_stride, (x_MK, low_MR, gate, residual, out, tail))
    _grouped_gemm_kernel[(_tiles(x_MK, weight, swiglu_from, tile),)](
        x_MK, x_scale, *_operands(weight), low_MR, up_NR, bias_N, gate, residual, out, tail,
        weight.codes.shape[1], *strides, *sizes, SWIGLU=swiglu_from is not None, **constants,
    )  # fmt: skip


def launch_tma(
    x_MK: Tensor, x_scale: Tensor | None, weight: Grouped, low_MR: Tensor | None, up_NR: Tensor | None,
    bias_N: Tensor | None, gelu_from: int | None, tail: Tensor | None,
    gate: Tensor | None, residual: Tensor | None, out: Tensor, tile: launch.Tile,
) -> None:  # fmt: skip
    sizes, constants = _of_launch(x_MK, x_scale, weight, up_NR, gelu_from, None, gate, tile)
    block_m, block_n, block_k, block_r = (constants[f"BLOCK_{name}"] for name in "MNKR")

    def descriptor(t: Tensor | None, rows: int, columns: int) -> TensorDescriptor | None:
        if t is None:
            return None
        return TensorDescriptor(t, list(as_rows(t).shape), [row_stride(t), 1], [rows, columns])

    codes, *parts = _operands(weight)
    _grouped_gemm_tma_kernel[(min(_tiles(x_MK, weight, None, tile), processors(x_MK.device)),)](
        descriptor(x_MK, block_m, block_k), x_scale, descriptor(codes, block_n, block_k * weight.bits // 8), *parts,
        descriptor(low_MR, block_m, block_r), descriptor(up_NR, block_n, block_r), bias_N, gate,
        *(descriptor(t, block_m // 2, block_n) for t in (residual, out, tail)),
        row_stride(gate), *sizes, **constants,
    )  # fmt: skip


def _tiles(x_MK: Tensor, weight: Grouped, swiglu_from: int | None, tile: launch.Tile) -> int:
    N, K = weight.shape
    return triton.cdiv(x_MK.numel() // K, tile["BLOCK_M"]) * tiles_across(N, swiglu_from, tile["BLOCK_N"])


def _of_launch(
    x_MK: Tensor, x_scale: Tensor | None, weight: Grouped, up_NR: Tensor | None, gelu_from: int | None,
    swiglu_from: int | None, gate: Tensor | None, tile: launch.Tile,
) -> tuple[tuple[int, ...], dict[str, Any]]:  # fmt: skip
    """What both products take: sizes and constants."""
    N, K = weight.shape
    M = x_MK.numel() // K
    if x_scale is not None:
        tile = {**tile, "BLOCK_K": min(tile["BLOCK_K"], _group_columns(weight))}
    rank = 0 if up_NR is None else up_NR.shape[1]
    gates = 1 if gate is None else gate.shape[0]
    constants = {
        "BITS": weight.bits, "SIGNED": weight.signed, "GROUP": _group_columns(weight), "RANK": rank,
        "BLOCK_R": min(rank & -rank, 64), "GELU": gelu_from is not None, "ONE_GATE": gates == 1,
        "EVEN_K": K % tile["BLOCK_K"] == 0, "PRECISION": FP32_PRODUCT, "enable_fp_fusion": True, **tile,
    }  # fmt: skip
    return (M, N, K, weight.scale_NG.shape[1], gelu_from or swiglu_from or 0, M // gates), constants


def launch_decode(weight: Grouped, out_NK: Tensor, tile: launch.Tile) -> None:
    """The weights themselves, in the dtype of `out_NK`, whose rows may be wider."""
    N, K = weight.shape
    _decode_kernel[(triton.cdiv(N, tile["BLOCK_N"]), triton.cdiv(K, tile["BLOCK_K"]))](
        *_operands(weight), out_NK, weight.codes.shape[1], out_NK.stride(0), N, K, weight.scale_NG.shape[1],
        BITS=weight.bits, SIGNED=weight.signed, GROUP=_group_columns(weight), EVEN_K=K % tile["BLOCK_K"] == 0,
        enable_fp_fusion=True, **tile,
    )  # fmt: skip
