"""Attention: every form of the kernel, and the reference, against a formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, cases, check
from test_kernels_norm import quantize_formula
from torch import Tensor

from sgl_diffusion.kernels import attention as module
from sgl_diffusion.kernels.attention import OP, Form, Visible, attention, bulk_copies, form_for
from sgl_diffusion.kernels.launch import forced_tile
from sgl_diffusion.kernels.op import Case, in_float64, poisoned, rel_l2
from sgl_diffusion.kernels.quantize import DTYPES, LARGEST

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")

FORMS: tuple[Form, ...] = ("pointer", "tma", "ws", "two_tiles")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def attention_formula(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, out: Tensor | None = None, code_scale: Tensor | None = None,
    causal: bool = False, key_mask_BS: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Every score written down, and who sees whom as one matrix."""
    B, Q, H, K = q_BLHK.shape
    S, shared = k_BLHK.shape[1], H // k_BLHK.shape[2]
    k, v = (torch.stack([x[:, :, h // shared] for h in range(H)], 2) for x in (k_BLHK, v_BLHK))
    # the sequence a token belongs to, and its place there
    of_query, of_key, at_query, at_key = (torch.zeros(n, dtype=torch.long) for n in (Q, S, Q, S))
    starts = ([0], [0]) if cu_seqlens_q is None else (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())  # type: ignore
    for sequence, (q0, k0) in enumerate(zip(*starts, strict=True)):
        of_query[q0:], of_key[k0:] = sequence, sequence
        at_query[q0:], at_key[k0:] = torch.arange(Q - q0), torch.arange(S - k0)
    seen = of_query[:, None] == of_key[None, :]
    if causal:
        seen &= at_query[:, None] >= at_key[None, :]
    seen = seen.to(q_BLHK.device).expand(B, 1, Q, S)
    if key_mask_BS is not None:
        seen = seen & key_mask_BS[:, None, None, :]
    scores = torch.einsum("bqhk,bshk->bhqs", q_BLHK, k) / math.sqrt(K)
    weights = torch.exp(scores) * seen
    total = weights.sum(-1, keepdim=True)
    result = torch.einsum("bhqs,bshk->bqhk", weights / total.clamp_min(1e-300), v)
    if code_scale is not None:
        blocks = code_scale.ndim > 1
        kind = "fp8_block" if blocks else "int8" if out is not None and out.dtype == torch.int8 else "fp8"
        return quantize_formula(result, kind, None if blocks else code_scale[0])[0]
    return (result, total.log()[..., 0]) if return_lse else result


FORMULAS = {"attention": attention_formula}


@pytest.mark.parametrize("case", [*cases([OP])], ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_matches_the_formula(case: Case, impl: Any) -> None:
    check(case, impl, attention_formula)


# -- forms ------------------------------------------------------------------------


def inputs(B: int, Q: int, S: int, H: int, K: int, G: int | None = None, dtype: Any = torch.float32) -> dict[str, Any]:
    """q, k and v side by side in one NaN-poisoned buffer of tokens: strided, yet matrices."""
    G, D = G or H, K * (H + 2 * (G or H))
    rows, generator = max(Q, S), torch.Generator().manual_seed(Q * S)
    buffer = poisoned((B, rows, D + 16), dtype, DEVICE)[..., :D].unflatten(-1, (H + 2 * G, K))
    if B > 1 and Q != S:  # each its own: samples of one buffer would not lie one behind the other
        parts = [poisoned((B, n, heads, K), dtype, DEVICE) for n, heads in ((Q, H), (S, G), (S, G))]
    else:
        parts = [buffer[:, :Q, :H], buffer[:, :S, H : H + G], buffer[:, :S, H + G :]]
    names = ("q_BLHK", "k_BLHK", "v_BLHK")
    return {
        name: x.copy_(torch.randn(x.shape, generator=generator).to(DEVICE))
        for name, x in zip(names, parts, strict=True)
    }


SIZES = [
    {"B": 1, "Q": 1, "S": 1, "H": 1, "K": 16},
    {"B": 1, "Q": 17, "S": 40, "H": 2, "K": 64},
    {"B": 1, "Q": 72, "S": 72, "H": 1, "K": 128},
    {"B": 2, "Q": 40, "S": 128, "H": 4, "K": 16, "G": 2},
    {"B": 1, "Q": 33, "S": 200, "H": 2, "K": 16, "G": 1},
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(f"{k}{v}" for k, v in size.items()))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_matches_the_formula(form: Form, size: dict[str, int], dtype: torch.dtype) -> None:
    x = inputs(**size, dtype=dtype)
    with forced_tile("attention", {"form": form, "BLOCK_Q": 32, "BLOCK_S": 32, "STAGES": 1, "num_warps": 4}):
        assert form_for(**x)[0] == form
        out, lse = attention(**x, return_lse=True, impl="triton")
    want, want_lse = attention_formula(**in_float64_all(x), return_lse=True)
    assert rel_l2(out, want) <= OP.tolerance[dtype]
    assert lse.dtype == torch.float32 and (lse - want_lse).abs().max() < 1e-5


def in_float64_all(x: dict[str, Any]) -> dict[str, Any]:
    return {name: in_float64(value) for name, value in x.items()}


def taken(form: Form, x: dict[str, Any], **visible: Any) -> Form:
    """The form that runs where the table asks for `form`; its result is checked."""
    with forced_tile("attention", {"form": form, "BLOCK_Q": 16, "BLOCK_S": 16, "STAGES": 1, "num_warps": 4}):
        ran = form_for(**x, visible=Visible(**visible))[0]
        got = attention(**x, **visible, impl="triton")
    assert rel_l2(got, attention_formula(**in_float64_all(x), **visible)) <= OP.tolerance[got.dtype]
    return ran


@pytest.mark.parametrize("form", ["tma", "ws", "two_tiles"])
def test_what_a_form_cannot_do_goes_to_the_pointers(form: Form) -> None:
    x = inputs(2, 20, 20, 2, 16)
    starts = torch.tensor([0, 9, 20], dtype=torch.int32, device=DEVICE)
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 11}
    assert taken(form, x, causal=True) == "pointer"
    assert taken(form, x, key_mask_BS=torch.rand(2, 20, device=DEVICE).add(0.5) > 0.7) == "pointer"
    assert taken(form, inputs(1, 20, 20, 2, 16), **packed) == "pointer"
    unaligned = {name: torch.cat([t, t[..., :1]], -1)[..., :16] for name, t in x.items()}
    assert taken(form, unaligned) == "pointer"
    shifted = {**x, "v_BLHK": torch.randn(2 * 20 * 2 * 16 + 1, device=DEVICE)[1:].view(2, 20, 2, 16)}
    assert taken(form, shifted) == "pointer"


def test_descriptors_made_in_the_kernel_take_more() -> None:
    """Samples with ragged tails, head dims that need padding, heads before tokens."""
    ragged, padded = inputs(2, 20, 20, 2, 16), inputs(1, 20, 20, 2, 96, dtype=torch.bfloat16)
    heads_first = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in inputs(1, 20, 20, 2, 16).items()}
    for x in (ragged, padded, heads_first):
        assert bulk_copies(**x) == 1
        assert taken("ws", x) == "ws"
        assert taken("tma", x) == taken("two_tiles", x) == "pointer"


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_never_sees_the_next(form: Form) -> None:
    """Tiles past the end of a sample lie in the next one, whose NaN must stay there."""
    x = inputs(2, 128, 128, 1, 16)
    x["k_BLHK"][1] = x["v_BLHK"][1] = x["q_BLHK"][1] = math.nan
    first = {name: t[:, :100] if form in ("pointer", "ws") else t for name, t in x.items()}
    with forced_tile("attention", {"form": form, "BLOCK_Q": 64, "BLOCK_S": 32, "STAGES": 1, "num_warps": 4}):
        assert form_for(**first)[0] == form
        got = attention(**first, impl="triton")[:1]
    want = attention_formula(**in_float64_all({name: t[:1] for name, t in first.items()}))
    assert rel_l2(got, want) <= 2e-6


# -- keys that are not seen -------------------------------------------------------


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_query_without_keys_gets_zero(impl: Any, causal: bool, dtype: torch.dtype) -> None:
    x = inputs(2, 20, 40, 2, 16, dtype=dtype)
    mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE)
    mask[0], mask[1, :18] = False, False
    out, lse = attention(**x, key_mask_BS=mask, causal=causal, return_lse=True, impl=impl)
    alive = torch.zeros(2, 20, dtype=torch.bool, device=DEVICE)
    alive[1, 18 if causal else 0 :] = True
    assert (out[~alive] == 0).all()
    assert (lse.mT[~alive] == -math.inf).all()
    want, want_lse = attention_formula(**in_float64_all(x), key_mask_BS=mask, causal=causal, return_lse=True)
    assert rel_l2(out[alive], want[alive]) <= OP.tolerance[dtype]
    assert (lse.mT[alive] - want_lse.mT[alive]).abs().max() < 1e-5


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_packed_sequences_may_be_empty(impl: Any) -> None:
    x = inputs(1, 30, 30, 2, 16)
    of_q = torch.tensor([0, 7, 7, 30], dtype=torch.int32, device=DEVICE)
    of_k = torch.tensor([0, 0, 12, 30], dtype=torch.int32, device=DEVICE)
    out, lse = attention(**x, cu_seqlens_q=of_q, cu_seqlens_k=of_k, max_seqlen_q=23, return_lse=True, impl=impl)
    assert (out[:, :7] == 0).all() and (lse[..., :7] == -math.inf).all()
    last = {"q_BLHK": x["q_BLHK"][:, 7:], **{n: x[n][:, 12:] for n in ("k_BLHK", "v_BLHK")}}
    assert rel_l2(out[:, 7:], attention_formula(**in_float64_all(last))) <= 2e-6


def test_causal_leaves_later_keys_alone() -> None:
    x = inputs(1, 40, 40, 1, 16)
    want = attention(**x, causal=True, impl="triton")[:, :20]
    x["k_BLHK"][:, 20:] = 100.0
    assert torch.equal(attention(**x, causal=True, impl="triton")[:, :20], want)


def test_log_sums_of_large_scores() -> None:
    """exp of them overflows, and their logarithm is the largest score itself."""
    q = torch.full((1, 17, 1, 16), 30.0, device=DEVICE)
    for impl in ("triton", "torch"):
        _, lse = attention(q, q, q, return_lse=True, impl=impl)
        assert torch.allclose(lse, torch.full_like(lse, 3600 + math.log(17)), rtol=1e-6)


def test_the_reference_is_exact_in_float64() -> None:
    for case in OP.cases(OP.tiny):
        if case.dtype == torch.float32 and "coded" not in case.size:  # codes are of fp8 and int8
            x = case.inputs(DEVICE)
            want = attention_formula(**in_float64_all(x))
            want = want if isinstance(want, tuple) else (want,)
            for got, exact in zip(OP.exact(x), want, strict=True):
                assert got.dtype == torch.float64 and rel_l2(got, exact) < 1e-13


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("coded", ["fp8_block", "fp8", "int8"])
def test_results_may_be_codes(coded: Any, form: Form, dtype: Any) -> None:
    """Of heads with a scale each, of 128 channels, or with one for all, in a slice of a wider buffer."""
    x = inputs(1, 40, 32, 2, 128, dtype=dtype)
    tile = {"form": form, "BLOCK_Q": 16, "BLOCK_S": 16, "STAGES": 2, **({"num_warps": 4} if DEVICE == "cuda" else {})}
    out = torch.zeros(1, 40, 4, 128, device=DEVICE).to(DTYPES[coded])
    with forced_tile("attention", tile):
        numbers = attention(**x, impl="triton").float()
        scale = torch.full((1,), float(numbers.abs().amax()) / 2 / LARGEST[coded], device=DEVICE)
        if coded == "fp8_block":
            scale = torch.full((1, 40, 4), -1.0, device=DEVICE)
        heads = scale[..., 2:] if coded == "fp8_block" else scale
        attention(**x, out=out[:, :, 2:], code_scale=heads, impl="triton")
    assert not out[:, :, :2].float().any() and (coded != "fp8_block" or (scale[..., :2] == -1).all())
    want, codes = numbers, out[:, :, 2:].float()
    if coded == "fp8_block":
        assert rel_l2(heads * LARGEST[coded], numbers.abs().amax(-1)) < OP.tolerance[dtype]
        codes *= heads[..., None]
    else:  # half of the largest number: codes saturate
        codes, want = codes * heads, numbers.clamp(-LARGEST[coded] * heads, LARGEST[coded] * heads)
    assert rel_l2(codes, want) < (0.01 if coded == "int8" else 0.03)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_packed_results_may_be_codes(impl: Any) -> None:
    x = inputs(1, 37, 37, 2, 128)
    starts = torch.tensor([0, 20, 37], dtype=torch.int32, device=DEVICE)
    packed: dict[str, Any] = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 20, "impl": impl}
    numbers = attention(**x, **packed)
    out, scale = torch.zeros_like(numbers).to(DTYPES["fp8"]), poisoned((1, 37, 2), torch.float32, DEVICE)
    attention(**x, **packed, out=out, code_scale=scale)
    assert rel_l2(scale * LARGEST["fp8"], numbers.abs().amax(-1)) < 2e-6
    assert rel_l2(out.float() * scale[..., None], numbers) < 0.03


# -- arguments --------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("packed", [False, True])
def test_only_the_slice_asked_for_is_written(impl: Any, packed: bool) -> None:
    x = inputs(1, 20, 20, 2, 16)
    buffer = torch.full((1, 24, 4, 32), 7.0, device=DEVICE)
    out = buffer[:, 2:22, 1:3, 8:24]
    starts = torch.tensor([0, 9, 20], dtype=torch.int32, device=DEVICE)
    lengths: dict[str, Any] = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 11} if packed else {}
    assert attention(**x, out=out, **lengths, impl=impl) is out
    assert rel_l2(out, attention_formula(**in_float64_all(x), **lengths)) <= 2e-6
    out.fill_(7.0)
    assert (buffer == 7).all()


