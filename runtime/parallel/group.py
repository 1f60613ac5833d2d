"""Ranks that exchange tensors, with a count of the bytes that each collective sends.

Everything that ranks of one job tell each other in the course of a request goes through a `Group`. One without a
process group stands for ranks that are not there: it takes tensors that are shapes alone ("meta"), for plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sgl_diffusion.runtime.parallel.volume import share, share_size

# under its newer name where PyTorch has it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Traffic:
    """What this rank has sent to others in one kind of collective."""

    calls: int = 0
    bytes: int = 0


class Group:
    """Ranks along one dimension of the mesh.

    Args:
        name: of the dimension.
        process_group: None for one rank, and for ranks that are not there.

    Attributes:
        traffic: by collective. An all-reduce is counted as a ring, which sends 2 (P - 1) / P of the tensor.
    """

    def __init__(self, name: str, size: int, rank: int = 0, process_group: dist.ProcessGroup | None = None) -> None:
        self.name, self.size, self.rank = name, size, rank
        self.process_group = process_group
        self.traffic: dict[str, Traffic] = {}

    def own(self, things: int) -> slice:
        """Which of so many things are this rank's: a run of n / P of them, of one more on the first n % P ranks."""
        return share(things, self.size, self.rank)

    def join(self, own: Tensor, things: int) -> Tensor:
        """(things, ...) from every rank's own (n, ...)."""
        if self.size == 1:
            return own
        most = share_size(things, self.size, 0)
        padded = own if len(own) == most else torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
        every = self.all_gather(padded.contiguous())
        return torch.cat([x[: share_size(things, self.size, rank)] for rank, x in enumerate(every)])

    def all_to_all(self, messages: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """What every rank has for this one, in the order of ranks: 1-d, of `messages`, 1-d in the order of receivers.

        Args:
            sent, received: elements for and from every rank.
        """
        own = sent[self.rank]
        self._count("all_to_all", (sum(sent) - own) * messages.element_size())
        result = messages.new_empty(sum(received))
        if not messages.is_meta:
            dist.all_to_all_single(result, messages, list(received), list(sent), group=self.process_group)
        return result

    def all_gather(self, x: Tensor) -> Tensor:
        """(P, ...) from every rank's contiguous x (...), of one shape."""
        self._count("all_gather", (self.size - 1) * x.nbytes)
        result = x.new_empty(self.size, *x.shape)
        if not x.is_meta:
            _all_gather(result.view(-1), x.view(-1), group=self.process_group)
        return result

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place of a contiguous x."""
        self._count("all_reduce", 2 * (self.size - 1) * x.nbytes // self.size)
        if not x.is_meta:
            dist.all_reduce(x, group=self.process_group)
        return x

    def exchange(self, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]) -> Exchange:
        """Begins to send contiguous tensors to ranks, and to receive into others; both sides name each pair of ranks'
        messages in the same order. On GPUs they travel on a stream of their own, while others compute.
        """
        self._count("exchange", sum(x.nbytes for _, x in sent))
        if any(x.is_meta for _, x in (*sent, *received)):
            return Exchange([], [])
        assert self.process_group is not None
        members = dist.get_process_group_ranks(self.process_group)
        pairs = [(dist.isend, *pair) for pair in sent] + [(dist.irecv, *pair) for pair in received]
        operations = [dist.P2POp(op, x, members[rank], self.process_group) for op, rank, x in pairs]
        return Exchange(dist.batch_isend_irecv(operations) if operations else [], [x for _, x in sent])

    def all_agree(self, yes: bool, device: torch.device) -> bool:
        """Whether all ranks say yes."""
        if self.size == 1:
            return yes
        return int(self.all_reduce(torch.tensor(float(yes), device=device)).item()) == self.size

    def _count(self, collective: str, sent: int) -> None:
        traffic = self.traffic.setdefault(collective, Traffic())
        traffic.calls += 1
        traffic.bytes += sent


@dataclass(frozen=True)
class Exchange:
    """Messages under way. What is sent must stay as it is until they have arrived."""

    under_way: Sequence[dist.Work]
    sent: Sequence[Tensor]

    def wait(self) -> None:
        """Until what was received is there: on GPUs, the current stream waits, and the host goes on."""
        for work in self.under_way:
            work.wait()
