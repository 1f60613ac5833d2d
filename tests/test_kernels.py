"""Every operation of the catalog against its formula in float64, as Triton kernel and as PyTorch reference.

Without a GPU the kernels run in Triton's interpreter on tiny sizes; with one, compiled, on production sizes too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import DEVICE, cases, check
from torch import Tensor

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.kernels.catalog import OPS, markdown_table
from sgl_diffusion.kernels.euler_step import euler_step
from sgl_diffusion.kernels.gate_residual import gate_residual
from sgl_diffusion.kernels.gelu import gelu_tanh
from sgl_diffusion.kernels.group_norm import group_norm
from sgl_diffusion.kernels.launch import architecture, tile_row, tile_table
from sgl_diffusion.kernels.norm_modulate import norm_modulate
from sgl_diffusion.kernels.op import Case, rel_l2
from sgl_diffusion.kernels.qk_norm_rope import qk_norm_rope

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")


# -- the formulas, as plainly as they can be written ------------------------------


def norm_modulate_formula(x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor) -> Tensor:
    centred = x_BLD - x_BLD.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
    return normed * (1 + scale_BD[:, None]) + shift_BD[:, None]


def gate_residual_formula(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    return x_BLD + gate_BD[:, None] * y_BLD


def gelu_tanh_formula(x_MD: Tensor, out: Tensor) -> Tensor:
    return x_MD / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x_MD + 0.044715 * x_MD**3)))


def attention_formula(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, out: Tensor) -> Tensor:
    scores = torch.einsum("bqhk,bshk->bhqs", q_BLHK, k_BLHK) / math.sqrt(q_BLHK.shape[-1])
    return torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1), v_BLHK)


def qk_norm_rope_formula(
    qkv_BL3HK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_LP: Tensor, sin_LP: Tensor,
    **written: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    def rotated(x: Tensor, weight: Tensor) -> Tensor:
        x = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight
        even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos_LP[:, None], sin_LP[:, None]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    q, k, v = qkv_BL3HK.unbind(2)
    return rotated(q, q_weight_K), rotated(k, k_weight_K), v


def group_norm_formula(x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, silu: bool) -> Tensor:
    x = x_BCHW.reshape(x_BCHW.shape[0], groups, -1)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
    channels = (-1, *[1] * (x_BCHW.ndim - 2))
    y = normed.reshape(x_BCHW.shape) * weight_C.view(channels) + bias_C.view(channels)
    return y / (1 + torch.exp(-y)) if silu else y


def euler_step_formula(x: Tensor, velocity: Tensor, dt: float | Tensor) -> Tensor:
    return x + dt * velocity


FORMULAS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {name: globals()[f"{name}_formula"] for name in OPS}


# -- every op, from the catalog ---------------------------------------------------


@pytest.mark.parametrize("case", cases([*OPS.values()]), ids=lambda c: f"{c.op.name}-{c}")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_matches_the_formula(case: Case, impl: Any) -> None:
    check(case, impl, FORMULAS[case.op.name])


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_same_inputs_give_the_same_bits(op: Any) -> None:
    case = next(op.cases(op.tiny[-1:]))
    first = [x.clone() for x in op.run(case.inputs(DEVICE), "triton")]
    second = op.run(case.inputs(DEVICE), "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_traffic_and_work_are_counted(op: Any) -> None:
    inputs = next(op.cases(op.production)).inputs("meta")
    largest = max(x.nbytes for x in inputs.values() if isinstance(x, Tensor))
    assert largest < op.bytes(inputs) < 8 * largest
    if op.flops is not None:
        assert op.flops(inputs) == 4 * 24 * 4608 * 4608 * 128


def test_the_docs_list_the_catalog() -> None:
    docs = Path(__file__).parent.parent / "docs" / "kernels.md"
    assert markdown_table() in docs.read_text()


# -- what the catalog's cases cannot show -----------------------------------------


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_only_the_slice_asked_for_is_written(impl: Any) -> None:
    B, L, H, K = 2, 5, 2, 16
    D = H * K
    buffer = torch.full((B, L, 4 * D), 7.0, device=DEVICE)
    q, k, v = torch.randn(3, B, L, H, K, device=DEVICE)
    attention(q, k, v, out=buffer[..., D : 2 * D].view(B, L, H, K), impl=impl)
    gelu_tanh(torch.randn(B, L, D, device=DEVICE), out=buffer[..., 2 * D : 3 * D], impl=impl)
    assert (buffer[..., :D] == 7).all() and (buffer[..., 3 * D :] == 7).all()
    assert (buffer[..., D : 3 * D] != 7).all()

    joint = torch.full((3, B, L + 2, H, K), 7.0, device=DEVICE)
    rows = joint[:, :, 1 : L + 1]
    qkv, weight = torch.randn(B, L, 3, H, K, device=DEVICE), torch.ones(K, device=DEVICE)
    table = torch.ones(L, K // 2, device=DEVICE)
    qk_norm_rope(qkv, weight, weight, table, table, *rows, impl=impl)
    assert (joint[:, :, 0] == 7).all() and (joint[:, :, -1] == 7).all()
    assert (rows != 7).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_gelu_works_in_place_and_returns_its_out(impl: Any) -> None:
    x = torch.randn(3, 40, device=DEVICE)
    want = gelu_tanh(x, impl=impl)
    assert gelu_tanh(x, out=x, impl=impl) is x
    assert torch.equal(x, want)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_attention_scale_and_large_scores(impl: Any) -> None:
    """Scores of thousands: exp overflows unless the maximum is taken out first."""
    q, k, v = torch.randn(3, 1, 24, 1, 16, device=DEVICE, dtype=torch.float64).mul(8).float()
    scores = torch.einsum("bqhk,bshk->bhqs", q.double(), k.double()) * 7.0
    want = torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1), v.double())
    assert rel_l2(attention(q, k, v, scale=7.0, impl=impl), want) < 2e-4


def test_modulation_may_be_wider_than_x() -> None:
    x = torch.randn(2, 3, 32, device=DEVICE).bfloat16()
    scale, shift, gate = torch.randn(3, 2, 32, device=DEVICE)
    for impl in ("triton", "torch"):
        got = norm_modulate(x, scale, shift, impl=impl)
        assert rel_l2(got, norm_modulate_formula(*(t.double() for t in (x, scale, shift)))) < 3e-3
        got = gate_residual(x, x, gate, impl=impl)
        assert rel_l2(got, gate_residual_formula(*(t.double() for t in (x, x, gate)))) < 3e-3


def test_auto_runs_the_reference_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 32)
    assert torch.equal(gelu_tanh(x), gelu_tanh(x, impl="torch"))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    gelu_tanh(x)
    with pytest.raises(ValueError, match="impl='triton': the tensors are on the CPU"):
        gelu_tanh(x, impl="triton")


# -- arguments --------------------------------------------------------------------

x3, v2 = torch.zeros(2, 3, 32), torch.zeros(2, 32)
x4, q4 = torch.zeros(1, 4, 3, 3), torch.zeros(1, 3, 2, 16)
qkv, k1, lp = torch.zeros(1, 3, 3, 2, 16), torch.zeros(16), torch.zeros(3, 8)

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: gelu_tanh(x3, impl="cuda"), "impl='cuda': expected auto, triton or torch"),
    (lambda: norm_modulate(v2, v2, v2), r"x_BLD: shape \(2, 32\), expected 3 dimensions"),
    (lambda: norm_modulate(x3, v2[:1], v2), r"scale_BD: shape \(1, 32\), expected \(2, 32\)"),
    (lambda: norm_modulate(x3, v2, v2.half()), "shift_BD: dtype float16, expected float32"),
    (lambda: norm_modulate(x3.int(), v2, v2), "x_BLD: dtype int32, expected float32, bfloat16, float16"),
    (lambda: norm_modulate(x3.mT.contiguous().mT, v2, v2), "x_BLD: last dimension has stride 3"),
    (lambda: norm_modulate(x3, v2.to("meta"), v2), "scale_BD: on meta, the other tensors are on cpu"),
    (lambda: gate_residual(x3, x3[:, :2], v2), r"y_BLD: shape \(2, 2, 32\), expected \(2, 3, 32\)"),
    (lambda: gate_residual(x3, x3.half(), v2), "y_BLD: dtype float16, expected float32"),
    (lambda: gelu_tanh(x3, out=x3[:, :2]), "out: shape"),
    (lambda: gelu_tanh(torch.zeros(2, 5, 32)[:, :3]), "x_MD: strides .* expected rows evenly apart"),
    (lambda: qk_norm_rope(qkv[:, :, :2], k1, k1, lp, lp, q4, q4, q4), "qkv_BL3HK: shape"),
    (lambda: qk_norm_rope(qkv, k1[:8], k1, lp, lp, q4, q4, q4), "q_weight_K: shape"),
    (lambda: qk_norm_rope(qkv, k1, k1, lp[:2], lp, q4, q4, q4), "cos_LP: shape"),
    (lambda: qk_norm_rope(qkv, k1, k1, lp, lp.half(), q4, q4, q4), "sin_LP: dtype float16"),
    (lambda: qk_norm_rope(qkv, k1, k1, lp, lp, q4, q4.half(), q4), "k_BLHK: dtype float16"),
    (lambda: qk_norm_rope(qkv, k1, k1, lp.mT.contiguous().mT, lp, q4, q4, q4), "cos_LP: strides"),
    (lambda: attention(q4, q4[:, :0], q4[:, :0]), "k_BLHK: .* expected at least one key"),
    (lambda: attention(q4, q4, q4[:, :2]), r"v_BLHK: shape \(1, 2, 2, 16\), expected \(1, 3, 2, 16\)"),
    (lambda: attention(q4, q4, q4, out=q4[:, :2]), "out: shape"),
    (lambda: attention(*[q4[..., :8]] * 3, impl="triton"), "head dim 8, .* takes 16..128; use impl='torch'"),
    (lambda: group_norm(x4, k1[:4], k1[:4], 3), "groups=3: expected a divisor of the 4 channels"),
    (lambda: group_norm(x4.mT, k1[:4], k1[:4], 2), "x_BCHW: strides .* expected contiguous"),
    (lambda: euler_step(x3, x3[:1], 0.1), "velocity: shape"),
    (lambda: euler_step(x3, x3, torch.zeros(1)), r"dt: shape \(1,\), expected \(\)"),
    (lambda: euler_step(x3, x3, torch.zeros((), dtype=torch.float16)), "dt: dtype float16"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


# -- tiles ------------------------------------------------------------------------


def test_a_gpu_without_a_table_uses_its_nearest_kin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)

    def table_of(capability: int) -> str:
        class Driver:
            def get_current_target(self) -> Any:
                return triton.backends.compiler.GPUTarget("cuda", capability, 32)

        monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
        return architecture()

    kin = {80: "sm_80", 86: "sm_89", 89: "sm_89", 90: "sm_90", 100: "sm_100", 103: "sm_100", 120: "sm_89"}
    assert {capability: table_of(capability) for capability in kin} == kin
    with pytest.raises(RuntimeError, match="sm_75: the kernels need"):
        table_of(75)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "interpreter"])
def test_tables_cover_the_catalog(arch: str) -> None:
    assert set(tile_table(arch)) == set(OPS)
    for head_dim in (16, 32, 64, 128):
        for itemsize in (2, 4):
            number, values = tile_row(arch, "attention", head_dim=head_dim, itemsize=itemsize)
            assert values["BLOCK_Q"] >= 16
            wider = tile_row(arch, "attention", head_dim=128, itemsize=itemsize)[0]
            assert number <= wider


# -- the interpreter itself -------------------------------------------------------


@triton.jit
def _round_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x, out_dtype=tl.float32))


@triton.jit
def _add_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x + x)


def test_bf16_is_right_in_kernels() -> None:
    """Fails in the interpreter as Triton ships it."""
    x = torch.randn(256, device=DEVICE)
    rounded = torch.empty(256, device=DEVICE, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, rounded, BLOCK=256)
    assert torch.equal(rounded, x.bfloat16())
    product = torch.empty(16, 16, device=DEVICE)
    _dot_kernel[(1,)](rounded, product, BLOCK=16)
    matrix = rounded.view(16, 16).double()
    assert rel_l2(product, matrix @ matrix) < 1e-6


@pytest.mark.skipif(DEVICE != "cpu", reason="of the interpreter")
def test_the_interpreter_refuses_bf16_arithmetic() -> None:
    x = torch.zeros(16, dtype=torch.bfloat16)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="widen bf16 to fp32"):
        _add_kernel[(1,)](x, x.clone(), BLOCK=16)
