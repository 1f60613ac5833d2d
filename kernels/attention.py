"""out = softmax(q k^T * scale) v over all keys, per head, in fp32 with a running maximum.

Shapes: q_BQHK, k_BSHK, v_BSHK -> out_BQHK. The launcher writes L for both lengths; they may differ.
Why: the score matrix never leaves the chip (Dao 2023, FlashAttention-2), and the result goes into a
slice of the output projection's input, so that [attention, MLP] is never concatenated.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned

# B batch  Q query tokens  S key tokens  H heads  K head dim
# of the Triton kernel: a tensor core's depth, and what registers hold
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128

# fp32 as three tf32 products on tensor cores: as good, and "ieee" spills registers on every tile
FP32_PRODUCT = "tf32x3"


@triton.jit
def _attend_block(
    q, acc, row_max, row_sum, k_ptrs, v_ptrs, k_live, v_live, column_live, scale_log2,
    MASKED: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):
    """One block of keys: scores, running softmax, and the weighted sum of values."""
    k = tl.load(k_ptrs, mask=k_live, other=0.0) if MASKED or PADDED else tl.load(k_ptrs)
    scores = tl.dot(q, k, input_precision=PRECISION, out_dtype=tl.float32) * scale_log2
    if MASKED:
        scores = tl.where(column_live, scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    weights = tl.math.exp2(scores - new_max[:, None])
    fade = tl.math.exp2(row_max - new_max)
    row_sum = row_sum * fade + tl.sum(weights, axis=1)
    v = tl.load(v_ptrs, mask=v_live, other=0.0) if MASKED or PADDED else tl.load(v_ptrs)
    acc = tl.dot(
        weights.to(v.dtype), v, acc * fade[:, None],
        input_precision=PRECISION, out_dtype=tl.float32,
    )
    return acc, new_max, row_sum


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h,
    v_stride_b, v_stride_l, v_stride_h, out_stride_b, out_stride_l, out_stride_h,
    Q, S, H, K, scale_log2,
    BLOCK_K: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):
    # 64-bit bases, 32-bit offsets inside a tile: video sequences pass 2^31 elements
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    first = (tl.program_id(0) * BLOCK_Q).to(tl.int64)
    r = tl.arange(0, BLOCK_Q)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_K)
    r_live = (r + first < Q)[:, None] & (d < K)[None, :]
    q = tl.load(
        q_ptr + b * q_stride_b + first * q_stride_l + h * q_stride_h
        + r[:, None] * q_stride_l + d[None, :],
        mask=r_live, other=0.0,
    )
    k_ptrs = k_ptr + b * k_stride_b + h * k_stride_h + s[None, :] * k_stride_l + d[:, None]
    v_ptrs = v_ptr + b * v_stride_b + h * v_stride_h + s[:, None] * v_stride_l + d[None, :]
    acc = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    row_max = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)

    whole = S // BLOCK_S * BLOCK_S
    for _ in tl.range(0, whole, BLOCK_S, num_stages=STAGES):
        acc, row_max, row_sum = _attend_block(
            q, acc, row_max, row_sum, k_ptrs, v_ptrs,
            (d < K)[:, None], (d < K)[None, :], True, scale_log2,
            MASKED=False, PADDED=PADDED, PRECISION=PRECISION,
        )
        k_ptrs += BLOCK_S * k_stride_l
        v_ptrs += BLOCK_S * v_stride_l
    if whole < S:
        s_live = s + whole < S
        acc, row_max, row_sum = _attend_block(
            q, acc, row_max, row_sum, k_ptrs, v_ptrs,
            s_live[None, :] & (d < K)[:, None], s_live[:, None] & (d < K)[None, :], s_live[None, :],
            scale_log2,
            MASKED=True, PADDED=PADDED, PRECISION=PRECISION,
        )

    out = (
        out_ptr + b * out_stride_b + first * out_stride_l + h * out_stride_h
        + r[:, None] * out_stride_l + d[None, :]
    )
    tl.store(out, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=r_live)


def attention(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor,
    *, out: Tensor | None = None, scale: float | None = None, impl: launch.Impl = "auto",
) -> Tensor:  # fmt: skip
    """Full (non-causal) attention. Returns `out`, or a new tensor like q.

    Args:
        q_BLHK, k_BLHK, v_BLHK: one dtype, any strides but a contiguous last dimension; k and v may
            be of another length than q.
        out: shape and dtype of q; may be a slice of a wider buffer.
        scale: of the scores; None is 1 / sqrt(K).
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; no keys; for Triton, a head
            dim outside 16..128.
    """
    launch.check_float(q_BLHK, q_BLHK=q_BLHK, k_BLHK=k_BLHK, v_BLHK=v_BLHK)
    launch.check_ndim(4, q_BLHK=q_BLHK)
    B, Q, H, K = q_BLHK.shape
    S = k_BLHK.shape[1]
    if S == 0:
        raise ValueError(f"k_BLHK: shape {tuple(k_BLHK.shape)}, expected at least one key")
    launch.check_shape((B, S, H, K), k_BLHK=k_BLHK, v_BLHK=v_BLHK)
    launch.check_dtype(q_BLHK.dtype, k_BLHK=k_BLHK, v_BLHK=v_BLHK)
    launch.check_last_dim(q_BLHK=q_BLHK, k_BLHK=k_BLHK, v_BLHK=v_BLHK)
    if out is not None:
        launch.check_float(q_BLHK, out=out)
        launch.check_shape((B, Q, H, K), out=out)
        launch.check_dtype(q_BLHK.dtype, out=out)
        launch.check_last_dim(out=out)
    if not launch.runs_triton(impl, q_BLHK):
        return attention_reference(q_BLHK, k_BLHK, v_BLHK, out=out, scale=scale)
    if not MIN_HEAD_DIM <= K <= MAX_HEAD_DIM:
        takes = f"{MIN_HEAD_DIM}..{MAX_HEAD_DIM}"
        raise ValueError(f"q_BLHK: head dim {K}, the Triton kernel takes {takes}; use impl='torch'")
    if out is None:
        out = q_BLHK.new_empty(B, Q, H, K)
    block_k = triton.next_power_of_2(K)
    tiles = launch.tile("attention", head_dim=block_k, itemsize=q_BLHK.element_size())
    with launch.on_device(q_BLHK):
        _attention_kernel[(triton.cdiv(Q, tiles["BLOCK_Q"]), B * H)](
            q_BLHK, k_BLHK, v_BLHK, out,
            *q_BLHK.stride()[:3], *k_BLHK.stride()[:3], *v_BLHK.stride()[:3], *out.stride()[:3],
            Q, S, H, K, (K**-0.5 if scale is None else scale) * math.log2(math.e),
            BLOCK_K=block_k, PADDED=block_k != K, PRECISION=FP32_PRODUCT,
            enable_fp_fusion=True, **tiles,
        )  # fmt: skip
    return out


def attention_reference(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor,
    *, out: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """PyTorch's fused attention, which keeps heads before tokens."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    result = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    return result if out is None else out.copy_(result)


