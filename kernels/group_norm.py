"""y = (x - mean) / sqrt(var + eps) * weight + bias over groups of channels, then SiLU if asked; in fp32.

Shapes: x_BCHW, weight_C, bias_C -> y_BCHW (Wu & He 2018). Any number of trailing dimensions; in memory (B, C, ...) or
(B, ..., C), which is what convolutions on tensor cores like.
Why: every ResNet block of an autoencoder starts with GroupNorm and SiLU; fused, x is read twice and written once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.layout import is_channels_last
from sgl_diffusion.kernels.op import Inputs, Op, noise

# B batch  C channels  HW pixels  G = B * groups  N elements of a group
# blocks a program reads for the moments; fewer would only add partial results to combine
PASSES_PER_PART = 16


# -- moments ----------------------------------------------------------------------


@triton.jit
def running_moments(x, live, seen, mean, squares):
    """Each lane's mean and sum of squared deviations (Welford 1962), given its `seen`-th value: exact to rounding
    whatever the mean."""
    delta = x - mean
    mean += tl.where(live, delta / seen, 0.0)
    squares += tl.where(live, delta * (x - mean), 0.0)
    return mean, squares


@triton.jit
def combined_moments(count, mean, squares):
    """Count, mean and sum of squared deviations of everything a row of them stands for (Chan et al. 1979)."""
    total = tl.sum(count, axis=0)
    mean_of_all = tl.sum(mean * count, axis=0) / tl.maximum(total, 1.0)
    away = mean - mean_of_all
    return total, mean_of_all, tl.sum(squares + count * away * away, axis=0)


# -- contiguous: a group is N elements in a row -----------------------------------


@triton.jit
def _moments_kernel(x_ptr, moments_ptr, N, span, BLOCK: tl.constexpr):
    """Count, mean and sum of squared deviations of one part of one group, in one pass."""
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
        mean, squares = running_moments(x, live, seen, mean, squares)
        count += tl.where(live, 1.0, 0.0)
    total, part_mean, part_squares = combined_moments(count, mean, squares)
    out = moments_ptr + (group * tl.num_programs(1) + part) * 3
    tl.store(out, total)
    tl.store(out + 1, part_mean)
    tl.store(out + 2, part_squares)


@triton.jit(do_not_specialize=["parts"])
def _normalise_kernel(
    x_ptr, moments_ptr, weight_ptr, bias_ptr, y_ptr, HW, C, channels_per_group, parts, eps,
    SILU: tl.constexpr, MAX_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):
    """One block of one channel; first combines the parts of its group, always in the same order."""
    row = tl.program_id(0)  # b * C + c; groups never straddle samples
    p = tl.arange(0, MAX_PARTS)
    moments = moments_ptr + ((row // channels_per_group) * parts + p) * 3
    count = tl.load(moments, mask=p < parts, other=0.0)
    mean = tl.load(moments + 1, mask=p < parts, other=0.0)
    squares = tl.load(moments + 2, mask=p < parts, other=0.0)
    total, group_mean, group_squares = combined_moments(count, mean, squares)
    gain = tl.rsqrt(group_squares / total + eps) * tl.load(weight_ptr + row % C).to(tl.float32)
    bias = tl.load(bias_ptr + row % C).to(tl.float32)

    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * HW + i
    y = (tl.load(x_ptr + at, mask=i < HW, other=0.0).to(tl.float32) - group_mean) * gain + bias
    if SILU:
        y = y / (1.0 + tl.math.exp2(y * -1.4426950408889634))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=i < HW)


# -- channels last: a pixel is C elements in a row --------------------------------


@triton.jit
def _pixel_moments_kernel(x_ptr, moments_ptr, HW, C, span, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared deviations of some channels over one part of the pixels of a sample."""
    part, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    pixel = tl.arange(0, BLOCK_HW)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.zeros((BLOCK_HW, BLOCK_C), tl.float32)
    mean = tl.zeros((BLOCK_HW, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_HW, BLOCK_C), tl.float32)
    seen = 0.0
    for start in range(0, span, BLOCK_HW):
        hw = part * span + start + pixel
        live = (hw < HW) & (c[None, :] < C)
        x = tl.load(x_ptr + (b * HW + hw) * C + c[None, :], mask=live, other=0.0).to(tl.float32)
        seen += 1.0
        mean, squares = running_moments(x, live, seen, mean, squares)
        count += tl.where(live, 1.0, 0.0)
    _, part_mean, part_squares = combined_moments(count, mean, squares)
    out = moments_ptr + (b * tl.num_programs(0) + part) * 2 * C + c
    tl.store(out, part_mean, mask=c < C)
    tl.store(out + C, part_squares, mask=c < C)