x4, mask = torch.zeros(1, 4, 4, 16), torch.ones(1, 4, dtype=torch.bool)
starts = torch.tensor([0, 4], dtype=torch.int32)
PACKED: dict[str, Any] = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 4}
ALL_THREE = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q: expected all three"

x8 = x4.to(DTYPES["fp8"])
MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: attention(x4[0], x4, x4), r"q_BLHK: shape \(4, 4, 16\), expected 4 dimensions"),
    (lambda: attention(x4, x4[0], x4), r"k_BLHK: shape \(4, 4, 16\), expected 4 dimensions"),
    (lambda: attention(x4, x4, x4, code_scale=x4[0, 0, 0, :1]), "out: expected a place for codes beside code_scale"),
    (lambda: attention(x4, x4, x4, out=x4, code_scale=x4[0, 0, 0, :1]), "out: dtype float32, expected float8_e4m3fn"),
    (lambda: attention(x4, x4, x4, out=x8, code_scale=x4[0, 0, 0]), r"code_scale: shape \(16,\), expected \(1,\)"),
    (
        lambda: attention(x4, x4, x4, out=x8, code_scale=x4[..., 0].contiguous()),
        "code_scale: expected one, as heads are of 16 channels and not 128",
    ),
    (lambda: attention(x4, x4[:, :, :3], x4[:, :, :3]), "k_BLHK: 3 heads, expected a divisor of the 4 heads of q"),
    (lambda: attention(x4, x4[:, :, :2], x4), r"v_BLHK: shape \(1, 4, 4, 16\), expected \(1, 4, 2, 16\)"),
    (lambda: attention(x4, x4.half(), x4), "k_BLHK: dtype float16, expected float32"),
    (lambda: attention(x4, x4, x4.mT.contiguous().mT), "v_BLHK: last dimension has stride 4, expected 1"),
    (lambda: attention(x4, x4, x4, scale=0.0), "scale=0.0: expected a number above 0"),
    (lambda: attention(x4, x4, x4, key_mask_BS=mask.int()), "key_mask_BS: dtype int32, expected bool"),
    (lambda: attention(x4, x4, x4, key_mask_BS=mask[:, :3]), r"key_mask_BS: shape \(1, 3\), expected \(1, 4\)"),
    (lambda: attention(x4, x4, x4, key_mask_BS=mask.to("meta")), "key_mask_BS: on meta, the other tensors are on cpu"),
    (lambda: attention(x4, x4, x4, cu_seqlens_q=starts), ALL_THREE),
    (lambda: attention(x4, x4, x4, max_seqlen_q=3), ALL_THREE),
    (lambda: attention(x4, x4, x4, **PACKED, key_mask_BS=mask), "key_mask_BS: expected None beside cu_seqlens_q"),
    (lambda: attention(*[x4.view(2, 2, 4, 16)] * 3, **PACKED), r"q_BLHK: shape \(2, .* expected one sample"),
    (lambda: attention(x4, x4, x4, **{**PACKED, "cu_seqlens_k": starts.long()}), "cu_seqlens_k: dtype int64"),
    (lambda: attention(x4, x4, x4, **{**PACKED, "cu_seqlens_k": starts[:1]}), r"cu_seqlens_k: shape \(1,\)"),
    (lambda: attention(x4, x4, x4, **{**PACKED, "max_seqlen_q": 0}), "max_seqlen_q=0: expected at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


def test_work_is_counted_in_seen_pairs() -> None:
    def pairs(Q: int, S: int) -> int:
        return sum(min(i + 1, S) for i in range(Q))

    for Q, S in ((5, 5), (3, 7), (7, 3)):
        x = OP.inputs("meta", torch.float32, B=2, Q=Q, S=S, H=3, K=16, causal=True)
        assert module.OP.flops is not None and module.OP.flops(x) == 4 * 2 * 3 * 16 * pairs(Q, S)
    x = OP.inputs("cpu", torch.float32, B=1, Q=12, S=14, H=3, K=16, packed=((5, 7), (4, 10)))
    assert module.OP.flops is not None and module.OP.flops(x) == 4 * 3 * 16 * (5 * 4 + 7 * 10)
