"""Attention in PyTorch: what CPU tensors run, what is exact in float64, and what diffusers runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.quantize import code_format, quantize_rows_reference

# B batch  Q query tokens  S key tokens  H heads  G heads of k and v  K head dim


class Visible(NamedTuple):
    """Which keys a query sees; everything None or False: all of its sample."""

    causal: bool = False
    key_mask_BS: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None


def attention_reference(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None, code_scale: Tensor | None = None,
    scale: float | None = None, return_lse: bool = False, **visible: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """PyTorch's fused attention, which keeps heads before tokens; log-sums by a second look at the scores."""
    results, sums = [], []
    for q, k, v, seen in _sequences(q_BLHK, k_BLHK, v_BLHK, Visible(**visible)):
        results.append(_attend(q, k, v, scale, seen).transpose(1, 2))
        if return_lse:
            sums.append(_log_sums(q, k, scale, seen))
    result = results[0] if len(results) == 1 else torch.cat(results, 1)
    out = placed(result, out, code_scale)
    return (out, torch.cat(sums, -1)) if return_lse else out


def placed(result_BLHK: Tensor, out: Tensor | None, code_scale: Tensor | None) -> Tensor:
    """The result itself, or in `out`; there as codes if they have scales, which may be those of heads (B, L, H)."""
    if out is None:
        return result_BLHK
    if code_scale is None:
        return out.copy_(result_BLHK)
    kind = code_format(out, code_scale)
    scale = code_scale[..., None] if kind == "fp8_block" else code_scale  # a head is a row of one block
    return quantize_rows_reference(result_BLHK, kind, scale=scale, out=out)[0]


def _sequences(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, visible: Visible
) -> Iterator[tuple[Tensor, Tensor, Tensor, Visible]]:
    """q, k and v with heads before tokens, all at once or, if packed, sequence by sequence."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    if visible.cu_seqlens_q is None or visible.cu_seqlens_k is None:
        yield q, k, v, visible
        return
    starts_q, starts_k = visible.cu_seqlens_q.tolist(), visible.cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        yield q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], Visible(visible.causal)


def _attend(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, scale: float | None, visible: Visible) -> Tensor:
    alone = visible.key_mask_BS is None
    return F.scaled_dot_product_attention(
        q_BHLK, k_BHLK, v_BHLK, scale=scale, enable_gqa=q_BHLK.shape[1] != k_BHLK.shape[1],
        is_causal=visible.causal and alone, attn_mask=None if alone else _mask(q_BHLK, k_BHLK, visible),
    )  # fmt: skip


def _mask(q_BHLK: Tensor, k_BHLK: Tensor, visible: Visible) -> Tensor:
    """True where a query sees a key; broadcasts to (B, H, Q, S)."""
    Q, S = q_BHLK.shape[2], k_BHLK.shape[2]
    mask = torch.ones(1, 1, 1, S, dtype=torch.bool, device=q_BHLK.device)
    if visible.causal:
        mask = mask.expand(1, 1, Q, S).tril()
    return mask if visible.key_mask_BS is None else mask & visible.key_mask_BS[:, None, None, :]


def _log_sums(q_BHLK: Tensor, k_BHLK: Tensor, scale: float | None, visible: Visible) -> Tensor:
    q, k = launch.widen(q_BHLK), launch.widen(k_BHLK)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill_(~_mask(q, k, visible), -math.inf).logsumexp(-1)


def eager_attention(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, out: Tensor, code_scale: Tensor | None = None,
    return_lse: bool = False, **visible: Any,
) -> Tensor:  # fmt: skip
    """As diffusers runs it: shared heads repeated, packed sequences one by one, and never a log-sum."""
    results = []
    for q, k, v, seen in _sequences(q_BLHK, k_BLHK, v_BLHK, Visible(**visible)):
        shared = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (k, v))
        results.append(_attend(q, k, v, None, seen).transpose(1, 2))
    return placed(results[0] if len(results) == 1 else torch.cat(results, 1), out, code_scale)