@triton.jit
def _gains_kernel(
    moments_ptr, weight_ptr, gains_ptr, HW, C, parts, span, eps,
    GROUP: tl.constexpr,  # channels of one; a constant, so that loads are as wide as it allows
    MAX_PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Mean of one group, and weight / deviation of each of its channels."""
    b = tl.program_id(1).to(tl.int64)
    part = tl.arange(0, MAX_PARTS)[:, None]
    c = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) * GROUP + c
    live = (part < parts) & (c[None, :] < GROUP)
    moments = moments_ptr + (b * parts + part) * 2 * C + channel[None, :]
    mean = tl.load(moments, mask=live, other=0.0)
    squares = tl.load(moments + C, mask=live, other=0.0)
    pixels = tl.minimum(tl.maximum(HW - part * span, 0), span).to(tl.float32)
    count, mean, squares = combined_moments(tl.where(live, pixels, 0.0), mean, squares)
    total, group_mean, group_squares = combined_moments(count, mean, squares)

    weight = tl.load(weight_ptr + channel, mask=c < GROUP, other=0.0).to(tl.float32)
    out = gains_ptr + b * 2 * C + channel
    tl.store(out, tl.zeros((BLOCK_C,), tl.float32) + group_mean, mask=c < GROUP)
    tl.store(out + C, weight * tl.rsqrt(group_squares / total + eps), mask=c < GROUP)


@triton.jit
def _normalise_pixels_kernel(
    x_ptr, gains_ptr, bias_ptr, y_ptr, HW, C,
    SILU: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.load(gains_ptr + b * 2 * C + c, mask=c < C, other=0.0)
    gain = tl.load(gains_ptr + b * 2 * C + C + c, mask=c < C, other=0.0)
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    hw = tl.program_id(0) * BLOCK_HW + tl.arange(0, BLOCK_HW)[:, None]
    at, live = (b * HW + hw) * C + c[None, :], (hw < HW) & (c[None, :] < C)
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    y = (x - mean[None, :]) * gain[None, :] + bias[None, :]
    if SILU:
        y = y / (1.0 + tl.math.exp2(y * -1.4426950408889634))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)


# -- the operation ----------------------------------------------------------------


def group_norm(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float = 1e-6,
    *, silu: bool = False, impl: launch.Impl = "auto",
) -> Tensor:  # fmt: skip
    """GroupNorm, optionally followed by SiLU: a new tensor in the dtype and memory format of x.

    Args:
        x_BCHW: (B, C, ...) with at least one trailing dimension; contiguous or, in 2-D and 3-D, channels last.
        weight_C, bias_C: any float dtype, contiguous.
        groups: divides C.
    Raises:
        ValueError: a shape, dtype, device, stride or number of groups that does not fit.
    """
    check_groups(x_BCHW, weight_C, bias_C, groups)
    last = is_channels_last("x_BCHW", x_BCHW)
    if not launch.runs_triton(impl, x_BCHW):
        return group_norm_reference(x_BCHW, weight_C, bias_C, groups, eps, silu=silu)
    y_BCHW = torch.empty_like(x_BCHW)
    apply = _normalise_pixels if last else _normalise_groups
    with launch.on_device(x_BCHW):
        apply(x_BCHW, weight_C, bias_C, y_BCHW, groups, eps, silu)
    return y_BCHW


def check_groups(x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int) -> None:
    launch.check_float(x_BCHW, x_BCHW=x_BCHW, weight_C=weight_C, bias_C=bias_C)
    if x_BCHW.ndim < 3:
        raise ValueError(f"x_BCHW: shape {tuple(x_BCHW.shape)}, expected (B, C, ...)")
    C = x_BCHW.shape[1]
    if groups < 1 or C % groups:
        raise ValueError(f"groups={groups}: expected a divisor of the {C} channels")
    launch.check_shape((C,), weight_C=weight_C, bias_C=bias_C)
    launch.check_contiguous(weight_C=weight_C, bias_C=bias_C)


def _normalise_groups(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, y_BCHW: Tensor, groups: int, eps: float, silu: bool
) -> None:
    (B, C), HW = x_BCHW.shape[:2], x_BCHW[0, 0].numel()
    tiles = launch.tile("group_norm", channels_last=0)
    moments = moments_of_parts(x_BCHW, groups, tiles)
    _normalise_kernel[(B * C, triton.cdiv(HW, tiles["BLOCK"]))](
        x_BCHW, moments, weight_C, bias_C, y_BCHW, HW, C, C // groups, moments.shape[1], eps,
        SILU=silu, enable_fp_fusion=True, **tiles,
    )  # fmt: skip


def moments_of_parts(x_BCHW: Tensor, groups: int, tiles: launch.Tile) -> Tensor:
    """Count, mean and sum of squared deviations of parts of every group: (G, parts, 3), fp32, of a contiguous x."""
    (B, C), block = x_BCHW.shape[:2], tiles["BLOCK"]
    N = C // groups * x_BCHW[0, 0].numel()
    parts = min(tiles["MAX_PARTS"], triton.cdiv(N, PASSES_PER_PART * block))
    span = triton.cdiv(triton.cdiv(N, parts), block) * block
    options = {name: value for name, value in tiles.items() if name != "MAX_PARTS"}
    moments = x_BCHW.new_empty(B * groups, parts, 3, dtype=torch.float32)
    _moments_kernel[(B * groups, parts)](x_BCHW, moments, N, span, enable_fp_fusion=True, **options)
    return moments


def _normalise_pixels(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, y_BCHW: Tensor, groups: int, eps: float, silu: bool
) -> None:
    B, C = x_BCHW.shape[:2]
    HW = x_BCHW[0, 0].numel()
    tiles = launch.tile("group_norm", channels_last=1)
    max_parts, block, options = tiles.pop("MAX_PARTS"), tiles.pop("BLOCK"), {"enable_fp_fusion": True, **tiles}
    block_c = min(options.pop("BLOCK_C"), triton.next_power_of_2(C))
    block_hw, blocks_c = block // block_c, triton.cdiv(C, block_c)
    # blocks of channels share out the programs, so that the parts of a group stay few
    parts = min(max(1, max_parts // blocks_c), triton.cdiv(HW, PASSES_PER_PART * block_hw))
    span = triton.cdiv(triton.cdiv(HW, parts), block_hw) * block_hw
    moments = x_BCHW.new_empty(B, parts, 2, C, dtype=torch.float32)
    gains = x_BCHW.new_empty(B, 2, C, dtype=torch.float32)
    _pixel_moments_kernel[(parts, blocks_c, B)](
        x_BCHW, moments, HW, C, span, BLOCK_HW=block_hw, BLOCK_C=block_c, **options
    )
    _gains_kernel[(groups, B)](
        moments, weight_C, gains, HW, C, parts, span, eps, GROUP=C // groups,
        MAX_PARTS=triton.next_power_of_2(parts), BLOCK_C=triton.next_power_of_2(C // groups), **options,
    )  # fmt: skip
    _normalise_pixels_kernel[(triton.cdiv(HW, block_hw), blocks_c, B)](
        x_BCHW, gains, bias_C, y_BCHW, HW, C, SILU=silu, BLOCK_HW=block_hw, BLOCK_C=block_c, **options
    )


def group_norm_reference(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float = 1e-6,
    *, silu: bool = False,
) -> Tensor:  # fmt: skip
    """PyTorch's GroupNorm in fp32, and SiLU in place on its result.

    For channels last it takes the variance as E[x^2] - E[x]^2, which for a mean of 8 deviations is wrong by 5e-5: there
    the mean is taken out first, which costs a pass.
    """
    x, weight, bias = (launch.widen(t) for t in (x_BCHW, weight_C, bias_C))
    if is_channels_last("x_BCHW", x):
        B, C = x.shape[:2]
        mean_BG = x.flatten(2).mean(-1).view(B, groups, -1).mean(-1, keepdim=True)
        x = x - mean_BG.expand(-1, -1, C // groups).reshape(B, C, *[1] * (x.ndim - 2))
    y = F.group_norm(x, groups, weight, bias, eps)
    return (F.silu(y, inplace=True) if silu else y).to(x_BCHW.dtype)


def eager_group_norm(x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, silu: bool) -> Tensor:
    """As diffusers runs it."""
    y = F.group_norm(x_BCHW, groups, weight_C, bias_C, 1e-6)
    return F.silu(y) if silu else y


def _inputs(
    device: str, dtype: torch.dtype, B: int, C: int, HW: tuple[int, ...], groups: int, silu: bool,
    channels_last: bool = False,
) -> Inputs:  # fmt: skip
    # far from zero: a variance taken as E[x^2] - E[x]^2 loses its digits here
    x = noise((B, *HW, C) if channels_last else (B, C, *HW), dtype, device) + 8
    return {
        "x_BCHW": x.movedim(-1, 1) if channels_last else x,
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
        {"B": 2, "C": 6, "HW": (5, 7), "groups": 2, "silu": True, "channels_last": True},
        {"B": 1, "C": 40, "HW": (3, 5, 7), "groups": 8, "silu": False, "channels_last": True},
    ),
    production=(
        {"B": 1, "C": 128, "HW": (1024, 1024), "groups": 32, "silu": True},
        {"B": 1, "C": 512, "HW": (128, 128), "groups": 32, "silu": False},
        {"B": 2, "C": 256, "HW": (3, 60, 104), "groups": 32, "silu": True},
        {"B": 1, "C": 128, "HW": (1024, 1024), "groups": 32, "silu": True, "channels_last": True},
        {"B": 1, "C": 512, "HW": (17, 64, 64), "groups": 32, "silu": True, "channels_last": True},
    ),
    cpu=(
        {"B": 1, "C": 128, "HW": (128, 128), "groups": 32, "silu": True},
        {"B": 1, "C": 128, "HW": (128, 128), "groups": 32, "silu": True, "channels_last": True},
    ),
    bytes=lambda i: 3 * i["x_BCHW"].nbytes,
)
