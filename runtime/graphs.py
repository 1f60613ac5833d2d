"""Captured work: a denoising step, a prompt's encoding, a decode is recorded once for its shapes and replayed.

On a GPU, a replay costs the host one call, however many launches there are; `tape.py` is the recorder of a CPU. Every
graph reads static buffers of its own, which new values are copied into: a new prompt or seed re-captures nothing.
CUDA graphs share one memory pool.
"""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sgl_diffusion.models.family import Tensors
from sgl_diffusion.runtime.errors import UserError

CAPACITY = 4  # graphs of a stage, where no warm-up declared more shapes
REFUSALS = 64  # shapes whose capture failed that are remembered, the latest
CAPTURED = ("text_encoding", "denoising", "decoding")  # stages
NOT_WARMED_UP = "this shape was not warmed up"

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


class Stale(Exception):
    """A replay that would not do what the call does: it has to be recorded again. Nothing was computed."""


class Recorder(Protocol):
    """The device's way to record a call; the arguments stay where they are between replays."""

    name: str

    def record(self, function: Function, arguments: tuple[Tensors, ...]) -> Recording:
        """Runs the function once, and returns its results, which every replay writes again, and the replay.

        Raises:
            RuntimeError: the call cannot be recorded; the reason.
        """


class CudaGraphs:
    """`torch.cuda.CUDAGraph`s in one pool."""

    name = "CUDA graph"

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, function: Function, arguments: tuple[Tensors, ...]) -> Recording:
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


class Graphs:
    """Runs functions of tensors through graphs where it can, and counts what it did, for the report.

    Args:
        why_not: the reason why every call runs eagerly; empty if graphs are used.
        required: graphs were asked for: a capture that fails is an error, not a reason to run eagerly.

    Attributes:
        capacity: graphs kept; the least recently used goes first.
        captures_nothing_new: why only what was captured already is replayed; empty if the rest is captured.
    Raises:
        UserError: graphs are required and there is a reason against them.
    """

    def __init__(self, recorder: Recorder, why_not: str = "", *, required: bool = False) -> None:
        if required and why_not:
            raise UserError(f"enable_cuda_graph=true: {why_not}")
        self.recorder, self.why_not, self.required = recorder, why_not, required
        self.capacity, self.captures_nothing_new = CAPACITY, ""
        self.captures = self.replays = 0
        self.eager: Counter[str] = Counter()
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._refused: OrderedDict[Hashable, str] = OrderedDict()

    def __call__(self, function: Function, *arguments: Tensors) -> tuple[Tensor, ...]:
        """The function's results, in tensors of their own. Equal functions are one function."""
        if self.why_not:
            self.eager[self.why_not] += 1
            return function(*arguments)
        key = (function, shape_class(arguments))
        graph = self._graphs.get(key)
        if graph is not None:
            try:
                _fill(graph, arguments)
                graph.replay()
                self.replays += 1
            except Stale:
                graph = None
                del self._graphs[key]
        if graph is None:
            if reason := self._refused.get(key, self.captures_nothing_new):
                self.eager[reason] += 1
                return function(*arguments)
            graph = self._capture(self.recorder, key, function, arguments)
            if graph is None:
                return self(function, *arguments)
        self._graphs.move_to_end(key)
        return tuple(result.clone() for result in graph.results)

    def _capture(
        self, recorder: Recorder, key: Hashable, function: Function, arguments: tuple[Tensors, ...]
    ) -> Graph | None:
        if len(self._graphs) == self.capacity:
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
            if len(self._refused) == REFUSALS:
                self._refused.popitem(last=False)
            self._refused[key] = told
            return None
        self.captures += 1
        filled = [weakref.ref(x) for x in leaves(arguments) if isinstance(x, Tensor)]
        graph = Graph(static, results, replay, filled)
        self._graphs[key] = graph
        return graph

    def report(self) -> dict[str, Any]:
        """Counts since the last report, and what captures."""
        counts = {"captures": self.captures, "replays": self.replays, "eager": dict(self.eager)}
        counts["recorder"] = None if self.why_not else self.recorder.name
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


def make_graphs(asked: str, recorder: Recorder, prevented: Mapping[str, str]) -> dict[str, Graphs]:
    """Graphs of every stage of a pipeline, as asked for with enable_cuda_graph (auto, true or false).

    Steps are captured when they first run, unless all was captured before users came. An encoding and a decode run once
    a request, so that a capture only pays for shapes known to come again: those of a warm-up.

    Args:
        prevented: by stage, something else that was asked for and keeps it from being captured.
    Raises:
        UserError: captured steps were asked for and cannot be had.
    """
    reasons = dict.fromkeys(CAPTURED, "switched off") if asked == "false" else prevented
    graphs = {
        stage: Graphs(recorder, reasons.get(stage, ""), required=asked == "true" and stage == "denoising")
        for stage in CAPTURED
    }
    for stage in ("text_encoding", "decoding"):
        graphs[stage].captures_nothing_new = NOT_WARMED_UP
    return graphs


@contextmanager
def capturing(graphs: Mapping[str, Graphs], shapes: int) -> Iterator[None]:
    """Inside the `with`, so many shapes are captured and kept, in every stage; nothing else is from then on.

    Steps are an exception where graphs were asked for: those of a new shape are still captured, and counted.
    """
    for stage in graphs.values():
        stage.captures_nothing_new, stage.capacity = "", max(CAPACITY, shapes)
    try:
        yield
    finally:
        for stage in graphs.values():
            stage.captures_nothing_new = "" if stage.required else NOT_WARMED_UP
