"""Timestep embeddings and patches against their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from kernel_checks import DEVICE, Formula, cases, check
from torch import Tensor

from sgl_diffusion.kernels.embedding import (
    PATCHIFY,
    TIMESTEP_EMBEDDING,
    UNPATCHIFY,
    patchify,
    timestep_embedding,
    unpatchify,
)
from sgl_diffusion.kernels.op import Case

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")
IMPLS = ["triton", "torch"]
OPS = (TIMESTEP_EMBEDDING, PATCHIFY, UNPATCHIFY)


def timestep_formula(
    t_B: Tensor, dim: int, flip_sin_to_cos: bool, downscale_freq_shift: float, scale: float, max_period: float
) -> Tensor:
    half = dim // 2
    rows = []
    for t in t_B.tolist():
        angles = [scale * t * max_period ** (-i / (half - downscale_freq_shift)) for i in range(half)]
        waves = [[math.sin(a) for a in angles], [math.cos(a) for a in angles]]
        first, second = reversed(waves) if flip_sin_to_cos else waves
        rows.append(first + second + [0.0] * (dim % 2))
    return torch.tensor(rows, dtype=torch.float64, device=t_B.device)


def patchify_formula(x: Tensor, patch: tuple[int, ...], channel_fastest: bool) -> Tensor:
    """Slices out one patch after the other."""
    if x.ndim == 4:
        x, patch = x[:, :, None], (1, *patch)
    (pt, ph, pw), (T, H, W) = patch, x.shape[2:]
    tokens = []
    for t in range(0, T, pt):
        for h in range(0, H, ph):
            for w in range(0, W, pw):
                cut = x[:, :, t : t + pt, h : h + ph, w : w + pw]
                tokens.append((cut.movedim(1, -1) if channel_fastest else cut).flatten(1))
    return torch.stack(tokens, 1)


def unpatchify_formula(x_BLD: Tensor, grid: tuple[int, ...], patch: tuple[int, ...], channel_fastest: bool) -> Tensor:
    """Cuts up the numbers of the result's places, and so learns where each value goes."""
    sizes = [g * p for g, p in zip(grid, patch, strict=True)]
    C = x_BLD.shape[-1] // math.prod(patch)
    places = torch.arange(C * math.prod(sizes), device=x_BLD.device).view(1, C, *sizes)
    order = patchify_formula(places, patch, channel_fastest).flatten()
    y = torch.empty(x_BLD.shape[0], order.numel(), dtype=x_BLD.dtype, device=x_BLD.device)
    y[:, order] = x_BLD.flatten(1)
    return y.view(-1, C, *sizes)


FORMULAS: dict[str, Formula] = {
    "timestep_embedding": timestep_formula,
    "patchify": patchify_formula,
    "unpatchify": unpatchify_formula,
}


@pytest.mark.parametrize("case", list(cases(OPS)), ids=lambda c: f"{c.op.name}-{c}")
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_the_formula(case: Case, impl: Any) -> None:
    check(case, impl, FORMULAS[case.op.name])


@pytest.mark.parametrize("impl", IMPLS)
def test_timesteps_are_embedded_as_by_diffusers(impl: Any) -> None:
    t = torch.tensor([1000.0, 999.0, 401.5, 1.0, 0.0], device=DEVICE)
    want = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    got = timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0, impl=impl)
    assert (got - want).abs().max() < 1.5e-4
    assert torch.equal(got[-1], want[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("channel_fastest", [False, True])
def test_patches_come_back_bit_by_bit(channel_fastest: bool, impl: Any, dtype: torch.dtype) -> None:
    x = torch.arange(2 * 3 * 4 * 6 * 2, device=DEVICE).view(2, 3, 4, 6, 2).to(dtype)
    tokens = patchify(x, (2, 3, 1), channel_fastest=channel_fastest, impl=impl)
    back = unpatchify(tokens, (2, 2, 2), (2, 3, 1), channel_fastest=channel_fastest, impl=impl)
    assert tokens.shape == (2, 8, 18) and tokens.is_contiguous()
    assert back.dtype == dtype and back.is_contiguous() and torch.equal(back, x)


t2, x4, x3 = torch.zeros(2), torch.zeros(1, 3, 4, 6), torch.zeros(1, 6, 12)

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: timestep_embedding(t2[0], 8), r"t_B: shape \(\), expected 1 dimensions"),
    (lambda: timestep_embedding(t2.long(), 8), "t_B: dtype int64, expected float32, bfloat16, float16"),
    (lambda: timestep_embedding(torch.zeros(4)[::2], 8), "t_B: strides"),
    (lambda: timestep_embedding(t2, 1), "dim=1: expected at least 2"),
    (lambda: timestep_embedding(t2, 2), "dim=2: .* half of it not downscale_freq_shift=1"),
    (lambda: patchify(x3, (2, 2)), r"x: shape \(1, 6, 12\), expected \(B, C, H, W\) or"),
    (lambda: patchify(x4, (2, 4)), r"patch=\(2, 4\): expected divisors of \(4, 6\)"),
    (lambda: patchify(x4, (1, 2, 2)), r"patch=\(1, 2, 2\): expected divisors of \(4, 6\)"),
    (lambda: patchify(x4.mT, (2, 2)), "x: strides .* expected contiguous"),
    (lambda: unpatchify(x4, (2, 3), (2, 2)), r"x_BLD: shape .* expected 3 dimensions"),
    (lambda: unpatchify(x3, (2, 2), (2, 2)), r"grid=\(2, 2\): expected 2 or 3 sizes of 6 patches in all"),
    (lambda: unpatchify(x3, (2, 3), (5, 2)), r"patch=\(5, 2\): expected 2 sizes whose product divides 12"),
    (lambda: unpatchify(x3, (2, 3), (1, 2, 2)), r"patch=\(1, 2, 2\): expected 2 sizes"),
    (lambda: unpatchify(x3.mT, (2, 6), (1, 1)), "x_BLD: strides"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
