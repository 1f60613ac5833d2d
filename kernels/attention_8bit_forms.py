"""The kernels behind `attention_8bit.py`: statistics of k and v, one pass that writes codes, and attention over codes.

Codes lie as tensor cores want 8-bit operands, the summed dimension contiguous: q8_BHQK, k8_BGSK and, channels before
tokens, v8_BGKS. Channels are filled up to BLOCK_K and tokens of k and v to whole tiles, with zeros, so that attention
loads them without masks. Scores are in powers of two: the scale of a query's codes has scale * log2(e) in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_diffusion.kernels.attention_forms import finish
from sgl_diffusion.kernels.quantize import row_scale, to_code

# of the kernels: b batch  h, g head of q, of k and v  first token of the tile
# r rows of a tile  s keys of a tile  d channels of a head  p parts of the tokens

# weights of an fp8 product are at most 2^8: exact, under e4m3's 448, and normal numbers down to 2^-14 of the largest
WEIGHTS_LOG2 = tl.constexpr(8.0)
LARGEST_FP8 = tl.constexpr(448.0)


# -- statistics -------------------------------------------------------------------


@triton.jit
def statistics_kernel(
    k_ptr, v_ptr, k_sum_ptr, v_amax_ptr,
    k_stride_b, k_stride_l, k_stride_h, v_stride_b, v_stride_l, v_stride_h, S, G, K, tokens_per_part,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):
    """Of every channel in one of PARTS ranges of tokens: the sum in k, the largest magnitude in v, if asked for.

    A fixed number of parts, each in order, that the next kernel adds in order: a mean has the same bits every time.
    """
    b = (tl.program_id(1) // G).to(tl.int64)
    g = (tl.program_id(1) % G).to(tl.int64)
    begin = tl.program_id(0) * tokens_per_part
    r = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK_K)
    k_ptr += b * k_stride_b + g * k_stride_h
    v_ptr += b * v_stride_b + g * v_stride_h
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    largest = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in range(begin, tl.minimum(begin + tokens_per_part, S), ROWS):
        row = (start + r).to(tl.int64)
        live = (row < S) & (d < K)[None, :]
        if k_sum_ptr is not None:
            total += tl.load(k_ptr + row * k_stride_l + d[None, :], mask=live, other=0.0).to(tl.float32)
        if v_amax_ptr is not None:
            v = tl.load(v_ptr + row * v_stride_l + d[None, :], mask=live, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(v))
    at = (tl.program_id(1) * PARTS + tl.program_id(0)) * BLOCK_K + d
    if k_sum_ptr is not None:
        tl.store(k_sum_ptr + at, tl.sum(total, axis=0))
    if v_amax_ptr is not None:
        tl.store(v_amax_ptr + at, tl.max(largest, axis=0))


@triton.jit
def _parts(ptr, head, BLOCK_K: tl.constexpr, PARTS: tl.constexpr):
    """A head's statistics of all parts."""
    at = tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    return tl.load(ptr + head * PARTS * BLOCK_K + at)


# -- codes ------------------------------------------------------------------------


