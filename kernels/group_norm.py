"""y = (x - mean) / sqrt(var + eps) * weight + bias over groups of channels, then SiLU if asked; in fp32.

Shapes: x_BCHW, weight_C, bias_C -> y_BCHW (Wu & He 2018). Any number of trailing dimensions.
Why: every ResNet block of an image autoencoder starts with GroupNorm and SiLU; fused, x is read
twice and written once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, noise

# B batch  C channels  HW pixels  G = B * groups  N elements of a group, contiguous in memory
# blocks a program reads for the moments; fewer would only add partial results to combine
PASSES_PER_PART = 16


@triton.jit
def _moments_kernel(x_ptr, moments_ptr, N, span, BLOCK: tl.constexpr):
    """Count, mean and sum of squared deviations of one part of one group.

    Each lane keeps Welford's running moments and lanes meet at the end: one pass, and exact to
    rounding whatever the mean.
    """
    group, part = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    seen = 0.0
    for start in range(0, span, BLOCK):
        i = part.to(tl.int64) * span + start + lane
        live = i < N
        x = tl.load(x_ptr + group.to(tl.int64) * N + i, mask=live, other=0.0).to(tl.float32)
        seen += 1.0
        delta = x - mean
        mean += tl.where(live, delta / seen, 0.0)
        squares += tl.where(live, delta * (x - mean), 0.0)
        count += tl.where(live, 1.0, 0.0)
    total = tl.sum(count, axis=0)
    part_mean = tl.sum(mean * count, axis=0) / tl.maximum(total, 1.0)
    away = mean - part_mean
    out = moments_ptr + (group * tl.num_programs(1) + part) * 3
    tl.store(out, total)
    tl.store(out + 1, part_mean)
    tl.store(out + 2, tl.sum(squares + count * away * away, axis=0))


@triton.jit
def _normalise_kernel(
    x_ptr, moments_ptr, weight_ptr, bias_ptr, y_ptr, HW, C, channels_per_group, parts, eps,
    SILU: tl.constexpr, MAX_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):
    """One block of one channel; first combines the parts of its group in a fixed order (Chan et al. 1979)."""
    row = tl.program_id(0)  # b * C + c; groups never straddle samples
    p = tl.arange(0, MAX_PARTS)
    moments = moments_ptr + ((row // channels_per_group) * parts + p) * 3
    count = tl.load(moments, mask=p < parts, other=0.0)
    mean = tl.load(moments + 1, mask=p < parts, other=0.0)
    squares = tl.load(moments + 2, mask=p < parts, other=0.0)
    total = tl.sum(count, axis=0)
    group_mean = tl.sum(mean * count, axis=0) / total
    away = mean - group_mean
    variance = tl.sum(squares + count * away * away, axis=0) / total
    gain = tl.rsqrt(variance + eps) * tl.load(weight_ptr + row % C).to(tl.float32)
    bias = tl.load(bias_ptr + row % C).to(tl.float32)

    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * HW + i
    y = (tl.load(x_ptr + at, mask=i < HW, other=0.0).to(tl.float32) - group_mean) * gain + bias
    if SILU:
        y = y / (1.0 + tl.math.exp2(y * -1.4426950408889634))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=i < HW)


def group_norm(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float = 1e-6,
    *, silu: bool = False, impl: launch.Impl = "auto",
) -> Tensor:  # fmt: skip
    """GroupNorm, optionally followed by SiLU: a new contiguous tensor in the dtype of x.

    Args:
        x_BCHW: contiguous; (B, C, ...) with at least one trailing dimension.
        weight_C, bias_C: any float dtype, contiguous.
        groups: divides C.
    Raises:
        ValueError: a shape, dtype, device, stride or number of groups that does not fit.
    """
    launch.check_float(x_BCHW, x_BCHW=x_BCHW, weight_C=weight_C, bias_C=bias_C)
    if x_BCHW.ndim < 3:
        raise ValueError(f"x_BCHW: shape {tuple(x_BCHW.shape)}, expected (B, C, ...)")
    B, C = x_BCHW.shape[:2]
    if groups < 1 or C % groups:
        raise ValueError(f"groups={groups}: expected a divisor of the {C} channels")
    launch.check_shape((C,), weight_C=weight_C, bias_C=bias_C)
    launch.check_contiguous(x_BCHW=x_BCHW, weight_C=weight_C, bias_C=bias_C)
    if not launch.runs_triton(impl, x_BCHW):
        return group_norm_reference(x_BCHW, weight_C, bias_C, groups, eps, silu=silu)
    G, HW = B * groups, x_BCHW[0, 0].numel()
    N = C // groups * HW
    tiles = launch.tile("group_norm")
    max_parts, block, options = tiles.pop("MAX_PARTS"), tiles.pop("BLOCK"), tiles
    parts = min(max_parts, triton.cdiv(N, PASSES_PER_PART * block))
    span = triton.cdiv(triton.cdiv(N, parts), block) * block
    moments = x_BCHW.new_empty(G, parts, 3, dtype=torch.float32)
    y_BCHW = torch.empty_like(x_BCHW)
    with launch.on_device(x_BCHW):
        _moments_kernel[(G, parts)](
            x_BCHW, moments, N, span, BLOCK=block, enable_fp_fusion=True, **options
        )
        _normalise_kernel[(B * C, triton.cdiv(HW, block))](
            x_BCHW, moments, weight_C, bias_C, y_BCHW, HW, C, C // groups, parts, eps,
            SILU=silu, MAX_PARTS=max_parts, BLOCK=block, enable_fp_fusion=True, **options,
        )  # fmt: skip
    return y_BCHW


def group_norm_reference(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float = 1e-6,
    *, silu: bool = False,
) -> Tensor:  # fmt: skip
    """PyTorch's GroupNorm in fp32, and SiLU in place on its result."""
    x, weight, bias = (launch.widen(t) for t in (x_BCHW, weight_C, bias_C))
    y = F.group_norm(x, groups, weight, bias, eps)
    return (F.silu(y, inplace=True) if silu else y).to(x_BCHW.dtype)


