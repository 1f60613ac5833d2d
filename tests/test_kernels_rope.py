"""Rotary embeddings, alone and behind the norms of q and k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, cases, check
from torch import Tensor

from sgl_diffusion.kernels.op import Case, rel_l2
from sgl_diffusion.kernels.qk_norm_rope import OP as QK_NORM_ROPE
from sgl_diffusion.kernels.qk_norm_rope import Stream, qk_norm_rope
from sgl_diffusion.kernels.rope import OP as ROPE
from sgl_diffusion.kernels.rope import rope

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")


def rope_formula(x_BLHK: Tensor, cos: Tensor, sin: Tensor, half_split: bool, out: Tensor) -> Tensor:
    """Every pair as a product of two complex numbers, one after the other."""
    P = x_BLHK.shape[-1] // 2
    cos, sin = (t if t.ndim == 4 else t[..., None, :] for t in (cos, sin))
    result = torch.empty_like(x_BLHK)
    for p in range(P):
        i, j = (p, P + p) if half_split else (2 * p, 2 * p + 1)
        turned = torch.complex(x_BLHK[..., i], x_BLHK[..., j]) * torch.complex(cos[..., p], sin[..., p])
        result[..., i], result[..., j] = turned.real, turned.imag
    return result


def qk_norm_rope_formula(
    streams: Sequence[Stream], cos: Tensor, sin: Tensor, half_split: bool, v_BLHK: Tensor | None, **written: Tensor
) -> tuple[Tensor, ...]:
    def normed(x: Tensor, weight: Tensor) -> Tensor:
        grouped = x if weight.numel() == x.shape[-1] else x.flatten(-2)
        return (grouped / torch.sqrt((grouped**2).mean(-1, keepdim=True) + 1e-6) * weight).view(x.shape)

    parts = [s.qkv_BN3HK.unbind(2) for s in streams]
    q = torch.cat([normed(p[0], s.q_weight) for p, s in zip(parts, streams, strict=True)], dim=1)
    k = torch.cat([normed(p[1], s.k_weight) for p, s in zip(parts, streams, strict=True)], dim=1)
    v = torch.cat([p[2] for p in parts], dim=1)
    turned = (rope_formula(q, cos, sin, half_split, q), rope_formula(k, cos, sin, half_split, k))
    return turned if v_BLHK is None else (*turned, v)


FORMULAS: dict[str, Callable[..., Any]] = {"rope": rope_formula, "qk_norm_rope": qk_norm_rope_formula}


@pytest.mark.parametrize("case", cases([ROPE, QK_NORM_ROPE]), ids=lambda c: f"{c.op.name}-{c}")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_matches_the_formula(case: Case, impl: Any) -> None:
    check(case, impl, FORMULAS[case.op.name])


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_only_the_rows_asked_for_are_written(impl: Any) -> None:
    B, L, H, K = 2, 5, 2, 16
    joint = torch.full((3, B, L + 2, H, K), 7.0, device=DEVICE)
    rows = joint[:, :, 1 : L + 1]
    weight, table = torch.ones(K, device=DEVICE), torch.ones(L, K // 2, device=DEVICE)
    parts = [Stream(torch.randn(B, n, 3, H, K, device=DEVICE), weight, weight) for n in (2, 3)]
    qk_norm_rope(parts, table, table, *rows, impl=impl)
    assert (joint[:, :, 0] == 7).all() and (joint[:, :, -1] == 7).all()
    assert (rows != 7).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_stream_in_place_leaves_v_and_its_neighbours_alone(impl: Any) -> None:
    wide = torch.randn(2, 3, 4 * 32, device=DEVICE)
    before, qkv = wide.clone(), wide[..., :96].unflatten(-1, (3, 2, 16))
    weight, table = torch.ones(16, device=DEVICE), torch.full((3, 8), 0.5, device=DEVICE)
    qk_norm_rope([Stream(qkv, weight, weight)], table, table, qkv[:, :, 0], qkv[:, :, 1], None, impl=impl)
    assert torch.equal(wide[..., 64:], before[..., 64:])
    assert (wide[..., :64] != before[..., :64]).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_table_of_one_serves_every_sample(impl: Any) -> None:
    x, angle = torch.randn(2, 3, 2, 16, device=DEVICE), torch.randn(1, 3, 8, device=DEVICE)
    got = rope(x, angle.cos(), angle.sin(), impl=impl)
    want = rope(x, angle.cos().repeat(2, 1, 1), angle.sin().repeat(2, 1, 1), impl=impl)
    assert torch.equal(got, want)
    assert rel_l2(got.norm(dim=-1), x.norm(dim=-1)) < 1e-6  # a rotation


x4, lp, k1 = torch.zeros(1, 3, 2, 16), torch.zeros(3, 8), torch.zeros(16)
qkv = torch.zeros(1, 3, 3, 2, 16)


def qknr(streams: Any, *rest: Any, **more: Any) -> Callable[[], object]:
    return lambda: qk_norm_rope(streams, *rest, **more)


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: rope(x4[0], lp, lp), r"x_BLHK: shape \(3, 2, 16\), expected 4 dimensions"),
    (lambda: rope(x4[..., :15], lp, lp), "x_BLHK: shape .* expected an even head dim"),
    (lambda: rope(x4, lp[:2], lp[:2]), r"cos: shape \(2, 8\), expected \(3, 8\), \(1, 3, 8\), \(1, 3, 2, 8\)"),
    (lambda: rope(x4, lp, lp[:2]), r"sin: shape \(2, 8\), expected \(3, 8\)"),
    (lambda: rope(x4, lp, lp.half()), "sin: dtype float16, expected float32"),
    (lambda: rope(x4, lp, torch.zeros(3, 16)[:, :8]), r"sin: strides \(16, 1\), expected those of cos, \(8, 1\)"),
    (lambda: rope(x4, lp, lp, out=x4[:, :2]), "out: shape"),
    (qknr([], lp, lp, x4, x4, x4), "streams: 0 of them, expected one or two"),
    (qknr([Stream(qkv[:, :, :2], k1, k1)], lp, lp, x4, x4, x4), r"streams\[0\].qkv_BN3HK: shape \(1, 3, 2, 2, 16\)"),
    (qknr([Stream(qkv, k1[:8], k1)], lp, lp, x4, x4, x4), r"streams\[0\].q_weight: shape \(8,\), expected \(16,\)"),
    (qknr([Stream(qkv, k1, k1)] * 2, lp, lp, x4, x4, x4), "q_BLHK: 3 tokens, the streams have 6"),
    (qknr([Stream(qkv, k1, k1)], lp, lp, x4, x4.half(), x4), "k_BLHK: dtype float16, expected float32"),
    (qknr([Stream(qkv.half(), k1, k1)], lp, lp, x4, x4, x4), "qkv_BN3HK: dtype float16, expected float32"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
