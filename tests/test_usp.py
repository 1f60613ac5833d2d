"""A sequence on several ranks equals one rank: real processes over gloo, against attention in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor

from sgl_diffusion.kernels.launch import rehearsing
from sgl_diffusion.kernels.op import rel_l2
from sgl_diffusion.runtime.attention import Attention, shape_only_attention
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parallel.group import Exchange, Group
from sgl_diffusion.runtime.parallel.layout import Layout
from sgl_diffusion.runtime.parallel.mesh import Mesh
from sgl_diffusion.runtime.parallel.usp import Usp, check_communication
from sgl_diffusion.runtime.parallel.volume import (
    Attended,
    Communication,
    Sent,
    attend_bytes,
    runs,
    share,
    share_size,
    whole_bytes,
)

CPU = torch.device("cpu")
LAYOUTS = {2: [(2, 1), (1, 2)], 4: [(4, 1), (1, 4), (2, 2)], 8: [(4, 2), (2, 4)]}  # ulysses, ring
# relative L2 error of an attention of noise, whose q, k, v and result are rounded to fp8; measured: 0.05, and 0.03 in a
# ring alone, where neither results nor what a rank has itself travel; 0.002 in bf16
FP8_ERROR = 0.06


@dataclass(frozen=True)
class Spread:
    """What is attended to, and how q, k and v lie in memory."""

    streams: tuple[int, ...]
    heads: int
    head_dim: int = 16
    batch: int = 1
    replicated: int = 0
    packed: bool = True  # (B, L, 3, H, K), else (3, B, L, H, K)
    dtype: torch.dtype = torch.float32

    def whole(self) -> tuple[Tensor, ...]:
        """q, k and v of all streams."""
        noise = torch.randn(
            3, self.batch, sum(self.streams), self.heads, self.head_dim, generator=torch.Generator().manual_seed(0)
        )
        return tuple(noise.to(self.dtype))

    def here(self, usp: Usp, x_BLHK: Tensor) -> Tensor:
        """What a rank has of it."""
        cut = [
            stream if i < self.replicated else stream[:, usp.own(stream.shape[1])]
            for i, stream in enumerate(x_BLHK.split(self.streams, 1))
        ]
        return torch.cat(cut, 1)


CASES = [
    Spread((16,), 8),
    Spread((16,), 8, batch=2),
    Spread((17,), 8, batch=2, packed=False),
    Spread((16, 32), 8, packed=False),
    Spread((9, 21), 9, batch=2),  # neither tokens nor heads are even
    Spread((9, 21), 11, batch=2, packed=False),
    Spread((11, 30, 13), 8),
    Spread((3, 21), 8, replicated=1),  # some ranks have no token of the text
    Spread((1, 21), 9, batch=2, replicated=1, packed=False),
    Spread((9, 2, 21), 8, replicated=2),
    Spread((3,), 8),  # some ranks have nothing to do
    Spread((37, 40), 8, dtype=torch.bfloat16),
]


def usp_of(ulysses: int, ring: int, communication: Communication = "model") -> Usp:
    return Usp.of(Mesh.join(Layout(ulysses=ulysses, ring=ring), CPU, 60.0), communication)


def attended(case: Spread, usp: Usp) -> tuple[Tensor, Tensor]:
    """A rank's result, written into a slice of a wider buffer, and what it should be, in float64."""
    whole = case.whole()
    q, k, v = (case.here(usp, x) for x in whole)
    dim = 2 if case.packed else 0
    q, k, v = torch.stack((q, k, v), dim).unbind(dim)
    wider = torch.full((case.batch, q.shape[1], 3, case.heads, case.head_dim), torch.nan, dtype=case.dtype)
    attention = Attention("transformer", None, CPU, case.dtype)
    got = usp.attend(attention, q, k, v, case.streams, replicated=case.replicated, out=wider[:, :, 1])
    assert got.data_ptr() == wider[:, :, 1].data_ptr() and wider[:, :, ::2].isnan().all()
    want = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in whole)).transpose(1, 2)
    return got, case.here(usp, want)


