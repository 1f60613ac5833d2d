"""q = rotate(RMSNorm(q) * q_weight), k = rotate(RMSNorm(k) * k_weight), v = v, from one projection.

rotate((x0, x1)) = (x0 cos - x1 sin, x1 cos + x0 sin) for pairs of neighbours (Su et al. 2021), in fp32.
Shapes: qkv_BL3HK, q_weight_K, k_weight_K, cos_LP, sin_LP with P = K / 2 -> q_BLHK, k_BLHK, v_BLHK.
Why: the largest lossless saving of a transformer step: about 20 small launches become one, and since
the results go straight into rows of the joint sequence's buffers, streams are never concatenated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned

# B batch  L tokens  H heads  K head dim  P = K / 2 pairs


@triton.jit
def _norm_rotate(
    x_HK, weight_ptr, cos_ptr, sin_ptr, K, eps, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr
):
    k = tl.arange(0, BLOCK_K)
    p = tl.arange(0, BLOCK_K // 2)
    rstd_H = tl.rsqrt(tl.sum(x_HK * x_HK, axis=1) / K + eps)
    weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    normed = x_HK * rstd_H[:, None] * weight[None, :]
    # reshape and split stay in registers; loading the neighbour from memory would take 16-bit loads
    x0, x1 = tl.split(tl.reshape(normed, (BLOCK_H, BLOCK_K // 2, 2)))
    cos = tl.load(cos_ptr + p, mask=p < K // 2, other=0.0)[None, :]
    sin = tl.load(sin_ptr + p, mask=p < K // 2, other=0.0)[None, :]
    return tl.reshape(tl.join(x0 * cos - x1 * sin, x1 * cos + x0 * sin), (BLOCK_H, BLOCK_K))


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr,
    in_stride_b, in_stride_l, in_stride_3, in_stride_h,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h,
    v_stride_b, v_stride_l, v_stride_h,
    L, H, K, eps,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # one token's heads of q, k or v a program
    head_blocks = tl.cdiv(H, BLOCK_H)
    row = (tl.program_id(0) // head_blocks).to(tl.int64)
    h = ((tl.program_id(0) % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    which = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_K)[None, :]
    live = (h < H) & (d < K)
    start = qkv_ptr + b * in_stride_b + row * in_stride_l + which * in_stride_3
    x = tl.load(start + h * in_stride_h + d, mask=live, other=0.0)
    cos_ptr += row * (K // 2)
    sin_ptr += row * (K // 2)
    if which == 0:
        y = _norm_rotate(x.to(tl.float32), q_weight_ptr, cos_ptr, sin_ptr, K, eps, BLOCK_H, BLOCK_K)
        out = q_ptr + b * q_stride_b + row * q_stride_l + h * q_stride_h + d
        tl.store(out, y.to(q_ptr.dtype.element_ty), mask=live)
    elif which == 1:
        y = _norm_rotate(x.to(tl.float32), k_weight_ptr, cos_ptr, sin_ptr, K, eps, BLOCK_H, BLOCK_K)
        out = k_ptr + b * k_stride_b + row * k_stride_l + h * k_stride_h + d
        tl.store(out, y.to(k_ptr.dtype.element_ty), mask=live)
    else:
        tl.store(v_ptr + b * v_stride_b + row * v_stride_l + h * v_stride_h + d, x, mask=live)


def qk_norm_rope(
    qkv_BL3HK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_LP: Tensor, sin_LP: Tensor,
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor,
    eps: float = 1e-6, *, impl: launch.Impl = "auto",
) -> None:  # fmt: skip
    """Normalises and rotates q and k of a packed projection and places q, k and v.

    Args:
        qkv_BL3HK: contiguous last dimension; may be a slice of a wider projection.
        q_weight_K, k_weight_K: weights of the RMSNorms over a head, any float dtype.
        cos_LP, sin_LP: fp32, contiguous.
        q_BLHK, k_BLHK, v_BLHK: written; dtype of qkv; may be rows of longer buffers, apart from qkv.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    Source: the joint attention processors and `apply_rotary_emb(use_real_unbind_dim=-1)` of diffusers.
    """
    weights = {"q_weight_K": q_weight_K, "k_weight_K": k_weight_K}
    tables = {"cos_LP": cos_LP, "sin_LP": sin_LP}
    outputs = {"q_BLHK": q_BLHK, "k_BLHK": k_BLHK, "v_BLHK": v_BLHK}
    launch.check_float(qkv_BL3HK, qkv_BL3HK=qkv_BL3HK, **weights, **tables, **outputs)
    if qkv_BL3HK.ndim != 5 or qkv_BL3HK.shape[2] != 3 or qkv_BL3HK.shape[4] % 2:
        shape = tuple(qkv_BL3HK.shape)
        raise ValueError(f"qkv_BL3HK: shape {shape}, expected (B, L, 3, H, K) with an even K")
    B, L, _, H, K = qkv_BL3HK.shape
    launch.check_shape((K,), **weights)
    launch.check_shape((L, K // 2), **tables)
    launch.check_shape((B, L, H, K), **outputs)
    launch.check_dtype(torch.float32, **tables)
    launch.check_dtype(qkv_BL3HK.dtype, **outputs)
    launch.check_contiguous(**weights, **tables)
    launch.check_last_dim(qkv_BL3HK=qkv_BL3HK, **outputs)
    if not launch.runs_triton(impl, qkv_BL3HK):
        qk_norm_rope_reference(
            qkv_BL3HK, q_weight_K, k_weight_K, cos_LP, sin_LP, q_BLHK, k_BLHK, v_BLHK, eps
        )
        return
    tiles = launch.tile("qk_norm_rope", heads=H, head_dim=K)
    with launch.on_device(qkv_BL3HK):
        _qk_norm_rope_kernel[(L * triton.cdiv(H, tiles["BLOCK_H"]), 3, B)](
            qkv_BL3HK, q_weight_K, k_weight_K, cos_LP, sin_LP, q_BLHK, k_BLHK, v_BLHK,
            *qkv_BL3HK.stride()[:4],
            *q_BLHK.stride()[:3], *k_BLHK.stride()[:3], *v_BLHK.stride()[:3],
            L, H, K, eps,
            BLOCK_K=triton.next_power_of_2(K), enable_fp_fusion=True, **tiles,
        )  # fmt: skip


def qk_norm_rope_reference(
    qkv_BL3HK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_LP: Tensor, sin_LP: Tensor,
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, eps: float = 1e-6,
) -> None:  # fmt: skip
    """The rotation of a pair is a complex product, which PyTorch computes in one vectorised pass."""
    q, k, v = qkv_BL3HK.unbind(2)
    turn_L1P = torch.complex(cos_LP, sin_LP)[:, None]
    for x, weight, out in ((q, q_weight_K, q_BLHK), (k, k_weight_K, k_BLHK)):
        x = launch.widen(x)
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        normed = (x * mean_square.add_(eps).rsqrt_()).mul_(launch.widen(weight))
        _pairs(normed).mul_(turn_L1P)
        out.copy_(normed)
    v_BLHK.copy_(v)


def _pairs(x: Tensor) -> Tensor:
    """Neighbours of the last dimension as complex numbers, sharing memory."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def eager_qk_norm_rope(
    qkv_BL3HK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_LP: Tensor, sin_LP: Tensor,
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor,
) -> None:  # fmt: skip
    """As diffusers runs it."""
    cos, sin = (table.repeat_interleave(2, dim=-1)[:, None] for table in (cos_LP, sin_LP))
    q, k, v = qkv_BL3HK.unbind(2)
    for x, weight, out in ((q, q_weight_K, q_BLHK), (k, k_weight_K, k_BLHK)):
        variance = x.float().pow(2).mean(-1, keepdim=True)
        x = (x * torch.rsqrt(variance + 1e-6)).to(weight.dtype) * weight
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        out.copy_((x.float() * cos + turned.float() * sin).to(x.dtype))
    v_BLHK.copy_(v)


