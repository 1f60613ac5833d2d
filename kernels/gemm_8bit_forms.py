"""The Triton kernels of `gemm_fp8` and `gemm_int8`.

"pointer" and "tma" are those of `gemm_forms.py` for 8-bit codes: the sum of the products of codes is scaled once, in
the epilogue, or, where blocks of 128 columns have scales of their own, block by block. The pointer kernel also
multiplies numbers of 16 or 32 bits with fp8 weights, which it decodes: on every GPU, for the sake of memory. Both can
leave the result as codes for the next product, where a tile holds all that a scale depends on, or the scale is known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_diffusion.kernels.gemm_forms import (
    finish,
    finish_swiglu,
    finish_tma,
    first_of_second,
    halves,
    tile_at,
    tile_columns,
    tile_halves,
    tiled_columns,
    with_bias_and_gelu,
)
from sgl_diffusion.kernels.microscaling import E4M3_BIAS, e4m3_over_bias
from sgl_diffusion.kernels.quantize import quantize_tile

# M rows  N output columns  K input columns


@triton.jit
def _add_product(acc, x, weight, scale, PROMOTE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x weight, or acc + scale * x weight where blocks have scales: a number for every row, or one."""
    if weight.dtype != x.dtype:
        weight = e4m3_over_bias(weight).to(x.dtype)
    if scale is not None:
        return acc + tl.dot(x, weight, input_precision=PRECISION, out_dtype=tl.float32) * scale
    elif PROMOTE:
        # tensor cores sum the products of one step; without a bound the compiler gives them `acc` as well
        return acc + tl.dot(x, weight, max_num_imprecise_acc=x.shape[1], out_dtype=tl.float32)
    else:
        return tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _block_scale(x_scale_ptr, weight_scale_ptr, row, first_n, first_k, K, SCALE_BLOCK: tl.constexpr):
    """Scale of the products of a tile and a step that are within one block: of each row, or one if x has none."""
    blocks = tl.cdiv(K, SCALE_BLOCK)
    scale = tl.load(weight_scale_ptr + first_n // SCALE_BLOCK * blocks + first_k // SCALE_BLOCK)
    if x_scale_ptr is None:
        return scale * E4M3_BIAS
    else:
        return scale * tl.load(x_scale_ptr + row * blocks + first_k // SCALE_BLOCK)[:, None]


@triton.jit
def _scale_of_halves(
    x_scale_ptr, weight_scale_ptr, row, first_left, first_right, first_k, K, BLOCK_N: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    """The same of a tile whose halves are each within a block."""
    left = _block_scale(x_scale_ptr, weight_scale_ptr, row, first_left, first_k, K, SCALE_BLOCK)
    right = _block_scale(x_scale_ptr, weight_scale_ptr, row, first_right, first_k, K, SCALE_BLOCK)
    return tl.where((tl.arange(0, BLOCK_N) < BLOCK_N // 2)[None, :], left, right)


@triton.jit
def _scaled(acc, x_scale_ptr, x_scale_stride, weight_scale_ptr, m, n, M, N):
    """Numbers from sums of products of codes, whose rows and columns have scales."""
    scale = tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if x_scale_ptr is None:
        return acc * (scale * E4M3_BIAS)
    else:
        return acc.to(tl.float32) * scale * tl.load(x_scale_ptr + m * x_scale_stride, mask=m < M, other=0.0)[:, None]


@triton.jit
def _finish_swiglu(
    acc, first_m, first_left, first_right, first_product, x_scale_ptr, x_scale_stride, weight_scale_ptr, bias_ptr,
    out, tail, out_stride_m, tail_stride_m, code_scale_ptr, code_scale_stride, M, N, swiglu_from,
    SCALE_BLOCK: tl.constexpr, CODE_BLOCK: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
):
    """`finish_swiglu` of a tile's sums."""
    left, right = halves(acc)
    if not SCALE_BLOCK:
        m, n = first_m + tl.arange(0, left.shape[0]), tl.arange(0, left.shape[1])
        left = _scaled(left, x_scale_ptr, x_scale_stride, weight_scale_ptr, m, first_left + n, M, N)
        right = _scaled(right, x_scale_ptr, x_scale_stride, weight_scale_ptr, m, first_right + n, M, N)
    finish_swiglu(
        left, right, first_m, first_left, first_right, first_product, bias_ptr, out, tail, out_stride_m, tail_stride_m,
        code_scale_ptr, code_scale_stride, M, N, swiglu_from, CODE_BLOCK, LARGEST, INTEGER,
    )


@triton.jit
def _finish_coded(
    acc, m, first_n, bias_ptr, out_ptr, tail_ptr, code_scale_ptr, code_scale_stride, out_stride_m, tail_stride_m, M, N,
    gelu_from, GELU: tl.constexpr, CODE_BLOCK: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
):
    """`finish`, with codes in the tail, or in `out` where there is none."""
    n = first_n + tl.arange(0, acc.shape[1])
    acc = with_bias_and_gelu(acc, bias_ptr, n, N, gelu_from, GELU)
    live = (m < M)[:, None] & (n < N)[None, :]
    row = m.to(tl.int64)[:, None]
    if tail_ptr is None:
        codes = quantize_tile(acc, code_scale_ptr, code_scale_stride, m, first_n, M, N, CODE_BLOCK, LARGEST, INTEGER)
        tl.store(out_ptr + row * out_stride_m + n[None, :], codes.to(out_ptr.dtype.element_ty), mask=live)
    else:
        in_tail = (n >= gelu_from)[None, :]
        tl.store(out_ptr + row * out_stride_m + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=live & ~in_tail)
        codes = quantize_tile(
            acc, code_scale_ptr, code_scale_stride, m, first_n - gelu_from, M, N - gelu_from, CODE_BLOCK, LARGEST,
            INTEGER,
        )
        places = tail_ptr + row * tail_stride_m + (n - gelu_from)[None, :]
        tl.store(places, codes.to(tail_ptr.dtype.element_ty), mask=live & in_tail)


@triton.jit
def _finish_coded_tma(
    acc, m, first_m, first_n, bias_ptr, out, tail, code_scale_ptr, code_scale_stride, M, N, gelu_from,
    GELU: tl.constexpr, CODE_BLOCK: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
):
    """The same; out and tail are descriptors, which drop the columns that are not their own."""
    acc = with_bias_and_gelu(acc, bias_ptr, first_n + tl.arange(0, acc.shape[1]), N, gelu_from, GELU)
    if tail is None:
        codes = quantize_tile(acc, code_scale_ptr, code_scale_stride, m, first_n, M, N, CODE_BLOCK, LARGEST, INTEGER)
        out.store([first_m, first_n], codes.to(out.dtype))
    else:
        out.store([first_m, first_n], acc.to(out.dtype))
        codes = quantize_tile(
            acc, code_scale_ptr, code_scale_stride, m, first_n - gelu_from, M, N - gelu_from, CODE_BLOCK, LARGEST,
            INTEGER,
        )
        tail.store([first_m, first_n - gelu_from], codes.to(tail.dtype))


@triton.jit
def gemm_8bit_pointer_kernel(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr,
    code_scale_ptr, x_stride_m, x_scale_stride, gate_stride_g, residual_stride_m, out_stride_m, tail_stride_m,
    code_scale_stride, M, N, K, activated_from, rows_per_gate,
    SUM: tl.constexpr, PROMOTE: tl.constexpr, SCALE_BLOCK: tl.constexpr, GELU: tl.constexpr, SWIGLU: tl.constexpr,
    ONE_GATE: tl.constexpr, CODE_BLOCK: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """One tile a program."""
    HALF_N: tl.constexpr = BLOCK_N // 2
    ROWS: tl.constexpr = HALF_N if SWIGLU else BLOCK_N  # of the weight, one after another
    tl.static_assert(SCALE_BLOCK % ROWS == 0 and SCALE_BLOCK % BLOCK_K == 0, "a block of scales holds whole tiles")
    columns = tiled_columns(N, activated_from, BLOCK_N, SWIGLU)
    first_m, first_n = tile_at(tl.program_id(0), M, columns, BLOCK_M, BLOCK_N, GROUP_M)
    m = first_m + tl.arange(0, BLOCK_M)
    n = tile_columns(first_n, N, activated_from, BLOCK_N, SWIGLU)
    if SWIGLU:
        first_left, first_right, first_product = tile_halves(first_n, N, activated_from, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows and columns past the end read others and are not stored: no masks in the loop
    x_ptrs = x_ptr + (m % M).to(tl.int64)[:, None] * x_stride_m + k[None, :]
    weight_ptrs = weight_ptr + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for first_k in range(0, K, BLOCK_K):
        if EVEN_K:
            x, weight = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            live = k < K - first_k
            x = tl.load(x_ptrs, mask=live[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=live[:, None], other=0.0)
        scale = None
        if SCALE_BLOCK and SWIGLU:
            scale = _scale_of_halves(
                x_scale_ptr, weight_scale_ptr, m % M, first_left, first_right, first_k, K, BLOCK_N, SCALE_BLOCK
            )
        elif SCALE_BLOCK:
            scale = _block_scale(x_scale_ptr, weight_scale_ptr, m % M, first_n, first_k, K, SCALE_BLOCK)
        acc = _add_product(acc, x, weight, scale, PROMOTE, PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if SWIGLU:
        _finish_swiglu(
            acc, first_m, first_left, first_right, first_product, x_scale_ptr, x_scale_stride, weight_scale_ptr,
            bias_ptr, out_ptr, tail_ptr, out_stride_m, tail_stride_m, code_scale_ptr, code_scale_stride, M, N,
            activated_from, SCALE_BLOCK, CODE_BLOCK, LARGEST, INTEGER,
        )
    else:
        if not SCALE_BLOCK:
            acc = _scaled(acc, x_scale_ptr, x_scale_stride, weight_scale_ptr, m, n, M, N)
        if code_scale_ptr is not None:
            _finish_coded(
                acc, m, first_n, bias_ptr, out_ptr, tail_ptr, code_scale_ptr, code_scale_stride, out_stride_m,
                tail_stride_m, M, N, activated_from, GELU, CODE_BLOCK, LARGEST, INTEGER,
            )
        else:
            finish(
                acc, m, n, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr, gate_stride_g, residual_stride_m,
                out_stride_m, tail_stride_m, M, N, activated_from, rows_per_gate, GELU, ONE_GATE,
            )


@triton.jit
def gemm_8bit_tma_kernel(
    x, x_scale_ptr, weight, pairs, weight_scale_ptr, bias_ptr, gate_ptr, residual, out, tail, code_scale_ptr,
    x_scale_stride, gate_stride_g, code_scale_stride, M, N, K, activated_from, rows_per_gate,
    SUM: tl.constexpr, PROMOTE: tl.constexpr, SCALE_BLOCK: tl.constexpr, GELU: tl.constexpr, SWIGLU: tl.constexpr,
    ONE_GATE: tl.constexpr, CODE_BLOCK: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """Every program takes many tiles, and loads of the next tile start under the epilogue of the last; `pairs` as of
    `gemm_forms`.
    """
    HALF_N: tl.constexpr = BLOCK_N // 2
    ROWS: tl.constexpr = HALF_N if SWIGLU else BLOCK_N  # of the weight, one after another
    tl.static_assert(SCALE_BLOCK % ROWS == 0 and SCALE_BLOCK % BLOCK_K == 0, "a block of scales holds whole tiles")
    tl.assume(K > 0)  # or Triton 3.6 waits after every wgmma: it sees a loop that may not run
    columns = activated_from if SWIGLU else N
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    if not SWIGLU or tail is not None:
        for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            first_m, first_n = tile_at(number, M, columns, BLOCK_M, BLOCK_N, GROUP_M)
            m = first_m + tl.arange(0, BLOCK_M)
            acc = tl.zeros((BLOCK_M, BLOCK_N), SUM)
            for first_k in range(0, K, BLOCK_K):
                scale = None
                if SCALE_BLOCK and SWIGLU:
                    scale = _scale_of_halves(
                        x_scale_ptr, weight_scale_ptr, m % M, first_n, first_n + HALF_N, first_k, K, BLOCK_N,
                        SCALE_BLOCK,
                    )
                elif SCALE_BLOCK:
                    scale = _block_scale(x_scale_ptr, weight_scale_ptr, m % M, first_n, first_k, K, SCALE_BLOCK)
                x_tile = x.load([first_m, first_k])
                acc = _add_product(acc, x_tile, weight.load([first_n, first_k]).T, scale, PROMOTE, None)
            if CODE_BLOCK and not SWIGLU:  # a tile is a block of codes
                if not SCALE_BLOCK:
                    n = first_n + tl.arange(0, BLOCK_N)
                    acc = _scaled(acc, x_scale_ptr, x_scale_stride, weight_scale_ptr, m, n, M, N)
                _finish_coded_tma(
                    acc, m, first_m, first_n, bias_ptr, out, tail, code_scale_ptr, code_scale_stride, M, N,
                    activated_from, GELU, CODE_BLOCK, LARGEST, INTEGER,
                )
            else:
                # in halves: a whole tile's epilogue holds accumulator and result in registers at once
                both = halves(acc)
                for half in tl.static_range(2):
                    y, start = both[half], first_n + half * HALF_N
                    if not SCALE_BLOCK:
                        n = start + tl.arange(0, HALF_N)
                        y = _scaled(y, x_scale_ptr, x_scale_stride, weight_scale_ptr, m, n, M, N)
                    if code_scale_ptr is not None and not SWIGLU:
                        _finish_coded_tma(
                            y, m, first_m, start, bias_ptr, out, tail, code_scale_ptr, code_scale_stride, M, N,
                            activated_from, GELU, CODE_BLOCK, LARGEST, INTEGER,
                        )
                    else:
                        finish_tma(
                            y, first_m, start, bias_ptr, gate_ptr, residual, out, None if SWIGLU else tail, M, N,
                            activated_from, gate_stride_g, rows_per_gate, GELU, ONE_GATE, BLOCK_M, HALF_N,
                        )
    if SWIGLU:
        products = (N - activated_from) // 2
        pair_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(products, HALF_N)
        for number in tl.range(first_of_second(tiles), pair_tiles, tl.num_programs(0), flatten=True):
            first_m, first = tile_at(number, M, products, BLOCK_M, HALF_N, GROUP_M)
            m = first_m + tl.arange(0, BLOCK_M)
            first_left, first_right = activated_from + first, activated_from + products + first
            acc = tl.zeros((BLOCK_M, BLOCK_N), SUM)
            for first_k in range(0, K, BLOCK_K):
                scale = None
                if SCALE_BLOCK:
                    scale = _scale_of_halves(
                        x_scale_ptr, weight_scale_ptr, m % M, first_left, first_right, first_k, K, BLOCK_N, SCALE_BLOCK
                    )
                weight_tile = tl.reshape(pairs.load([0, first, first_k]), (BLOCK_N, BLOCK_K))
                acc = _add_product(acc, x.load([first_m, first_k]), weight_tile.T, scale, PROMOTE, None)
            _finish_swiglu(
                acc, first_m, first_left, first_right, first, x_scale_ptr, x_scale_stride, weight_scale_ptr, bias_ptr,
                out if tail is None else tail, None, None, None, code_scale_ptr, code_scale_stride, M, N,
                activated_from, SCALE_BLOCK, CODE_BLOCK, LARGEST, INTEGER,
            )