def take_sent(usp: Usp) -> Sent:
    """Bytes by collective since the last time."""
    sent = Sent(
        *(
            group.traffic[name].bytes if name in group.traffic else 0
            for group, name in ((usp.ulysses, "all_to_all"), (usp.ring, "exchange"), (usp.sp, "all_gather"))
        )
    )
    for group in (usp.ulysses, usp.ring, usp.sp):
        group.traffic.clear()
    return sent


def formula(case: Spread, usp: Usp) -> Sent:
    sizes = Attended(case.streams, case.heads, case.head_dim, case.dtype.itemsize, case.batch, case.replicated,
                     usp.communication)  # fmt: skip
    return attend_bytes(sizes, usp.ulysses.size, usp.ring.size, usp.sp.rank)


# -- attention ----------------------------------------------------------------------


def rank_equals_one(layouts: Sequence[tuple[int, int]]) -> None:
    for (ulysses, ring), case in product(layouts, CASES):
        usp = usp_of(ulysses, ring)
        got, want = attended(case, usp)
        about = ulysses, ring, case
        limit = 1e-5 if case.dtype == torch.float32 else 3e-2
        assert got.shape == want.shape, about
        if got.numel():
            assert (error := (got - want).abs().max() / want.std()) <= limit, (*about, error)
        assert take_sent(usp) == formula(case, usp), about

        attention, whole = Attention("transformer", None, CPU, case.dtype), case.whole()
        q, k, v = (case.here(usp, x).contiguous() for x in whole)
        again = usp.attend(attention, q, k, v, case.streams, replicated=case.replicated)
        assert torch.equal(again, got), (*about, "neither a run nor how tensors lie changes a bit")
        if ring == 1 and len(case.streams) == 1:
            assert torch.equal(got, case.here(usp, attention(*whole))), (*about, "keys are in one rank's order")
        take_sent(usp)
    whole_equals_every_part(usp)


def whole_equals_every_part(usp: Usp) -> None:
    for tokens, batch in product((1, 16, 21), (1, 2)):
        x_BLD = torch.arange(tokens * batch * 6.0).view(batch, tokens, 6)
        wider = torch.stack((x_BLD, x_BLD), 2)[:, usp.own(tokens), 0]
        got = usp.whole(wider, tokens)
        assert torch.equal(got, x_BLD) and got.is_contiguous()
        assert take_sent(usp) == Sent(0, 0, whole_bytes(tokens, 6, 4, usp.ranks, batch))


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_attention_equals_that_of_one_rank(ranks: int) -> None:
    """And is what the formula says that is sent."""
    run_ranks(ranks, rank_equals_one, LAYOUTS[ranks])


def replicated_rows_are_the_same_bits() -> None:
    for layout, case in product(LAYOUTS[4], CASES):
        if case.replicated:
            usp = usp_of(*layout)
            rows = attended(case, usp)[0][:, : sum(case.streams[: case.replicated])].contiguous()
            assert all(torch.equal(other, rows) for other in usp.sp.all_gather(rows))


def in_eight_bits() -> None:
    """Closer than rounding every number to fp8 could take it, for half the bytes of bf16."""
    for (ulysses, ring), case in product(LAYOUTS[4], CASES):
        case = replace(case, dtype=torch.bfloat16, head_dim=64)
        usp = usp_of(ulysses, ring, "fp8")
        got, want = attended(case, usp)
        assert not got.numel() or rel_l2(got, want) < FP8_ERROR, (ulysses, ring, case, rel_l2(got, want))
        assert (sent := take_sent(usp)) == formula(case, usp)
        usp.communication = "model"
        full = formula(case, usp)
        assert sent.all_gather == full.all_gather
        assert sent.all_to_all / 68 == full.all_to_all / 128 and sent.exchange / 68 == full.exchange / 128


