"""One sequence on several ranks: each has some tokens of all heads, and attends as if it had them all.

Ulysses (Jacobs et al. 2023) exchanges heads for tokens: one all-to-all of packed q, k and v before, one of the result
after. A ring (Liu et al. 2023) passes keys and values on from rank to rank while each attends to those it has, and the
attentions become one by their log-sum-exps. USP (Fang and Zhao 2024) does the first inside groups of neighbours, and
the second among such groups.

Nothing is padded. Messages hold the tokens before everything else, so that those of all ranks are one sequence as they
arrive, in the order of ranks: the only copies are one that packs heads, and one that unpacks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sgl_diffusion.kernels.collective import join_ranks, merge_attention, split_ranks
from sgl_diffusion.kernels.quantize import quantize_heads, quantize_rows
from sgl_diffusion.models.family import ONE_RANK, AttentionFn
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parallel.group import Exchange, Group
from sgl_diffusion.runtime.parallel.mesh import Mesh
from sgl_diffusion.runtime.parallel.volume import SCALE_BYTES, Communication, runs, share, share_size

# B batch  L tokens  H heads  K head dim  W numbers of a head as they travel  N = 3 B samples of q, of k and of v
# D width  P ranks
FP8 = torch.float8_e4m3fn
FP8_SINCE = (8, 9)  # compute capability


class Usp:
    """A `Split` of sequences over the ranks of a ring of Ulysses groups.

    The order of additions depends on the ranks' number alone: a run gives the same bits as the one before. Without a
    ring, and with one stream, they are those of one rank.

    Args:
        ulysses, ring: this rank's.
        sp: of both, where this rank is ring.rank * ulysses.size + ulysses.rank.
        communication: how q, k, v and results travel. In fp8 each number is off by at most a 16th of itself, or, if it
            is very small, 2^-18 of the largest of its row.
    """

    def __init__(self, ulysses: Group, ring: Group, sp: Group, *, communication: Communication = "model") -> None:
        self.ulysses, self.ring, self.sp = ulysses, ring, sp
        self.communication = communication

    @classmethod
    def of(cls, mesh: Mesh, communication: Communication = "model") -> Usp:
        return cls(mesh.ulysses, mesh.ring, mesh.sp, communication=communication)

    @property
    def ranks(self) -> int:
        return self.sp.size

    def own(self, tokens: int) -> slice:
        return self.sp.own(tokens)

    def whole(self, own_BLD: Tensor, tokens: int) -> Tensor:
        """Contiguous. Ranks with one token fewer than others send any other in its place."""
        P, (B, L, D) = self.sp.size, own_BLD.shape
        if P == 1:
            return own_BLD
        most = -(-tokens // P)
        sent = own_BLD.contiguous()
        if most > L:
            sent = own_BLD.new_empty(B, most, D)
            sent[:, :L] = own_BLD
        gathered_PBLD = self.sp.all_gather(sent)
        if tokens % P == 0:
            return gathered_PBLD.movedim(0, 1).flatten(1, 2)  # a view of one sample
        whole_BLD, first = own_BLD.new_empty(B, tokens, D), 0
        for run in runs(tokens, P):
            received = gathered_PBLD[first : first + run.ranks, :, : run.each]
            whole_BLD[:, run.things].view(B, run.ranks, run.each, D).copy_(received.movedim(0, 1))
            first += run.ranks
        return whole_BLD

    def attend(
        self,
        attention: AttentionFn,
        q_BLHK: Tensor,
        k_BLHK: Tensor,
        v_BLHK: Tensor,
        streams: Sequence[int],
        *,
        replicated: int = 0,
        out: Tensor | None = None,
        code_scale: Tensor | None = None,
    ) -> Tensor:
        """As of `Split`. With a ring, `attention` is asked for log-sum-exps, see `Attention`."""
        if self.sp.size == 1:
            return ONE_RANK.attend(attention, q_BLHK, k_BLHK, v_BLHK, streams, out=out, code_scale=code_scale)
        if code_scale is not None:  # numbers travel
            assert out is not None, "codes have a place"
            seen = self.attend(attention, q_BLHK, k_BLHK, v_BLHK, streams, replicated=replicated)
            return quantize_heads(seen, out, code_scale)
        out = q_BLHK.new_empty(q_BLHK.shape) if out is None else out
        cut = _cut(tuple(streams), replicated, self.sp.size, self.sp.rank)
        if self.ulysses.size == 1 and not replicated:
            return self._attend_in_ring(attention, q_BLHK, k_BLHK, v_BLHK, cut, out)
        qkv_L3BHK = self._tokens_for_heads(q_BLHK, k_BLHK, v_BLHK, cut)
        q, k, v = (x_LBHK.transpose(0, 1) for x_LBHK in qkv_L3BHK.unbind(1))
        seen_LBHK = q_BLHK.new_empty(qkv_L3BHK[:, 0].shape)
        self._attend_in_ring(attention, q, k, v, cut, seen_LBHK.transpose(0, 1))
        self._heads_for_tokens(seen_LBHK, cut, out)
        for start, tokens in cut.replicated:
            own, all_of_it = self.own(tokens), out[:, start : start + tokens]
            all_of_it.copy_(self.whole(all_of_it[:, own].flatten(2), tokens).view(all_of_it.shape))
        return out

    # -- Ulysses --

    def _tokens_for_heads(self, q: Tensor, k: Tensor, v: Tensor, cut: Cut) -> Tensor:
        """(L, 3, B, H, K): all tokens of this Ulysses group, of this rank's heads."""
        B, _, H, K = q.shape
        own = cut.lengths[self.sp.rank]
        messages, at = q.new_empty(3 * B * own * H * K), 0
        for run in runs(H, self.ulysses.size):
            shape = (run.ranks, own, 3 * B, run.each, K)
            messages_PNLHK = messages[at : (at := at + _size(shape))].view(shape).transpose(1, 2)
            for n, x_NLHK in _stacked(q, k, v):
                for here, there in cut.pieces:
                    into = messages_PNLHK[:, n : n + len(x_NLHK), there]
                    split_ranks(x_NLHK[:, here, run.things], run.ranks, dim="heads", out=into)
        heads, lengths = self._heads(H), self._lengths(cut)
        sent = [3 * B * own * h for h in heads]
        received = [3 * B * length * heads[self.ulysses.rank] for length in lengths]
        return self._all_to_all(messages, K, sent, received).view(sum(lengths), 3, B, heads[self.ulysses.rank], K)

    def _heads_for_tokens(self, seen_LBHK: Tensor, cut: Cut, out_BLHK: Tensor) -> None:
        """Undoes it for results: writes this rank's tokens, of all heads."""
        _, B, heads, K = seen_LBHK.shape
        own, H = cut.lengths[self.sp.rank], out_BLHK.shape[2]
        sent = [length * B * heads for length in self._lengths(cut)]
        received = [own * B * h for h in self._heads(H)]
        messages, at = self._all_to_all(seen_LBHK.flatten(), K, sent, received), 0
        for run in runs(H, self.ulysses.size):
            shape = (run.ranks, own, B, run.each, K)
            messages_PBLHK = messages[at : (at := at + _size(shape))].view(shape).transpose(1, 2)
            for here, there in cut.pieces:
                join_ranks(messages_PBLHK[:, :, there], dim="heads", out=out_BLHK[:, here, run.things])

    def _all_to_all(self, messages: Tensor, width: int, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Of rows of so many numbers, 1-d before and after; sent and received are rows by rank."""
        if self.ulysses.size == 1:
            return messages
        rows = self._encode(messages.view(-1, width))
        sizes = ([n * rows.shape[-1] for n in counts] for counts in (sent, received))
        arrived = self.ulysses.all_to_all(rows.flatten(), *sizes)
        return self._decode(arrived.view(-1, rows.shape[-1]), messages.dtype).flatten()

    def _heads(self, heads: int) -> list[int]:
        return [share_size(heads, self.ulysses.size, rank) for rank in range(self.ulysses.size)]

    def _lengths(self, cut: Cut) -> Sequence[int]:
        """Tokens of each rank of this Ulysses group."""
        first = self.ring.rank * self.ulysses.size
        return cut.lengths[first : first + self.ulysses.size]

    # -- the ring --

    def _attend_in_ring(self, attention: AttentionFn, q: Tensor, k: Tensor, v: Tensor, cut: Cut, out: Tensor) -> Tensor:
        """Attention of q to the keys of all Ulysses groups, of which k and v are this one's; into `out`.

        While a block of keys is attended to, it travels on, and the next one arrives.
        """
        ring = self.ring
        if ring.size == 1:
            return attention(q, k, v, out=out) if q.numel() else out
        U = self.ulysses.size
        blocks = [sum(cut.lengths[i * U : (i + 1) * U]) for i in range(ring.size)]
        here = self._encode(torch.stack((k.transpose(0, 1), v.transpose(0, 1)), dim=1))
        arriving = here.new_empty(min(2, ring.size - 1), max(blocks), *here.shape[1:])
        total: Tensor | None = None
        for step in range(ring.size):
            there = arriving[step % len(arriving), : blocks[(ring.rank - step - 1) % ring.size]]
            exchange = self._pass_on(here, there) if step + 1 < ring.size else None
            if step:
                k, v = (x_LBHK.transpose(0, 1) for x_LBHK in self._decode(here, q.dtype).unbind(1))
            if q.numel() and k.numel() and total is None:
                # fp32 results are added up where they are wanted
                part, lse = attention(q, k, v, out=out if out.dtype == torch.float32 else None, return_lse=True)
                total = part.float()
            elif total is not None and k.numel():
                merge_attention(total, lse, *attention(q, k, v, return_lse=True))
            if exchange is not None:
                exchange.wait()
            here = there
        if total is None:
            return out.zero_()
        return out if total is out else out.copy_(total)

    def _pass_on(self, sent: Tensor, received: Tensor) -> Exchange:
        """Without messages that hold nothing."""
        ring = self.ring
        after, before = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
        return ring.exchange([(after, sent)] if sent.numel() else [], [(before, received)] if received.numel() else [])

    # -- numbers as they travel --

    def _encode(self, x: Tensor) -> Tensor:
        """(..., W) of contiguous (..., K): in fp8, bytes of the codes and then of their scale."""
        if self.communication == "model":
            return x
        if x.shape[-1] % SCALE_BYTES:
            raise ValueError(f"head dim {x.shape[-1]}: a multiple of {SCALE_BYTES} can travel in fp8")
        if not x.numel():
            return x.new_empty(*x.shape[:-1], x.shape[-1] + SCALE_BYTES, dtype=torch.uint8)
        codes, scale = quantize_rows(x, "fp8")
        return torch.cat([codes.view(torch.uint8), scale.unsqueeze(-1).view(torch.uint8)], dim=-1)

    def _decode(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Contiguous."""
        if self.communication == "model":
            return x
        codes, scale = x[..., :-SCALE_BYTES].view(FP8), x[..., -SCALE_BYTES:].view(torch.float32)
        return codes.to(dtype).mul_(scale)  # codes are numbers of any dtype of models; the product is rounded once


def check_communication(communication: Communication, ranks: int, device: torch.device) -> None:
    """Raises UserError where fp8 cannot take effect: on one rank, or a GPU that does not know it."""
    if communication == "model":
        return
    if ranks == 1:
        raise UserError(f"sp_communication={communication}: nothing travels: one rank has the whole sequence")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_SINCE:
        raise UserError(f"sp_communication={communication}: needs GPUs of sm_89 or later")


# -- which tokens -------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A sequence cut among ranks, as one of them sees it.

    Attributes:
        pieces: runs of tokens that it contributes: where they stand among those that it has, and in its messages.
        lengths: how many every rank contributes.
        replicated: where the streams that it has whole begin, and their tokens.
    """

    pieces: tuple[tuple[slice, slice], ...]
    lengths: tuple[int, ...]
    replicated: tuple[tuple[int, int], ...]


@lru_cache(maxsize=64)
def _cut(streams: tuple[int, ...], replicated: int, ranks: int, rank: int) -> Cut:
    lengths = tuple(sum(share_size(tokens, ranks, r) for tokens in streams) for r in range(ranks))
    whole, start, runs_here = [], 0, []
    for tokens in streams[:replicated]:
        own = share(tokens, ranks, rank)
        whole.append((start, tokens))
        runs_here.append(slice(start + own.start, start + own.stop))
        start += tokens
    others = sum(share_size(tokens, ranks, rank) for tokens in streams[replicated:])
    runs_here.append(slice(start, start + others))
    pieces, there = [], 0
    for here in runs_here:
        if here.stop > here.start:
            pieces.append((here, slice(there, there + here.stop - here.start)))
            there += here.stop - here.start
    return Cut(tuple(pieces), lengths, tuple(whole))


def _stacked(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor) -> Iterator[tuple[int, Tensor]]:
    """q, k and v as one tensor (N, L, H, K), if they lie evenly in one buffer, else one by one; with where they begin
    among N.
    """
    B, tensors = len(q_BLHK), (q_BLHK, k_BLHK, v_BLHK)
    apart = k_BLHK.storage_offset() - q_BLHK.storage_offset()
    in_one_buffer = (
        len({x.untyped_storage()._cdata for x in tensors}) == len({x.stride() for x in tensors}) == 1
        and v_BLHK.storage_offset() - k_BLHK.storage_offset() == apart
        and apart > 0
    )
    if in_one_buffer and (B == 1 or apart == B * q_BLHK.stride(0)):
        step = apart if B == 1 else q_BLHK.stride(0)
        yield 0, q_BLHK.as_strided((3 * B, *q_BLHK.shape[1:]), (step, *q_BLHK.stride()[1:]))
        return
    yield from ((i * B, x) for i, x in enumerate(tensors))


def _size(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
