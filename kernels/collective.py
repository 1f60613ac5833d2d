"""What one GPU does around the exchanges of sequence parallelism: pack messages, unpack them, merge attentions.

Ulysses (Jacobs et al. 2023): each of P ranks has some tokens of all heads, exchanges, attends all tokens of some heads,
and exchanges back. With x_BLHK of one rank, and messages_PBLHK whose first dimension an all-to-all exchanges:

    messages = split_ranks(x, P, dim="heads")       B, L, H, K  ->  P, B, L, H / P, K
    x = join_ranks(received, dim="tokens")          P, B, L, H / P, K  ->  B, L P, H / P, K
    messages = split_ranks(out, P, dim="tokens")    B, L P, H / P, K  ->  P, B, L, H / P, K
    out = join_ranks(received, dim="heads")         P, B, L, H / P, K  ->  B, L, H, K

q, k and v are one x with B three times as large. Where messages hold the tokens before everything else, as strided
views of (P, L, B, H, K), those of all ranks lie in order already: only heads are packed and unpacked, with one copy on
either side. Heads that P does not divide are packed in two runs, of ranks with one more and of ranks with one fewer.

Ring (Liu et al. 2023): keys travel, and attentions over different keys become one by their log-sum-exps l:
out = (out e^l + other e^l') / (e^l + e^l'), lse = log(e^l + e^l').
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned

# P ranks  B batch  L tokens  Q query tokens  H heads  K head dim
Dim = Literal["tokens", "heads"]
AXIS = {"tokens": 1, "heads": 2}  # of x_BLHK


# -- exchanges --------------------------------------------------------------------


@triton.jit
def _copy_heads_kernel(
    from_ptr, to_ptr, from_stride_p, from_stride_b, from_stride_l, from_stride_h,
    to_stride_p, to_stride_b, to_stride_l, to_stride_h, B, L, H, K,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Rows are the (token, head) pairs of one message and sample."""
    p = (tl.program_id(1) // B).to(tl.int64)
    b = (tl.program_id(1) % B).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token, head = (row // H).to(tl.int64), row % H
    k = tl.arange(0, BLOCK_K)[None, :]
    live = (row < L * H)[:, None] & (k < K)
    from_rows = p * from_stride_p + b * from_stride_b + token * from_stride_l + head * from_stride_h
    to_rows = p * to_stride_p + b * to_stride_b + token * to_stride_l + head * to_stride_h
    tl.store(to_ptr + to_rows[:, None] + k, tl.load(from_ptr + from_rows[:, None] + k, mask=live), mask=live)


def split_ranks(
    x_BLHK: Tensor, ranks: int, *, dim: Dim, out: Tensor | None = None, impl: launch.Impl = "auto"
) -> Tensor:
    """One message for each rank, with its share of the tokens or heads: (P, B, L, H, K). Returns `out`, or a
    contiguous tensor.

    Args:
        x_BLHK: any strides but a contiguous last dimension.
        ranks: divides `dim`.
        out: its dtype; any strides but a contiguous last dimension.
    Raises:
        ValueError: a dimension that ranks do not divide; a shape, dtype or stride that does not fit.
    """
    launch.check_float(x_BLHK, x_BLHK=x_BLHK)
    launch.check_ndim(4, x_BLHK=x_BLHK)
    launch.check_last_dim(x_BLHK=x_BLHK)
    _check_dim(dim)
    if ranks < 1 or x_BLHK.shape[AXIS[dim]] % ranks:
        raise ValueError(f"ranks={ranks}: expected a divisor of the {x_BLHK.shape[AXIS[dim]]} {dim}")
    shares_PBLHK = _shares(x_BLHK, ranks, dim)
    if out is not None:
        _check_out(out, x_BLHK, tuple(shares_PBLHK.shape))
    nothing_moves = out is None and shares_PBLHK.is_contiguous()
    if nothing_moves or not launch.runs_triton(impl, x_BLHK):
        return split_ranks_reference(x_BLHK, ranks, dim=dim, out=out)
    if out is None:
        out = x_BLHK.new_empty(shares_PBLHK.shape)
    _copy_heads("split_ranks", shares_PBLHK, out)
    return out


def join_ranks(
    messages_PBLHK: Tensor, *, dim: Dim, out: Tensor | None = None, impl: launch.Impl = "auto"
) -> Tensor:
    """Undoes `split_ranks`: x_BLHK with the tokens or heads of all messages. Returns `out`, or a contiguous tensor.

    Args:
        messages_PBLHK: any strides but a contiguous last dimension.
        out: its dtype; may be a slice of a wider buffer.
    Raises:
        ValueError: a shape, dtype or stride that does not fit.
    """
    launch.check_float(messages_PBLHK, messages_PBLHK=messages_PBLHK)
    launch.check_ndim(5, messages_PBLHK=messages_PBLHK)
    launch.check_last_dim(messages_PBLHK=messages_PBLHK)
    _check_dim(dim)
    P, *shape = messages_PBLHK.shape
    shape[AXIS[dim]] *= P
    if out is not None:
        _check_out(out, messages_PBLHK, tuple(shape))
    nothing_moves = out is None and messages_PBLHK.movedim(0, AXIS[dim]).is_contiguous()
    if nothing_moves or not launch.runs_triton(impl, messages_PBLHK):
        return join_ranks_reference(messages_PBLHK, dim=dim, out=out)
    if out is None:
        out = messages_PBLHK.new_empty(shape)
    _copy_heads("join_ranks", messages_PBLHK, _shares(out, P, dim))
    return out


def _check_dim(dim: str) -> None:
    if dim not in AXIS:
        raise ValueError(f"dim={dim!r}: expected tokens or heads")


def _check_out(out: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    launch.check_float(like, out=out)
    launch.check_dtype(like.dtype, out=out)
    launch.check_shape(shape, out=out)
    launch.check_last_dim(out=out)


def _shares(x_BLHK: Tensor, ranks: int, dim: Dim) -> Tensor:
    """x as (P, B, L, H, K), without a copy."""
    return x_BLHK.unflatten(AXIS[dim], (ranks, -1)).movedim(AXIS[dim], 0)


def _copy_heads(op: str, from_PBLHK: Tensor, to_PBLHK: Tensor) -> None:
    P, B, L, H, K = from_PBLHK.shape
    if not from_PBLHK.numel():
        return
    tile = launch.tile(op)
    with launch.on_device(from_PBLHK):
        _copy_heads_kernel[(triton.cdiv(L * H, tile["BLOCK_ROWS"]), P * B)](
            from_PBLHK, to_PBLHK, *from_PBLHK.stride()[:4], *to_PBLHK.stride()[:4], B, L, H, K,
            BLOCK_K=triton.next_power_of_2(K), enable_fp_fusion=True, **tile,
        )  # fmt: skip


def split_ranks_reference(x_BLHK: Tensor, ranks: int, *, dim: Dim, out: Tensor | None = None) -> Tensor:
    shares_PBLHK = _shares(x_BLHK, ranks, dim)
    return shares_PBLHK.contiguous() if out is None else out.copy_(shares_PBLHK)


def join_ranks_reference(messages_PBLHK: Tensor, *, dim: Dim, out: Tensor | None = None) -> Tensor:
    axis = AXIS[dim]
    if out is None:
        return messages_PBLHK.movedim(0, axis).flatten(axis, axis + 1)
    _shares(out, messages_PBLHK.shape[0], dim).copy_(messages_PBLHK)
    return out


# -- attentions over different keys -----------------------------------------------


@triton.jit
def _merge_attention_kernel(
    out_ptr, lse_ptr, other_ptr, other_lse_ptr, out_stride_b, out_stride_q, out_stride_h,
    other_stride_b, other_stride_q, other_stride_h, H, Q, K,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """A block of queries of one head, whose log-sum-exps are contiguous."""
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    k = tl.arange(0, BLOCK_K)[None, :]
    row = q.to(tl.int64)[:, None]
    live = (q < Q)[:, None] & (k < K)
    lse_at = tl.program_id(1).to(tl.int64) * Q + q
    lse = tl.load(lse_ptr + lse_at, mask=q < Q, other=0.0)
    other_lse = tl.load(other_lse_ptr + lse_at, mask=q < Q, other=0.0)
    top = tl.maximum(lse, other_lse)
    dead = top == -float("inf")  # no key on either side
    base = tl.where(dead, 0.0, top)
    weight = tl.math.exp2((lse - base) * 1.4426950408889634)
    other_weight = tl.math.exp2((other_lse - base) * 1.4426950408889634)
    total = weight + other_weight
    share = tl.where(dead, 0.0, weight / total)[:, None]
    other_share = tl.where(dead, 0.0, other_weight / total)[:, None]

    out_ptrs = out_ptr + b * out_stride_b + h * out_stride_h + row * out_stride_q + k
    other_ptrs = other_ptr + b * other_stride_b + h * other_stride_h + row * other_stride_q + k
    out = tl.load(out_ptrs, mask=live, other=0.0).to(tl.float32)
    other = tl.load(other_ptrs, mask=live, other=0.0).to(tl.float32)
    # an attention without keys may be NaN: its share is not enough to keep it out
    merged = tl.where(share > 0, share * out, 0.0) + tl.where(other_share > 0, other_share * other, 0.0)
    tl.store(out_ptrs, merged.to(out_ptr.dtype.element_ty), mask=live)
    merged_lse = tl.where(dead, top, base + tl.math.log2(total) * 0.6931471805599453)
    tl.store(lse_ptr + lse_at, merged_lse, mask=q < Q)


def merge_attention(
    out_BQHK: Tensor, lse_BHQ: Tensor, other_BQHK: Tensor, other_lse_BHQ: Tensor, *, impl: launch.Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both, in place: returns `out_BQHK` and `lse_BHQ`. Without a key they are 0 and -inf.

    Args:
        out_BQHK, other_BQHK: any float dtypes and strides but a contiguous last dimension; fp32 for the first keeps a
            long ring exact.
        lse_BHQ, other_lse_BHQ: fp32, contiguous, natural logarithms; -inf where there was no key.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    launch.check_float(
        out_BQHK, out_BQHK=out_BQHK, lse_BHQ=lse_BHQ, other_BQHK=other_BQHK, other_lse_BHQ=other_lse_BHQ
    )
    launch.check_ndim(4, out_BQHK=out_BQHK)
    B, Q, H, K = out_BQHK.shape
    launch.check_shape((B, Q, H, K), other_BQHK=other_BQHK)
    launch.check_shape((B, H, Q), lse_BHQ=lse_BHQ, other_lse_BHQ=other_lse_BHQ)
    launch.check_dtype(torch.float32, lse_BHQ=lse_BHQ, other_lse_BHQ=other_lse_BHQ)
    launch.check_last_dim(out_BQHK=out_BQHK, other_BQHK=other_BQHK)
    launch.check_contiguous(lse_BHQ=lse_BHQ, other_lse_BHQ=other_lse_BHQ)
    if not launch.runs_triton(impl, out_BQHK):
        return merge_attention_reference(out_BQHK, lse_BHQ, other_BQHK, other_lse_BHQ)
    tile = launch.tile("merge_attention")
    with launch.on_device(out_BQHK):
        _merge_attention_kernel[(triton.cdiv(Q, tile["BLOCK_Q"]), B * H)](
            out_BQHK, lse_BHQ, other_BQHK, other_lse_BHQ, *out_BQHK.stride()[:3], *other_BQHK.stride()[:3], H, Q, K,
            BLOCK_K=triton.next_power_of_2(K), enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return out_BQHK, lse_BHQ


def merge_attention_reference(
    out_BQHK: Tensor, lse_BHQ: Tensor, other_BQHK: Tensor, other_lse_BHQ: Tensor
) -> tuple[Tensor, Tensor]:
    """In place where the outputs are fp32. No value decides which operations run, so that they can be taped."""
    alone_BQH1, unchanged_BQH1 = (torch.isneginf(lse).mT.unsqueeze(-1) for lse in (lse_BHQ, other_lse_BHQ))
    share_BQH1 = torch.sigmoid(other_lse_BHQ - lse_BHQ).mT.unsqueeze(-1).masked_fill_(unchanged_BQH1, 0)
    wide = launch.widen(out_BQHK).masked_fill_(alone_BQH1, 0)
    wide.lerp_(other_BQHK.to(wide.dtype).masked_fill(unchanged_BQH1, 0), share_BQH1)
    if wide is not out_BQHK:
        out_BQHK.copy_(wide)
    return out_BQHK, torch.logaddexp(lse_BHQ, other_lse_BHQ, out=lse_BHQ)


# -- the catalog's entries --------------------------------------------------------


def eager_split_ranks(x_BLHK: Tensor, ranks: int, dim: Dim, out: Tensor | None) -> Tensor:
    """As diffusers runs it; a copy into `out` stands for its share of `cat`."""
    messages = x_BLHK.unflatten(AXIS[dim], (ranks, -1)).movedim(AXIS[dim], 0).contiguous()
    return messages if out is None else out.copy_(messages)


def eager_join_ranks(messages_PBLHK: Tensor, dim: Dim, out: Tensor | None) -> Tensor:
    """As diffusers runs it; a copy into `out` stands for its share of `cat`."""
    axis = AXIS[dim]
    joined = messages_PBLHK.movedim(0, axis).flatten(axis, axis + 1)
    return joined if out is None else out.copy_(joined)


def eager_merge_attention(
    out_BQHK: Tensor, lse_BHQ: Tensor, other_BQHK: Tensor, other_lse_BHQ: Tensor
) -> tuple[Tensor, Tensor]:
    """As diffusers runs it, with its log-sum-exps in the layout of the outputs."""
    lse, other_lse = (x.mT.unsqueeze(-1) for x in (lse_BHQ, other_lse_BHQ))
    out = out_BQHK - torch.sigmoid(other_lse - lse) * (out_BQHK - other_BQHK)
    return out, (lse - F.logsigmoid(lse - other_lse)).squeeze(-1).mT


def _split_inputs(
    device: str, dtype: torch.dtype, B: int, L: int, H: int, K: int, ranks: int, dim: Dim, tokens_first: bool = False
) -> Inputs:
    """`tokens_first`: messages hold the tokens before the samples."""
    wider = poisoned((B, L, 3, H, K), dtype, device)
    tokens, heads = (L, H // ranks) if dim == "heads" else (L // ranks, H)
    return {
        "x_BLHK": inside(wider, noise((B, L, H, K), dtype, device), 1, slice(None), slice(None)),
        "ranks": ranks,
        "dim": dim,
        "out": poisoned((ranks, tokens, B, heads, K), dtype, device).transpose(1, 2) if tokens_first else None,
    }


def _join_inputs(
    device: str, dtype: torch.dtype, B: int, L: int, H: int, K: int, ranks: int, dim: Dim, sliced: bool,
    tokens_first: bool = False,
) -> Inputs:  # fmt: skip
    heads, tokens = (H * ranks, L) if dim == "heads" else (H, L * ranks)
    wider = poisoned((B, tokens, 2 * heads * K), dtype, device)
    if tokens_first:
        messages_PBLHK = noise((ranks, L, B, H, K), dtype, device).transpose(1, 2)
    else:
        messages_PBLHK = noise((ranks, B, L, H, K), dtype, device)
    return {
        "messages_PBLHK": messages_PBLHK,
        "dim": dim,
        "out": wider[..., : heads * K].unflatten(-1, (heads, K)) if sliced else None,
    }


def _merge_inputs(device: str, dtype: torch.dtype, B: int, Q: int, H: int, K: int, out: torch.dtype) -> Inputs:
    return {
        "out_BQHK": noise((B, Q, H, K), out, device),
        "lse_BHQ": noise((B, H, Q), torch.float32, device, 1) * 3,
        "other_BQHK": inside(
            poisoned((B, Q, H, 2 * K), dtype, device), noise((B, Q, H, K), dtype, device, 2), slice(K, 2 * K)
        ),
        "other_lse_BHQ": noise((B, H, Q), torch.float32, device, 3) * 3,
    }


SPLIT_OP = Op(
    name="split_ranks",
    formula="one contiguous message for each rank, with its share of the tokens or heads",
    replaces="contiguous",
    launch=split_ranks,
    reference=split_ranks_reference,
    eager=eager_split_ranks,
    inputs=_split_inputs,
    tiny=(
        {"B": 1, "L": 1, "H": 2, "K": 16, "ranks": 2, "dim": "heads"},
        {"B": 2, "L": 5, "H": 6, "K": 24, "ranks": 3, "dim": "heads", "tokens_first": True},
        {"B": 2, "L": 9, "H": 2, "K": 33, "ranks": 3, "dim": "tokens"},
    ),
    production=(
        {"B": 3, "L": 2304, "H": 24, "K": 128, "ranks": 2, "dim": "heads"},
        {"B": 3, "L": 4095, "H": 40, "K": 128, "ranks": 8, "dim": "heads", "tokens_first": True},
        {"B": 2, "L": 32760, "H": 5, "K": 128, "ranks": 8, "dim": "tokens"},
    ),
    cpu=({"B": 3, "L": 1024, "H": 8, "K": 64, "ranks": 4, "dim": "heads", "tokens_first": True},),
    bytes=lambda i: 2 * i["x_BLHK"].nbytes,
)

JOIN_OP = Op(
    name="join_ranks",
    formula="the tokens or heads of all ranks' messages in order",
    replaces="contiguous, cat",
    launch=join_ranks,
    reference=join_ranks_reference,
    eager=eager_join_ranks,
    inputs=_join_inputs,
    tiny=(
        {"B": 1, "L": 1, "H": 1, "K": 16, "ranks": 2, "dim": "heads", "sliced": True},
        {"B": 2, "L": 5, "H": 3, "K": 24, "ranks": 3, "dim": "heads", "sliced": False},
        {"B": 2, "L": 5, "H": 3, "K": 24, "ranks": 2, "dim": "heads", "sliced": True, "tokens_first": True},
        {"B": 2, "L": 9, "H": 2, "K": 33, "ranks": 3, "dim": "tokens", "sliced": True},
    ),
    production=(
        {"B": 1, "L": 2304, "H": 12, "K": 128, "ranks": 2, "dim": "heads", "sliced": True},
        {"B": 1, "L": 4095, "H": 5, "K": 128, "ranks": 8, "dim": "heads", "sliced": False},
        {"B": 3, "L": 4095, "H": 5, "K": 128, "ranks": 8, "dim": "tokens", "sliced": False},
    ),
    cpu=({"B": 2, "L": 1024, "H": 4, "K": 64, "ranks": 4, "dim": "heads", "sliced": True, "tokens_first": True},),
    bytes=lambda i: 2 * i["messages_PBLHK"].nbytes,
)

MERGE_OP = Op(
    name="merge_attention",
    formula="(out e^l + other e^l') / (e^l + e^l') and log(e^l + e^l'), in place",
    replaces="sub, sigmoid, mul, logsigmoid",
    launch=merge_attention,
    reference=merge_attention_reference,
    eager=eager_merge_attention,
    inputs=_merge_inputs,
    tiny=(
        {"B": 1, "Q": 1, "H": 1, "K": 16, "out": torch.float32},
        {"B": 2, "Q": 9, "H": 3, "K": 24, "out": torch.float32},
        {"B": 2, "Q": 5, "H": 2, "K": 33, "out": torch.bfloat16},
    ),
    production=(
        {"B": 1, "Q": 2304, "H": 24, "K": 128, "out": torch.float32},
        {"B": 1, "Q": 32760, "H": 5, "K": 128, "out": torch.bfloat16},
    ),
    cpu=({"B": 1, "Q": 2048, "H": 8, "K": 64, "out": torch.float32},),
    bytes=lambda i: 2 * (i["out_BQHK"].nbytes + i["lse_BHQ"].nbytes) + i["other_BQHK"].nbytes + i["lse_BHQ"].nbytes,
)