def order_of_events() -> None:
    """A block travels on before it is attended to, and is waited for after."""
    usp, events = usp_of(1, 4), []
    exchange, attention = usp.ring.exchange, Attention("transformer", None, CPU, torch.float32)

    class Waiting:
        def __init__(self, under_way: Exchange) -> None:
            self.under_way = under_way

        def wait(self) -> None:
            events.append("wait")
            self.under_way.wait()

    def exchanging(*messages: Any) -> Any:
        events.append("exchange")
        return Waiting(exchange(*messages))

    def attending(*qkv: Tensor, **options: Any) -> Any:
        events.append("attend")
        return attention(*qkv, **options)

    usp.ring.exchange = exchanging  # type: ignore[method-assign]
    q, k, v = (CASES[0].here(usp, x) for x in CASES[0].whole())
    usp.attend(attending, q, k, v, CASES[0].streams)
    assert events == ["exchange", "attend", "wait"] * 3 + ["attend"]


def four_ranks() -> None:
    replicated_rows_are_the_same_bits()
    in_eight_bits()
    order_of_events()


def test_four_ranks_in_eight_bits_and_in_order() -> None:
    run_ranks(4, four_ranks)


def test_shapes_alone_pass_through_and_are_counted() -> None:
    for (ulysses, ring), case, communication in product(LAYOUTS[4], CASES[2::3], ("model", "fp8")):
        usp = Usp.of(Mesh.stand_in(Layout(ulysses=ulysses, ring=ring)), communication)  # type: ignore[arg-type]
        q, k, v = (case.here(usp, x).to("meta") for x in case.whole())
        attention = shape_only_attention("transformer", None, CPU)
        with rehearsing("cpu"):
            got = usp.attend(attention, q, k, v, case.streams, replicated=case.replicated)
            last = case.streams[-1]
            whole = usp.whole(got[:, got.shape[1] - share_size(last, 4, 0) :].flatten(2), last)
        assert got.is_meta and got.shape == q.shape and got.dtype == q.dtype
        assert whole.shape == (case.batch, last, case.heads * case.head_dim)
        gathered = whole_bytes(last, whole.shape[2], case.dtype.itemsize, 4, case.batch)
        expected = formula(case, usp)
        assert take_sent(usp) == replace(expected, all_gather=expected.all_gather + gathered)


@pytest.mark.parametrize(("things", "ranks"), [(0, 2), (3, 4), (8, 4), (11, 4), (7, 1)])
def test_shares_and_runs_are_all_of_it_in_order(things: int, ranks: int) -> None:
    shares = [share(things, ranks, rank) for rank in range(ranks)]
    assert [i for own in shares for i in range(things)[own]] == list(range(things))
    sizes = [own.stop - own.start for own in shares]
    assert sizes == [share_size(things, ranks, rank) for rank in range(ranks)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    assert [Group("", ranks, rank).own(things) for rank in range(ranks)] == shares
    per_run = [(run.each, range(things)[run.things]) for run in runs(things, ranks) for _ in range(run.ranks)]
    assert [each for each, _ in per_run] == [n for n in sizes if n]
    assert [i for run in runs(things, ranks) for i in range(things)[run.things]] == list(range(things))


def test_fp8_is_refused_where_it_cannot_take_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    check_communication("model", 1, CPU)
    check_communication("fp8", 2, CPU)
    with pytest.raises(UserError, match="sp_communication=fp8: nothing travels"):
        check_communication("fp8", 1, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="sp_communication=fp8: needs GPUs of sm_89 or later"):
        check_communication("fp8", 2, torch.device("cuda", 0))
    usp = Usp.of(Mesh.stand_in(Layout(ulysses=2)), "fp8")
    q = torch.empty(1, 2, 2, 6, device="meta")
    with rehearsing("cpu"), pytest.raises(ValueError, match="head dim 6: a multiple of 4 can travel in fp8"):
        usp.attend(shape_only_attention("transformer", None, CPU), q, q, q, [4])
