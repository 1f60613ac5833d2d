"""Guidance with an Euler step, and linear combinations, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, Formula, cases, check
from torch import Tensor

from sgl_diffusion.kernels import linear_combination as combination
from sgl_diffusion.kernels import sampler
from sgl_diffusion.kernels.linear_combination import linear_combination
from sgl_diffusion.kernels.op import Case, rel_l2
from sgl_diffusion.kernels.sampler import guided_euler_step

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")
IMPLS = ["triton", "torch"]


def guided_formula(
    x: Tensor,
    positive: Tensor,
    dt: float | Tensor,
    negative: Tensor | None,
    scale: float | Tensor,
    rescale: float,
    per_token_norm: bool,
    velocity_out: Tensor | None,
) -> tuple[Tensor, ...]:
    v = positive
    if negative is not None:
        v = negative + scale * (positive - negative)
        if per_token_norm:
            v = v / v.pow(2).sum(-1, keepdim=True).sqrt() * positive.pow(2).sum(-1, keepdim=True).sqrt()
        for sample in range(len(v)):
            spread = (positive[sample] - positive[sample].mean()).norm() / (v[sample] - v[sample].mean()).norm()
            v[sample] = rescale * v[sample] * spread + (1 - rescale) * v[sample] if rescale else v[sample]
    stepped = x + dt * v
    return (stepped,) if velocity_out is None else (stepped, v)


def combination_formula(tensors: list[Tensor], coefficients: Any, out: Tensor | None) -> tuple[Tensor, ...]:
    y = (torch.stack(tensors, -1) * torch.as_tensor(coefficients, dtype=torch.float64, device=DEVICE)).sum(-1)
    return (y,) if out is None else (y, y)


FORMULAS: dict[str, Formula] = {"guided_euler_step": guided_formula, "linear_combination": combination_formula}


@pytest.mark.parametrize("case", list(cases([sampler.OP, combination.OP])), ids=lambda c: f"{c.op.name}-{c}")
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_the_formula(case: Case, impl: Any) -> None:
    check(case, impl, FORMULAS[case.op.name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_without_guidance_it_is_an_euler_step(impl: Any, dtype: torch.dtype) -> None:
    x, velocity = torch.randn(2, 2, 5, 33, device=DEVICE).to(dtype)
    want = x.double() - 0.07 * velocity.double()
    for dt in (-0.07, torch.tensor(-0.07, device=DEVICE)):
        stepped = guided_euler_step(x, velocity, dt, scale=7.0, rescale=0.7, impl=impl)
        assert stepped.dtype == dtype
        assert rel_l2(stepped, want) < (1e-6 if dtype == torch.float32 else 3e-3)
        assert torch.equal(stepped, guided_euler_step(x, velocity, dt, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_scaling_back_keeps_what_it_says(impl: Any) -> None:
    positive, negative = torch.randn(2, 2, 30, 16, device=DEVICE)
    x = torch.zeros_like(positive)
    v = guided_euler_step(x, positive, 1.0, negative=negative, scale=5, rescale=1.0, impl=impl)
    assert torch.allclose(v.std((1, 2)), positive.std((1, 2)))
    v = guided_euler_step(x, positive, 1.0, negative=negative, scale=5, per_token_norm=True, impl=impl)
    assert torch.allclose(v.norm(dim=-1), positive.norm(dim=-1))


@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes_may_differ_and_inputs_stay(impl: Any) -> None:
    x = torch.randn(2, 4, 16, device=DEVICE)
    positive, negative = torch.randn(2, 2, 4, 16, device=DEVICE).bfloat16()
    kept = [t.clone() for t in (x, positive, negative)]
    velocity = torch.empty_like(x)
    stepped = guided_euler_step(x, positive, 0.5, negative=negative, scale=2, velocity_out=velocity, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, positive, negative), strict=True))
    want = 2 * positive.double() - negative.double()
    assert stepped.dtype == torch.float32
    assert rel_l2(velocity, want) < 1e-6 and rel_l2(stepped, x.double() + 0.5 * want) < 1e-6

    mixed = linear_combination([positive, x], [3, -2.0], impl=impl)
    assert mixed.dtype == torch.bfloat16
    assert rel_l2(mixed, 3 * positive.double() - 2 * x.double()) < 3e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_a_combination_may_be_written_over_a_tensor(impl: Any) -> None:
    x, y = torch.randn(2, 3, 50, device=DEVICE)
    want = linear_combination([x, y], [0.5, 2.0], impl=impl)
    assert linear_combination([x, y], [0.5, 2.0], out=y, impl=impl) is y
    assert torch.equal(y, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_slice_asked_for_is_written(impl: Any) -> None:
    buffer = torch.full((4, 3, 33), 7.0, device=DEVICE)
    x, positive, negative = torch.randn(3, 1, 3, 33, device=DEVICE)
    linear_combination([x, positive], [1.0, 2.0], out=buffer[1:2], impl=impl)
    guided_euler_step(x, positive, 1.0, negative=negative, scale=3.0, velocity_out=buffer[2:3], impl=impl)
    assert (buffer[0] == 7).all() and (buffer[3] == 7).all() and (buffer[1:3] != 7).all()


x3, c2 = torch.zeros(2, 3, 8), torch.zeros(2)

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: guided_euler_step(c2, c2, 0.1), r"x: shape \(2,\), expected \(B, ...\)"),
    (lambda: guided_euler_step(x3, x3[:1], 0.1), r"positive: shape \(1, 3, 8\), expected \(2, 3, 8\)"),
    (lambda: guided_euler_step(x3, x3, 0.1, negative=x3[..., :4]), "negative: shape"),
    (lambda: guided_euler_step(x3, x3.int(), 0.1), "positive: dtype int32, expected float32, bfloat16, float16"),
    (lambda: guided_euler_step(x3, x3.to("meta"), 0.1), "positive: on meta, the other tensors are on cpu"),
    (lambda: guided_euler_step(x3, x3, torch.zeros(1)), r"dt: shape \(1,\), expected \(\)"),
    (lambda: guided_euler_step(x3, x3, torch.zeros((), dtype=torch.float16)), "dt: dtype float16, expected float32"),
    (lambda: guided_euler_step(x3, x3, 0.1, negative=x3, scale=torch.zeros(1)), r"scale: shape \(1,\), expected \(\)"),
    (lambda: guided_euler_step(x3, x3, 0.1, velocity_out=x3[0]), "velocity_out: shape"),
    (
        lambda: guided_euler_step(x3, x3, 0.1, velocity_out=torch.zeros(2, 8, 3).mT),
        "velocity_out: strides .* expected contiguous",
    ),
    (
        lambda: guided_euler_step(x3, x3, 0.1, negative=x3, rescale=0.7, per_token_norm=True),
        "per_token_norm=True: expected False with rescale=0.7",
    ),
    (lambda: linear_combination([], []), "tensors: 0 of them, expected 1 to 6"),
    (lambda: linear_combination([x3] * 7, [1.0] * 7), "tensors: 7 of them, expected 1 to 6"),
    (lambda: linear_combination([x3, x3], [1.0]), "coefficients: 1 of them, expected 2, one for each tensor"),
    (lambda: linear_combination([x3], c2), r"coefficients: shape \(2,\), expected \(1,\)"),
    (lambda: linear_combination([x3, x3], c2.half()), "coefficients: dtype float16, expected float32"),
    (lambda: linear_combination([x3, x3[:1]], c2), r"tensors\[1\]: shape"),
    (lambda: linear_combination([x3, x3.long()], c2), r"tensors\[1\]: dtype int64"),
    (lambda: linear_combination([x3], [1.0], out=x3[0]), "out: shape"),
    (lambda: linear_combination([x3], [1.0], out=torch.zeros(2, 8, 3).mT), "out: strides .* expected contiguous"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
