"""y = x / max(||x||, eps) * sqrt(C) * weight + bias, or x / sqrt(mean(x^2) + eps), over channels, then SiLU; in fp32.

Shapes: x_BCHW or x_BCTHW, weight_C, bias_C -> y like x; contiguous or channels last in memory.
Why: the norm of video autoencoders, whose tensors are the largest there are; fused, x is read once and written once,
straight into the padded input of the causal convolution that follows, if wanted.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.layout import is_channels_last
from sgl_diffusion.kernels.op import Inputs, Op, noise, poisoned

# B batch  C channels  S pixels of all frames


@triton.jit(do_not_specialize=["H", "W"])  # tiles of a picture are of many sizes
def _channel_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, x_stride_b, x_stride_c, x_stride_s,
    y_stride_b, y_stride_c, y_stride_t, y_stride_h, y_stride_w,
    S, C, H, W, root_c, eps,
    EPS_IN_MEAN: tl.constexpr, SILU: tl.constexpr, Y_IS_EVEN: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Some pixels with all their channels, which stay in registers between the norm and the product."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    row = c[:, None].to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    live = (c[:, None] < C) & (s < S)
    x = tl.load(x_ptr + b * x_stride_b + row * x_stride_c + s * x_stride_s, mask=live, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, axis=0)[None, :]
    y = x * (tl.rsqrt(squares / C + eps) if EPS_IN_MEAN else root_c / tl.maximum(tl.sqrt(squares), eps))
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    if SILU:
        y = y / (1.0 + tl.math.exp2(y * -1.4426950408889634))
    at = s * y_stride_w
    if not Y_IS_EVEN:  # pixels are not evenly apart: there is padding between rows
        at = s // (H * W) * y_stride_t + s // W % H * y_stride_h + s % W * y_stride_w
    tl.store(y_ptr + b * y_stride_b + row * y_stride_c + at, y.to(y_ptr.dtype.element_ty), mask=live)


def channel_norm(
    x: Tensor, weight_C: Tensor | None = None, bias_C: Tensor | None = None, *, eps: float = 1e-12,
    eps_in_mean: bool = False, silu: bool = False, out: Tensor | None = None, impl: launch.Impl = "auto",
) -> Tensor:  # fmt: skip
    """RMSNorm over channels, optionally followed by SiLU: in the dtype and memory format of x, or written to `out`.

    Args:
        x: (B, C, H, W) or (B, C, T, H, W), contiguous or channels last.
        weight_C, bias_C: any float dtype, contiguous; none is 1 and 0.
        eps_in_mean: eps is added to the mean of squares, instead of being the smallest length.
        out: shaped as x, in the dtype of x, any strides: the part of a padded buffer that is not padding.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    Source: the RMS norms of diffusers' causal video autoencoders; `PerChannelRMSNorm` has eps in the mean.
    """
    last = _checked(x, {"weight_C": weight_C, "bias_C": bias_C}, out)
    if not launch.runs_triton(impl, x):
        return channel_norm_reference(x, weight_C, bias_C, eps=eps, eps_in_mean=eps_in_mean, silu=silu, out=out)
    if out is None:
        out = torch.empty_like(x)
    B, C, *_, H, W = x.shape
    S = x[0, 0].numel()
    t, h, w = out.stride()[-3:] if x.ndim == 5 else (0, *out.stride()[-2:])
    even = (h == W * w or H == 1) and (x.ndim == 4 or x.shape[2] == 1 or t == H * W * w)
    tiles = launch.tile("channel_norm", channels=C, channels_last=int(last))
    with launch.on_device(x):
        _channel_norm_kernel[(triton.cdiv(S, tiles["BLOCK_S"]), B)](
            x, weight_C, bias_C, out, C * S, *((1, C) if last else (S, 1)), *out.stride()[:2], t, h, w,
            S, C, H, W, math.sqrt(C), eps,
            EPS_IN_MEAN=eps_in_mean, SILU=silu, Y_IS_EVEN=even, BLOCK_C=triton.next_power_of_2(C),
            enable_fp_fusion=True, **tiles,
        )  # fmt: skip
    return out


def _checked(x: Tensor, optional: dict[str, Tensor | None], out: Tensor | None) -> bool:
    """Whether x is channels last, if all fits."""
    vectors = {name: v for name, v in optional.items() if v is not None}
    launch.check_float(x, x=x, **vectors)
    if x.ndim not in (4, 5):
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (B, C, H, W) or (B, C, T, H, W)")
    launch.check_shape((x.shape[1],), **vectors)
    launch.check_contiguous(**vectors)
    if out is not None:
        launch.check_float(x, out=out)
        launch.check_shape(tuple(x.shape), out=out)
        launch.check_dtype(x.dtype, out=out)
    return is_channels_last("x", x)


def channel_norm_reference(
    x: Tensor, weight_C: Tensor | None = None, bias_C: Tensor | None = None, *, eps: float = 1e-12,
    eps_in_mean: bool = False, silu: bool = False, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    wide, C, ones = launch.widen(x), x.shape[1], [1] * (x.ndim - 2)
    if x.is_contiguous():  # across strides a product and a mean are faster than a norm
        mean_square = wide.square().mean(1, keepdim=True)
    else:
        mean_square = torch.linalg.vector_norm(wide, dim=1, keepdim=True).square_().div_(C)
    into = out if out is not None and out.dtype == wide.dtype else None
    if eps_in_mean:
        y = torch.mul(wide, mean_square.add_(eps).rsqrt_(), out=into)
    else:
        y = torch.div(wide, mean_square.sqrt_().clamp_min_(eps / math.sqrt(C)), out=into)
    if weight_C is not None:
        y.mul_(launch.widen(weight_C).view(-1, *ones))
    if bias_C is not None:
        y.add_(launch.widen(bias_C).view(-1, *ones))
    if silu:
        F.silu(y, inplace=True)
    if out is None:
        return y.to(x.dtype)
    return out if into is out else out.copy_(y)


def eager_channel_norm(
    x: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps_in_mean: bool, silu: bool, out: Tensor | None
) -> Tensor:
    """As diffusers runs it."""
    ones = [1] * (x.ndim - 2)
    if eps_in_mean:
        y = x / torch.sqrt(torch.mean(x**2, dim=1, keepdim=True) + 1e-12)
    else:
        y = F.normalize(x.float(), dim=1).to(x.dtype) * x.shape[1] ** 0.5
    if weight_C is not None:
        y = y * weight_C.view(-1, *ones)
    if bias_C is not None:
        y = y + bias_C.view(-1, *ones)
    y = F.silu(y) if silu else y
    return y if out is None else out.copy_(y)


def _inputs(
    device: str, dtype: torch.dtype, x: tuple[int, ...], weight: bool = True, bias: bool = False,
    eps_in_mean: bool = False, silu: bool = True, padded: bool = False, channels_last: bool = False,
) -> Inputs:  # fmt: skip
    B, C, *pixels = x

    def tensor(make: str, *sizes: int) -> Tensor:
        shape = (B, *sizes, C) if channels_last else (B, C, *sizes)
        filled = noise(shape, dtype, device) if make == "noise" else poisoned(shape, dtype, device)
        return filled.movedim(-1, 1) if channels_last else filled

    out = None
    if padded:  # two frames before, a pixel around
        before = [2] * (len(pixels) - 2)
        wide = tensor("poison", *(t + 2 for t in pixels[:-2]), *(n + 2 for n in pixels[-2:]))
        out = wide[(slice(None), slice(None), *(slice(n, None) for n in before), slice(1, -1), slice(1, -1))]
    return {
        "x": tensor("noise", *pixels),
        "weight_C": noise((C,), dtype, device, 1) if weight else None,
        "bias_C": noise((C,), dtype, device, 2) if bias else None,
        "eps_in_mean": eps_in_mean,
        "silu": silu,
        "out": out,
    }


OP = Op(
    name="channel_norm",
    formula="x / max(norm(x), eps) * sqrt(C) * weight + bias over channels, then SiLU if asked",
    replaces="normalize (3 launches), 2 casts, 2 mul, silu, copy into the padded input",
    launch=channel_norm,
    reference=channel_norm_reference,
    eager=eager_channel_norm,
    inputs=_inputs,
    tiny=(
        {"x": (1, 1, 1, 1)},
        {"x": (2, 6, 5, 7), "bias": True},
        {"x": (2, 6, 2, 5, 7), "padded": True, "silu": False},
        {"x": (1, 33, 2, 3, 5), "weight": False, "eps_in_mean": True},
        {"x": (2, 40, 5, 7), "channels_last": True, "bias": True},
        {"x": (1, 6, 3, 5, 7), "channels_last": True, "padded": True},
    ),
    production=(
        {"x": (1, 96, 4, 480, 832)},
        {"x": (1, 384, 2, 120, 208)},
        {"x": (1, 1024, 4, 60, 104)},
        {"x": (1, 96, 4, 480, 832), "channels_last": True},
        {"x": (1, 384, 2, 120, 208), "padded": True, "channels_last": True},
        {"x": (1, 512, 9, 64, 64), "weight": False, "eps_in_mean": True},
    ),
    cpu=(
        {"x": (1, 48, 2, 120, 104)},
        {"x": (1, 48, 2, 120, 104), "padded": True},
        {"x": (1, 96, 2, 60, 104), "channels_last": True},
        {"x": (1, 96, 2, 60, 104), "weight": False, "eps_in_mean": True},
    ),
    written=("out",),
    bytes=lambda i: 2 * i["x"].nbytes,
)
