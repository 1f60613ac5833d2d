"""Counting memory: every tensor from the operation that made it until nothing holds it any more.

What is counted is tensors. Scratch that a library takes inside of one operation is not seen: see docs/memory.md. A
GPU's allocator counts by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.clone.default)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Memory of tensors that were made on a kind of device inside of the mode, for as long as something holds it.

    What an operation takes and gives back inside of itself is not seen.
    """

    def __init__(self, device_type: str, granularity: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type, self.granularity = device_type, granularity
        self.now = self.peak = 0
        self._held: set[int] = set()
        self._values = WeakIdKeyDictionary()  # of small integer tensors that are now shapes alone

    @contextmanager
    def rising(self) -> Iterator[None]:
        """Counts inside of the block, and begins the peak anew."""
        self.peak = self.now
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):  # inference mode hands those over as a whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is aten.unique_consecutive.default and args[0].is_meta:  # its result's shape is data
            return func(self._values[args[0]], *args[1:], **kwargs)
        if func is aten.equal.default and args[0].is_meta:  # a tape asks whether an input is what it was
            return True
        if func is aten.addmm.out and args[1].is_meta:  # for shapes alone PyTorch takes a dozen operations
            return kwargs["out"]
        result = _product(*args) if func is aten.addmm.default and args[1].is_meta else func(*args, **kwargs)
        outside: set[int] | None = None
        for x in _tensors((result,)):
            if x.is_meta and func in COPIES and not args[0].is_floating_point():
                self._values[x] = self._values.get(args[0], args[0])  # type: ignore[no-untyped-call]
            if x.device.type == self.device_type:
                if outside is None:
                    outside = {given.untyped_storage()._cdata for given in _tensors((args, *kwargs.values()))}
                if x.untyped_storage()._cdata not in outside:
                    self._hold(x.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // self.granularity) * self.granularity
        if key not in self._held:
            self._held.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size


def _product(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What `addmm` makes of shapes alone."""
    return a.new_empty(a.shape[0], b.shape[1])


@cache
def _is_composite(func: Any) -> bool:
    return bool(func._can_decompose())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple | list):
            yield from _tensors(x)


class Gauge:
    """The most memory that each stage of one run needed, in bytes.

    On a CPU, steps that an earlier run has captured do not count: the first run of a shape tells all.

    Args:
        counting: on a CPU, follow every tensor, which takes time; a GPU's allocator counts in any case.
        weights: bytes that lie on the device all the time, where no allocator counts them.
    """

    def __init__(self, device: torch.device, *, counting: bool = False, weights: int = 0) -> None:
        self.device, self.weights = device, weights
        self.live = LiveBytes(device.type) if counting and device.type == "cpu" else None
        self.peaks: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the work inside of the block, which must not be left and entered again by a generator."""
        if self.live is not None:
            with self.live.rising():
                yield
            self._add(name, self.live.peak + self.weights)
        elif self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self._add(name, torch.cuda.max_memory_allocated(self.device))
        else:
            yield

    def _add(self, name: str, peak: int) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0), peak)


def module_bytes(parts: Iterable[Any]) -> int:
    """Of the weights of those parts that are modules."""
    return sum(t.nbytes for part in parts if isinstance(part, nn.Module) for t in (*part.parameters(), *part.buffers()))
