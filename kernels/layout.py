"""Layouts around the convolutions of an autoencoder: nearest upsampling, and the padding of a causal convolution.

    upsample_nearest: y[b, c, t, h, w] = x[b, c, t or t // 2, h // 2, w // 2]
    causal_pad: (frames before, x, frames after) along time, pixels around each frame

Shapes: x_BCHW or x_BCTHW, contiguous or channels last -> the same memory format. Values are copied bit by bit.
Why: x is read once and every value written once; PyTorch concatenates the cached frames, then pads, and so moves a
video's largest tensors twice.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, noise

# B batch  C channels  T frames  H, W pixels
# In memory both formats are (outer, T, H, W, inner): contiguous (B * C, T, H, W, 1), channels last (B, T, H, W, C).

FrameMode = Literal["zero", "replicate"]
PixelMode = Literal["zero", "replicate", "reflect"]
PIXEL_MODES = ("zero", "replicate", "reflect")


def is_channels_last(name: str, x: Tensor) -> bool:
    """False for a contiguous (B, C, ...), True for one that is contiguous as (B, ..., C), in 2-D and 3-D."""
    if x.is_contiguous():
        return False
    if x.ndim in (4, 5) and x.movedim(1, -1).is_contiguous():
        return True
    strides = f"strides {x.stride()} for shape {tuple(x.shape)}"
    raise ValueError(f"{name}: {strides}, expected contiguous or channels last")


def _empty(like: Tensor, shape: tuple[int, ...], last: bool) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats[len(shape)] if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


# -- nearest upsampling -----------------------------------------------------------

NARROW, WIDE = 64, 1024  # pixels


@triton.jit(do_not_specialize=["ROWS", "H"])
def _upsample_rows_kernel(
    x_ptr, y_ptr, ROWS, H, W,
    FACTOR_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Contiguous: some rows of W pixels, each written FACTOR_T * 2 times."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64) * W + w, mask=(row < ROWS) & (w < W), other=0.0)
    y = tl.interleave(x, x)
    w = tl.program_id(1) * (2 * BLOCK_W) + tl.arange(0, 2 * BLOCK_W)[None, :]
    live = (row < ROWS) & (w < 2 * W)
    frame, h = row // H, row % H
    for t in tl.static_range(FACTOR_T):
        for down in tl.static_range(2):
            out = (frame * FACTOR_T + t).to(tl.int64) * (2 * H) + 2 * h + down
            tl.store(y_ptr + out * (2 * W) + w, y, mask=live)


@triton.jit(do_not_specialize=["PIXELS", "H", "W"])
def _upsample_pixels_kernel(
    x_ptr, y_ptr, PIXELS, H, W, C,
    FACTOR_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Channels last: some pixels of C values, each written FACTOR_T * 4 times."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    live = (p < PIXELS) & (c < C)
    y = tl.load(x_ptr + p.to(tl.int64) * C + c, mask=live, other=0.0)
    frame, h, w = p // (H * W), p // W % H, p % W
    for t in tl.static_range(FACTOR_T):
        for down in tl.static_range(2):
            for right in tl.static_range(2):
                row = (frame * FACTOR_T + t).to(tl.int64) * (2 * H) + 2 * h + down
                out = row * (2 * W) + 2 * w + right
                tl.store(y_ptr + out * C + c, y, mask=live)


def upsample_nearest(x: Tensor, *, frames: bool = False, impl: launch.Impl = "auto") -> Tensor:
    """Twice the height and width, and with `frames` twice the frames: a new tensor in the memory format of x.

    Args:
        x: (B, C, H, W), or (B, C, T, H, W); contiguous or channels last.
    Raises:
        ValueError: a shape, dtype or stride that does not fit.
    Source: `F.interpolate(mode="nearest")` in the upsampling blocks of diffusers' autoencoders.
    """
    launch.check_float(x, x=x)
    if x.ndim != 5 and (frames or x.ndim != 4):
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (B, C, {'' if frames else '[T,] '}{'T, ' * frames}H, W)")
    last = is_channels_last("x", x)
    if not launch.runs_triton(impl, x):
        return upsample_nearest_reference(x, frames=frames)
    H, W = x.shape[-2:]
    factor = 2 if frames else 1
    y = _empty(x, (*x.shape[:-3], x.shape[-3] * factor, 2 * H, 2 * W), last)
    tiles = launch.tile("upsample_nearest")
    block, options = tiles.pop("BLOCK"), {"FACTOR_T": factor, "enable_fp_fusion": True, **tiles}
    with launch.on_device(x):
        if last:
            C = x.shape[1]
            block_c = min(block, triton.next_power_of_2(C))
            block_p, pixels = block // block_c, x.numel() // C
            _upsample_pixels_kernel[(triton.cdiv(pixels, block_p), triton.cdiv(C, block_c))](
                x, y, pixels, H, W, C, BLOCK_P=block_p, BLOCK_C=block_c, **options
            )
        else:
            # pictures, and tiles at their edges, are of any width: the narrow ones share a kernel, and the wide ones do
            block_w = min(block, max(NARROW, min(WIDE, triton.next_power_of_2(W))))
            block_r, rows = block // block_w, x.numel() // W
            _upsample_rows_kernel[(triton.cdiv(rows, block_r), triton.cdiv(W, block_w))](
                x, y, rows, H, W, BLOCK_R=block_r, BLOCK_W=block_w, **options
            )
    return y


def upsample_nearest_reference(x: Tensor, *, frames: bool = False) -> Tensor:
    factors = (2.0, 2.0) if x.ndim == 4 else (2.0 if frames else 1.0, 2.0, 2.0)
    return F.interpolate(x, scale_factor=factors, mode="nearest")


def eager_upsample_nearest(x: Tensor, frames: bool) -> Tensor:
    """As diffusers runs it: frame by frame unless their number changes."""
    if frames or x.ndim == 4:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    B, C, T, H, W = x.shape
    y = F.interpolate(x.permute(0, 2, 1, 3, 4).reshape(B * T, C, H, W), scale_factor=(2.0, 2.0), mode="nearest")
    return y.view(B, T, C, 2 * H, 2 * W).permute(0, 2, 1, 3, 4)


# -- causal padding ---------------------------------------------------------------


@triton.jit
def _source(i, SIZE, MODE: tl.constexpr):
    """The position in 0..SIZE-1 that position i of a padded axis takes its value from, if it takes one."""
    if MODE == "reflect":
        i = tl.where(i < 0, -i, tl.where(i < SIZE, i, 2 * SIZE - 2 - i))
    if MODE == "replicate":
        i = tl.minimum(tl.maximum(i, 0), SIZE - 1)
    return i, (i >= 0) & (i < SIZE)


@triton.jit
def _causal_pad_kernel(
    x_ptr, cache_ptr, y_ptr, PIXELS, CACHED, T, H, W, C, before, pad,
    FRAME_MODE: tl.constexpr, PIXEL_MODE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Some pixels of the result, each of C values; frames 0..CACHED-1 of the source are the cache, then come x's."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    w, w_live = _source(p % (W + 2 * pad) - pad, W, PIXEL_MODE)
    row = p // (W + 2 * pad)
    h, h_live = _source(row % (H + 2 * pad) - pad, H, PIXEL_MODE)
    t, t_live = _source(row // (H + 2 * pad) - (before - CACHED), CACHED + T, FRAME_MODE)
    live = (p < PIXELS) & w_live & h_live & t_live
    outer = tl.program_id(2).to(tl.int64)
    place = (t.to(tl.int64) * H + h) * W + w

    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    at = (outer * T - CACHED) * (H * W) + place
    y = tl.load(x_ptr + at[:, None] * C + c, mask=(live & (t >= CACHED))[:, None] & (c < C), other=0.0)
    if cache_ptr is not None:
        in_cache = (live & (t < CACHED))[:, None]
        at = outer * CACHED * (H * W) + place
        y = tl.where(in_cache, tl.load(cache_ptr + at[:, None] * C + c, mask=in_cache & (c < C), other=0.0), y)
    at = outer * PIXELS + p
    tl.store(y_ptr + at[:, None] * C + c, y, mask=(p < PIXELS)[:, None] & (c < C))


def causal_pad(
    x_BCTHW: Tensor, cache_BCTHW: Tensor | None = None, *, before: int, after: int = 0, pixels: int = 0,
    frame_mode: FrameMode = "zero", pixel_mode: PixelMode = "zero", impl: launch.Impl = "auto",
) -> Tensor:  # fmt: skip
    """The input of a causal convolution: a new (B, C, before + T + after, H + 2 pixels, W + 2 pixels), as x in memory.

    Args:
        x_BCTHW: contiguous or channels last.
        cache_BCTHW: at most `before` frames that precede x, in its memory format.
        before, after: frames to add; those the cache does not give are zero, or repeat the nearest frame.
        pixels: to add on each side; zero, or the nearest pixel, or mirrored without repeating the edge.
    Raises:
        ValueError: a shape, dtype, device, stride, mode or number of frames or pixels that does not fit.
    Source: the causal convolutions of diffusers' video autoencoders.
    """
    last = _check_pad(x_BCTHW, cache_BCTHW, before, after, pixels, frame_mode, pixel_mode)
    if not launch.runs_triton(impl, x_BCTHW):
        return causal_pad_reference(
            x_BCTHW, cache_BCTHW, before=before, after=after, pixels=pixels, frame_mode=frame_mode,
            pixel_mode=pixel_mode,
        )  # fmt: skip
    B, C, T, H, W = x_BCTHW.shape
    y_BCTHW = _empty(x_BCTHW, (B, C, before + T + after, H + 2 * pixels, W + 2 * pixels), last)
    outer, inner = (B, C) if last else (B * C, 1)
    cached = 0 if cache_BCTHW is None else cache_BCTHW.shape[2]
    count = y_BCTHW.numel() // (outer * inner)
    tiles = launch.tile("causal_pad", channels_last=int(last))
    block = tiles.pop("BLOCK")
    block_c = min(block, triton.next_power_of_2(inner))
    block_p = block // block_c
    with launch.on_device(x_BCTHW):
        _causal_pad_kernel[(triton.cdiv(count, block_p), triton.cdiv(inner, block_c), outer)](
            x_BCTHW, cache_BCTHW, y_BCTHW, count, cached, T, H, W, inner, before, pixels,
            FRAME_MODE=frame_mode, PIXEL_MODE=pixel_mode, BLOCK_P=block_p, BLOCK_C=block_c,
            enable_fp_fusion=True, **tiles,
        )  # fmt: skip
    return y_BCTHW


def _check_pad(
    x_BCTHW: Tensor, cache_BCTHW: Tensor | None, before: int, after: int, pixels: int,
    frame_mode: str, pixel_mode: str,
) -> bool:  # fmt: skip
    """Whether x is channels last."""
    launch.check_ndim(5, x_BCTHW=x_BCTHW)
    launch.check_float(x_BCTHW, x_BCTHW=x_BCTHW)
    last = is_channels_last("x_BCTHW", x_BCTHW)
    B, C, _, H, W = x_BCTHW.shape
    if frame_mode not in PIXEL_MODES[:2]:
        raise ValueError(f"frame_mode={frame_mode!r}: expected zero or replicate")
    if pixel_mode not in PIXEL_MODES:
        raise ValueError(f"pixel_mode={pixel_mode!r}: expected zero, replicate or reflect")
    if min(before, after, pixels) < 0:
        raise ValueError(f"before={before}, after={after}, pixels={pixels}: expected none below 0")
    if pixel_mode == "reflect" and pixels >= min(H, W):
        raise ValueError(f"pixels={pixels}: expected less than H and W, {H} and {W}, to reflect")
    if cache_BCTHW is not None:
        launch.check_ndim(5, cache_BCTHW=cache_BCTHW)
        launch.check_float(x_BCTHW, cache_BCTHW=cache_BCTHW)
        launch.check_dtype(x_BCTHW.dtype, cache_BCTHW=cache_BCTHW)
        cached = cache_BCTHW.shape[2]
        launch.check_shape((B, C, cached, H, W), cache_BCTHW=cache_BCTHW)
        if not 1 <= cached <= before:
            raise ValueError(f"cache_BCTHW: {cached} frames, expected 1 to before={before}")
        if not (cache_BCTHW.movedim(1, -1) if last else cache_BCTHW).is_contiguous():
            layout = "channels last" if last else "contiguous"
            raise ValueError(f"cache_BCTHW: strides {cache_BCTHW.stride()}, expected {layout} as x")
    return last


def causal_pad_reference(
    x_BCTHW: Tensor, cache_BCTHW: Tensor | None = None, *, before: int, after: int = 0, pixels: int = 0,
    frame_mode: FrameMode = "zero", pixel_mode: PixelMode = "zero",
) -> Tensor:  # fmt: skip
    """Every value written once: the frames into their place, then what surrounds them."""
    B, C, T, H, W = x_BCTHW.shape
    last = is_channels_last("x_BCTHW", x_BCTHW)
    if cache_BCTHW is None and not last and frame_mode == pixel_mode == "replicate":
        return F.pad(x_BCTHW, (*[pixels] * 4, before, after), mode="replicate")
    y = _empty(x_BCTHW, (B, C, before + T + after, H + 2 * pixels, W + 2 * pixels), last)
    rows, columns = slice(pixels, pixels + H), slice(pixels, pixels + W)
    frames = y[..., rows, columns]
    first = before
    frames[:, :, before : before + T] = x_BCTHW
    if cache_BCTHW is not None:
        first -= cache_BCTHW.shape[2]
        frames[:, :, first:before] = cache_BCTHW
    repeats = frame_mode == "replicate"
    frames[:, :, :first] = frames[:, :, first : first + 1] if repeats else 0
    frames[:, :, before + T :] = frames[:, :, before + T - 1 : before + T] if repeats else 0
    _pad_axis(y[..., columns], -2, pixels, pixel_mode)
    _pad_axis(y, -1, pixels, pixel_mode)
    return y


def _pad_axis(y: Tensor, dim: int, pad: int, mode: PixelMode) -> None:
    """Fills the outermost `pad` places on both sides of an axis from those within."""
    for i in range(pad):
        source = pad if mode == "replicate" else 2 * pad - i
        for place, origin in ((i, source), (-1 - i, -1 - source)):
            if mode == "zero":
                y.select(dim, place).zero_()
            else:
                y.select(dim, place).copy_(y.select(dim, origin))


def eager_causal_pad(
    x_BCTHW: Tensor, cache_BCTHW: Tensor | None, before: int, after: int, pixels: int,
    frame_mode: FrameMode, pixel_mode: PixelMode,
) -> Tensor:  # fmt: skip
    """As diffusers runs it: concatenation, then padding."""
    x, around = x_BCTHW, (pixels,) * 4
    if cache_BCTHW is not None:
        x = torch.cat([cache_BCTHW, x], dim=2)
        before -= cache_BCTHW.shape[2]
    if frame_mode == pixel_mode:
        return F.pad(x, (*around, before, after), mode="constant" if pixel_mode == "zero" else pixel_mode)
    if frame_mode == "replicate":
        x = torch.cat([x[:, :, :1].repeat(1, 1, before, 1, 1), x, x[:, :, -1:].repeat(1, 1, after, 1, 1)], dim=2)
    else:
        x = F.pad(x, (0, 0, 0, 0, before, after))
    return F.pad(x, (*around, 0, 0), mode="constant" if pixel_mode == "zero" else pixel_mode)


# -- operations -------------------------------------------------------------------


def _ground(shape: tuple[int, ...], dtype: torch.dtype, device: str, last: bool, seed: int = 0) -> Tensor:
    """(B, C, ...) in either memory format."""
    B, C, *rest = shape
    return noise((B, *rest, C), dtype, device, seed).movedim(-1, 1) if last else noise(shape, dtype, device, seed)


def _upsample_inputs(
    device: str, dtype: torch.dtype, x: tuple[int, ...], frames: bool = False, channels_last: bool = False
) -> Inputs:
    return {"x": _ground(x, dtype, device, channels_last), "frames": frames}


UPSAMPLE_NEAREST = Op(
    name="upsample_nearest",
    formula="every pixel 2 x 2 times, and every frame twice if asked",
    replaces="2 transposes of frames, interpolate",
    launch=upsample_nearest,
    reference=upsample_nearest_reference,
    eager=eager_upsample_nearest,
    inputs=_upsample_inputs,
    tiny=(
        {"x": (1, 1, 1, 1)},
        {"x": (2, 3, 5, 7)},
        {"x": (2, 3, 2, 3, 5), "frames": True},
        {"x": (2, 5, 3, 7), "channels_last": True},
        {"x": (2, 40, 2, 3, 4), "channels_last": True},
        {"x": (1, 5, 2, 3, 4), "frames": True, "channels_last": True},
    ),
    production=(
        {"x": (1, 512, 256, 256)},
        {"x": (1, 512, 256, 256), "channels_last": True},
        {"x": (1, 192, 4, 240, 416), "channels_last": True},
        {"x": (1, 256, 9, 128, 128), "frames": True, "channels_last": True},
    ),
    cpu=({"x": (1, 64, 64, 64)}, {"x": (1, 32, 4, 64, 64)}, {"x": (1, 64, 128, 64), "channels_last": True}),
    bytes=lambda i: (9 if i["frames"] else 5) * i["x"].nbytes,
)


def _pad_inputs(
    device: str, dtype: torch.dtype, x: tuple[int, ...], cached: int = 0, before: int = 2, after: int = 0,
    pixels: int = 1, frame_mode: FrameMode = "zero", pixel_mode: PixelMode = "zero", channels_last: bool = False,
) -> Inputs:  # fmt: skip
    B, C, _, H, W = x
    return {
        "x_BCTHW": _ground(x, dtype, device, channels_last),
        "cache_BCTHW": _ground((B, C, cached, H, W), dtype, device, channels_last, 1) if cached else None,
        "before": before,
        "after": after,
        "pixels": pixels,
        "frame_mode": frame_mode,
        "pixel_mode": pixel_mode,
    }


def _pad_bytes(i: Inputs) -> int:
    x = i["x_BCTHW"]
    B, C, T, H, W = x.shape
    written = B * C * (i["before"] + T + i["after"]) * (H + 2 * i["pixels"]) * (W + 2 * i["pixels"])
    return x.nbytes + (0 if i["cache_BCTHW"] is None else i["cache_BCTHW"].nbytes) + written * x.itemsize


CAUSAL_PAD = Op(
    name="causal_pad",
    formula="cached or repeated frames before x, zeros or repeated or mirrored pixels around it",
    replaces="concatenation, pad",
    launch=causal_pad,
    reference=causal_pad_reference,
    eager=eager_causal_pad,
    inputs=_pad_inputs,
    tiny=(
        {"x": (1, 1, 1, 1, 1)},
        {"x": (2, 3, 2, 3, 5), "cached": 2},
        {"x": (2, 3, 2, 3, 5), "cached": 1, "frame_mode": "replicate", "pixel_mode": "reflect", "pixels": 2},
        {"x": (1, 2, 3, 4, 5), "frame_mode": "replicate", "pixel_mode": "replicate", "before": 1, "after": 1},
        {"x": (2, 40, 1, 3, 4), "cached": 1, "channels_last": True},
        {"x": (1, 5, 2, 3, 4), "frame_mode": "replicate", "pixel_mode": "reflect", "after": 1, "channels_last": True},
    ),
    production=(
        {"x": (1, 96, 4, 480, 832), "cached": 2},
        {"x": (1, 384, 2, 120, 208), "cached": 2, "channels_last": True},
        {"x": (1, 128, 9, 256, 256), "frame_mode": "replicate", "pixel_mode": "replicate"},
        {"x": (1, 512, 9, 64, 64), "frame_mode": "replicate", "pixel_mode": "reflect", "channels_last": True},
    ),
    cpu=(
        {"x": (1, 24, 4, 120, 104), "cached": 2},
        {"x": (1, 24, 4, 120, 104), "frame_mode": "replicate", "pixel_mode": "replicate"},
        {"x": (1, 96, 4, 60, 52), "cached": 2, "channels_last": True},
    ),
    bytes=_pad_bytes,
    narrow_loads="contiguous, a row of W values goes to a row of W + 2: no word of one is a word of the other",
)
