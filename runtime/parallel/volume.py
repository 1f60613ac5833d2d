"""How things are shared out among ranks, and what ranks that share a sequence send. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

SCALE_BYTES = 4  # fp32, of every row of 8-bit codes

Communication = Literal["model", "fp8"]
"""How heads travel: in the model's dtype, or as 8-bit codes with one scale for the row of a token and head."""


def share(things: int, ranks: int, rank: int) -> slice:
    """Which of several things in order are a rank's. If ranks do not divide them, the first ranks have one more."""
    each, more = divmod(things, ranks)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


def share_size(things: int, ranks: int, rank: int) -> int:
    each, more = divmod(things, ranks)
    return each + (rank < more)


class Run(NamedTuple):
    """Consecutive ranks that have equally many things."""

    ranks: int
    each: int
    things: slice  # of all of them


def runs(things: int, ranks: int) -> Iterator[Run]:
    """One, or two where ranks do not divide the things; without those that have none."""
    each, more = divmod(things, ranks)
    if more:
        yield Run(more, each + 1, slice(0, more * (each + 1)))
    if each:
        yield Run(ranks - more, each, slice(more * (each + 1), things))


@dataclass(frozen=True)
class Attended:
    """What goes through one attention of a sequence that is spread over ranks.

    Attributes:
        streams: tokens of each, over all ranks.
        heads: of all ranks that share the sequence; where tensor parallelism splits heads, those of one of its ranks.
        itemsize: bytes of a number of the model's dtype.
        replicated: so many streams, the first ones, are whole on every rank, before and after.
    """

    streams: Sequence[int]
    heads: int
    head_dim: int
    itemsize: int
    batch: int = 1
    replicated: int = 0
    communication: Communication = "model"


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends to others: among those of Ulysses, of the ring, and among all of the sequence."""

    all_to_all: int
    exchange: int
    all_gather: int

    @property
    def total(self) -> int:
        return self.all_to_all + self.exchange + self.all_gather


def attend_bytes(attended: Attended, ulysses: int, ring: int, rank: int = 0) -> Sent:
    """What a rank sends in one attention.

    With l tokens and h heads of this rank, L tokens and H heads of those it exchanges heads with, K numbers of a head
    in w bytes, and B samples: 3 B l (H - h) w of q, k and v go out, and B (L - l) h w of the result go back. In a
    ring of R, R - 1 blocks of 2 B L h w pass through. Results for replicated streams are gathered in the model's dtype.

    Args:
        rank: among those that share the sequence.
    """
    a, ranks = attended, ulysses * ring
    lengths = [sum(share_size(tokens, ranks, r) for tokens in a.streams) for r in range(ranks)]
    blocks = [sum(lengths[i * ulysses : (i + 1) * ulysses]) for i in range(ring)]
    block, own = divmod(rank, ulysses)
    heads = share_size(a.heads, ulysses, own)
    row = a.head_dim * a.itemsize if a.communication == "model" else a.head_dim + SCALE_BYTES
    out = 3 * lengths[rank] * (a.heads - heads)
    back = (blocks[block] - lengths[rank]) * heads
    passed = sum(2 * blocks[(block - step) % ring] * heads for step in range(ring - 1))
    gathered = sum(
        whole_bytes(tokens, a.heads * a.head_dim, a.itemsize, ranks, a.batch) for tokens in a.streams[: a.replicated]
    )
    return Sent(a.batch * (out + back) * row, a.batch * passed * row, gathered)


def whole_bytes(tokens: int, width: int, itemsize: int, ranks: int, batch: int = 1) -> int:
    """What every rank sends so that all have the tokens of a stream: as many as the one with the most has."""
    return (ranks - 1) * batch * -(-tokens // ranks) * width * itemsize
