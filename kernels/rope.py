"""rotate((x0, x1)) = (x0 cos - x1 sin, x1 cos + x0 sin) for every rotary pair of a head, in fp32 (Su et al. 2021).

Shapes: x_BLHK, cos and sin (L, P), (B, L, P) or (B, L, H, P) with P = K / 2 -> out_BLHK.
A pair is two neighbours (2p, 2p + 1), or with `half_split` an element of each half (p, P + p). A token at a point of
space and time has one table for all axes: a share of the pairs turns with each coordinate.
Why: one read and one write of x, in place if asked, instead of the four of a rotation by slices.
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
def load_pairs(row_ptrs, live, K: tl.constexpr, HALF_SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Both elements of the pairs of some heads, (ROWS, BLOCK_K / 2) each, from pointers (ROWS, 1)."""
    if HALF_SPLIT:
        p = tl.arange(0, BLOCK_K // 2)[None, :]
        x0 = tl.load(row_ptrs + p, mask=live & (p < K // 2), other=0.0)
        x1 = tl.load(row_ptrs + K // 2 + p, mask=live & (p < K // 2), other=0.0)
    else:
        # reshape and split stay in registers; loading the neighbour from memory would take 16-bit loads
        k = tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(row_ptrs + k, mask=live & (k < K), other=0.0)
        x0, x1 = tl.split(tl.reshape(x, (ROWS, BLOCK_K // 2, 2)))
    return x0.to(tl.float32), x1.to(tl.float32)


@triton.jit
def store_pairs(
    row_ptrs, x0, x1, live, K: tl.constexpr, HALF_SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    if HALF_SPLIT:
        p = tl.arange(0, BLOCK_K // 2)[None, :]
        tl.store(row_ptrs + p, x0.to(row_ptrs.dtype.element_ty), mask=live & (p < K // 2))
        tl.store(row_ptrs + K // 2 + p, x1.to(row_ptrs.dtype.element_ty), mask=live & (p < K // 2))
    else:
        k = tl.arange(0, BLOCK_K)[None, :]
        x = tl.reshape(tl.join(x0, x1), (ROWS, BLOCK_K))
        tl.store(row_ptrs + k, x.to(row_ptrs.dtype.element_ty), mask=live & (k < K))


@triton.jit
def rotate_pairs(
    x0, x1, cos_row, sin_row, h, h_stride, live, K: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Turns pairs by the table of one token, which every head shares unless PER_HEAD."""
    p = tl.arange(0, BLOCK_K // 2)[None, :]
    if PER_HEAD:
        cos = tl.load(cos_row + h * h_stride + p, mask=live & (p < K // 2), other=0.0)
        sin = tl.load(sin_row + h * h_stride + p, mask=live & (p < K // 2), other=0.0)
    else:
        cos = tl.load(cos_row + p, mask=p < K // 2, other=0.0)
        sin = tl.load(sin_row + p, mask=p < K // 2, other=0.0)
    return x0 * cos - x1 * sin, x1 * cos + x0 * sin


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr,
    x_stride_b, x_stride_l, x_stride_h, table_stride_b, table_stride_l, table_stride_h,
    out_stride_b, out_stride_l, out_stride_h, H,
    K: tl.constexpr, HALF_SPLIT: tl.constexpr, PER_HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
):
    head_blocks = tl.cdiv(H, BLOCK_H)
    row = (tl.program_id(0) // head_blocks).to(tl.int64)
    h = ((tl.program_id(0) % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    b = tl.program_id(1).to(tl.int64)
    x = x_ptr + b * x_stride_b + row * x_stride_l + h * x_stride_h
    x0, x1 = load_pairs(x, h < H, K, HALF_SPLIT, BLOCK_H, BLOCK_K)
    table = b * table_stride_b + row * table_stride_l
    x0, x1 = rotate_pairs(x0, x1, cos_ptr + table, sin_ptr + table, h, table_stride_h, h < H, K, PER_HEAD, BLOCK_K)
    out = out_ptr + b * out_stride_b + row * out_stride_l + h * out_stride_h
    store_pairs(out, x0, x1, h < H, K, HALF_SPLIT, BLOCK_H, BLOCK_K)


def rope(
    x_BLHK: Tensor, cos: Tensor, sin: Tensor,
    *, half_split: bool = False, out: Tensor | None = None, impl: launch.Impl = "auto",
) -> Tensor:  # fmt: skip
    """Rotary position embedding of heads. Returns `out`, or a new contiguous tensor.

    Args:
        x_BLHK: contiguous last dimension, even K.
        cos, sin: fp32, (L, P), (B, L, P), or (B, L, H, P) where heads turn differently; a 1 stands for any B or H.
        half_split: pairs are (p, P + p) instead of (2p, 2p + 1).
        out: shape and dtype of x; may be a slice of a wider buffer, or x itself.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    Source: `apply_rotary_emb` of diffusers; `use_real_unbind_dim=-2` is `half_split`.
    """
    launch.check_float(x_BLHK, x_BLHK=x_BLHK)
    launch.check_ndim(4, x_BLHK=x_BLHK)
    B, L, H, K = x_BLHK.shape
    cos_BLHP, sin_BLHP = per_token(x_BLHK, cos, sin)
    if out is None:
        out = x_BLHK.new_empty(B, L, H, K)
    launch.check_float(x_BLHK, out=out)
    launch.check_shape((B, L, H, K), out=out)
    launch.check_dtype(x_BLHK.dtype, out=out)
    launch.check_last_dim(x_BLHK=x_BLHK, out=out)
    if not launch.runs_triton(impl, x_BLHK):
        return rope_reference(x_BLHK, cos, sin, half_split=half_split, out=out)
    tiles = launch.tile("rope", heads=H)
    with launch.on_device(x_BLHK):
        _rope_kernel[(L * triton.cdiv(H, tiles["BLOCK_H"]), B)](
            x_BLHK, cos_BLHP, sin_BLHP, out,
            *x_BLHK.stride()[:3], *cos_BLHP.stride()[:3], *out.stride()[:3], H,
            K=K, HALF_SPLIT=half_split, PER_HEAD=cos_BLHP.shape[2] > 1,
            BLOCK_K=triton.next_power_of_2(K), enable_fp_fusion=True, **tiles,
        )  # fmt: skip
    return out


def per_token(x_BLHK: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin as (B, L, 1 or H, P) without a copy: stride 0 where they are shared.

    Raises:
        ValueError: an odd head dim, a table that does not fit, or tables of different strides.
    """
    B, L, H, K = x_BLHK.shape
    if K % 2:
        raise ValueError(f"x_BLHK: shape {tuple(x_BLHK.shape)}, expected an even head dim")
    launch.check_float(x_BLHK, cos=cos, sin=sin)
    launch.check_dtype(torch.float32, cos=cos, sin=sin)
    launch.check_shape(tuple(cos.shape), sin=sin)
    samples, *rest = cos.shape if cos.ndim > 2 else (1, *cos.shape)
    if samples not in (1, B) or rest != ([L, K // 2] if cos.ndim < 4 else [L, H, K // 2]):
        allowed = f"{(L, K // 2)}, {(B, L, K // 2)}, {(B, L, H, K // 2)}"
        raise ValueError(f"cos: shape {tuple(cos.shape)}, expected {allowed}")
    launch.check_last_dim(cos=cos, sin=sin)
    if cos.stride() != sin.stride():
        raise ValueError(f"sin: strides {sin.stride()}, expected those of cos, {cos.stride()}")
    cos, sin = (table if table.ndim == 4 else table.unsqueeze(-2) for table in (cos, sin))
    return cos.expand(B, -1, -1, -1), sin.expand(B, -1, -1, -1)


def rope_reference(
    x_BLHK: Tensor, cos: Tensor, sin: Tensor, *, half_split: bool = False, out: Tensor | None = None
) -> Tensor:
    turned = rotated(launch.widen(x_BLHK), cos, sin, half_split)
    return turned.to(x_BLHK.dtype) if out is None else out.copy_(turned)


def rotated(x_BLHK: Tensor, cos: Tensor, sin: Tensor, half_split: bool) -> Tensor:
    """A new tensor in the dtype of x, fp32 or fp64."""
    cos, sin = (table if table.ndim == 4 else table.unsqueeze(-2) for table in (cos, sin))
    if half_split:
        out = torch.empty_like(x_BLHK, memory_format=torch.contiguous_format)
        (x0, x1), (out0, out1) = x_BLHK.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(x0, cos, out=out0).addcmul_(x1, sin, value=-1)
        torch.mul(x1, cos, out=out1).addcmul_(x0, sin)
        return out
    # the rotation of a pair is a complex product, which PyTorch computes in one vectorised pass
    if x_BLHK.storage_offset() % 2 or any(stride % 2 for stride in x_BLHK.stride()[:-1]):
        x_BLHK = x_BLHK.clone(memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(x_BLHK.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def eager_rope(x_BLHK: Tensor, cos: Tensor, sin: Tensor, half_split: bool, out: Tensor) -> Tensor:
    """As diffusers runs it, which keeps tables of K columns."""
    if half_split:
        x0, x1 = x_BLHK.unflatten(-1, (2, -1)).unbind(-2)
        turned = torch.cat([-x1, x0], dim=-1)
    else:
        x0, x1 = x_BLHK.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-x1, x0], dim=-1).flatten(-2)
    cos, sin = (_columns(table, half_split) for table in (cos, sin))
    return out.copy_((x_BLHK.float() * cos + turned.float() * sin).to(x_BLHK.dtype))


def _columns(table: Tensor, half_split: bool) -> Tensor:
    table = table if table.ndim == 4 else table.unsqueeze(-2)
    return torch.cat([table, table], dim=-1) if half_split else table.repeat_interleave(2, dim=-1)


def _inputs(
    device: str, dtype: torch.dtype, B: int, L: int, H: int, K: int,
    half_split: bool, table: str, in_place: bool = False,
) -> Inputs:  # fmt: skip
    shape = {"L": (L, K // 2), "BL": (B, L, K // 2), "BLH": (B, L, H, K // 2)}[table]
    angle = noise(shape, torch.float32, device, 1)
    x_BLHK = inside(poisoned((B, L, H, 2 * K), dtype, device), noise((B, L, H, K), dtype, device), slice(K, 2 * K))
    return {
        "x_BLHK": x_BLHK,
        "cos": angle.cos(),
        "sin": angle.sin(),
        "half_split": half_split,
        "out": x_BLHK if in_place else poisoned((B, L + 2, H, K), dtype, device)[:, 1 : L + 1],
    }


OP = Op(
    name="rope",
    formula="(x0 cos - x1 sin, x1 cos + x0 sin) of neighbours or of halves",
    replaces="a rotary embedding (8 launches)",
    launch=rope,
    reference=rope_reference,
    eager=eager_rope,
    inputs=_inputs,
    tiny=(
        {"B": 1, "L": 1, "H": 1, "K": 16, "half_split": False, "table": "L"},
        {"B": 2, "L": 3, "H": 3, "K": 64, "half_split": False, "table": "BL", "in_place": True},
        {"B": 1, "L": 5, "H": 5, "K": 48, "half_split": True, "table": "L"},
        {"B": 2, "L": 2, "H": 2, "K": 66, "half_split": True, "table": "BLH"},
        {"B": 2, "L": 2, "H": 3, "K": 128, "half_split": False, "table": "BLH"},
    ),
    production=(
        {"B": 1, "L": 4608, "H": 24, "K": 128, "half_split": False, "table": "L"},
        {"B": 1, "L": 6144, "H": 32, "K": 128, "half_split": True, "table": "BLH"},
        {"B": 2, "L": 512, "H": 8, "K": 64, "half_split": True, "table": "BL"},
    ),
    cpu=(
        {"B": 1, "L": 1024, "H": 12, "K": 64, "half_split": False, "table": "L"},
        {"B": 1, "L": 1024, "H": 12, "K": 64, "half_split": True, "table": "L"},
    ),
    bytes=lambda i: 2 * i["x_BLHK"].nbytes + i["cos"].nbytes + i["sin"].nbytes,
)
