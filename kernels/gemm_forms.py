"""The Triton kernels of `gemm.py`, and what fits each.

"pointer" runs on every GPU: one tile a program, loads in flight through shared memory. "tma" needs Hopper or later:
persistent programs, and operands that the bulk copy engine can address.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.pointwise import gelu_tanh, silu
from sgl_diffusion.kernels.quantize import quantize_tile

# M rows  N output columns  K input columns
# a SwiGLU takes the columns from `activated_from` on: gates, then as many values; columns before them are the head

# fp32 as three tf32 products on tensor cores
FP32_PRODUCT = "tf32x3"
TMA_ALIGNMENT = 16  # bytes, of addresses and row strides


@triton.jit
def tile_at(number, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile. Tiles go down GROUP_M at a time, so that both operands stay in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = number // per_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = number % per_group
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def tiled_columns(N, activated_from, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr):
    """How many columns tiles count: head and SwiGLU both begin with a tile, and end with one that may be ragged."""
    if SWIGLU:
        return (tl.cdiv(activated_from, BLOCK_N) + tl.cdiv((N - activated_from) // 2, BLOCK_N // 2)) * BLOCK_N
    else:
        return N


@triton.jit
def tile_halves(first_n, N, activated_from, BLOCK_N: tl.constexpr):
    """Of those tiles: rows of the weight where the left and the right half begin, and the first product they make.

    A SwiGLU's tile has gates on the left and, on the right, their values. Tiles of the head come before the first
    product, and their halves are neighbours.
    """
    HALF_N: tl.constexpr = BLOCK_N // 2
    product = (first_n // BLOCK_N - tl.cdiv(activated_from, BLOCK_N)) * HALF_N
    left = tl.where(product < 0, first_n, activated_from + product)
    return left, left + tl.where(product < 0, HALF_N, (N - activated_from) // 2), product


@triton.jit
def tile_columns(first_n, N, activated_from, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr):
    """Rows of the weight that a tile multiplies."""
    n = tl.arange(0, BLOCK_N)
    if SWIGLU:
        left, right, _ = tile_halves(first_n, N, activated_from, BLOCK_N)
        return tl.where(n < BLOCK_N // 2, left + n, right + n - BLOCK_N // 2)
    else:
        return first_n + n


@triton.jit
def halves(acc):
    """Left and right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def with_bias_and_gelu(acc, bias_ptr, n, N, gelu_from, GELU: tl.constexpr):
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = tl.where((n >= gelu_from)[None, :], gelu_tanh(acc), acc)
    return acc


