"""Times spans on the clock of the device that does the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

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
    """CUDA events on a GPU, because the host runs ahead of it; the host's clock on a CPU.

    Args:
        annotate: name the spans in PyTorch's traces too, and on a GPU as NVTX ranges, which Nsight shows.
    """

    def __init__(self, device: torch.device, *, annotate: bool = False) -> None:
        self.device, self.annotate = device, annotate
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
            with self._named(name):
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

    def _named(self, name: str) -> AbstractContextManager[Any]:
        names = ExitStack()
        if self.annotate:
            names.enter_context(torch.profiler.record_function(name))
            if self.device.type == "cuda":
                names.enter_context(torch.cuda.nvtx.range(name))
        return names

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


def profiler(device: torch.device) -> torch.profiler.profile:
    """Records every operation, on all threads: diffusers' pipelines work in one of their own."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    return torch.profiler.profile(activities=activities, record_shapes=True, experimental_config=threads)
