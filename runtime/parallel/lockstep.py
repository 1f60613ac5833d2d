"""Ranks that draw the same request go on together after every event, or stop together.

The first rank speaks: it has the caller, reads pictures, writes files. The others take its orders, and after every
event of a request hear from it whether its caller wants more.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.latents import Latents
from sgl_diffusion.runtime.request import Job
from sgl_diffusion.runtime.snapshots import Snapshot

FOREVER = timedelta(days=365)  # others wait for orders as long as the first has none; if it dies, they are told

Event = TypeVar("Event")
End = TypeVar("End")


@dataclass(frozen=True)
class DrawOrder:
    """What all ranks draw. `tiling`: its decode works in tiles. `latents` are decoded, `resume` is gone on with."""

    job: Job
    tiling: bool
    latents: Latents | None
    resume: Snapshot | None


@dataclass(frozen=True)
class WarmUpOrder:
    """So many shapes to capture follow, or, if None, no more."""

    shapes: int | None


Order = DrawOrder | WarmUpOrder


class Stopped(Exception):
    """The first rank's caller has let go of the request."""


class RankLost(RunFailure):
    """A request cannot be drawn by these processes, though it might by others."""


class Lockstep:
    """The ranks of a job; of one alone, all of this is nothing.

    Args:
        orders, steps: process groups on the CPU; None for one rank. An order may take for ever, a step not.

    Attributes:
        broken: a rank has failed in the midst of a request: nobody knows what the others do.
    """

    def __init__(self, orders: dist.ProcessGroup | None = None, steps: dist.ProcessGroup | None = None) -> None:
        self.orders, self.steps = orders, steps
        self.is_first = orders is None or dist.get_rank() == 0
        self.broken = False

    @classmethod
    def of_all(cls, timeout_s: float) -> Lockstep:
        """Of all ranks, which all call this; `timeout_s` as of a `Mesh`."""
        orders, steps = (dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) for _ in range(2))
        _set_pg_timeout(FOREVER, orders)  # not before: ranks find each other, or one is lost
        return cls(orders, steps)

    def give(self, order: Order | None) -> None:
        """From the first rank to all others; None: there will be no more.

        Raises:
            RankLost: they are not there to take it.
        """
        if self.orders is None:
            return
        if self.broken:
            raise RankLost("another rank failed in an earlier request: the ranks have to be started again")
        try:
            dist.broadcast_object_list([order], src=0, group=self.orders)
        except RuntimeError as e:
            self.broken = True
            raise RankLost(f"another rank is gone: {str(e).splitlines()[0]}") from e

    def take(self) -> Order | None:
        """What the first rank gives next."""
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, group=self.orders)
        order: Order | None = box[0]
        return order

    def in_step(self, events: Generator[Event, None, End]) -> Generator[Event, None, End]:
        """Passes events on. All ranks come to the same ones.

        Raises:
            Stopped: on other ranks than the first, when its caller wants no more.
        """
        if self.orders is None:
            return (yield from events)
        while True:
            self.broken = True  # until what this rank does next has come to its end
            try:
                event = next(events)
            except StopIteration as end:
                self.broken = False
                result: End = end.value
                return result
            except UserError:  # of the request: all ranks find it
                self.broken = False
                raise
            self.broken = False
            goes_on = not self.is_first
            try:
                yield event
                goes_on = True
            finally:
                if not self._all_go_on(goes_on):
                    events.close()
                    if not self.is_first:
                        raise Stopped

    def _all_go_on(self, first: bool) -> bool:
        """What the first rank says."""
        word, self.broken = torch.tensor(first), True
        dist.broadcast(word, src=0, group=self.steps)
        self.broken = False
        return bool(word)


ALONE = Lockstep()
