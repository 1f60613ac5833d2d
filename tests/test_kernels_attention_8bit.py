"""Attention with products of 8-bit numbers: against float64 within what each format is allowed, and against itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, cases, check
from torch import Tensor

from sgl_diffusion.kernels import attention_8bit as module
from sgl_diffusion.kernels.attention_8bit import (
    FP8_OP,
    INT8_OP,
    OUTLIER_TOLERANCE,
    TOLERANCES,
    Tolerance,
    attention_fp8,
    attention_int8,
)
from sgl_diffusion.kernels.launch import Unsupported, forced_tile
from sgl_diffusion.kernels.op import Case, poisoned, rel_l2
from sgl_diffusion.kernels.quantize import DTYPES, LARGEST

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")

Format = tuple[str, str]  # of scores and of values
FORMATS: tuple[Format, ...] = (("int8", "half"), ("int8", "fp8"), ("fp8", "fp8"))
formats = pytest.mark.parametrize("format", FORMATS, ids="-".join)


def attend(format: Format, *tensors: Tensor, impl: Any = "triton", **how: Any) -> Any:
    if format[0] == "int8":
        return attention_int8(*tensors, pv=format[1], impl=impl, **how)  # type: ignore[arg-type]
    return attention_fp8(*tensors, impl=impl, **how)


def attention_formula(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, out: Tensor | None = None, code_scale: Tensor | None = None,
    pv: str = "half", smooth_k: bool = True, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Exact: nothing is rounded."""
    shared = q_BLHK.shape[2] // k_BLHK.shape[2]
    k, v = (torch.stack([x[:, :, h // shared] for h in range(q_BLHK.shape[2])], 2) for x in (k_BLHK, v_BLHK))
    scores = torch.einsum("bqhk,bshk->bhqs", q_BLHK, k) / math.sqrt(q_BLHK.shape[-1])
    weights = torch.exp(scores)
    total = weights.sum(-1, keepdim=True)
    result = torch.einsum("bhqs,bshk->bqhk", weights / total, v)
    return (result, total.log()[..., 0]) if return_lse else result


FORMULAS = {"attention_int8": attention_formula, "attention_fp8": attention_formula}


@pytest.mark.parametrize("case", [*cases([INT8_OP, FP8_OP])], ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_matches_the_formula(case: Case, impl: Any) -> None:
    check(case, impl, attention_formula)


@formats
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("coded", ["fp8_block", "fp8", "int8"])
def test_results_may_be_codes(format: Format, coded: Any, impl: Any) -> None:
    """Of heads with a scale each, of 128 channels, or with one for all, in a slice of a wider buffer."""
    q, k, v = inputs(B=2, Q=17, S=90, H=2, K=128 if coded == "fp8_block" else 48)
    numbers = attend(format, q, k, v, impl=impl)
    out = torch.zeros(2, 17, 4, q.shape[-1], device=DEVICE).to(DTYPES[coded])
    scale = torch.full((1,), float(numbers.abs().amax()) / 2 / LARGEST[coded], device=DEVICE)
    if coded == "fp8_block":
        scale = torch.full((2, 17, 4), -1.0, device=DEVICE)
    heads = scale[..., 2:] if coded == "fp8_block" else scale
    assert (
        attend(format, q, k, v, out=out[:, :, 2:], code_scale=heads, impl=impl).data_ptr() == out[:, :, 2:].data_ptr()
    )
    assert not out[:, :, :2].float().any() and (coded != "fp8_block" or (scale[..., :2] == -1).all())
    if coded == "fp8_block":
        torch.testing.assert_close(heads * LARGEST[coded], numbers.abs().amax(-1).float(), rtol=8e-3, atol=0)
    near = out[:, :, 2:].float() * (heads[..., None] if coded == "fp8_block" else heads)
    limit = LARGEST[coded] * heads  # half of the largest number: codes saturate
    want = numbers.float() if coded == "fp8_block" else numbers.float().clamp(-limit, limit)
    assert rel_l2(near, want) < (0.01 if coded == "int8" else 0.03)


# -- how exact --------------------------------------------------------------------


def inputs(B: int = 1, Q: int = 64, S: int = 256, H: int = 1, K: int = 128, G: int | None = None) -> list[Tensor]:
    """Standard normal, in bf16."""
    draw = torch.Generator().manual_seed(7)
    shapes = ((B, Q, H, K), (B, S, G or H, K), (B, S, G or H, K))
    return [torch.randn(shape, generator=draw).bfloat16().to(DEVICE) for shape in shapes]


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    result, lse = attention_formula(q.double(), k.double(), v.double(), return_lse=True)
    assert isinstance(result, Tensor)
    return result, lse


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@formats
@pytest.mark.parametrize("channel", ["plain", "shifted", "wide"])
def test_errors_are_within_what_is_declared(format: Format, channel: str) -> None:
    q, k, v = inputs()
    if channel == "shifted":
        k[..., 42] += 8
    elif channel == "wide":
        k[..., 42] *= 8
    declared: Tolerance = OUTLIER_TOLERANCE if channel == "wide" else TOLERANCES[format]  # type: ignore[index]
    got, (want, _) = attend(format, q, k, v), exact(q, k, v)
    assert rel_l2(got, want) <= declared.rel_l2
    assert cosine(got, want) >= declared.cosine


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_smooth_keys_keep_a_shifted_channel_out_of_the_scales(impl: Any) -> None:
    q, k, v = inputs()
    k[..., 42] += 8
    want = exact(q, k, v)[0]
    with_mean, without = (rel_l2(attention_int8(q, k, v, smooth_k=s, impl=impl), want) for s in (False, True))  # type: ignore[arg-type]
    assert without < with_mean / 2


@formats
@pytest.mark.parametrize("smooth_k", [True, False])
def test_kernel_and_reference_have_the_same_codes(format: Format, smooth_k: bool) -> None:
    """Log-sums are those of the scores before weights are rounded, so they tell nearly to the bit."""
    q, k, v = inputs(B=2, Q=17, S=90, H=2, K=48, G=1)
    got, lse = attend(format, q, k, v, smooth_k=smooth_k, return_lse=True)
    want, want_lse = attend(format, q, k, v, smooth_k=smooth_k, return_lse=True, impl="torch")
    assert (lse - want_lse).abs().max() < 1e-5
    assert rel_l2(got, want) < (3e-3 if format[1] == "half" else 3e-2)


@pytest.mark.parametrize("format", FORMATS[1:], ids="-".join)
def test_values_have_a_scale_for_each_channel(format: Format) -> None:
    """Where all keys are alike all weights are, exactly, and what is left of the error is that of v."""
    q, k, v = inputs(S=100)
    k[:] = k[:, :1]
    v *= torch.logspace(-3, 3, 128, device=DEVICE).bfloat16()
    got = attend(format, q, k, v)
    assert rel_l2(got, attend(format, q, k, v, impl="torch")) < 3e-3
    error = (got.double() - v.double().mean(1, keepdim=True)).norm(dim=1) / v.double().norm(dim=1)
    assert error.max() < 0.1


def test_the_reference_is_in_float64_if_asked() -> None:
    case = next(FP8_OP.cases(FP8_OP.tiny[1:2]))
    assert [x.dtype for x in FP8_OP.exact(case.inputs(DEVICE))] == [torch.float64] * 2


# -- log-sums ---------------------------------------------------------------------


@formats
@pytest.mark.parametrize("smooth_k", [True, False])
def test_halves_of_the_keys_make_the_whole(format: Format, smooth_k: bool) -> None:
    """Each half goes without a mean of its own, which its log-sums have to make up for."""
    q, k, v = inputs(S=200, K=64)
    k[:, 100:, :, 5] += 4
    k[:, :100, :, 9] -= 4
    parts = [attend(format, q, k[:, s], v[:, s], smooth_k=smooth_k, return_lse=True) for s in HALVES]
    shares = torch.stack([lse for _, lse in parts]).softmax(0).transpose(-1, -2)[..., None]
    merged = sum(share * out for share, (out, _) in zip(shares, parts, strict=True))
    want, want_lse = exact(q, k, v)
    assert rel_l2(merged, want) <= TOLERANCES[format].rel_l2 * (1 if smooth_k else 2)  # type: ignore[index]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    assert lse.dtype == torch.float32 and rel_l2(lse, want_lse) <= INT8_OP.tolerance[torch.float32]


HALVES = (slice(0, 100), slice(100, 200))


# -- memory -----------------------------------------------------------------------


@formats
def test_strides_and_neighbours(format: Format) -> None:
    """q, k and v side by side in one poisoned buffer, the second sample much larger; only `out` is written."""
    buffer = poisoned((2, 75, 3 * 2 * 48 + 16), torch.bfloat16, DEVICE)
    q, k, v = (x[:, :70] for x in buffer[..., :288].unflatten(-1, (6, 48)).split(2, dim=2))
    for x, values in zip((q, k, v), inputs(Q=70, S=70, H=2, K=48), strict=True):
        x[:1], x[1:] = values, 100 * values
    wide = torch.full((2, 75, 4, 64), 7.0, dtype=torch.bfloat16, device=DEVICE)
    out = wide[:, 2:72, 1:3, 8:56]
    assert attend(format, q, k, v, out=out) is out
    assert rel_l2(out[:1], exact(q[:1], k[:1], v[:1])[0]) <= TOLERANCES[format].rel_l2  # type: ignore[index]
    out.fill_(7.0)
    assert (wide == 7).all()


@formats
def test_larger_tiles(format: Format) -> None:
    """Of keys that share a scale, too; fewer queries than a tile has, and other ones than keys."""
    q, k, v = inputs(Q=21, S=140, K=32)
    with forced_tile(f"attention_{format[0]}", {"BLOCK_Q": 64, "BLOCK_S": 128, "STAGES": 1, "num_warps": 4}):
        got = attend(format, q, k, v)
    assert rel_l2(got, exact(q, k, v)[0]) <= TOLERANCES[format].rel_l2  # type: ignore[index]


@formats
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_zeros_are_exact(format: Format, impl: Any) -> None:
    q, k, v = inputs(Q=3, S=70, K=32)
    got, lse = attend(format, q * 0, k, v * 0, return_lse=True, impl=impl)
    assert (got == 0).all() and torch.allclose(lse, torch.full_like(lse, math.log(70)))


def test_scale() -> None:
    q, k, v = inputs(Q=20, S=70, K=64)
    for impl in ("triton", "torch"):
        got, lse = attention_int8(q, k, v, scale=0.5, return_lse=True, impl=impl)  # type: ignore[arg-type]
        want, want_lse = exact(q * 4, k, v)
        assert rel_l2(got, want) < 4e-2 and rel_l2(lse, want_lse) < 5e-3


# -- arguments --------------------------------------------------------------------

x4 = torch.zeros(1, 4, 4, 16, dtype=torch.bfloat16)
MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: attention_int8(x4, x4, x4, pv="int8"), "pv='int8': expected half or fp8"),  # type: ignore[arg-type]
    (lambda: attention_int8(x4, x4.half(), x4), "k_BLHK: dtype float16, expected bfloat16"),
    (lambda: attention_fp8(x4, x4[:, :, :3], x4[:, :, :3]), "k_BLHK: 3 heads, expected a divisor of the 4 heads of q"),
    (lambda: attention_fp8(x4, x4[:, :0], x4[:, :0]), "expected at least one key"),
    (lambda: attention_fp8(x4, x4, x4, scale=-1.0), "scale=-1.0: expected a number above 0"),
    (lambda: attention_int8(*[x4.float()] * 3, impl="triton"), "dtype torch.float32, the kernel takes bfloat16 or"),
    (lambda: attention_fp8(*[x4[..., :8]] * 3, impl="triton"), r"head dim 8, the kernel takes 16\.\.128"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.launch, "architecture", lambda: "sm_80")
    for format in FORMATS[1:]:
        with pytest.raises(Unsupported, match=f"attention_{format[0]}: fp8 needs a GPU of sm_89 or later"):
            attend(format, x4, x4, x4)