def _inputs(device: str, dtype: torch.dtype, B: int, L: int, H: int, K: int) -> Inputs:
    projection = poisoned((B, L, 7 * H * K), dtype, device)
    qkv = inside(projection, noise((B, L, 3 * H * K), dtype, device), slice(0, 3 * H * K))
    angle_LP = noise((L, K // 2), torch.float32, device, 1)
    q_joint, k_joint = poisoned((2, B, L + 2, H, K), dtype, device)[:, :, 1 : L + 1]
    return {
        "qkv_BL3HK": qkv.unflatten(-1, (3, H, K)),
        "q_weight_K": noise((K,), dtype, device, 2),
        "k_weight_K": noise((K,), dtype, device, 3),
        "cos_LP": angle_LP.cos(),
        "sin_LP": angle_LP.sin(),
        "q_BLHK": q_joint,
        "k_BLHK": k_joint,
        "v_BLHK": poisoned((B, L, H, 2 * K), dtype, device)[..., :K],
    }


OP = Op(
    name="qk_norm_rope",
    formula="rotate(RMSNorm(q) * q_weight), rotate(RMSNorm(k) * k_weight), v",
    replaces="2 rms_norm, 2 rotary embeddings (8 launches each), 3 copies or concatenations",
    launch=qk_norm_rope,
    reference=qk_norm_rope_reference,
    eager=eager_qk_norm_rope,
    inputs=_inputs,
    tiny=(
        {"B": 1, "L": 1, "H": 1, "K": 16},
        {"B": 2, "L": 3, "H": 3, "K": 64},
        {"B": 1, "L": 5, "H": 5, "K": 48},
        {"B": 2, "L": 2, "H": 2, "K": 128},
    ),
    production=(
        {"B": 1, "L": 4608, "H": 24, "K": 128},
        {"B": 2, "L": 4096, "H": 40, "K": 128},
        {"B": 1, "L": 4096, "H": 24, "K": 64},
        {"B": 1, "L": 512, "H": 8, "K": 96},
    ),
    written=("q_BLHK", "k_BLHK", "v_BLHK"),
    cpu=({"B": 1, "L": 1024, "H": 12, "K": 64},),
    bytes=lambda i: 2 * i["qkv_BL3HK"].nbytes + i["cos_LP"].nbytes + i["sin_LP"].nbytes,
)
