"""Packing for exchanges between GPUs and merging of attentions, against formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, cases, check
from torch import Tensor

from sgl_diffusion.kernels import collective as module
from sgl_diffusion.kernels.collective import join_ranks, merge_attention, split_ranks
from sgl_diffusion.kernels.op import Case, rel_l2

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")


def split_ranks_formula(x_BLHK: Tensor, ranks: int, dim: str, out: Tensor | None) -> Tensor:
    return torch.stack(x_BLHK.chunk(ranks, dim=1 if dim == "tokens" else 2))


def join_ranks_formula(messages_PBLHK: Tensor, dim: str, out: Tensor | None) -> Tensor:
    return torch.cat(tuple(messages_PBLHK), dim=1 if dim == "tokens" else 2)


def merge_attention_formula(
    out_BQHK: Tensor, lse_BHQ: Tensor, other_BQHK: Tensor, other_lse_BHQ: Tensor
) -> tuple[Tensor, Tensor]:
    weight, other_weight = lse_BHQ.exp(), other_lse_BHQ.exp()
    total = weight + other_weight
    shares = ((w / total).transpose(1, 2)[..., None] for w in (weight, other_weight))
    return next(shares) * out_BQHK + next(shares) * other_BQHK, total.log()


FORMULAS: dict[str, Callable[..., Any]] = {
    "split_ranks": split_ranks_formula,
    "join_ranks": join_ranks_formula,
    "merge_attention": merge_attention_formula,
}
OPS = [module.SPLIT_OP, module.JOIN_OP, module.MERGE_OP]


@pytest.mark.parametrize("case", [*cases(OPS)], ids=lambda c: f"{c.op.name}-{c}")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_matches_the_formula(case: Case, impl: Any) -> None:
    check(case, impl, FORMULAS[case.op.name])


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("B", [1, 2])
def test_ulysses_round_trip_among_ranks(B: int, impl: Any) -> None:
    """All ranks of an exchange in one process: every rank gets all tokens of its heads, and its own tokens back."""
    P, L, H, K = 2, 3, 4, 16
    x = torch.randn(B, P * L, H, K, device=DEVICE)

    def exchange(messages: list[Tensor]) -> list[Tensor]:
        return list(torch.stack(messages).transpose(0, 1).contiguous())

    sent = [split_ranks(tokens, P, dim="heads", impl=impl) for tokens in x.chunk(P, dim=1)]
    received = [join_ranks(m, dim="tokens", impl=impl) for m in exchange(sent)]
    assert all(torch.equal(got, heads) for got, heads in zip(received, x.chunk(P, dim=2), strict=True))
    back = exchange([split_ranks(heads, P, dim="tokens", impl=impl) for heads in received])
    result = [join_ranks(m, dim="heads", impl=impl) for m in back]
    assert all(torch.equal(got, tokens) for got, tokens in zip(result, x.chunk(P, dim=1), strict=True))
    assert all(x.is_contiguous() for x in [*sent, *received, *back, *result])


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_runs_of_uneven_heads_fill_one_buffer(tokens: int, impl: Any) -> None:
    """Five heads on three ranks, 2 + 2 + 1: every rank's message in one buffer, with the tokens first, and back."""
    B, K = 2, 16
    x = torch.randn(B, tokens, 5, K, device=DEVICE)
    messages = torch.full((tokens * B * 5 * K,), torch.nan, device=DEVICE)
    cut = tokens * B * 4 * K
    two = messages[:cut].view(2, tokens, B, 2, K).transpose(1, 2)
    one = messages[cut:].view(1, tokens, B, 1, K).transpose(1, 2)
    assert split_ranks(x[:, :, :4], 2, dim="heads", out=two, impl=impl) is two
    split_ranks(x[:, :, 4:], 1, dim="heads", out=one, impl=impl)
    sent = [x[:, :, heads].transpose(0, 1).flatten() for heads in (slice(0, 2), slice(2, 4), slice(4, 5))]
    assert torch.equal(messages, torch.cat(sent))
    back = torch.full((B, tokens, 7, K), torch.nan, device=DEVICE)
    join_ranks(two, dim="heads", out=back[:, :, :4], impl=impl)
    join_ranks(one, dim="heads", out=back[:, :, 4:5], impl=impl)
    assert torch.equal(back[:, :, :5], x) and back[:, :, 5:].isnan().all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_tokens_of_one_sequence_are_not_copied(impl: Any) -> None:
    x = torch.randn(1, 6, 2, 16, device=DEVICE)
    messages = split_ranks(x, 3, dim="tokens", impl=impl)
    assert messages.data_ptr() == x.data_ptr()
    assert join_ranks(messages, dim="tokens", impl=impl).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_only_the_slice_asked_for_is_written(impl: Any) -> None:
    buffer = torch.full((2, 5, 3, 4, 16), 7.0, device=DEVICE)
    join_ranks(torch.randn(2, 2, 5, 2, 16, device=DEVICE), dim="heads", out=buffer[:, :, 1], impl=impl)
    assert (buffer[:, :, 0] == 7).all() and (buffer[:, :, 2] == 7).all() and (buffer[:, :, 1] != 7).all()

    out = torch.full((1, 5, 2, 48), 7.0, device=DEVICE)
    other, lse = torch.randn(1, 5, 2, 16, device=DEVICE), torch.randn(1, 2, 5, device=DEVICE)
    merge_attention(out[..., 16:32], lse.clone(), other, lse, impl=impl)
    assert (out[..., :16] == 7).all() and (out[..., 32:] == 7).all() and (out[..., 16:32] != 7).all()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_without_keys(impl: Any, dtype: torch.dtype) -> None:
    """An attention without keys is NaN and its log-sum-exp -inf: the other one is the result, 0 if there is none."""
    inf, nan = torch.inf, torch.nan
    out = torch.tensor([1.0, nan, nan, 2.0], device=DEVICE).to(dtype).view(1, 4, 1, 1).repeat(1, 1, 1, 16)
    other = torch.tensor([nan, 3.0, nan, 4.0], device=DEVICE).to(dtype).view(1, 4, 1, 1).repeat(1, 1, 1, 16)
    lse, other_lse = torch.tensor([[5.0, -inf, -inf, 200.0], [-inf, 6.0, -inf, 200.0]], device=DEVICE).view(2, 1, 1, 4)
    merged, merged_lse = merge_attention(out, lse, other, other_lse, impl=impl)
    assert merged is out and merged_lse is lse
    want = torch.tensor([1.0, 3.0, 0.0, 3.0], device=DEVICE).to(dtype)
    assert torch.equal(out, want.view(1, 4, 1, 1).expand_as(out))
    assert torch.allclose(lse.flatten(), torch.tensor([5.0, 6.0, -inf, 200.6931], device=DEVICE))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_attention_in_parts_is_attention(impl: Any) -> None:
    q, k, v = torch.randn(3, 1, 12, 2, 16, device=DEVICE)

    def attend(keys: slice) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("bqhk,bshk->bhqs", q, k[:, keys])
        return torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1), v[:, keys]), scores.logsumexp(-1)

    out, lse = (x.contiguous() for x in attend(slice(0, 5)))
    for part in (slice(5, 6), slice(6, 12)):
        other, other_lse = attend(part)
        merge_attention(out, lse, other, other_lse, impl=impl)
    want, want_lse = attend(slice(0, 12))
    assert rel_l2(out, want) < 1e-6 and rel_l2(lse, want_lse) < 1e-6


