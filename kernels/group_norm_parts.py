"""`group_norm` of a picture that lies in parts on several ranks: each takes the moments of its own, and is given those
of all.

    group_moments: count, mean and sum of squared deviations of every group of a part
    group_norm_parts: y = (x - mean) / sqrt(var + eps) * weight + bias, then SiLU if asked; in fp32, of one part

Shapes: x_BCHW, moments_PG3, weight_C, bias_C -> y_BCHW; contiguous. Moments of parts become those of the whole without
a loss of digits (Chan et al. 1979), so that it is the group norm of the whole.
Why: what travels are three numbers a group; y is written straight into a taller tensor, between the rows of neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.group_norm import check_groups, combined_moments, moments_of_parts
from sgl_diffusion.kernels.op import Inputs, Op, noise, poisoned

# B batch  C channels  HW pixels  G = B * groups  P parts of the picture


@triton.jit
def _moments_of_whole(moments_ptr, parts, stride, MAX_PARTS: tl.constexpr):
    """Of one group, from those of its parts, always combined in the same order."""
    p = tl.arange(0, MAX_PARTS)
    moments = moments_ptr + p * stride
    count = tl.load(moments, mask=p < parts, other=0.0)
    mean = tl.load(moments + 1, mask=p < parts, other=0.0)
    squares = tl.load(moments + 2, mask=p < parts, other=0.0)
    return combined_moments(count, mean, squares)


@triton.jit(do_not_specialize=["parts"])
def _combine_kernel(parts_ptr, moments_ptr, parts, MAX_PARTS: tl.constexpr):
    """One group."""
    group = tl.program_id(0)
    total, mean, squares = _moments_of_whole(parts_ptr + group * parts * 3, parts, 3, MAX_PARTS)
    tl.store(moments_ptr + group * 3, total)
    tl.store(moments_ptr + group * 3 + 1, mean)
    tl.store(moments_ptr + group * 3 + 2, squares)


@triton.jit(do_not_specialize=["parts"])
def _normalise_kernel(
    x_ptr, moments_ptr, weight_ptr, bias_ptr, y_ptr, HW, C, y_stride_b, y_stride_c, channels_per_group, parts, G, eps,
    SILU: tl.constexpr, MAX_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one channel."""
    row = tl.program_id(0)  # b * C + c; groups never straddle samples
    moments = moments_ptr + (row // channels_per_group) * 3
    total, group_mean, group_squares = _moments_of_whole(moments, parts, G * 3, MAX_PARTS)
    gain = tl.rsqrt(group_squares / total + eps) * tl.load(weight_ptr + row % C).to(tl.float32)
    bias = tl.load(bias_ptr + row % C).to(tl.float32)

    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row.to(tl.int64) * HW + i, mask=i < HW, other=0.0).to(tl.float32)
    y = (x - group_mean) * gain + bias
    if SILU:
        y = y / (1.0 + tl.math.exp2(y * -1.4426950408889634))
    plane = (row // C).to(tl.int64) * y_stride_b + (row % C).to(tl.int64) * y_stride_c
    tl.store(y_ptr + plane + i, y.to(y_ptr.dtype.element_ty), mask=i < HW)


# -- the operations ---------------------------------------------------------------


def group_moments(x_BCHW: Tensor, groups: int, *, impl: launch.Impl = "auto") -> Tensor:
    """Count, mean and sum of squared deviations of every group of every sample: (G, 3), fp32.

    Args:
        x_BCHW: (B, C, ...) with at least one trailing dimension; contiguous.
        groups: divides C.
    Raises:
        ValueError: a shape, dtype, stride or number of groups that does not fit.
    """
    launch.check_float(x_BCHW, x_BCHW=x_BCHW)
    launch.check_contiguous(x_BCHW=x_BCHW)
    if x_BCHW.ndim < 3 or groups < 1 or x_BCHW.shape[1] % groups:
        raise ValueError(f"x_BCHW: shape {tuple(x_BCHW.shape)}, expected (B, C, ...) with C in {groups} groups")
    if not launch.runs_triton(impl, x_BCHW):
        return group_moments_reference(x_BCHW, groups)
    tiles = launch.tile("group_moments")
    with launch.on_device(x_BCHW):
        parts_GP3 = moments_of_parts(x_BCHW, groups, tiles)
        G, parts, _ = parts_GP3.shape
        if parts == 1:
            return parts_GP3.view(G, 3)
        moments_G3 = parts_GP3.new_empty(G, 3)
        _combine_kernel[(G,)](
            parts_GP3, moments_G3, parts, MAX_PARTS=tiles["MAX_PARTS"], enable_fp_fusion=True, num_warps=1
        )
    return moments_G3


def group_norm_parts(
    x_BCHW: Tensor, moments_PG3: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float = 1e-6, *,
    silu: bool = False, out: Tensor | None = None, impl: launch.Impl = "auto",
) -> Tensor:  # fmt: skip
    """GroupNorm by the moments of all parts, optionally followed by SiLU: in the dtype of x, or written to `out`.

    Args:
        x_BCHW: (B, C, ...) with at least one trailing dimension; contiguous. One part, or some of its pixels.
        moments_PG3: `group_moments` of every part, fp32, contiguous.
        weight_C, bias_C: any float dtype, contiguous.
        groups: divides C.
        out: shaped as x, in its dtype; the pixels of a channel are contiguous: rows of a taller tensor.
    Raises:
        ValueError: a shape, dtype, device, stride or number of groups that does not fit.
    """
    check_groups(x_BCHW, weight_C, bias_C, groups)
    launch.check_float(x_BCHW, moments_PG3=moments_PG3)
    launch.check_contiguous(x_BCHW=x_BCHW, moments_PG3=moments_PG3)
    launch.check_dtype(torch.float32, moments_PG3=moments_PG3)
    (B, C), HW, parts = x_BCHW.shape[:2], x_BCHW[0, 0].numel(), len(moments_PG3)
    launch.check_shape((parts, B * groups, 3), moments_PG3=moments_PG3)
    if out is not None:
        launch.check_float(x_BCHW, out=out)
        launch.check_dtype(x_BCHW.dtype, out=out)
        launch.check_shape(tuple(x_BCHW.shape), out=out)
        launch.check_contiguous(pixels_of_out=out[0, 0])
    if not launch.runs_triton(impl, x_BCHW):
        return group_norm_parts_reference(x_BCHW, moments_PG3, weight_C, bias_C, groups, eps, silu=silu, out=out)
    y_BCHW = torch.empty_like(x_BCHW) if out is None else out
    tiles = launch.tile("group_norm_parts")
    with launch.on_device(x_BCHW):
        _normalise_kernel[(B * C, triton.cdiv(HW, tiles["BLOCK"]))](
            x_BCHW, moments_PG3, weight_C, bias_C, y_BCHW, HW, C, *y_BCHW.stride()[:2], C // groups, parts, B * groups,
            eps, SILU=silu, MAX_PARTS=triton.next_power_of_2(parts), enable_fp_fusion=True, **tiles,
        )  # fmt: skip
    return y_BCHW


def group_moments_reference(x_BCHW: Tensor, groups: int) -> Tensor:
    x_GN = launch.widen(x_BCHW).reshape(len(x_BCHW) * groups, -1)
    variance_G, mean_G = torch.var_mean(x_GN, -1, correction=0)
    N = x_GN.shape[-1]
    return torch.stack([torch.full_like(mean_G, N), mean_G, variance_G * N], -1)


def group_norm_parts_reference(
    x_BCHW: Tensor, moments_PG3: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float = 1e-6, *,
    silu: bool = False, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    x, weight, bias = (launch.widen(t) for t in (x_BCHW, weight_C, bias_C))
    count, mean, squares = moments_PG3.unbind(-1)
    total = count.sum(0)
    mean_G = (mean * count).sum(0) / total
    variance_G = (squares + count * (mean - mean_G).square()).sum(0) / total
    (B, C), ones = x.shape[:2], [1] * (x.ndim - 2)
    mean, deviation = (v.repeat_interleave(C // groups).view(B, C, *ones) for v in (mean_G, (variance_G + eps).sqrt()))
    into = out if out is not None and out.dtype == x.dtype else None
    y = torch.sub(x, mean, out=into).mul_(weight.view(-1, *ones) / deviation).add_(bias.view(-1, *ones))
    y = F.silu(y, inplace=True) if silu else y
    if out is None:
        return y.to(x_BCHW.dtype)
    return out if into is out else out.copy_(y)


# -- the catalog's entries --------------------------------------------------------


def eager_group_moments(x_BCHW: Tensor, groups: int) -> Tensor:
    """By PyTorch's operations, as diffusers has none."""
    x_GN = x_BCHW.view(len(x_BCHW) * groups, -1).float()
    variance_G, mean_G = torch.var_mean(x_GN, -1, correction=0)
    return torch.stack([torch.full_like(mean_G, x_GN.shape[-1]), mean_G, variance_G * x_GN.shape[-1]], -1)


def eager_group_norm_parts(
    x_BCHW: Tensor, moments_PG3: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, silu: bool, out: Tensor | None
) -> Tensor:
    """By PyTorch's operations, as diffusers has no parts; a copy into `out` stands for the padding of a convolution."""
    count, mean, squares = moments_PG3.unbind(-1)
    total = count.sum(0)
    mean_G = (mean * count).sum(0) / total
    variance_G = (squares + count * (mean - mean_G) ** 2).sum(0) / total
    x = x_BCHW.float().view(len(mean_G), -1)
    y = ((x - mean_G[:, None]) * (variance_G + 1e-6).rsqrt()[:, None]).view(x_BCHW.shape)
    y = (y * weight_C.float().view(-1, 1, 1) + bias_C.float().view(-1, 1, 1)).to(x_BCHW.dtype)
    y = F.silu(y) if silu else y
    return y if out is None else out.copy_(y)


def _moments_inputs(device: str, dtype: torch.dtype, B: int, C: int, HW: tuple[int, ...], groups: int) -> Inputs:
    return {"x_BCHW": noise((B, C, *HW), dtype, device) + 8, "groups": groups}


def _parts_inputs(
    device: str, dtype: torch.dtype, B: int, C: int, HW: tuple[int, int], groups: int, parts: int, silu: bool,
    with_rims: bool,
) -> Inputs:  # fmt: skip
    """The first of parts whose sizes, means and deviations differ, as those of a sky and of a forest."""
    shape = (B, C, *HW)
    each = [
        torch.stack([torch.full_like(m[:, 0], 1 + i), m[:, 0] + 8, (1 + i) * m[:, 1].abs()], -1)
        for i, m in enumerate(noise((parts, B * groups, 2), torch.float32, device, 3))
    ]
    wider = poisoned((B, C, HW[0] + 2, HW[1]), dtype, device)
    return {
        "x_BCHW": noise(shape, dtype, device) + 8,
        "moments_PG3": torch.stack(each),
        "weight_C": noise((C,), dtype, device, 1),
        "bias_C": noise((C,), dtype, device, 2),
        "groups": groups,
        "silu": silu,
        "out": wider[:, :, 1:-1] if with_rims else None,
    }


MOMENTS_OP = Op(
    name="group_moments",
    formula="count, mean and sum of squared deviations of every group",
    replaces="to fp32, var_mean, fill, mul, stack",
    launch=group_moments,
    reference=group_moments_reference,
    eager=eager_group_moments,
    inputs=_moments_inputs,
    tiny=(
        {"B": 1, "C": 2, "HW": (1,), "groups": 1},
        {"B": 2, "C": 6, "HW": (5, 7), "groups": 3},
        {"B": 1, "C": 8, "HW": (9, 31), "groups": 2},
    ),
    production=(
        {"B": 1, "C": 512, "HW": (32, 128), "groups": 32},
        {"B": 1, "C": 128, "HW": (256, 1024), "groups": 32},
    ),
    cpu=({"B": 1, "C": 128, "HW": (64, 128), "groups": 32},),
    narrow_loads="what parts are combined from is three numbers each, in fp32",
    bytes=lambda i: i["x_BCHW"].nbytes,
)

PARTS_OP = Op(
    name="group_norm_parts",
    formula="group_norm of a part of a picture, by the moments of all parts",
    replaces="13 of moments, to fp32, sub, mul, mul, add, cast, silu, pad",
    launch=group_norm_parts,
    reference=group_norm_parts_reference,
    eager=eager_group_norm_parts,
    inputs=_parts_inputs,
    tiny=(
        {"B": 1, "C": 2, "HW": (1, 1), "groups": 1, "parts": 1, "silu": False, "with_rims": False},
        {"B": 2, "C": 6, "HW": (5, 7), "groups": 3, "parts": 3, "silu": True, "with_rims": True},
        {"B": 1, "C": 8, "HW": (9, 11), "groups": 2, "parts": 2, "silu": False, "with_rims": False},
    ),
    production=(
        {"B": 1, "C": 128, "HW": (256, 1024), "groups": 32, "parts": 4, "silu": True, "with_rims": True},
        {"B": 1, "C": 512, "HW": (32, 128), "groups": 32, "parts": 4, "silu": False, "with_rims": False},
    ),
    cpu=({"B": 1, "C": 128, "HW": (64, 128), "groups": 32, "parts": 2, "silu": True, "with_rims": True},),
    bytes=lambda i: 2 * i["x_BCHW"].nbytes,
    written=("out",),
)