def eager_group_norm(x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, silu: bool) -> Tensor:
    """As diffusers runs it."""
    y = F.group_norm(x_BCHW, groups, weight_C, bias_C, 1e-6)
    return F.silu(y) if silu else y


def _inputs(
    device: str, dtype: torch.dtype, B: int, C: int, HW: tuple[int, ...], groups: int, silu: bool
) -> Inputs:
    return {
        # far from zero: a variance taken as E[x^2] - E[x]^2 loses its digits here
        "x_BCHW": noise((B, C, *HW), dtype, device) + 8,
        "weight_C": noise((C,), dtype, device, 1),
        "bias_C": noise((C,), dtype, device, 2),
        "groups": groups,
        "silu": silu,
    }


OP = Op(
    name="group_norm",
    formula="(x - mean) / sqrt(var + eps) * weight + bias, then SiLU if asked",
    replaces="group_norm, silu",
    launch=group_norm,
    reference=group_norm_reference,
    eager=eager_group_norm,
    inputs=_inputs,
    tiny=(
        {"B": 1, "C": 2, "HW": (1,), "groups": 1, "silu": False},
        {"B": 2, "C": 6, "HW": (5, 7), "groups": 3, "silu": True},
        {"B": 1, "C": 8, "HW": (9, 11), "groups": 2, "silu": False},
    ),
    production=(
        {"B": 1, "C": 128, "HW": (1024, 1024), "groups": 32, "silu": True},
        {"B": 1, "C": 512, "HW": (128, 128), "groups": 32, "silu": False},
        {"B": 2, "C": 256, "HW": (3, 61, 37), "groups": 32, "silu": True},
    ),
    cpu=({"B": 1, "C": 128, "HW": (128, 128), "groups": 32, "silu": True},),
    bytes=lambda i: 3 * i["x_BCHW"].nbytes,
)