x4, lse3 = torch.zeros(2, 6, 4, 16), torch.zeros(2, 4, 6)

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: split_ranks(x4, 3, dim="heads"), "ranks=3: expected a divisor of the 4 heads"),
    (lambda: split_ranks(x4, 4, dim="tokens"), "ranks=4: expected a divisor of the 6 tokens"),
    (lambda: split_ranks(x4, 0, dim="heads"), "ranks=0: expected a divisor"),
    (lambda: split_ranks(x4, 2, dim="batch"), "dim='batch': expected tokens or heads"),  # type: ignore[arg-type]
    (lambda: split_ranks(x4[0], 2, dim="heads"), r"x_BLHK: shape \(6, 4, 16\), expected 4 dimensions"),
    (lambda: split_ranks(x4.mT, 2, dim="heads"), "x_BLHK: last dimension has stride 16"),
    (lambda: join_ranks(x4, dim="heads"), "messages_PBLHK: .* expected 5 dimensions"),
    (lambda: join_ranks(x4.unsqueeze(0).transpose(0, 1), dim="heads", out=x4[0]), "out: shape"),
    (lambda: join_ranks(x4.mT.expand(2, 2, 6, 16, 4), dim="heads"), "messages_PBLHK: last dimension has stride 16"),
    (lambda: split_ranks(x4, 2, dim="heads", out=x4[None]), r"out: shape \(1, .*, expected \(2, 2, 6, 2, 16\)"),
    (lambda: join_ranks(x4[None], dim="heads", out=x4.half()), "out: dtype float16, expected float32"),
    (
        lambda: merge_attention(x4, lse3, x4[:, :2], lse3),
        r"other_BQHK: shape \(2, 2, 4, 16\), expected \(2, 6, 4, 16\)",
    ),
    (lambda: merge_attention(x4, lse3.mT, x4, lse3), r"lse_BHQ: shape \(2, 6, 4\), expected \(2, 4, 6\)"),
    (lambda: merge_attention(x4, lse3, x4, lse3.half()), "other_lse_BHQ: dtype float16, expected float32"),
    (lambda: merge_attention(x4, lse3, x4, lse3.mT.contiguous().mT), "other_lse_BHQ: strides .* expected contiguous"),
    (lambda: merge_attention(x4, lse3, x4.mT.contiguous().mT, lse3), "other_BQHK: last dimension has stride 4"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
