"""The kernels behind `attention`: one running softmax, four ways to feed it.

Every form keeps a tile of queries on the chip and walks over the keys, with the running maximum, sum and weighted
values of each query in fp32 (Dao 2023, FlashAttention-2). They differ in how tiles arrive:

    pointer    loads through pointers: any GPU, any strides, masks, causal, packed sequences of their own lengths
    tma        sm_90 and later: the copy engine fetches tiles of 2-D views of q, k, v described on the host
    ws         Hopper: one warpgroup fetches for two that compute ("warp specialised"); Triton takes this only with 4
               warps and with descriptors made in the kernel
    two_tiles  Hopper: two query tiles share each tile of keys, so one's softmax runs beside the other's product
"""

from __future__ import annotations

import triton
import triton.language as tl

from sgl_diffusion.kernels.quantize import known_codes, row_scale, to_code

# of the kernels: b batch  h head  first row of the query tile
# r rows of a tile  s keys of a tile  d channels of a head


# -- the running softmax ----------------------------------------------------------


@triton.jit
def _weigh(scores, acc, row_max, row_sum, scale_log2, SOME_ROWS_DEAD: tl.constexpr):
    """Softmax weights of one block of scores, and the running state moved to the new maximum.

    The scale is positive, so the maximum is taken before it is applied, and applying it is part of an fma.
    """
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)
    # a row that has seen no live key yet: -inf - -inf would be NaN
    shift = tl.where(new_max == -float("inf"), 0.0, new_max) if SOME_ROWS_DEAD else new_max
    weights = tl.math.exp2(scores * scale_log2 - shift[:, None])
    fade = tl.math.exp2(row_max - shift)
    return weights, acc * fade[:, None], new_max, row_sum * fade + tl.sum(weights, axis=1)


