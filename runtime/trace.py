"""Times spans on the clock of the device that does the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Span:
    """`start_ms` counts from the stopwatch's start; `depth` is 0 for a stage and 1 for a part of one."""

    name: str
    start_ms: float
    duration_ms: float
    depth: int


Mark = torch.cuda.Event | int


class Stopwatch:
    """CUDA events on a GPU, because the host runs ahead of it; the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._depth = 0
        self._marks: list[tuple[str, int, Mark, Mark | None]] = []
        self._zero = self._now()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Times the work issued inside the block. Spans may nest; a span that raises ends there."""
        index, depth = len(self._marks), self._depth
        start = self._now()
        self._marks.append((name, depth, start, None))
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._marks[index] = (name, depth, start, self._now())

    def finish(self) -> list[Span]:
        """The closed spans in order of their starts. On a GPU this is the only wait."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [
            Span(name, self._between(self._zero, start), self._between(start, stop), depth)
            for name, depth, start, stop in self._marks
            if stop is not None
        ]

    def _now(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter_ns()
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    @staticmethod
    def _between(start: Mark, stop: Mark) -> float:
        """Milliseconds."""
        if isinstance(start, int) and isinstance(stop, int):
            return (stop - start) / 1e6
        assert isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event)
        return float(start.elapsed_time(stop))