@triton.jit
def quantize_kernel(
    q_ptr, k_ptr, v_ptr, k_sum_ptr, v_amax_ptr,
    q8_ptr, k8_ptr, v8_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, mean_score_ptr,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h, v_stride_b, v_stride_l, v_stride_h,
    Q, S, H, G, K, S_FULL, scale_log2,
    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, PARTS: tl.constexpr,
    LARGEST: tl.constexpr, INTEGER: tl.constexpr,
):
    """A tile of BLOCK_S tokens of one head of q (third number of the program 0), k (1) or v (2)."""
    which = tl.program_id(2)
    first = tl.program_id(0) * BLOCK_S
    if which == 0:
        if first < Q:
            b = (tl.program_id(1) // H).to(tl.int64)
            h = (tl.program_id(1) % H).to(tl.int64)
            _queries(
                q_ptr + b * q_stride_b + h * q_stride_h, q_stride_l, k_sum_ptr, b * G + h // (H // G),
                q8_ptr, q_scale_ptr, mean_score_ptr, b * H + h, first, Q, S, K, scale_log2,
                BLOCK_K, BLOCK_S, PARTS, LARGEST, INTEGER,
            )
    elif first < S and tl.program_id(1) < tl.num_programs(1) // H * G:
        b = (tl.program_id(1) // G).to(tl.int64)
        g = (tl.program_id(1) % G).to(tl.int64)
        if which == 1:
            _keys(
                k_ptr + b * k_stride_b + g * k_stride_h, k_stride_l, k_sum_ptr,
                k8_ptr, k_scale_ptr, b * G + g, first, S, K, S_FULL,
                BLOCK_K, BLOCK_S, PARTS, LARGEST, INTEGER,
            )
        elif v8_ptr is not None:
            _values(
                v_ptr + b * v_stride_b + g * v_stride_h, v_stride_l, v_amax_ptr,
                v8_ptr, v_scale_ptr, b * G + g, first, S, K, S_FULL, BLOCK_K, BLOCK_S, PARTS,
            )


@triton.jit
def _tile(ptr, stride_l, first, L, K, BLOCK_K: tl.constexpr, ROWS: tl.constexpr):
    """Rows of tokens in fp32, zeros past the last token and channel."""
    row = first + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK_K)[None, :]
    return tl.load(ptr + row.to(tl.int64) * stride_l + d, mask=(row < L) & (d < K), other=0.0).to(tl.float32)


@triton.jit
def _queries(
    q_ptr, q_stride_l, k_sum_ptr, key_head, q8_ptr, q_scale_ptr, mean_score_ptr, head, first, Q, S, K, scale_log2,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
):
    """A scale for each query, and, if log-sums want it, each query's score with the mean key that k goes without."""
    q = _tile(q_ptr, q_stride_l, first, Q, K, BLOCK_K, ROWS)
    row = first + tl.arange(0, ROWS)
    if mean_score_ptr is not None:
        mean = tl.sum(_parts(k_sum_ptr, key_head, BLOCK_K, PARTS), axis=0) / S
        tl.store(mean_score_ptr + head * Q + row, tl.sum(q * mean[None, :], axis=1) * scale_log2, mask=row < Q)
    scale = row_scale(tl.max(tl.abs(q), axis=1), LARGEST)
    codes = to_code(q, scale[:, None], INTEGER).to(q8_ptr.dtype.element_ty)
    at = (head * Q + row)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tl.store(q8_ptr + at, codes, mask=(row < Q)[:, None])
    tl.store(q_scale_ptr + head * Q + row, scale * scale_log2, mask=row < Q)


@triton.jit
def _keys(
    k_ptr, k_stride_l, k_sum_ptr, k8_ptr, k_scale_ptr, head, first, S, K, S_FULL,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
):
    """One scale for the tile, of k without its mean over all tokens if there are sums."""
    k = _tile(k_ptr, k_stride_l, first, S, K, BLOCK_K, ROWS)
    row = first + tl.arange(0, ROWS)
    if k_sum_ptr is not None:
        mean = tl.sum(_parts(k_sum_ptr, head, BLOCK_K, PARTS), axis=0) / S
        k = tl.where((row < S)[:, None], k - mean[None, :], 0.0)
    scale = row_scale(tl.max(tl.max(tl.abs(k), axis=1), axis=0), LARGEST)
    at = (head * S_FULL + row)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    tl.store(k8_ptr + at, to_code(k, scale, INTEGER).to(k8_ptr.dtype.element_ty))
    tl.store(k_scale_ptr + (head * S_FULL + first) // ROWS, scale)


@triton.jit
def _values(
    v_ptr, v_stride_l, v_amax_ptr, v8_ptr, v_scale_ptr, head, first, S, K, S_FULL,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):
    """A scale for each channel over all tokens."""
    d = tl.arange(0, BLOCK_K)
    scale = row_scale(tl.max(_parts(v_amax_ptr, head, BLOCK_K, PARTS), axis=0), LARGEST_FP8)
    codes = to_code(_tile(v_ptr, v_stride_l, first, S, K, BLOCK_K, ROWS), scale[None, :], False)
    at = (head * BLOCK_K + d)[:, None] * S_FULL + (first + tl.arange(0, ROWS))[None, :]
    tl.store(v8_ptr + at, codes.to(v8_ptr.dtype.element_ty).T)
    if first == 0:
        tl.store(v_scale_ptr + head * BLOCK_K + d, scale)


# -- attention --------------------------------------------------------------------


@triton.jit
def _attend_block(
    q, q_scale, acc, row_max, row_sum, k_ptrs, k_scale_ptr, v_ptrs, start, S, K,
    TAIL: tl.constexpr, PADDED: tl.constexpr, INTEGER: tl.constexpr, FP8_VALUES: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One tile of keys. TAIL: some of them are past the end. PADDED: so are channels of values in half precision."""
    s = start + tl.arange(0, BLOCK_S)
    scores = tl.dot(q, tl.load(k_ptrs), out_dtype=tl.int32 if INTEGER else tl.float32).to(tl.float32)
    if TAIL:
        scores = tl.where((s < S)[None, :], scores, -float("inf"))
    # both scales are positive, so the maximum is taken before them, and applying them is part of an fma
    scale = q_scale * tl.load(k_scale_ptr + start // BLOCK_S)
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale)
    shift = new_max - WEIGHTS_LOG2 if FP8_VALUES else new_max
    weights = tl.math.exp2(scores * scale[:, None] - shift[:, None])
    fade = tl.math.exp2(row_max - new_max)
    acc = acc * fade[:, None]
    row_sum = row_sum * fade + tl.sum(weights, axis=1)
    if FP8_VALUES:
        # tensor cores of sm_89 and sm_90 add fp8 products in about 14 bits: they sum a tile, and fp32 sums the tiles;
        # as the third argument of `dot`, acc makes the assembler wait after every wgmma
        acc += tl.dot(weights.to(tl.float8e4nv), tl.load(v_ptrs), max_num_imprecise_acc=BLOCK_S)
    else:
        if TAIL:
            v = tl.load(v_ptrs, mask=(s < S)[:, None] & (tl.arange(0, BLOCK_K) < K)[None, :], other=0.0)
        elif PADDED:
            v = tl.load(v_ptrs, mask=(tl.arange(0, BLOCK_K) < K)[None, :], other=0.0)
        else:
            v = tl.load(v_ptrs)
        acc = tl.dot(weights.to(v.dtype), v, acc, out_dtype=tl.float32)
    return acc, new_max, row_sum


@triton.jit
def attend_kernel(
    q8_ptr, k8_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, mean_score_ptr, out_ptr, code_scale_ptr, lse_ptr,
    v_stride_b, v_stride_l, v_stride_h, out_stride_b, out_stride_l, out_stride_h,
    code_stride_b, code_stride_l, lse_stride_b, lse_stride_h, Q, S, H, queries_per_key_head, K, S_FULL,
    BLOCK_K: tl.constexpr, PADDED: tl.constexpr, INTEGER: tl.constexpr, FP8_VALUES: tl.constexpr,
    HEAD_SCALES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):
    """v_ptr: codes, channels before tokens, if FP8_VALUES, else the values themselves with their strides."""
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    first = tl.program_id(0) * BLOCK_Q
    row = first + tl.arange(0, BLOCK_Q)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_K)
    head = b * H + h
    key_head = head // queries_per_key_head  # of all samples, as G divides H
    q = tl.load(q8_ptr + (head * Q + row)[:, None] * BLOCK_K + d[None, :], mask=(row < Q)[:, None], other=0.0)
    q_scale = tl.load(q_scale_ptr + head * Q + row, mask=row < Q, other=1.0)
    k_ptrs = k8_ptr + key_head * S_FULL * BLOCK_K + s[None, :] * BLOCK_K + d[:, None]
    k_scale_ptr += key_head * S_FULL // BLOCK_S
    if FP8_VALUES:
        v_ptrs = v_ptr + key_head * BLOCK_K * S_FULL + d[None, :] * S_FULL + s[:, None]
        v_step = BLOCK_S
    else:
        v_ptrs = v_ptr + b * v_stride_b + h // queries_per_key_head * v_stride_h + s[:, None] * v_stride_l + d[None, :]
        v_step = BLOCK_S * v_stride_l
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    row_max = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    end = S // BLOCK_S * BLOCK_S
    for start in tl.range(0, end, BLOCK_S, num_stages=STAGES):
        acc, row_max, row_sum = _attend_block(
            q, q_scale, acc, row_max, row_sum, k_ptrs, k_scale_ptr, v_ptrs, start, S, K,
            False, PADDED, INTEGER, FP8_VALUES, BLOCK_S, BLOCK_K,
        )
        k_ptrs += BLOCK_S * BLOCK_K
        v_ptrs += v_step
    if end < S:
        acc, row_max, row_sum = _attend_block(
            q, q_scale, acc, row_max, row_sum, k_ptrs, k_scale_ptr, v_ptrs, end, S, K,
            True, PADDED, INTEGER, FP8_VALUES, BLOCK_S, BLOCK_K,
        )
    if FP8_VALUES:
        acc *= tl.load(v_scale_ptr + key_head * BLOCK_K + d)[None, :]
        row_max -= WEIGHTS_LOG2
    if mean_score_ptr is not None:
        row_max += tl.load(mean_score_ptr + head * Q + row, mask=row < Q, other=0.0)
    finish(
        acc, row_max, row_sum, out_ptr, code_scale_ptr, lse_ptr, b, h, first, out_stride_b, out_stride_l, out_stride_h,
        code_stride_b, code_stride_l, Q, lse_stride_b, lse_stride_h, K, BLOCK_Q, BLOCK_K, False, HEAD_SCALES,
    )
