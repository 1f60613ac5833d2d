"""Modulation vectors of all timesteps at once, against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, cases, check
from torch import Tensor

from sgl_diffusion.kernels import modulation as module
from sgl_diffusion.kernels.modulation import modulation
from sgl_diffusion.kernels.op import Case, rel_l2

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")


def modulation_formula(e_MK: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
    return torch.einsum("mk,nk->mn", e_MK / (1 + torch.exp(-e_MK)), weight_NK) + bias_N


FORMULAS = {"modulation": modulation_formula}


@pytest.mark.parametrize("case", [*cases([module.OP])], ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_matches_the_formula(case: Case, impl: Any) -> None:
    check(case, impl, modulation_formula)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_bias_is_optional_and_e_may_be_wider_than_the_weights(impl: Any) -> None:
    e, weight = torch.randn(3, 48, device=DEVICE), torch.randn(40, 48, device=DEVICE).bfloat16()
    got = modulation(e, weight, impl=impl)
    assert got.dtype == torch.bfloat16
    assert rel_l2(got, modulation_formula(e.double(), weight.double(), torch.zeros(40, device=DEVICE))) < 3e-3


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_row_does_not_depend_on_the_others(impl: Any) -> None:
    """So a request computes the same vectors whatever its number of steps, within one block of rows."""
    e, weight = torch.randn(16, 32, device=DEVICE), torch.randn(40, 32, device=DEVICE)
    together = modulation(e, weight, impl=impl)
    assert rel_l2(modulation(e[3:4], weight, impl=impl), together[3:4]) < 1e-6


e2, w2, b1 = torch.zeros(2, 16), torch.zeros(32, 16), torch.zeros(32)

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: modulation(e2[0], w2), r"e_MK: shape \(16,\), expected 2 dimensions"),
    (lambda: modulation(e2, w2[:, :8]), r"weight_NK: shape \(32, 8\), expected \(32, 16\)"),
    (lambda: modulation(e2, w2.mT.contiguous().mT), "weight_NK: strides .* expected contiguous"),
    (lambda: modulation(e2, w2, b1[:5]), r"bias_N: shape \(5,\), expected \(32,\)"),
    (lambda: modulation(e2, w2, b1.half()), "bias_N: dtype float16, expected float32"),
    (lambda: modulation(e2.int(), w2), "e_MK: dtype int32, expected float32, bfloat16, float16"),
    (lambda: modulation(e2.mT.contiguous().mT, w2), "e_MK: last dimension has stride 2"),
    (lambda: modulation(e2, w2.to("meta")), "weight_NK: on meta, the other tensors are on cpu"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