@triton.jit
def finish(
    acc, row_max, row_sum, out_ptr, code_scale_ptr, lse_ptr, b, h, first, out_stride_b, out_stride_l, out_stride_h,
    code_stride_b, code_stride_l, Q, lse_stride_b, lse_stride_h, K,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SOME_ROWS_DEAD: tl.constexpr, HEAD_SCALES: tl.constexpr,
):
    """Stores a tile of the result, and the logarithm of each row's sum if `lse_ptr` is given.

    With `code_scale_ptr` the result is codes: HEAD_SCALES, with a scale for every row and head, which is stored there;
    else with the one scale that is there.
    """
    r = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_K)
    acc = acc / (tl.where(row_sum > 0, row_sum, 1.0) if SOME_ROWS_DEAD else row_sum)[:, None]
    if code_scale_ptr is not None:
        INTEGER: tl.constexpr = out_ptr.dtype.element_ty == tl.int8
        LARGEST: tl.constexpr = 127.0 if INTEGER else 448.0
        if HEAD_SCALES:
            scale = row_scale(tl.max(tl.abs(acc), axis=1), LARGEST)
            rows = code_scale_ptr + b * code_stride_b + first.to(tl.int64) * code_stride_l + h
            tl.store(rows + r * code_stride_l, scale, mask=first + r < Q)
            acc = to_code(acc, scale[:, None], INTEGER)
        else:
            acc = known_codes(acc, code_scale_ptr, LARGEST, INTEGER)
    out = out_ptr + b * out_stride_b + first.to(tl.int64) * out_stride_l + h * out_stride_h
    tl.store(
        out + r[:, None] * out_stride_l + d[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=(first + r < Q)[:, None] & (d < K)[None, :],
    )
    if lse_ptr is not None:
        lse = (row_max + tl.math.log2(row_sum)) * 0.6931471805599453
        tl.store(lse_ptr + b * lse_stride_b + h * lse_stride_h + first + r, lse, mask=first + r < Q)


# -- pointer ----------------------------------------------------------------------


@triton.jit
def _attend_block(
    q, acc, row_max, row_sum, k_ptrs, v_ptrs, start, key_bias_ptr, S, first, K, scale_log2,
    TAIL: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One block of keys. TAIL: some of them may be past the end."""
    d = tl.arange(0, BLOCK_K)
    s = start + tl.arange(0, BLOCK_S)
    if TAIL:
        k = tl.load(k_ptrs, mask=(s < S)[None, :] & (d < K)[:, None], other=0.0)
    elif PADDED:
        k = tl.load(k_ptrs, mask=(d < K)[:, None], other=0.0)
    else:
        k = tl.load(k_ptrs)
    scores = tl.dot(q, k, input_precision=PRECISION, out_dtype=tl.float32)
    if key_bias_ptr is not None:
        scores += tl.load(key_bias_ptr + s, mask=s < S, other=-float("inf"))[None, :]
    elif TAIL:
        scores = tl.where((s < S)[None, :], scores, -float("inf"))
    if CAUSAL:
        scores = tl.where(s[None, :] <= (first + tl.arange(0, BLOCK_Q))[:, None], scores, -float("inf"))
    weights, acc, row_max, row_sum = _weigh(scores, acc, row_max, row_sum, scale_log2, key_bias_ptr is not None)
    if TAIL:
        v = tl.load(v_ptrs, mask=(s < S)[:, None] & (d < K)[None, :], other=0.0)
    elif PADDED:
        v = tl.load(v_ptrs, mask=(d < K)[None, :], other=0.0)
    else:
        v = tl.load(v_ptrs)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=tl.float32)
    return acc, row_max, row_sum


@triton.jit
def pointer_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, code_scale_ptr, lse_ptr, key_bias_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h,
    v_stride_b, v_stride_l, v_stride_h, out_stride_b, out_stride_l, out_stride_h,
    code_stride_b, code_stride_l, lse_stride_b, lse_stride_h,
    Q, S, H, queries_per_key_head, K, scale_log2,
    BLOCK_K: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, ONE_LOOP: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_SCALES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
):
    # 64-bit bases, 32-bit offsets inside a tile: video sequences pass 2^31 elements
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    # causal tiles grow with their number: the longest go first, the short ones fill the gaps at the end
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    first = tile * BLOCK_Q
    if cu_seqlens_q_ptr is not None:  # all sequences lie in one row: strides between samples are 0
        q_start = tl.load(cu_seqlens_q_ptr + b)
        k_start = tl.load(cu_seqlens_k_ptr + b)
        Q = tl.load(cu_seqlens_q_ptr + b + 1) - q_start
        S = tl.load(cu_seqlens_k_ptr + b + 1) - k_start
        q_ptr += q_start.to(tl.int64) * q_stride_l
        out_ptr += q_start.to(tl.int64) * out_stride_l
        if HEAD_SCALES:
            code_scale_ptr += q_start.to(tl.int64) * code_stride_l
        k_ptr += k_start.to(tl.int64) * k_stride_l
        v_ptr += k_start.to(tl.int64) * v_stride_l
        if lse_ptr is not None:
            lse_ptr += q_start
        if first >= Q:
            return
    if key_bias_ptr is not None:
        key_bias_ptr += b * S
    r = tl.arange(0, BLOCK_Q)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_K)
    q = tl.load(
        q_ptr + b * q_stride_b + first.to(tl.int64) * q_stride_l + h * q_stride_h
        + r[:, None] * q_stride_l + d[None, :],
        mask=(first + r < Q)[:, None] & (d < K)[None, :], other=0.0,
    )
    key_head = h // queries_per_key_head
    k_ptrs = k_ptr + b * k_stride_b + key_head * k_stride_h + s[None, :] * k_stride_l + d[:, None]
    v_ptrs = v_ptr + b * v_stride_b + key_head * v_stride_h + s[:, None] * v_stride_l + d[None, :]
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    row_max = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)

    limit = tl.minimum(S, first + BLOCK_Q) if CAUSAL else S
    end = limit if ONE_LOOP else limit // BLOCK_S * BLOCK_S
    for start in tl.range(0, end, BLOCK_S, num_stages=STAGES):
        acc, row_max, row_sum = _attend_block(
            q, acc, row_max, row_sum, k_ptrs, v_ptrs, start, key_bias_ptr, S, first, K, scale_log2,
            ONE_LOOP, CAUSAL, PADDED, PRECISION, BLOCK_Q, BLOCK_S, BLOCK_K,
        )
        k_ptrs += BLOCK_S * k_stride_l
        v_ptrs += BLOCK_S * v_stride_l
    if not ONE_LOOP and end < limit:
        acc, row_max, row_sum = _attend_block(
            q, acc, row_max, row_sum, k_ptrs, v_ptrs, end, key_bias_ptr, S, first, K, scale_log2,
            True, CAUSAL, PADDED, PRECISION, BLOCK_Q, BLOCK_S, BLOCK_K,
        )
    finish(
        acc, row_max, row_sum, out_ptr, code_scale_ptr, lse_ptr, b, h, first, out_stride_b, out_stride_l, out_stride_h,
        code_stride_b, code_stride_l, Q, lse_stride_b, lse_stride_h, K, BLOCK_Q, BLOCK_K,
        key_bias_ptr is not None or cu_seqlens_k_ptr is not None, HEAD_SCALES,
    )


# -- tma and ws -------------------------------------------------------------------


@triton.jit
def _attend_tiles(
    q, k_tiles, v_tiles, k_row, k_column, v_column, S, scale_log2,
    RAGGED: tl.constexpr, SPECIALISED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):
    """All keys, from rows `k_row` on of two descriptors. RAGGED: the last tile is not full."""
    s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    row_max = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    for start in tl.range(0, S, BLOCK_S, num_stages=STAGES, warp_specialize=SPECIALISED):
        k = k_tiles.load([k_row + start, k_column])
        scores = tl.dot(q, k.T, input_precision=PRECISION, out_dtype=tl.float32)
        if RAGGED:
            scores = tl.where((start + s < S)[None, :], scores, -float("inf"))
        weights, acc, row_max, row_sum = _weigh(scores, acc, row_max, row_sum, scale_log2, False)
        v = v_tiles.load([k_row + start, v_column])
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=tl.float32)
    return acc, row_max, row_sum


@triton.jit
def tma_kernel(
    q_tiles, k_tiles, v_tiles, out_ptr, code_scale_ptr, lse_ptr, q_stride_h, k_stride_h, v_stride_h,
    out_stride_b, out_stride_l, out_stride_h, code_stride_b, code_stride_l, lse_stride_b, lse_stride_h,
    Q, S, H, queries_per_key_head, K, scale_log2,
    BLOCK_K: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, HEAD_SCALES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):
    """Descriptors of 2-D views: rows are the tokens of all samples, columns the channels of all heads."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    first = tl.program_id(0) * BLOCK_Q
    key_head = h // queries_per_key_head
    acc, row_max, row_sum = _attend_tiles(
        q_tiles.load([b * Q + first, h * q_stride_h]), k_tiles, v_tiles,
        b * S, key_head * k_stride_h, key_head * v_stride_h, S, scale_log2,
        RAGGED, False, PRECISION, BLOCK_Q, BLOCK_S, BLOCK_K, STAGES,
    )
    finish(
        acc, row_max, row_sum, out_ptr, code_scale_ptr, lse_ptr, b.to(tl.int64), h.to(tl.int64), first,
        out_stride_b, out_stride_l, out_stride_h, code_stride_b, code_stride_l,
        Q, lse_stride_b, lse_stride_h, K, BLOCK_Q, BLOCK_K, False, HEAD_SCALES,
    )


@triton.jit
def ws_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, code_scale_ptr, lse_ptr,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h,
    v_stride_b, v_stride_l, v_stride_h, out_stride_b, out_stride_l, out_stride_h,
    code_stride_b, code_stride_l, lse_stride_b, lse_stride_h,
    Q, S, H, queries_per_key_head, K, scale_log2,
    BLOCK_K: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, HEAD_SCALES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):
    """Descriptors of one head of one sample: rows past its end and channels past K read as 0."""
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    first = tl.program_id(0) * BLOCK_Q
    key_head = h // queries_per_key_head
    q_tiles = tl.make_tensor_descriptor(
        q_ptr + b * q_stride_b + h * q_stride_h, [Q, K], [q_stride_l, 1], [BLOCK_Q, BLOCK_K]
    )
    k_tiles = tl.make_tensor_descriptor(
        k_ptr + b * k_stride_b + key_head * k_stride_h, [S, K], [k_stride_l, 1], [BLOCK_S, BLOCK_K]
    )
    v_tiles = tl.make_tensor_descriptor(
        v_ptr + b * v_stride_b + key_head * v_stride_h, [S, K], [v_stride_l, 1], [BLOCK_S, BLOCK_K]
    )
    acc, row_max, row_sum = _attend_tiles(
        q_tiles.load([first, 0]), k_tiles, v_tiles, 0, 0, 0, S, scale_log2,
        RAGGED, True, PRECISION, BLOCK_Q, BLOCK_S, BLOCK_K, STAGES,
    )
    finish(
        acc, row_max, row_sum, out_ptr, code_scale_ptr, lse_ptr, b, h, first,
        out_stride_b, out_stride_l, out_stride_h, code_stride_b, code_stride_l,
        Q, lse_stride_b, lse_stride_h, K, BLOCK_Q, BLOCK_K, False, HEAD_SCALES,
    )


# -- two tiles --------------------------------------------------------------------


@triton.jit
def two_tiles_kernel(
    q_tiles, k_tiles, v_tiles, out_ptr, code_scale_ptr, lse_ptr, q_stride_h, k_stride_h, v_stride_h,
    out_stride_b, out_stride_l, out_stride_h, code_stride_b, code_stride_l, lse_stride_b, lse_stride_h,
    Q, S, H, queries_per_key_head, K, scale_log2,
    BLOCK_K: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, HEAD_SCALES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):
    """As `tma_kernel`, with two tiles of BLOCK_Q queries: both products with k first, then softmax by softmax."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    first = tl.program_id(0) * 2 * BLOCK_Q
    second = first + BLOCK_Q
    key_head = h // queries_per_key_head
    s = tl.arange(0, BLOCK_S)
    q0 = q_tiles.load([b * Q + first, h * q_stride_h])
    q1 = q_tiles.load([b * Q + second, h * q_stride_h])
    acc0 = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    acc1 = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    max0 = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    max1 = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    sum0 = tl.zeros((BLOCK_Q,), tl.float32)
    sum1 = tl.zeros((BLOCK_Q,), tl.float32)
    for start in tl.range(0, S, BLOCK_S, num_stages=STAGES):
        k = k_tiles.load([b * S + start, key_head * k_stride_h]).T
        v = v_tiles.load([b * S + start, key_head * v_stride_h])
        scores0 = tl.dot(q0, k, input_precision=PRECISION, out_dtype=tl.float32)
        scores1 = tl.dot(q1, k, input_precision=PRECISION, out_dtype=tl.float32)
        if RAGGED:
            scores0 = tl.where((start + s < S)[None, :], scores0, -float("inf"))
            scores1 = tl.where((start + s < S)[None, :], scores1, -float("inf"))
        weights0, acc0, max0, sum0 = _weigh(scores0, acc0, max0, sum0, scale_log2, False)
        acc0 = tl.dot(weights0.to(v.dtype), v, acc0, input_precision=PRECISION, out_dtype=tl.float32)
        weights1, acc1, max1, sum1 = _weigh(scores1, acc1, max1, sum1, scale_log2, False)
        acc1 = tl.dot(weights1.to(v.dtype), v, acc1, input_precision=PRECISION, out_dtype=tl.float32)
    b = b.to(tl.int64)
    h = h.to(tl.int64)
    finish(
        acc0, max0, sum0, out_ptr, code_scale_ptr, lse_ptr, b, h, first,
        out_stride_b, out_stride_l, out_stride_h, code_stride_b, code_stride_l,
        Q, lse_stride_b, lse_stride_h, K, BLOCK_Q, BLOCK_K, False, HEAD_SCALES,
    )
    finish(
        acc1, max1, sum1, out_ptr, code_scale_ptr, lse_ptr, b, h, second,
        out_stride_b, out_stride_l, out_stride_h, code_stride_b, code_stride_l,
        Q, lse_stride_b, lse_stride_h, K, BLOCK_Q, BLOCK_K, False, HEAD_SCALES,
    )
