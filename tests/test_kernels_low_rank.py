"""The projection of a low-rank branch beside the codes of its input, against formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, cases, check
from torch import Tensor

from sgl_diffusion.kernels import launch, low_rank
from sgl_diffusion.kernels.low_rank import quantize_low_rank
from sgl_diffusion.kernels.op import Case, noise, rel_l2

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")


def formula(x_MK: Tensor, down_RK: Tensor, smooth_K: Tensor | None = None, format: str | None = None) -> Any:
    low = torch.einsum("...k,rk->...r", x_MK, down_RK)
    if format is None:
        return low
    y = x_MK if smooth_K is None else x_MK / smooth_K
    amax = y.abs().amax(-1)
    scale = torch.where(amax > 0, amax / {"int8": 127, "fp8": 448}[format], torch.ones_like(amax))
    codes = y / scale[..., None]
    return codes.round() if format == "int8" else codes.to(torch.float8_e4m3fn).double(), scale, low


FORMULAS = {"quantize_low_rank": formula}


@pytest.mark.parametrize("case", [*cases([low_rank.OP])], ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_matches_the_formula(case: Case, impl: launch.Impl) -> None:
    check(case, impl, formula)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_an_outlier_that_is_smoothed_does_not_cost_the_other_columns(impl: launch.Impl) -> None:
    x = noise((17, 64), torch.float32, DEVICE)
    x[:, 5] *= 100
    down, smooth = noise((16, 64), torch.float32, DEVICE, 1), torch.ones(64, device=DEVICE)
    smooth[5] = 100
    errors = []
    for factors in (None, smooth):
        codes, scale, low = quantize_low_rank(x, down, smooth_K=factors, format="int8", impl=impl)
        wanted = x if factors is None else x / factors
        errors.append(rel_l2((codes * scale[:, None])[:, 6:], wanted[:, 6:]))
        assert rel_l2(low, x.double() @ down.double().T) < 2e-6  # of x as it is
    assert errors[1] < 0.01 < 0.1 < errors[0]


def test_meta_tensors_have_the_shapes_of_results() -> None:
    x, down = torch.empty(2, 3, 64, device="meta"), torch.empty(16, 64, device="meta")
    codes, scale, low = quantize_low_rank(x, down, format="int8", impl="torch")
    assert (codes.shape, scale.shape, low.shape) == ((2, 3, 64), (2, 3), (2, 3, 16))
    assert quantize_low_rank(x, down, impl="torch").shape == (2, 3, 16)


def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "architecture", lambda: "sm_80")
    with pytest.raises(launch.Unsupported, match="format='fp8': needs a GPU of sm_89"):
        quantize_low_rank(torch.zeros(3, 64), torch.zeros(16, 64), format="fp8", impl="triton")


x, d = torch.zeros(2, 3, 64), torch.zeros(16, 64)

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: quantize_low_rank(x, d[0]), r"down_RK: shape \(64,\), expected 2 dimensions"),
    (lambda: quantize_low_rank(x, d[:8]), "down_RK: rank 8, expected a multiple of 16 up to 128"),
    (lambda: quantize_low_rank(x, torch.zeros(144, 64)), "down_RK: rank 144, expected a multiple of 16 up to 128"),
    (lambda: quantize_low_rank(x, d[:, :32]), r"x_MK: shape \(2, 3, 64\), expected \(2, 3, 32\)"),
    (lambda: quantize_low_rank(x, d.half()), "down_RK: dtype float16, expected float32"),
    (lambda: quantize_low_rank(x, d.mT.contiguous().mT), "down_RK: strides .* expected contiguous"),
    (lambda: quantize_low_rank(x.mT.contiguous().mT, d), "x_MK: last dimension has stride 3"),
    (lambda: quantize_low_rank(x, d, smooth_K=d[0, :8]), r"smooth_K: shape \(8,\), expected \(64,\)"),
    (lambda: quantize_low_rank(x, d, smooth_K=d[0].to("meta")), "smooth_K: on meta, the other tensors are on cpu"),
    (lambda: quantize_low_rank(x, d, format="fp8_block"), "format='fp8_block': expected int8, fp8 or None"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