def eager_attention(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, out: Tensor) -> Tensor:
    """As diffusers runs it."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    return out.copy_(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


def _inputs(device: str, dtype: torch.dtype, B: int, Q: int, S: int, H: int, K: int) -> Inputs:
    longer, wider = poisoned((B, S + 3, H, K), dtype, device), poisoned((B, S, H, 2 * K), dtype, device)
    return {
        "q_BLHK": noise((B, Q, H, K), dtype, device),
        "k_BLHK": inside(
            longer, noise((B, S, H, K), dtype, device, 1), slice(0, S), slice(None), slice(None)
        ),
        "v_BLHK": inside(wider, noise((B, S, H, K), dtype, device, 2), slice(0, K)),
        "out": poisoned((B, Q, 5 * H * K), dtype, device)[..., : H * K].unflatten(-1, (H, K)),
    }


def _flops(i: Inputs) -> int:
    B, Q, H, K = i["q_BLHK"].shape
    return 4 * B * H * Q * i["k_BLHK"].shape[1] * K


OP = Op(
    name="attention",
    formula="softmax(q k^T * scale) v",
    replaces="scaled_dot_product_attention, cat",
    launch=attention,
    reference=attention_reference,
    eager=eager_attention,
    inputs=_inputs,
    tiny=(
        {"B": 1, "Q": 1, "S": 1, "H": 1, "K": 16},
        {"B": 2, "Q": 20, "S": 20, "H": 2, "K": 64},
        {"B": 1, "Q": 17, "S": 40, "H": 1, "K": 48},
        {"B": 1, "Q": 33, "S": 32, "H": 1, "K": 128},
    ),
    production=(
        {"B": 1, "Q": 4608, "S": 4608, "H": 24, "K": 128},
        {"B": 1, "Q": 4096, "S": 4096, "H": 24, "K": 64},
        {"B": 2, "Q": 4096, "S": 512, "H": 12, "K": 128},
        {"B": 1, "Q": 1000, "S": 1000, "H": 8, "K": 80},
    ),
    cpu=({"B": 1, "Q": 1024, "S": 1024, "H": 12, "K": 64},),
    bytes=lambda i: 2 * i["q_BLHK"].nbytes + i["k_BLHK"].nbytes + i["v_BLHK"].nbytes,
    flops=_flops,
    # the weights are rounded to the dtype of v before the second product
    tolerance={torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4},
)
