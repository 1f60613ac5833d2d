"""Captured denoising steps: a step is recorded once for its shapes and replayed with new values.

A replay costs the host one call, however many launches the step has. Every graph reads static buffers of its own, which
new values are copied into: a new prompt or seed re-captures nothing. Graphs share one memory pool.
"""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sgl_diffusion.models.family import Tensors
from sgl_diffusion.runtime.errors import UserError

CAPACITY = 4  # graphs kept; the least recently used goes first

Function = Callable[..., tuple[Tensor, ...]]
Recording = tuple[tuple[Tensor, ...], Callable[[], None]]
"""Results, which every replay writes again, and the replay."""


# -- trees of tensors -------------------------------------------------------------


def leaves(tree: Tensors) -> Iterator[Any]:
    """Tensors and plain values, in order."""
    if isinstance(tree, tuple | list):
        for item in tree:
            yield from leaves(item)
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from leaves(getattr(tree, field.name))
    else:
        yield tree


def rebuild(tree: Tensors, values: Iterator[Any]) -> Tensors:
    """The same tree with other leaves."""
    if isinstance(tree, tuple | list):
        return type(tree)(rebuild(item, values) for item in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{field.name: rebuild(getattr(tree, field.name), values) for field in fields(tree)})
    return next(values)


def shape_class(tree: Tensors) -> Hashable:
    """What a graph is good for: shapes and dtypes of the tensors, and the plain values themselves."""
    return tuple((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves(tree))


# -- capture ----------------------------------------------------------------------


@dataclass
class Graph:
    """A recorded call: what it reads, what it writes, and how to run it again."""

    arguments: tuple[Tensors, ...]
    results: tuple[Tensor, ...]
    replay: Callable[[], None]
    filled: list[weakref.ref[Tensor]]  # tensors whose values the static buffers hold


class Recorder(Protocol):
    """The device's way to record a call; the arguments stay where they are between replays."""

    def record(
        self, function: Function, arguments: tuple[Tensors, ...]
    ) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """Runs the function once, and returns its results, which every replay writes again, and the replay."""


class CudaGraphs:
    """`torch.cuda.CUDAGraph`s in one pool."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(
        self, function: Function, arguments: tuple[Tensors, ...]
    ) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        # once outside of the graph: kernels compile and libraries take their workspaces, which a capture must not
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            results = function(*arguments)
        graph.replay()
        return results, graph.replay


# -- replay -----------------------------------------------------------------------


class StepGraphs:
    """Runs functions of tensors through graphs where it can, and counts what it did, for the report.

    Args:
        recorder: None where there is nothing to record with.
        why_not: the reason why every step runs eagerly; empty if graphs are used.
        required: graphs were asked for: a capture that fails is an error, not a reason to run eagerly.
    Raises:
        UserError: graphs are required and there is a reason against them.
    """

    def __init__(self, recorder: Recorder | None, why_not: str = "", *, required: bool = False) -> None:
        if required and why_not:
            raise UserError(f"enable_cuda_graph=true: {why_not}")
        self.recorder, self.why_not, self.required = recorder, why_not, required
        self.captures = self.replays = 0
        self.eager: Counter[str] = Counter()
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()

    def __call__(self, function: Function, *arguments: Tensors) -> tuple[Tensor, ...]:
        """The function's results, in tensors of their own. Equal functions are one function."""
        if self.recorder is None or self.why_not:
            self.eager[self.why_not] += 1
            return function(*arguments)
        key = (function, shape_class(arguments))
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._capture(self.recorder, key, function, arguments)
            if graph is None:
                return self(function, *arguments)
        else:
            _fill(graph, arguments)
            graph.replay()
            self.replays += 1
        self._graphs.move_to_end(key)
        return tuple(result.clone() for result in graph.results)

    def _capture(
        self, recorder: Recorder, key: Hashable, function: Function, arguments: tuple[Tensors, ...]
    ) -> Graph | None:
        if len(self._graphs) == CAPACITY:
            self._graphs.popitem(last=False)
        values = [x.clone() if isinstance(x, Tensor) else x for x in leaves(arguments)]
        static = rebuild(arguments, iter(values))
        try:
            results, replay = recorder.record(function, static)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            told = f"a capture failed: {str(e).splitlines()[0]}"
            if self.required:
                raise UserError(f"enable_cuda_graph=true: {told}") from e
            self.why_not = told
            return None
        self.captures += 1
        filled = [weakref.ref(x) for x in leaves(arguments) if isinstance(x, Tensor)]
        graph = Graph(static, results, replay, filled)
        self._graphs[key] = graph
        return graph

    def report(self) -> dict[str, Any]:
        """Counts since the last report."""
        counts = {"captures": self.captures, "replays": self.replays, "eager": dict(self.eager)}
        self.captures = self.replays = 0
        self.eager.clear()
        return counts


def _fill(graph: Graph, arguments: tuple[Tensors, ...]) -> None:
    """Copies new values into the static buffers; a request's own tensors are the same ones at every step."""
    buffers = [x for x in leaves(graph.arguments) if isinstance(x, Tensor)]
    sources = [x for x in leaves(arguments) if isinstance(x, Tensor)]
    for i, (buffer, source) in enumerate(zip(buffers, sources, strict=True)):
        if source is not graph.filled[i]():
            buffer.copy_(source)
            graph.filled[i] = weakref.ref(source)


def step_graphs(asked: str, device: torch.device, prevented_by: str) -> StepGraphs:
    """Graphs for a device, as asked for with enable_cuda_graph (auto, true or false).

    Args:
        prevented_by: something else that was asked for and cannot be captured; empty if there is nothing.
    Raises:
        UserError: they were asked for and cannot be had.
    """
    why_not = "switched off" if asked == "false" else prevented_by
    if device.type != "cuda" and not why_not:
        why_not = f"the device is {device}"
    return StepGraphs(None if why_not else CudaGraphs(), why_not, required=asked == "true")
