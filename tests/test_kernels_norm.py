"""Norms of a residual stream, alone and behind a residual, and their quantised results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, cases, check
from torch import Tensor

from sgl_diffusion.kernels import norm as norm_file
from sgl_diffusion.kernels import quantize as quantize_file
from sgl_diffusion.kernels.norm import norm
from sgl_diffusion.kernels.op import Case, rel_l2
from sgl_diffusion.kernels.quantize import quantize_rows
from sgl_diffusion.kernels.residual import GATE_RESIDUAL, RESIDUAL_NORM, gate_residual, residual_norm

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")
OPS = [norm_file.OP, RESIDUAL_NORM, GATE_RESIDUAL, quantize_file.OP]


def by_row(vectors_GD: Tensor, group: Tensor | None, x: Tensor) -> Tensor:
    """The vector of every row, in the shape of x."""
    D, G = vectors_GD.shape[1], vectors_GD.shape[0]
    R = x.numel() // D
    index = [int(group[r]) if group is not None else r * G // R for r in range(R)]
    return vectors_GD[index].view(x.shape)


def quantize_formula(x: Tensor, format: str, scale: Tensor | None = None, out: Any = None) -> tuple[Tensor, Tensor]:
    largest = {"fp8": 448, "fp8_block": 448, "int8": 127}[format]
    width = 128 if format == "fp8_block" else x.shape[-1]
    codes, scales = torch.empty_like(x), []
    for columns, of in zip(x.split(width, dim=-1), codes.split(width, dim=-1), strict=True):
        amax = columns.abs().amax(-1)
        s = torch.where(amax == 0, 1.0, amax / largest) if scale is None or format == "fp8_block" else scale
        of.copy_((columns / s[..., None]).clamp(-largest, largest))
        scales.append(s)
    codes = torch.round(codes) if format == "int8" else codes.to(torch.float8_e4m3fn).double()
    return codes, torch.stack(scales, dim=-1) if format == "fp8_block" else scales[0]


def norm_formula(
    x: Tensor,
    kind: str,
    weight_D: Any,
    bias_D: Any,
    scale: Any,
    shift: Any,
    group: Any,
    quantize: Any,
    code_scale: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    y = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-6)
    y = y if weight_D is None else y * weight_D
    y = y if bias_D is None else y + bias_D
    y = y if scale is None else y * (1 + by_row(scale, group, x))
    y = y if shift is None else y + by_row(shift, group, x)
    return quantize_formula(y, quantize, code_scale) if quantize else y


def gate_residual_formula(
    x: Tensor, branch: Tensor, gate: Any, group: Any, tanh_gate: bool, sandwich_weight_D: Any, out: Any = None
) -> Tensor:
    if sandwich_weight_D is not None:
        branch = branch / torch.sqrt((branch * branch).mean(-1, keepdim=True) + 1e-6) * sandwich_weight_D
    if gate is not None:
        branch = branch * by_row(torch.tanh(gate) if tanh_gate else gate, group, x)
    return x + branch


def residual_norm_formula(
    x: Tensor, branch: Tensor, gate: Any, group: Any, tanh_gate: bool, sandwich_weight_D: Any, **norm_arguments: Any
) -> tuple[Tensor, ...]:
    total = gate_residual_formula(x, branch, gate, group, tanh_gate, sandwich_weight_D)
    y = norm_formula(total, group=group, **norm_arguments)
    return (*(y if isinstance(y, tuple) else (y,)), total)


FORMULAS: dict[str, Callable[..., Any]] = {
    "norm": norm_formula,
    "residual_norm": residual_norm_formula,
    "gate_residual": gate_residual_formula,
    "quantize_rows": quantize_formula,
}


@pytest.mark.parametrize("case", [*cases(OPS)], ids=lambda c: f"{c.op.name}-{c}")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_matches_the_formula(case: Case, impl: Any) -> None:
    check(case, impl, FORMULAS[case.op.name])


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_the_norm_sees_the_sum_as_it_is_stored(impl: Any) -> None:
    """In bf16 the rounded sum is what diffusers norms."""
    x, branch = torch.randn(2, 6, 64, device=DEVICE).mul(8).bfloat16()
    stored = gate_residual(x, branch, None, impl=impl)
    want = norm(stored, kind="layer", impl=impl)
    got = residual_norm(x, branch, kind="layer", impl=impl)
    assert torch.equal(x, stored) and torch.equal(got, want)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_an_fp16_sum_saturates(impl: Any) -> None:
    x = torch.full((2, 32), 60000.0, device=DEVICE, dtype=torch.float16)
    x[1] *= -1
    want = torch.tensor([65504.0, -65504.0], device=DEVICE, dtype=torch.float16)
    assert torch.equal(gate_residual(x, x, None, impl=impl)[:, 0], want)
    residual_norm(x, x.clone(), kind="rms", impl=impl)
    assert torch.equal(x[:, 0], want)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_sum_may_go_anywhere(impl: Any) -> None:
    x, branch, buffer = torch.randn(3, 2, 3, 32, device=DEVICE)
    wide = torch.full((2, 3, 64), 7.0, device=DEVICE)
    out = wide[..., 16:48]
    assert gate_residual(x, branch, None, out=out, impl=impl) is out
    assert (wide[..., :16] == 7).all() and (wide[..., 48:] == 7).all()
    assert gate_residual(x, branch, None, out=x, impl=impl) is x
    assert torch.equal(x, out)


def test_many_groups_and_few_give_the_same() -> None:
    """The reference goes run by run where groups are few, and by index where they are many."""
    x, scale, shift = torch.randn(3, 200, 32, device=DEVICE)
    alternating = (torch.arange(200, device=DEVICE) % 2).int()
    for group, vectors in ((None, (scale, shift)), (alternating, (scale[:2], shift[:2]))):
        for kind in ("layer", "rms"):
            got = norm(x, kind=kind, scale=vectors[0], shift=vectors[1], group=group, impl="torch")  # type: ignore[arg-type]
            wide = [v.double() for v in vectors]
            want = norm_formula(x.double(), kind, None, None, *wide, group, None)
            assert isinstance(want, Tensor) and rel_l2(got, want) < 1e-6


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_residual_may_have_groups_where_its_norm_has_none(impl: Any) -> None:
    x, branch = torch.randn(2, 200, 32, device=DEVICE)
    gate, group = torch.randn(2, 32, device=DEVICE), (torch.arange(200, device=DEVICE) % 2).int()
    want = norm_formula((x + gate[group.long()] * branch).double(), "layer", None, None, None, None, None, None)
    got = residual_norm(x, branch, gate, kind="layer", group=group, impl=impl)
    assert isinstance(want, Tensor) and rel_l2(got, want) < 1e-6


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_an_fp16_sum_that_is_not_a_number_stays_none(impl: Any) -> None:
    """Saturation must not turn a broken model into a plausible picture."""
    x = torch.zeros(2, 32, device=DEVICE, dtype=torch.float16)
    x[1, 3] = float("nan")
    assert torch.equal(gate_residual(x, torch.zeros_like(x), None, impl=impl).isnan(), x.isnan())


def test_fp8_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from sgl_diffusion.kernels import launch

    monkeypatch.setattr(launch, "architecture", lambda: "sm_80")
    x = torch.randn(2, 32, device=DEVICE)
    for call in (
        lambda: quantize_rows(x, "fp8", impl="triton"),
        lambda: norm(x, kind="rms", quantize="fp8_block", impl="triton"),
    ):
        with pytest.raises(launch.Unsupported, match="format='fp8(_block)?': needs a GPU of sm_89 or later"):
            call()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_fixed_scale_saturates_and_is_returned(impl: Any) -> None:
    """What is not a number stays none, where a format has a code for it."""
    x = torch.tensor([[1.0, -9.0, 3.0, 2.0], [0.4, 9.0, -4.0, float("nan")]], device=DEVICE)
    scale = torch.full((1,), 0.01, device=DEVICE)
    codes, same = quantize_rows(x[:, :3], "int8", scale=scale, impl=impl)
    assert same is scale and codes.tolist() == [[100, -127, 127], [40, 127, -127]]
    codes, same = quantize_rows(x, "fp8", scale=scale, impl=impl)
    assert same is scale and torch.equal(codes.float().isnan(), x.isnan())
    assert codes[:, :3].tolist() == [[96.0, -448.0, 288.0], [40.0, 448.0, -384.0]]  # ties to even


x3, x2, v, w = torch.zeros(2, 3, 32), torch.zeros(6, 32), torch.zeros(2, 32), torch.zeros(32)
index = torch.zeros(6, dtype=torch.int32)

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: norm(x3, kind="batch"), "kind='batch': expected layer or rms"),  # type: ignore[arg-type]
    (lambda: norm(w, kind="rms"), r"x: shape \(32,\), expected \(R, D\) or \(B, L, D\)"),
    (lambda: norm(x3.int(), kind="rms"), "x: dtype int32, expected float32, bfloat16, float16"),
    (lambda: norm(x3.mT.contiguous().mT, kind="rms"), "x: last dimension has stride 3, expected 1"),
    (lambda: norm(x3, kind="rms", weight_D=w[:8]), r"weight_D: shape \(8,\), expected \(32,\)"),
    (lambda: norm(x3, kind="rms", weight_D=w.to("meta")), "weight_D: on meta, the other tensors are on cpu"),
    (lambda: norm(x3, kind="rms", scale=v, shift=v[:1]), r"shift: shape \(1, 32\), expected \(2, 32\)"),
    (lambda: norm(x3, kind="rms", scale=torch.zeros(4, 32)), "scale: 4 groups, expected a divisor of the 6 rows of x"),
    (lambda: norm(x3, kind="rms", scale=v[:0]), "scale: 0 groups, expected a divisor of the 6 rows of x"),
    (lambda: norm(x3, kind="rms", scale=v, group=index[:3]), r"group: shape \(3,\), expected \(6,\)"),
    (lambda: norm(x3, kind="rms", scale=v, group=index.long()), "group: dtype int64, expected int32"),
    (lambda: norm(x3, kind="rms", quantize="int4"), "format='int4': expected fp8, fp8_block, int8"),  # type: ignore[arg-type]
    (lambda: residual_norm(x3, x3[:, :2], kind="rms"), r"branch: shape \(2, 2, 32\), expected \(2, 3, 32\)"),
    (lambda: residual_norm(x3, x3.half(), kind="rms"), "branch: dtype float16, expected float32"),
    (lambda: gate_residual(x2, x2, v, out=x2.half()), "out: dtype float16, expected float32"),
    (lambda: gate_residual(x2, x2, v[:, :8]), r"gate: shape \(2, 8\), expected \(2, 32\)"),
    (lambda: quantize_rows(x3, "int4"), "format='int4': expected fp8, fp8_block, int8"),  # type: ignore[arg-type]
    (lambda: quantize_rows(x3.mT.contiguous().mT, "int8"), "x: last dimension has stride 3"),
    (lambda: quantize_rows(x3, "fp8_block", scale=w[:1]), "scale, out: expected both of format='fp8_block', or none"),
    (lambda: norm(x3, kind="rms", code_scale=w[:1]), "code_scale: expected none without codes"),
    (lambda: norm(x3, kind="rms", quantize="fp8_block", code_scale=w[:1]), "code_scale: expected none beside quantize"),
    (lambda: norm(x3, kind="rms", quantize="int8", code_scale=w), r"scale: shape \(32,\), expected \(1,\)"),
    (lambda: quantize_rows(x3, "fp8", out=x3), "out: dtype float32, expected float8_e4m3fn"),
    (lambda: quantize_rows(x3, "fp8", scale=w), r"scale: shape \(32,\), expected \(1,\)"),
    (lambda: quantize_rows(x3, "fp8", scale=w[:1].half()), "scale: dtype float16, expected float32"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
