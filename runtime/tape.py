"""Captured work on a CPU: the operations of a call are taped once, with their memory, and run again without Python.

Small models spend as much time on the way to an operation as in it: modules, checks, views, allocations. A tape keeps
the operations that compute, with the tensors they read and write; views and allocations are there already. It is to a
CPU what a CUDA graph is to a GPU, and gives the bits that the call itself gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from sgl_diffusion.models.family import Tensors
from sgl_diffusion.runtime.graphs import Function, Recording, Stale, leaves

LIMIT = 256 * 1024**2  # bytes a tape may hold on to: beyond, operations are so long that the way to them is nothing
ALLOCATIONS = frozenset(("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"))

Play = Callable[[], Any]


class Tapes:
    """Records calls of pure functions of tensors on the CPU."""

    name = "CPU tape"

    def record(self, function: Function, arguments: tuple[Tensors, ...]) -> Recording:
        """Runs the function once; its results, and what computes them again from the same arguments.

        Raises:
            RuntimeError: it reads a value it computed, or makes more than `LIMIT`: it cannot be taped.
        """
        inputs = [x for x in leaves(arguments) if isinstance(x, Tensor)]
        with _Recorder(inputs) as recorder:
            results = function(*arguments)
        plays, read = recorder.plays, recorder.read

        def replay() -> None:
            if not all(torch.equal(x, value) for x, value in read):
                raise Stale
            for play in plays:
                play()

        return results, replay


class _Recorder(TorchDispatchMode):
    """Tapes every operation that computes, while it is active."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs = {x.untyped_storage()._cdata for x in inputs}
        self.plays: list[Play] = []
        self.read: list[tuple[Tensor, Tensor]] = []  # inputs whose values decided what was taped, and those values
        self.held = 0

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):  # what it consists of is taped: the same kernels, with memory to write to
            with self:
                return func.decompose(*args, **kwargs)
        made = func(*args, **kwargs)
        given, results = list(_tensors((args, kwargs))), list(_tensors(made))
        if _reads_on_the_host(func, args):
            self._note_read(func, given)
        elif _writes(func):
            self.plays.append(lambda: func(*args, **kwargs))
        elif func._schema.name.partition("::")[2] not in ALLOCATIONS and not _are_views(results, given):
            self._hold(results)
            self.plays.append(_again(func, args, kwargs, results))
        return made

    def _note_read(self, func: OpOverload, given: list[Tensor]) -> None:
        """An input may be read: a replay first makes sure that it holds the same values."""
        for x in given:
            if x.untyped_storage()._cdata not in self.inputs:
                raise RuntimeError(f"{func} reads a value that was computed")
            if not any(x is seen for seen, _ in self.read):
                self.read.append((x, x.clone()))

    def _hold(self, results: list[Tensor]) -> None:
        self.held += sum(x.nbytes for x in results)
        if self.held > LIMIT:
            self.plays.clear()
            raise RuntimeError(f"what it makes in between is more than {LIMIT // 1024**2} MiB")


def _again(func: OpOverload, args: Any, kwargs: Any, results: list[Tensor]) -> Play:
    """Computes into the memory of the first results."""
    variant = _out_variant(func)
    if variant is not None and len(variant[1]) == len(results):
        into, names = variant
        outs = dict(zip(names, results, strict=True))
        return lambda: into(*args, **kwargs, **outs)

    def copy() -> None:
        for result, value in zip(results, _tensors(func(*args, **kwargs)), strict=True):
            result.copy_(value)

    return copy


@cache
def _out_variant(func: OpOverload) -> tuple[OpOverload, list[str]] | None:
    """The overload that writes its results to given tensors, and the names of these."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    packet = func._overloadpacket
    for name in packet.overloads():  # type: ignore[no-untyped-call]
        overload = getattr(packet, name)
        outs = [a.name for a in overload._schema.arguments if a.is_out]
        if outs and [(a.name, str(a.type)) for a in overload._schema.arguments if not a.is_out] == wanted:
            return overload, outs
    return None


@cache
def _is_composite(func: OpOverload) -> bool:
    name = func.name()  # type: ignore[no-untyped-call]
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


@cache
def _writes(func: OpOverload) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


def _reads_on_the_host(func: OpOverload, args: Any) -> bool:
    """Whether Python may go on by what tensors hold: a result is a number, or has a shape that depends on values."""
    if func._schema.name == "aten::index":  # by numbers, shapes are known
        return any(x.dtype == torch.bool for x in _tensors(args[1]))
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _are_views(results: list[Tensor], given: list[Tensor]) -> bool:
    """Whether the results are in memory that was there before."""
    there = {x.untyped_storage()._cdata for x in given}
    return all(x.untyped_storage()._cdata in there for x in results)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor))
