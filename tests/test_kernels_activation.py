"""Activations of a feed-forward, and their quantised results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, cases, check
from test_kernels_norm import quantize_formula
from torch import Tensor

from sgl_diffusion.kernels.activation import OP, activation
from sgl_diffusion.kernels.op import Case

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")


def gelu_erf(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def activation_formula(x: Tensor, kind: str, bias: Tensor | None, out: Tensor, quantize: Any, code_scale: Any) -> Any:
    x = x if bias is None else x + bias
    half = x.shape[-1] // 2
    y = {
        "gelu_tanh": lambda: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu_erf": lambda: gelu_erf(x),
        "silu": lambda: x / (1 + torch.exp(-x)),
        "swiglu": lambda: x[..., :half] / (1 + torch.exp(-x[..., :half])) * x[..., half:],
        "geglu": lambda: x[..., :half] * gelu_erf(x[..., half:]),
    }[kind]()
    return quantize_formula(y, quantize, code_scale) if quantize else y


FORMULAS = {"activation": activation_formula}


@pytest.mark.parametrize("case", [*cases([OP])], ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_matches_the_formula(case: Case, impl: Any) -> None:
    check(case, impl, activation_formula)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("kind", ["gelu_tanh", "swiglu"])
def test_only_the_slice_asked_for_is_written(impl: Any, kind: Any) -> None:
    buffer = torch.full((2, 5, 96), 7.0, device=DEVICE)
    out = buffer[..., 32:64]
    x = torch.randn(2, 5, 64 if kind == "swiglu" else 32, device=DEVICE)
    assert activation(x, kind, out=out, impl=impl) is out
    assert (buffer[..., :32] == 7).all() and (buffer[..., 64:] == 7).all()
    assert (out != 7).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_far_tails_do_not_overflow(impl: Any) -> None:
    x = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4], device=DEVICE)[None]
    for kind in ("gelu_tanh", "gelu_erf", "silu"):
        got = activation(x, kind, impl=impl)  # type: ignore[arg-type]
        assert torch.equal(got, x.clamp_min(0)), kind


x3 = torch.zeros(2, 3, 32)
MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: activation(x3, "relu"), "kind='relu': expected gelu_tanh, gelu_erf, silu, swiglu, geglu"),  # type: ignore[arg-type]
    (lambda: activation(x3[..., :31], "geglu"), r"x: shape \(2, 3, 31\), expected an even width for geglu"),
    (lambda: activation(x3, "silu", bias=x3[0, 0, :8]), r"bias: shape \(8,\), expected \(32,\)"),
    (lambda: activation(x3, "swiglu", out=x3), r"out: shape \(2, 3, 32\), expected \(2, 3, 16\)"),
    (lambda: activation(x3, "silu", out=x3.half()), "out: dtype float16, expected float32"),
    (lambda: activation(x3, "silu", quantize="int8", out=x3), "out: dtype float32, expected int8"),
    (lambda: activation(x3, "silu", code_scale=x3[0, 0, :1]), "code_scale: expected none without codes"),
    (lambda: activation(x3, "silu", quantize="int8", code_scale=x3[0, 0]), r"scale: shape \(32,\), expected \(1,\)"),
    (lambda: activation(x3, "silu", quantize="int4"), "format='int4': expected fp8, fp8_block, int8"),  # type: ignore[arg-type]
    (lambda: activation(torch.zeros(2, 5, 32)[:, :3], "silu"), "x: strides .* expected rows evenly apart"),
    (lambda: activation(x3.int(), "silu"), "x: dtype int32"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