@triton.jit
def gated(acc, gate_ptr, m, n, M, N, gate_stride_g, rows_per_gate, ONE_GATE: tl.constexpr):
    if gate_ptr is None:
        return acc
    elif ONE_GATE:
        return acc * tl.load(gate_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    else:
        rows = (m // rows_per_gate).to(tl.int64) * gate_stride_g
        live = (m < M)[:, None] & (n < N)[None, :]
        return acc * tl.load(gate_ptr + rows[:, None] + n[None, :], mask=live, other=0.0).to(tl.float32)


@triton.jit
def finish(
    acc, m, n, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr,
    gate_stride_g, residual_stride_m, out_stride_m, tail_stride_m, M, N, gelu_from, rows_per_gate,
    GELU: tl.constexpr, ONE_GATE: tl.constexpr,
):
    """Epilogue of rows m and columns n of a product."""
    live = (m < M)[:, None] & (n < N)[None, :]
    acc = with_bias_and_gelu(acc, bias_ptr, n, N, gelu_from, GELU)
    acc = gated(acc, gate_ptr, m, n, M, N, gate_stride_g, rows_per_gate, ONE_GATE)
    row = m.to(tl.int64)[:, None]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride_m + n[None, :], mask=live, other=0.0)
        acc += residual.to(tl.float32)
    out = acc.to(out_ptr.dtype.element_ty)
    if tail_ptr is None:
        tl.store(out_ptr + row * out_stride_m + n[None, :], out, mask=live)
    else:
        in_tail = (n >= gelu_from)[None, :]
        tl.store(out_ptr + row * out_stride_m + n[None, :], out, mask=live & ~in_tail)
        tl.store(tail_ptr + row * tail_stride_m + (n - gelu_from)[None, :], out, mask=live & in_tail)


@triton.jit
def _put(y, place, stride_m, m, first_m, first_n, M, columns):
    """Leaves a tile in a place of so many columns: a pointer, or a descriptor, which has strides of its own."""
    if stride_m is None:
        place.store([first_m, first_n], y.to(place.dtype))
    else:
        n = first_n + tl.arange(0, y.shape[1])
        live = (m < M)[:, None] & (n < columns)[None, :]
        y = y.to(place.dtype.element_ty)
        tl.store(place + m.to(tl.int64)[:, None] * stride_m + n[None, :], y, mask=live)


@triton.jit
def _put_products(
    gate, value, place, stride_m, m, first_m, first, M, products, code_scale_ptr, code_scale_stride,
    CODE_BLOCK: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
):
    y = silu(gate) * value
    if code_scale_ptr is not None:
        y = quantize_tile(
            y, code_scale_ptr, code_scale_stride, m, first, M, products, CODE_BLOCK, LARGEST, INTEGER
        )
    _put(y, place, stride_m, m, first_m, first, M, products)


@triton.jit
def finish_swiglu(
    left, right, first_m, first_left, first_right, first_product, bias_ptr, out, tail, out_stride_m, tail_stride_m,
    code_scale_ptr, code_scale_stride, M, N, swiglu_from,
    CODE_BLOCK: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
):
    """Epilogue of a tile's halves where there is a SwiGLU: its products, which may be codes, or columns of the head.

    Results go to pointers, or to descriptors, whose strides are None.
    """
    m, n = first_m + tl.arange(0, left.shape[0]), tl.arange(0, left.shape[1])
    left = with_bias_and_gelu(left, bias_ptr, first_left + n, N, 0, False)
    right = with_bias_and_gelu(right, bias_ptr, first_right + n, N, 0, False)
    products = (N - swiglu_from) // 2
    if tail is None:
        _put_products(
            left, right, out, out_stride_m, m, first_m, first_product, M, products,
            code_scale_ptr, code_scale_stride, CODE_BLOCK, LARGEST, INTEGER,
        )
    else:
        if first_product >= 0:
            _put_products(
                left, right, tail, tail_stride_m, m, first_m, first_product, M, products,
                code_scale_ptr, code_scale_stride, CODE_BLOCK, LARGEST, INTEGER,
            )
        else:
            _put(left, out, out_stride_m, m, first_m, first_left, M, swiglu_from)
            _put(right, out, out_stride_m, m, first_m, first_right, M, swiglu_from)


@triton.jit
def finish_tile(
    acc, first_m, first_n, m, n, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr,
    gate_stride_g, residual_stride_m, out_stride_m, tail_stride_m, M, N, activated_from, rows_per_gate,
    GELU: tl.constexpr, SWIGLU: tl.constexpr, ONE_GATE: tl.constexpr,
):
    """Epilogue of a tile with rows m, whose columns n are those of `tile_columns`."""
    if SWIGLU:
        left, right = halves(acc)
        first_left, first_right, first_product = tile_halves(first_n, N, activated_from, acc.shape[1])
        finish_swiglu(
            left, right, first_m, first_left, first_right, first_product, bias_ptr, out_ptr, tail_ptr,
            out_stride_m, tail_stride_m, None, None, M, N, activated_from, 0, 0.0, False,
        )
    else:
        finish(
            acc, m, n, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr, gate_stride_g, residual_stride_m,
            out_stride_m, tail_stride_m, M, N, activated_from, rows_per_gate, GELU, ONE_GATE,
        )


@triton.jit
def _gemm_pointer_kernel(
    x_ptr, weight_ptr, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr,
    x_stride_m, gate_stride_g, residual_stride_m, out_stride_m, tail_stride_m,
    M, N, K, activated_from, rows_per_gate,
    GELU: tl.constexpr, SWIGLU: tl.constexpr, ONE_GATE: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """One tile a program."""
    columns = tiled_columns(N, activated_from, BLOCK_N, SWIGLU)
    first_m, first_n = tile_at(tl.program_id(0), M, columns, BLOCK_M, BLOCK_N, GROUP_M)
    m = first_m + tl.arange(0, BLOCK_M)
    n = tile_columns(first_n, N, activated_from, BLOCK_N, SWIGLU)
    k = tl.arange(0, BLOCK_K)
    # rows and columns past the end read others and are not stored: no masks in the loop
    x_ptrs = x_ptr + (m % M).to(tl.int64)[:, None] * x_stride_m + k[None, :]
    weight_ptrs = weight_ptr + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_k in range(0, K, BLOCK_K):
        if EVEN_K:
            x, weight = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            live = k < K - first_k
            x = tl.load(x_ptrs, mask=live[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=live[:, None], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=tl.float32)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    finish_tile(
        acc, first_m, first_n, m, n, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr, gate_stride_g,
        residual_stride_m, out_stride_m, tail_stride_m, M, N, activated_from, rows_per_gate, GELU, SWIGLU, ONE_GATE,
    )


@triton.jit
def finish_tma(
    acc, first_m, first_n, bias_ptr, gate_ptr, residual, out, tail, M, N, gelu_from, gate_stride_g, rows_per_gate,
    GELU: tl.constexpr, ONE_GATE: tl.constexpr, BLOCK_M: tl.constexpr, HALF_N: tl.constexpr,
):
    """The same of half a tile; residual, out and tail are descriptors."""
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, HALF_N)
    acc = with_bias_and_gelu(acc, bias_ptr, n, N, gelu_from, GELU)
    acc = gated(acc, gate_ptr, m, n, M, N, gate_stride_g, rows_per_gate, ONE_GATE)
    if residual is not None:
        acc += residual.load([first_m, first_n]).to(tl.float32)
    result = acc.to(out.dtype)
    out.store([first_m, first_n], result)
    if tail is not None:  # each store drops the columns that are not its own
        tail.store([first_m, first_n - gelu_from], result)


@triton.jit
def first_of_second(tiles):
    """This program's first tile of a second kind, where programs took so many of the first in turn."""
    programs = tl.num_programs(0)
    return (tl.program_id(0) + programs - tiles % programs) % programs


@triton.jit
def _gemm_tma_kernel(
    x, weight, pairs, bias_ptr, gate_ptr, residual, out, tail,
    M, N, K, activated_from, gate_stride_g, rows_per_gate,
    GELU: tl.constexpr, SWIGLU: tl.constexpr, ONE_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """Every program takes many tiles, and loads of the next tile start under the epilogue of the last.

    With a SwiGLU, `pairs` is a descriptor of the weight's gates and values, (2, products, K), and weight of the head.
    """
    HALF_N: tl.constexpr = BLOCK_N // 2
    tl.assume(K > 0)  # or Triton 3.6 waits after every wgmma: it sees a loop that may not run
    columns = activated_from if SWIGLU else N
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    if not SWIGLU or tail is not None:
        for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            first_m, first_n = tile_at(number, M, columns, BLOCK_M, BLOCK_N, GROUP_M)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, K, BLOCK_K):
                acc = tl.dot(x.load([first_m, k]), weight.load([first_n, k]).T, acc, out_dtype=tl.float32)
            # in halves: a whole tile's epilogue holds accumulator and result in registers at once
            left, right = halves(acc)
            finish_tma(
                left, first_m, first_n, bias_ptr, gate_ptr, residual, out, None if SWIGLU else tail,
                M, N, activated_from, gate_stride_g, rows_per_gate, GELU, ONE_GATE, BLOCK_M, HALF_N,
            )
            finish_tma(
                right, first_m, first_n + HALF_N, bias_ptr, gate_ptr, residual, out, None if SWIGLU else tail,
                M, N, activated_from, gate_stride_g, rows_per_gate, GELU, ONE_GATE, BLOCK_M, HALF_N,
            )
    if SWIGLU:
        products = (N - activated_from) // 2
        pair_tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(products, HALF_N)
        for number in tl.range(first_of_second(tiles), pair_tiles, tl.num_programs(0), flatten=True):
            first_m, first = tile_at(number, M, products, BLOCK_M, HALF_N, GROUP_M)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, K, BLOCK_K):
                both = tl.reshape(pairs.load([0, first, k]), (BLOCK_N, BLOCK_K))
                acc = tl.dot(x.load([first_m, k]), both.T, acc, out_dtype=tl.float32)
            left, right = halves(acc)
            finish_swiglu(
                left, right, first_m, activated_from + first, activated_from + products + first, first, bias_ptr,
                out if tail is None else tail, None, None, None, None, None, M, N, activated_from, 0, 0.0, False,
            )


# -- launching --------------------------------------------------------------------


def as_rows(x: Tensor) -> Tensor:
    """All leading dimensions as one, without a copy."""
    return x.view(-1, x.shape[-1])


def row_stride(x: Tensor | None) -> int:
    return 0 if x is None else as_rows(x).stride(0)


def fit_descriptors(*tensors: Tensor | None) -> bool:
    """Whether the TMA unit can address the rows of all these."""
    return all(
        t.data_ptr() % TMA_ALIGNMENT == 0 and row_stride(t) * t.element_size() % TMA_ALIGNMENT == 0
        for t in tensors
        if t is not None
    )


def tiles_across(N: int, swiglu_from: int | None, block_n: int) -> int:
    """As `tiled_columns` has them."""
    if swiglu_from is None:
        return triton.cdiv(N, block_n)
    return triton.cdiv(swiglu_from, block_n) + triton.cdiv((N - swiglu_from) // 2, block_n // 2)


def pairs_of(weight_NK: Tensor, swiglu_from: int | None, tile: launch.Tile) -> TensorDescriptor | None:
    """A SwiGLU's gates and their values: a tile is as many rows of both."""
    if swiglu_from is None:
        return None
    (N, K), half = weight_NK.shape, tile["BLOCK_N"] // 2
    products = (N - swiglu_from) // 2
    return TensorDescriptor(weight_NK[swiglu_from:], [2, products, K], [products * K, K, 1], [2, half, tile["BLOCK_K"]])


def launch_pointer(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, gelu_from: int | None, swiglu_from: int | None,
    tail: Tensor | None, gate: Tensor | None, residual: Tensor | None, out: Tensor, tile: launch.Tile,
) -> None:  # fmt: skip
    N, K = weight_NK.shape
    M = x_MK.numel() // K
    grid = (triton.cdiv(M, tile["BLOCK_M"]) * tiles_across(N, swiglu_from, tile["BLOCK_N"]),)
    groups = 1 if gate is None else gate.shape[0]
    _gemm_pointer_kernel[grid](
        x_MK, weight_NK, bias_N, gate, residual, out, tail, *map(row_stride, (x_MK, gate, residual, out, tail)),
        M, N, K, gelu_from or swiglu_from or 0, M // groups,
        GELU=gelu_from is not None, SWIGLU=swiglu_from is not None, ONE_GATE=groups == 1,
        EVEN_K=K % tile["BLOCK_K"] == 0, PRECISION=FP32_PRODUCT, enable_fp_fusion=True, **tile,
    )  # fmt: skip


def launch_tma(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, gelu_from: int | None, swiglu_from: int | None,
    tail: Tensor | None, gate: Tensor | None, residual: Tensor | None, out: Tensor, tile: launch.Tile,
) -> None:  # fmt: skip
    block_m, block_n, block_k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]

    def descriptor(t: Tensor | None, columns: int, rows: int = block_m) -> TensorDescriptor | None:
        if t is None:
            return None
        return TensorDescriptor(t, list(as_rows(t).shape), [row_stride(t), 1], [rows, columns])

    N, K = weight_NK.shape
    M = x_MK.numel() // K
    groups = 1 if gate is None else gate.shape[0]
    tiles = triton.cdiv(M, block_m) * tiles_across(N, swiglu_from, block_n)
    _gemm_tma_kernel[(min(tiles, processors(x_MK.device)),)](
        descriptor(x_MK, block_k), descriptor(weight_NK, block_k, block_n), pairs_of(weight_NK, swiglu_from, tile),
        bias_N, gate, *(descriptor(t, block_n // 2) for t in (residual, out, tail)),
        M, N, K, gelu_from or swiglu_from or 0, row_stride(gate), M // groups,
        GELU=gelu_from is not None, SWIGLU=swiglu_from is not None, ONE_GATE=groups == 1,
        enable_fp_fusion=True, **tile,
    )  # fmt: skip


@functools.cache
def processors(device: torch.device) -> int:
    """Of the GPU; elsewhere few, so that a program takes several tiles of a small test."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
