"""Norms and layouts of autoencoders against their formulas in float64, in both memory formats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, Formula, cases, check
from torch import Tensor

from sgl_diffusion.kernels import channel_norm as channel_norm_file
from sgl_diffusion.kernels import group_norm as group_norm_file
from sgl_diffusion.kernels import group_norm_parts as group_norm_parts_file
from sgl_diffusion.kernels.channel_norm import channel_norm
from sgl_diffusion.kernels.group_norm import group_norm
from sgl_diffusion.kernels.group_norm_parts import group_moments, group_norm_parts
from sgl_diffusion.kernels.layout import CAUSAL_PAD, UPSAMPLE_NEAREST, causal_pad, upsample_nearest
from sgl_diffusion.kernels.op import Case, rel_l2

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")
IMPLS = ["triton", "torch"]
PARTS_OPS = (group_norm_parts_file.MOMENTS_OP, group_norm_parts_file.PARTS_OP)  # contiguous alone
OPS = (group_norm_file.OP, channel_norm_file.OP, UPSAMPLE_NEAREST, CAUSAL_PAD)


def silu_if(asked: bool, y: Tensor) -> Tensor:
    return y / (1 + torch.exp(-y)) if asked else y


def group_norm_formula(x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, silu: bool) -> Tensor:
    grouped = x_BCHW.reshape(x_BCHW.shape[0], groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normed = (centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).view(x_BCHW.shape)
    ones = [1] * (x_BCHW.ndim - 2)
    return silu_if(silu, normed * weight_C.view(-1, *ones) + bias_C.view(-1, *ones))


def group_moments_formula(x_BCHW: Tensor, groups: int) -> Tensor:
    grouped = x_BCHW.reshape(x_BCHW.shape[0] * groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    squares = (grouped - mean).pow(2).sum(-1)
    return torch.stack([torch.full_like(squares, grouped.shape[1]), mean[:, 0], squares], -1)


def group_norm_parts_formula(
    x_BCHW: Tensor, moments_PG3: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, silu: bool, out: Tensor | None
) -> tuple[Tensor, ...]:
    """By sums and sums of squares, which float64 can afford."""
    count, mean, squares = moments_PG3.unbind(-1)
    total = (count * mean).sum(0) / count.sum(0)
    variance = (squares + count * mean**2).sum(0) / count.sum(0) - total**2
    grouped = x_BCHW.reshape(x_BCHW.shape[0] * groups, -1)
    normed = ((grouped - total[:, None]) / (variance[:, None] + 1e-6).sqrt()).view(x_BCHW.shape)
    ones = [1] * (x_BCHW.ndim - 2)
    y = silu_if(silu, normed * weight_C.view(-1, *ones) + bias_C.view(-1, *ones))
    return (y,) if out is None else (y, y)


def channel_norm_formula(
    x: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps_in_mean: bool, silu: bool, out: Tensor | None
) -> tuple[Tensor, ...]:
    squares = x.pow(2).sum(1, keepdim=True)
    C, ones = x.shape[1], [1] * (x.ndim - 2)
    y = x / (squares / C + 1e-12).sqrt() if eps_in_mean else x / squares.sqrt().clamp_min(1e-12) * math.sqrt(C)
    y = y if weight_C is None else y * weight_C.view(-1, *ones)
    y = silu_if(silu, y if bias_C is None else y + bias_C.view(-1, *ones))
    return (y,) if out is None else (y, y)


def upsample_formula(x: Tensor, frames: bool) -> Tensor:
    x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return x.repeat_interleave(2, -3) if frames else x


def causal_pad_formula(
    x_BCTHW: Tensor,
    cache_BCTHW: Tensor | None,
    before: int,
    after: int,
    pixels: int,
    frame_mode: str,
    pixel_mode: str,
) -> Tensor:
    """Axis by axis, by a list of the indices each takes its values from."""
    cached = 0 if cache_BCTHW is None else cache_BCTHW.shape[2]
    y = x_BCTHW if cache_BCTHW is None else torch.cat([cache_BCTHW, x_BCTHW], 2)
    for dim, first, last, mode in (
        (2, before - cached, after, frame_mode),
        (3, pixels, pixels, pixel_mode),
        (4, pixels, pixels, pixel_mode),
    ):
        size = y.shape[dim]
        y = torch.cat([y, torch.zeros_like(y.select(dim, 0)).unsqueeze(dim)], dim)  # zeros live at index `size`
        places = []
        for i in range(-first, size + last):
            if mode == "replicate":
                places.append(min(max(i, 0), size - 1))
            elif mode == "reflect":
                places.append(abs(i) if i < size else 2 * (size - 1) - i)
            else:
                places.append(i if 0 <= i < size else size)
        y = y.index_select(dim, torch.tensor(places, device=y.device))
    return y


FORMULAS: dict[str, Formula] = {
    "group_norm": group_norm_formula,
    "group_moments": group_moments_formula,
    "group_norm_parts": group_norm_parts_formula,
    "channel_norm": channel_norm_formula,
    "upsample_nearest": upsample_formula,
    "causal_pad": causal_pad_formula,
}


@pytest.mark.parametrize("case", list(cases(OPS + PARTS_OPS)), ids=lambda c: f"{c.op.name}-{c}")
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_the_formula(case: Case, impl: Any) -> None:
    check(case, impl, FORMULAS[case.op.name])


RETURNING = [c for op in OPS for c in op.cases(op.tiny) if c.inputs("meta").get("out") is None]


@pytest.mark.parametrize("case", RETURNING[::3], ids=lambda c: f"{c.op.name}-{c}")
@pytest.mark.parametrize("impl", IMPLS)
def test_the_memory_format_stays(case: Case, impl: Any) -> None:
    inputs = case.inputs(DEVICE)
    x = next(iter(inputs.values()))
    (y,) = case.op.run(inputs, impl)
    assert y.is_contiguous() if x.is_contiguous() else y.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
def test_both_memory_formats_hold_the_same(impl: Any) -> None:
    x = torch.randn(1, 8, 3, 5, 4, device=DEVICE)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    assert not last.is_contiguous()
    weight = torch.randn(8, device=DEVICE)
    for call in (
        lambda x: group_norm(x, weight, weight, 2, impl=impl),
        lambda x: channel_norm(x, weight, silu=True, impl=impl),
        lambda x: upsample_nearest(x, frames=True, impl=impl),
        lambda x: causal_pad(x, before=2, pixels=1, pixel_mode="reflect", impl=impl),
    ):
        assert torch.allclose(call(x), call(last), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_slice_asked_for_is_written(impl: Any) -> None:
    buffer = torch.full((2, 6, 5, 7, 6), 7.0, device=DEVICE)
    inner = buffer[:, :, 2:, 1:-1, 1:-1]
    x = torch.randn(2, 6, 3, 5, 4, device=DEVICE)
    assert channel_norm(x, out=inner, impl=impl) is inner
    assert (inner != 7).all()
    inner.fill_(7.0)
    assert (buffer == 7).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_pixel_of_zeros_stays_zero(impl: Any) -> None:
    x = torch.randn(1, 6, 2, 3, device=DEVICE)
    x[:, :, 0] = 0
    assert (channel_norm(x, impl=impl)[:, :, 0] == 0).all()
    assert (channel_norm(x, eps_in_mean=True, eps=1e-8, impl=impl)[:, :, 0] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_norm_of_parts_is_the_norm_of_the_whole(impl: Any) -> None:
    """Also where parts are far apart, as a sky and a forest."""
    x = torch.randn(2, 6, 8, 7, device=DEVICE)
    x[:, :, 3:] += 30
    weight, parts = torch.randn(6, device=DEVICE), [part.contiguous() for part in x.split([3, 4, 1], 2)]
    moments = torch.stack([group_moments(part, 3, impl=impl) for part in parts])
    got = [group_norm_parts(part, moments, weight, weight, 3, silu=True, impl=impl) for part in parts]
    want = group_norm_formula(x.double(), weight.double(), weight.double(), 3, silu=True)
    assert rel_l2(torch.cat(got, 2), want) < 1e-6


def test_values_are_moved_bit_by_bit() -> None:
    x = torch.randn(1, 3, 2, 4, 4, device=DEVICE)
    assert torch.equal(upsample_nearest(x, impl="triton")[..., ::2, 1::2], x)
    assert torch.equal(causal_pad(x, before=1, pixels=2, impl="triton")[:, :, 1:, 2:-2, 2:-2], x)


x4, x5, v6 = torch.zeros(2, 6, 4, 5), torch.zeros(1, 6, 2, 4, 5), torch.zeros(6)
m43 = torch.ones(1, 4, 3)
x5_last = x5.contiguous(memory_format=torch.channels_last_3d)

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: group_norm(x4.mT, v6, v6, 2), "x_BCHW: strides .* expected contiguous or channels last"),
    (lambda: group_norm(x4[0, 0], v6, v6, 2), r"x_BCHW: shape \(4, 5\), expected \(B, C, ...\)"),
    (lambda: group_norm(x5_last, v6, v6, 4), "groups=4: expected a divisor of the 6 channels"),
    (lambda: group_moments(x4, 4), r"x_BCHW: shape \(2, 6, 4, 5\), expected \(B, C, ...\) with C in 4 groups"),
    (lambda: group_norm_parts(x4, torch.zeros(2, 6, 3), v6, v6, 2), r"moments_PG3: shape .* expected \(2, 4, 3\)"),
    (lambda: group_norm_parts(x4, m43, v6, v6, 2, out=x4.mT.contiguous().mT), "pixels_of_out: strides"),
    (lambda: channel_norm(x4[0]), r"x: shape \(6, 4, 5\), expected \(B, C, H, W\) or"),
    (lambda: channel_norm(x4, v6[:5]), r"weight_C: shape \(5,\), expected \(6,\)"),
    (lambda: channel_norm(x4, None, v6.int()), "bias_C: dtype int32"),
    (lambda: channel_norm(x4, torch.zeros(12)[::2]), "weight_C: strides .* expected contiguous"),
    (lambda: channel_norm(x4.mT), "x: strides .* expected contiguous or channels last"),
    (lambda: channel_norm(x4, out=x4[:1]), "out: shape"),
    (lambda: channel_norm(x4, out=x4.half()), "out: dtype float16, expected float32"),
    (lambda: upsample_nearest(x4[0]), r"x: shape \(6, 4, 5\), expected \(B, C, \[T,\] H, W\)"),
    (lambda: upsample_nearest(x4, frames=True), r"x: shape \(2, 6, 4, 5\), expected \(B, C, T, H, W\)"),
    (lambda: upsample_nearest(x4.mT), "x: strides"),
    (lambda: causal_pad(x4, before=1), r"x_BCTHW: shape \(2, 6, 4, 5\), expected 5 dimensions"),
    (lambda: causal_pad(x5.mT, before=1), "x_BCTHW: strides"),
    (lambda: causal_pad(x5, before=-1), "before=-1, after=0, pixels=0: expected none below 0"),
    (lambda: causal_pad(x5, before=1, frame_mode="reflect"), "frame_mode='reflect': expected zero or replicate"),  # type: ignore[arg-type]
    (lambda: causal_pad(x5, before=1, pixel_mode="mirror"), "pixel_mode='mirror': expected zero, replicate or"),  # type: ignore[arg-type]
    (lambda: causal_pad(x5, before=1, pixels=4, pixel_mode="reflect"), "pixels=4: expected less than H and W, 4 and 5"),
    (lambda: causal_pad(x5, x5, before=1), "cache_BCTHW: 2 frames, expected 1 to before=1"),
    (lambda: causal_pad(x5, x5.half(), before=2), "cache_BCTHW: dtype float16, expected float32"),
    (lambda: causal_pad(x5, x5[..., :4], before=2), "cache_BCTHW: shape"),
    (lambda: causal_pad(x5, x5_last, before=2), "cache_BCTHW: strides .* expected contiguous as x"),
    (lambda: causal_pad(x5_last, x5, before=2), "cache_BCTHW: strides .* expected channels last as x"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
