"""q = rotate(RMSNorm(q) * q_weight), k = rotate(RMSNorm(k) * k_weight), v = v, from packed projections; in fp32.

Shapes: qkv_BN3HK of one or two streams, weights (K,) or (H * K,), tables as for `rope` -> q_BLHK, k_BLHK, v_BLHK.
Why: the largest lossless saving of a transformer step: about 20 small launches become one. Two streams go into the
rows of one joint sequence, so nothing is concatenated; a single stream may stay where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned
from sgl_diffusion.kernels.rope import eager_rope, load_pairs, per_token, rotate_pairs, rotated, store_pairs

# B batch  N tokens of a stream  L tokens of all streams  H heads  K head dim  P = K / 2 pairs


class Stream(NamedTuple):
    """A packed projection (contiguous last dimension, may be a slice of a wider one) and the weights of its norms.

    Weights of K elements norm every head by itself, weights of H * K norm all heads together.
    """

    qkv_BN3HK: Tensor
    q_weight: Tensor
    k_weight: Tensor


@triton.jit
def _qk_norm_rope_kernel(
    x_ptr, q_weight_ptr, k_weight_ptr, x_stride_b, x_stride_l, x_stride_3, x_stride_h,
    y_ptr, y_q_weight_ptr, y_k_weight_ptr, y_stride_b, y_stride_l, y_stride_3, y_stride_h,
    cos_ptr, sin_ptr, table_stride_b, table_stride_l, table_stride_h,
    q_ptr, q_stride_b, q_stride_l, q_stride_h, k_ptr, k_stride_b, k_stride_l, k_stride_h,
    v_ptr, v_stride_b, v_stride_l, v_stride_h,
    N, H, eps,
    TWO_STREAMS: tl.constexpr, ACROSS_HEADS: tl.constexpr, HALF_SPLIT: tl.constexpr, PER_HEAD: tl.constexpr,
    K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Some heads of one token of q, k or v a program; tokens from N on are the second stream's, y."""
    head_blocks = tl.cdiv(H, BLOCK_H)
    token = tl.program_id(0) // head_blocks
    row = token.to(tl.int64)
    h = ((tl.program_id(0) % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    which = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    live = h < H

    src = x_ptr + b * x_stride_b + row * x_stride_l + which * x_stride_3
    src_stride_h = x_stride_h
    if TWO_STREAMS:  # noqa: SIM102 (a constexpr must not share a condition with a runtime value)
        if token >= N:
            src = y_ptr + b * y_stride_b + (row - N) * y_stride_l + which * y_stride_3
            src_stride_h = y_stride_h
            q_weight_ptr = y_q_weight_ptr
            k_weight_ptr = y_k_weight_ptr
    x0, x1 = load_pairs(src + h * src_stride_h, live, K, HALF_SPLIT, BLOCK_H, BLOCK_K)

    if which == 2:
        out = v_ptr + b * v_stride_b + row * v_stride_l + h * v_stride_h
        store_pairs(out, x0, x1, live, K, HALF_SPLIT, BLOCK_H, BLOCK_K)
    else:
        weight_ptr = q_weight_ptr
        out = q_ptr + b * q_stride_b + row * q_stride_l + h * q_stride_h
        if which == 1:
            weight_ptr = k_weight_ptr
            out = k_ptr + b * k_stride_b + row * k_stride_l + h * k_stride_h
        squares = tl.sum(x0 * x0 + x1 * x1, axis=1)
        if ACROSS_HEADS:
            rstd = tl.rsqrt(tl.sum(squares, axis=0) / (H * K) + eps)
            weight0, weight1 = load_pairs(weight_ptr + h * K, live, K, HALF_SPLIT, BLOCK_H, BLOCK_K)
        else:
            rstd = tl.rsqrt(squares / K + eps)[:, None]
            first = tl.zeros((1, 1), tl.int32)
            weight0, weight1 = load_pairs(weight_ptr + first, first == 0, K, HALF_SPLIT, 1, BLOCK_K)
        x0 = x0 * rstd * weight0
        x1 = x1 * rstd * weight1
        table = b * table_stride_b + row * table_stride_l
        x0, x1 = rotate_pairs(
            x0, x1, cos_ptr + table, sin_ptr + table, h, table_stride_h, live, K, PER_HEAD, BLOCK_K
        )
        store_pairs(out, x0, x1, live, K, HALF_SPLIT, BLOCK_H, BLOCK_K)


def qk_norm_rope(
    streams: Sequence[Stream], cos: Tensor, sin: Tensor, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor | None,
    *, eps: float = 1e-6, half_split: bool = False, impl: launch.Impl = "auto",
) -> None:  # fmt: skip
    """Norms and rotates q and k of one or two packed projections, and places q, k and v.

    Args:
        streams: follow each other along the sequence; all norm per head, or all across heads.
        cos, sin, half_split: as for `rope`; tables of all L tokens.
        q_BLHK, k_BLHK, v_BLHK: written, in the dtype of the streams; may be rows of longer buffers. Those of a single
            stream may be the stream's own q and k, with None for v, which then stays where it is.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    Source: the joint attention processors and `apply_rotary_emb` of diffusers.
    """
    outputs = {"q_BLHK": q_BLHK, "k_BLHK": k_BLHK} | ({} if v_BLHK is None else {"v_BLHK": v_BLHK})
    B, L, H, K = _checked(streams, outputs)
    cos_BLHP, sin_BLHP = per_token(q_BLHK, cos, sin)
    if not launch.runs_triton(impl, q_BLHK):
        qk_norm_rope_reference(streams, cos, sin, q_BLHK, k_BLHK, v_BLHK, eps=eps, half_split=half_split)
        return
    first, last = streams[0], streams[-1]
    across = first.q_weight.numel() != K
    tiles = launch.tile("qk_norm_rope", heads=H, head_dim=K, across=int(across))
    if across:
        tiles["BLOCK_H"] = triton.next_power_of_2(H)
    v = q_BLHK if v_BLHK is None else v_BLHK
    with launch.on_device(q_BLHK):
        _qk_norm_rope_kernel[(L * triton.cdiv(H, tiles["BLOCK_H"]), 2 if v_BLHK is None else 3, B)](
            *first, *first.qkv_BN3HK.stride()[:4], *last, *last.qkv_BN3HK.stride()[:4],
            cos_BLHP, sin_BLHP, *cos_BLHP.stride()[:3],
            q_BLHK, *q_BLHK.stride()[:3], k_BLHK, *k_BLHK.stride()[:3], v, *v.stride()[:3],
            first.qkv_BN3HK.shape[1], H, eps,
            TWO_STREAMS=len(streams) == 2, ACROSS_HEADS=across, HALF_SPLIT=half_split,
            PER_HEAD=cos_BLHP.shape[2] > 1, K=K, BLOCK_K=triton.next_power_of_2(K), enable_fp_fusion=True, **tiles,
        )  # fmt: skip


def _checked(streams: Sequence[Stream], outputs: dict[str, Tensor]) -> tuple[int, int, int, int]:
    """B, L, H and K, if all shapes, dtypes and strides agree."""
    if len(streams) not in (1, 2):
        raise ValueError(f"streams: {len(streams)} of them, expected one or two")
    q_BLHK = outputs["q_BLHK"]
    launch.check_ndim(4, q_BLHK=q_BLHK)
    B, L, H, K = q_BLHK.shape
    launch.check_float(q_BLHK, **outputs)
    launch.check_shape((B, L, H, K), **outputs)
    launch.check_dtype(q_BLHK.dtype, **outputs)
    launch.check_last_dim(**outputs)
    norm_width = H * K if streams[0].q_weight.numel() == H * K else K
    for i, stream in enumerate(streams):
        qkv, qkv_name = stream.qkv_BN3HK, f"streams[{i}].qkv_BN3HK"
        weights = {f"streams[{i}].q_weight": stream.q_weight, f"streams[{i}].k_weight": stream.k_weight}
        launch.check_ndim(5, **{qkv_name: qkv})
        launch.check_float(q_BLHK, **{qkv_name: qkv}, **weights)
        launch.check_shape((B, qkv.shape[1], 3, H, K), **{qkv_name: qkv})
        launch.check_dtype(q_BLHK.dtype, **{qkv_name: qkv})
        launch.check_last_dim(**{qkv_name: qkv})
        launch.check_shape((norm_width,), **weights)
        launch.check_contiguous(**weights)
    if (tokens := sum(stream.qkv_BN3HK.shape[1] for stream in streams)) != L:
        raise ValueError(f"q_BLHK: {L} tokens, the streams have {tokens}")
    return B, L, H, K


def qk_norm_rope_reference(
    streams: Sequence[Stream], cos: Tensor, sin: Tensor, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor | None,
    *, eps: float = 1e-6, half_split: bool = False,
) -> None:  # fmt: skip
    start = 0
    for qkv, q_weight, k_weight in streams:
        rows = slice(start, start + qkv.shape[1])
        start = rows.stop
        stream_cos, stream_sin = (table[rows] if table.ndim == 2 else table[:, rows] for table in (cos, sin))
        q, k, v = qkv.unbind(2)
        for x, weight, out in ((q, q_weight, q_BLHK), (k, k_weight, k_BLHK)):
            normed = _rms_norm(launch.widen(x), launch.widen(weight), eps)
            out[:, rows] = rotated(normed, stream_cos, stream_sin, half_split)
        if v_BLHK is not None:
            v_BLHK[:, rows] = v


def _rms_norm(x_BNHK: Tensor, weight: Tensor, eps: float) -> Tensor:
    H, K = x_BNHK.shape[-2:]
    dims = -1 if weight.numel() == K else (-2, -1)
    mean_square = torch.linalg.vector_norm(x_BNHK, dim=dims, keepdim=True).square_().div_(weight.numel())
    return (x_BNHK * mean_square.add_(eps).rsqrt_()).mul_(weight if dims == -1 else weight.view(H, K))


def eager_qk_norm_rope(
    streams: Sequence[Stream], cos: Tensor, sin: Tensor, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor | None,
    half_split: bool,
) -> None:  # fmt: skip
    """As diffusers runs it: norms by stream, concatenation, rotation."""
    parts: list[list[Tensor]] = [[], [], []]
    for qkv, q_weight, k_weight in streams:
        q, k, v = qkv.unbind(2)
        for x, weight, part in ((q, q_weight, parts[0]), (k, k_weight, parts[1])):
            heads = x if weight.shape == x.shape[-1:] else x.flatten(-2)
            variance = heads.float().pow(2).mean(-1, keepdim=True)
            part.append(((heads * torch.rsqrt(variance + 1e-6)).to(weight.dtype) * weight).view(x.shape))
        parts[2].append(v)
    q, k, v = (torch.cat(p, dim=1) if len(p) > 1 else p[0] for p in parts)
    eager_rope(q, cos, sin, half_split, q_BLHK)
    eager_rope(k, cos, sin, half_split, k_BLHK)
    if v_BLHK is not None:
        v_BLHK.copy_(v)


def _inputs(
    device: str, dtype: torch.dtype, B: int, N: tuple[int, ...], H: int, K: int,
    across: bool = False, half_split: bool = False, in_place: bool = False, table: str = "L", apart: bool = False,
) -> Inputs:  # fmt: skip
    L, streams = sum(N), []
    for i, n in enumerate(N):
        heads = noise((B, n, 3, H, K), dtype, device, i)
        if apart and i:  # the second stream's heads are not neighbours
            qkv = inside(poisoned((B, n, 3, H, 2 * K), dtype, device), heads, slice(0, K))
        else:
            wide = poisoned((B, n, 7 * H * K), dtype, device)
            qkv = inside(wide, heads.flatten(2), slice(0, 3 * H * K)).unflatten(-1, (3, H, K))
        weights = [noise((H * K if across else K,), dtype, device, 10 + 2 * i + j) for j in (0, 1)]
        streams.append(Stream(qkv, *weights))
    angle = noise({"L": (L, K // 2), "BLH": (B, L, H, K // 2)}[table], torch.float32, device, 20)
    q, k = poisoned((2, B, L + 2, H, K), dtype, device)[:, :, 1 : L + 1]
    if in_place:
        q, k, _ = streams[0].qkv_BN3HK.unbind(2)
    return {
        "streams": streams,
        "cos": angle.cos(),
        "sin": angle.sin(),
        "q_BLHK": q,
        "k_BLHK": k,
        "v_BLHK": None if in_place else poisoned((B, L, H, 2 * K), dtype, device)[..., :K],
        "half_split": half_split,
    }


def _bytes(i: Inputs) -> int:
    moved = [i["q_BLHK"], i["k_BLHK"], *([] if i["v_BLHK"] is None else [i["v_BLHK"]])]
    return 2 * sum(x.nbytes for x in moved) + i["cos"].nbytes + i["sin"].nbytes


OP = Op(
    name="qk_norm_rope",
    formula="rotate(RMSNorm(q) * q_weight), rotate(RMSNorm(k) * k_weight), v",
    replaces="2 or 4 rms_norm, 2 rotary embeddings (8 launches each), 3 copies or concatenations",
    launch=qk_norm_rope,
    reference=qk_norm_rope_reference,
    eager=eager_qk_norm_rope,
    inputs=_inputs,
    tiny=(
        {"B": 1, "N": (1,), "H": 1, "K": 16},
        {"B": 2, "N": (2, 3), "H": 3, "K": 64, "apart": True},
        {"B": 1, "N": (1, 5), "H": 5, "K": 48, "half_split": True},
        {"B": 2, "N": (2,), "H": 2, "K": 128, "in_place": True},
        {"B": 2, "N": (3,), "H": 5, "K": 32, "across": True},
        {"B": 1, "N": (2, 1), "H": 3, "K": 16, "across": True, "half_split": True, "table": "BLH"},
    ),
    production=(
        {"B": 1, "N": (512, 4096), "H": 24, "K": 128},
        {"B": 1, "N": (4608,), "H": 24, "K": 128, "in_place": True},
        {"B": 1, "N": (32760,), "H": 40, "K": 128, "across": True, "in_place": True},
        {"B": 2, "N": (6144,), "H": 32, "K": 128, "across": True, "half_split": True, "table": "BLH"},
        {"B": 1, "N": (512,), "H": 8, "K": 96},
    ),
    cpu=(
        {"B": 1, "N": (128, 896), "H": 12, "K": 64},
        {"B": 1, "N": (1024,), "H": 12, "K": 64, "in_place": True},
        {"B": 1, "N": (1024,), "H": 12, "K": 64, "across": True, "half_split": True},
    ),
    written=("q_BLHK", "k_BLHK", "v_BLHK"),
    bytes=_bytes,
)
