"""Into and out of a transformer: the sinusoid of a timestep, and latents cut into patches, one patch a token.

    timestep_embedding: angle = scale * t * max_period^(-i / (D / 2 - shift)); (sin, cos) of it, or cosines first
    patchify: x_BCTHW -> y_BLD, D = C * pt * ph * pw; unpatchify: its inverse

Shapes: t_B -> y_BD in fp32; x_BCHW or x_BCTHW <-> y_BLD, values copied bit by bit.
Why: a dozen small launches at either end of every step become three.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, noise

# B batch  D width of a token  L tokens  C channels  T frames  H, W pixels


# -- timestep embedding -----------------------------------------------------------


@triton.jit
def _timestep_embedding_kernel(
    t_ptr, y_ptr, D, scale, exponent,  # log2 of the ratio of one frequency to the one before
    COSINE_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    half = D // 2
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    second = d >= half
    i = tl.where(second, d - half, d)
    t = tl.load(t_ptr + b).to(tl.float32)
    angle = scale * t * tl.math.exp2(exponent * i.to(tl.float32))
    y = tl.where(second != COSINE_FIRST, tl.cos(angle), tl.sin(angle))
    tl.store(y_ptr + b * D + d, tl.where(d < 2 * half, y, 0.0), mask=d < D)


def timestep_embedding(
    t_B: Tensor, dim: int, *, flip_sin_to_cos: bool = False, downscale_freq_shift: float = 1.0, scale: float = 1.0,
    max_period: float = 10000.0, impl: launch.Impl = "auto",
) -> Tensor:  # fmt: skip
    """The sinusoidal embedding of timesteps: (B, dim) in fp32; an odd `dim` ends in a zero.

    The angle itself is rounded to fp32, here as in diffusers: for an angle of 1000 the result is right to 1e-4.

    Args:
        t_B: any float dtype, contiguous.
        flip_sin_to_cos: cosines first.
        downscale_freq_shift: 1 makes the last frequency 1 / max_period.
    Raises:
        ValueError: a shape, dtype, stride, width or shift that does not fit.
    Source: `get_timestep_embedding` of diffusers.
    """
    launch.check_ndim(1, t_B=t_B)
    launch.check_float(t_B, t_B=t_B)
    launch.check_contiguous(t_B=t_B)
    if dim < 2 or dim // 2 == downscale_freq_shift:
        raise ValueError(f"dim={dim}: expected at least 2, half of it not downscale_freq_shift={downscale_freq_shift}")
    if not launch.runs_triton(impl, t_B):
        return timestep_embedding_reference(
            t_B, dim, flip_sin_to_cos=flip_sin_to_cos, downscale_freq_shift=downscale_freq_shift, scale=scale,
            max_period=max_period,
        )  # fmt: skip
    y_BD = t_B.new_empty(t_B.shape[0], dim, dtype=torch.float32)
    tiles = launch.tile("timestep_embedding")
    with launch.on_device(t_B):
        _timestep_embedding_kernel[(t_B.shape[0], triton.cdiv(dim, tiles["BLOCK"]))](
            t_B, y_BD, dim, float(scale), -math.log2(max_period) / (dim // 2 - downscale_freq_shift),
            COSINE_FIRST=flip_sin_to_cos, enable_fp_fusion=True, **tiles,
        )  # fmt: skip
    return y_BD


def timestep_embedding_reference(
    t_B: Tensor, dim: int, *, flip_sin_to_cos: bool = False, downscale_freq_shift: float = 1.0, scale: float = 1.0,
    max_period: float = 10000.0,
) -> Tensor:  # fmt: skip
    t, half = launch.widen(t_B), dim // 2
    exponent = torch.arange(half, dtype=t.dtype, device=t.device).mul_(
        -math.log(max_period) / (half - downscale_freq_shift)
    )
    angle = t[:, None] * exponent.exp_().mul_(scale)
    y = t.new_empty(len(t), dim)
    y[:, 2 * half :] = 0
    cosine = 0 if flip_sin_to_cos else half
    torch.cos(angle, out=y[:, cosine : cosine + half])
    torch.sin(angle, out=y[:, half - cosine : 2 * half - cosine])
    return y


def eager_timestep_embedding(
    t_B: Tensor, dim: int, flip_sin_to_cos: bool, downscale_freq_shift: float, scale: float, max_period: float
) -> Tensor:
    """As diffusers runs it."""
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(0, half, dtype=torch.float32, device=t_B.device)
    exponent = exponent / (half - downscale_freq_shift)
    y = scale * (t_B[:, None].float() * torch.exp(exponent)[None, :])
    y = torch.cat([torch.sin(y), torch.cos(y)], dim=-1)
    if flip_sin_to_cos:
        y = torch.cat([y[:, half:], y[:, :half]], dim=-1)
    return torch.nn.functional.pad(y, (0, 1, 0, 0)) if dim % 2 else y


# -- patches ----------------------------------------------------------------------

Size = tuple[int, ...]
"""(frames, height, width), or (height, width) for one frame."""


@triton.jit(do_not_specialize=["TOKENS", "GRID_T", "GRID_H", "GRID_W"])
def _patches_kernel(
    image_ptr,
    tokens_ptr,
    TOKENS,
    D,
    C,
    GRID_T,
    GRID_H,
    GRID_W,
    PATCH_T: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    CHANNEL_FASTEST: tl.constexpr,
    TO_IMAGE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some values of some tokens, to or from the image, where a value is as far from its patch in every patch."""
    PLACES: tl.constexpr = PATCH_T * PATCH_H * PATCH_W
    W = GRID_W * PATCH_W
    HW = GRID_H * PATCH_H * W
    THW = GRID_T * PATCH_T * HW.to(tl.int64)
    token = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    row, frame = token // GRID_W, token // (GRID_W * GRID_H)
    patch = (frame // GRID_T) * C * THW + (frame % GRID_T) * PATCH_T * HW.to(tl.int64)
    patch += (row % GRID_H) * PATCH_H * W + (token % GRID_W) * PATCH_W

    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if CHANNEL_FASTEST:
        place, c = d // C, d % C
    else:
        place, c = d % PLACES, d // PLACES
    value = c * THW + place // (PATCH_W * PATCH_H) * HW + place // PATCH_W % PATCH_H * W + place % PATCH_W

    image = image_ptr + patch[:, None] + value[None, :]
    tokens = tokens_ptr + token[:, None].to(tl.int64) * D + d[None, :]
    live = (token[:, None] < TOKENS) & (d[None, :] < D)
    if TO_IMAGE:
        tl.store(image, tl.load(tokens, mask=live), mask=live)
    else:
        tl.store(tokens, tl.load(image, mask=live), mask=live)


def patchify(x: Tensor, patch: Size, *, channel_fastest: bool = False, impl: launch.Impl = "auto") -> Tensor:
    """Cuts x into patches: (B, L, D), tokens in the order of frames, rows, columns.

    Args:
        x: (B, C, H, W) or (B, C, T, H, W), contiguous, any dtype.
        patch: as many sizes as x has after C; each divides its dimension.
        channel_fastest: a token holds (pt, ph, pw, C) instead of (C, pt, ph, pw).
    Raises:
        ValueError: a shape, stride or patch that does not fit.
    Source: `_pack_latents` of diffusers' image pipelines, and its patch embeddings, which are strided convolutions.
    """
    if x.ndim not in (4, 5):
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (B, C, H, W) or (B, C, T, H, W)")
    launch.check_contiguous(x=x)
    B, C, *size = x.shape
    if len(patch) != len(size) or any(p < 1 or n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(f"patch={tuple(patch)}: expected divisors of {tuple(size)}")
    if not launch.runs_triton(impl, x):
        return patchify_reference(x, patch, channel_fastest=channel_fastest)
    grid = tuple(n // p for n, p in zip(size, patch, strict=True))
    y_BLD = x.new_empty(B, math.prod(grid), C * math.prod(patch))
    _move(x, y_BLD, C, grid, patch, channel_fastest, to_image=False)
    return y_BLD


def unpatchify(
    x_BLD: Tensor, grid: Size, patch: Size, *, channel_fastest: bool = False, impl: launch.Impl = "auto"
) -> Tensor:
    """Puts patches back together: the inverse of `patchify`.

    Args:
        x_BLD: contiguous, any dtype.
        grid: patches along each dimension of the result after (B, C).
        patch, channel_fastest: as for `patchify`.
    Raises:
        ValueError: a shape, stride, grid or patch that does not fit.
    Source: `_unpack_latents` of diffusers' image pipelines, channels slowest, and the end of its video transformers,
        channels fastest.
    """
    launch.check_ndim(3, x_BLD=x_BLD)
    launch.check_contiguous(x_BLD=x_BLD)
    B, L, D = x_BLD.shape
    if len(grid) not in (2, 3) or math.prod(grid) != L:
        raise ValueError(f"grid={tuple(grid)}: expected 2 or 3 sizes of {L} patches in all")
    if len(patch) != len(grid) or min(patch) < 1 or D % math.prod(patch):
        raise ValueError(f"patch={tuple(patch)}: expected {len(grid)} sizes whose product divides {D}")
    if not launch.runs_triton(impl, x_BLD):
        return unpatchify_reference(x_BLD, grid, patch, channel_fastest=channel_fastest)
    C = D // math.prod(patch)
    y = x_BLD.new_empty(B, C, *(n * p for n, p in zip(grid, patch, strict=True)))
    _move(y, x_BLD, C, grid, patch, channel_fastest, to_image=True)
    return y


def _move(
    image: Tensor, tokens_BLD: Tensor, C: int, grid: Size, patch: Size, channel_fastest: bool, to_image: bool
) -> None:
    tokens, D = tokens_BLD.shape[0] * tokens_BLD.shape[1], tokens_BLD.shape[2]
    tiles = launch.tile("unpatchify" if to_image else "patchify")
    block = tiles.pop("BLOCK")
    block_d = min(block, triton.next_power_of_2(D))
    block_l = block // block_d
    with launch.on_device(image):
        _patches_kernel[(triton.cdiv(tokens, block_l), triton.cdiv(D, block_d))](
            image, tokens_BLD, tokens, D, C, *(1, *grid)[-3:], *(1, *patch)[-3:],
            CHANNEL_FASTEST=channel_fastest, TO_IMAGE=to_image, BLOCK_L=block_l, BLOCK_D=block_d,
            enable_fp_fusion=True, **tiles,
        )  # fmt: skip


def patchify_reference(x: Tensor, patch: Size, *, channel_fastest: bool = False) -> Tensor:
    B, C, *size = x.shape
    n = len(size)
    split = [k for s, p in zip(size, patch, strict=True) for k in (s // p, p)]  # (grid, place) of every dimension
    grid, place = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
    order = (*place, 1) if channel_fastest else (1, *place)
    return x.view(B, C, *split).permute(0, *grid, *order).reshape(B, -1, C * math.prod(patch))


def unpatchify_reference(x_BLD: Tensor, grid: Size, patch: Size, *, channel_fastest: bool = False) -> Tensor:
    B, n = x_BLD.shape[0], len(grid)
    token = (*patch, -1) if channel_fastest else (-1, *patch)
    channel, place = (2 * n + 1, n + 1) if channel_fastest else (n + 1, n + 2)
    order = [at for i in range(n) for at in (1 + i, place + i)]
    y = x_BLD.view(B, *grid, *token).permute(0, channel, *order)
    return y.reshape(B, y.shape[1], *(g * p for g, p in zip(grid, patch, strict=True)))


# -- operations -------------------------------------------------------------------


def _embedding_inputs(
    device: str, dtype: torch.dtype, B: int, dim: int, flip: bool = True, shift: float = 0.0, scale: float = 1.0,
    period: float = 10000.0,
) -> Inputs:  # fmt: skip
    return {
        "t_B": noise((B,), dtype, device).abs().mul(400),
        "dim": dim,
        "flip_sin_to_cos": flip,
        "downscale_freq_shift": shift,
        "scale": scale,
        "max_period": period,
    }


TIMESTEP_EMBEDDING = Op(
    name="timestep_embedding",
    formula="(sin, cos) of scale * t * max_period^(-i / (D / 2 - shift))",
    replaces="arange, mul, div, exp, 2 mul, sin, cos, 2 concatenations",
    launch=timestep_embedding,
    reference=timestep_embedding_reference,
    eager=eager_timestep_embedding,
    inputs=_embedding_inputs,
    tiny=(
        {"B": 1, "dim": 2},
        {"B": 3, "dim": 33, "flip": False, "shift": 1.0},
        {"B": 2, "dim": 256, "scale": 0.5, "period": 1000.0},
    ),
    production=({"B": 1, "dim": 256}, {"B": 2, "dim": 320, "flip": False, "shift": 1.0}),
    cpu=({"B": 512, "dim": 256},),
    bytes=lambda i: i["t_B"].nbytes + 4 * i["t_B"].numel() * i["dim"],
    # angles of up to 1200 are rounded to 24 bits, 4e-5 of a radian; so is the power that makes them
    tolerance={torch.float32: 1e-4},
    narrow_loads="one timestep a program",
)
_PATCHES_TINY = (
    {"x": (1, 1, 1, 1), "patch": (1, 1)},
    {"x": (2, 3, 4, 6), "patch": (2, 2)},
    {"x": (2, 5, 2, 6, 10), "patch": (1, 2, 2), "channel_fastest": True},
    {"x": (1, 3, 4, 6, 2), "patch": (2, 3, 1)},
)
_PATCHES_PRODUCTION = (
    {"x": (1, 16, 128, 128), "patch": (2, 2)},
    {"x": (1, 16, 21, 60, 104), "patch": (1, 2, 2)},
    {"x": (1, 16, 21, 60, 104), "patch": (1, 2, 2), "channel_fastest": True},
)
_PATCHES_CPU = ({"x": (1, 16, 256, 256), "patch": (2, 2)}, {"x": (1, 16, 21, 60, 104), "patch": (1, 2, 2)})
_PATCHES_NARROW = "a row of a patch is two values"


def _patchify_inputs(device: str, dtype: torch.dtype, x: Size, patch: Size, channel_fastest: bool = False) -> Inputs:
    return {"x": noise(x, dtype, device), "patch": patch, "channel_fastest": channel_fastest}


PATCHIFY = Op(
    name="patchify",
    formula="(B, C, T, H, W) as (B, patches, values of a patch)",
    replaces="view, permute, copy",
    launch=patchify,
    reference=patchify_reference,
    eager=patchify_reference,
    inputs=_patchify_inputs,
    bytes=lambda i: 2 * i["x"].nbytes,
    tiny=_PATCHES_TINY,
    production=_PATCHES_PRODUCTION,
    cpu=_PATCHES_CPU,
    narrow_loads=_PATCHES_NARROW,
)


def _unpatchify_inputs(device: str, dtype: torch.dtype, x: Size, patch: Size, channel_fastest: bool = False) -> Inputs:
    grid = tuple(n // p for n, p in zip(x[2:], patch, strict=True))
    tokens = noise((x[0], math.prod(grid), x[1] * math.prod(patch)), dtype, device)
    return {"x_BLD": tokens, "grid": grid, "patch": patch, "channel_fastest": channel_fastest}


UNPATCHIFY = Op(
    name="unpatchify",
    formula="(B, patches, values of a patch) as (B, C, T, H, W)",
    replaces="view, permute, copy",
    launch=unpatchify,
    reference=unpatchify_reference,
    eager=unpatchify_reference,
    inputs=_unpatchify_inputs,
    bytes=lambda i: 2 * i["x_BLD"].nbytes,
    tiny=_PATCHES_TINY,
    production=_PATCHES_PRODUCTION,
    cpu=_PATCHES_CPU,
    narrow_loads=_PATCHES_NARROW,
)
