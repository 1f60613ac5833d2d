"""Weights that live on the host: a component comes to the device for its stage, or its layers come one by one.

Layers are the children of a module's outermost ModuleLists. While layer i computes, a second stream copies layers i+1
to i+k into the device buffers that i's predecessors have left; a layer's weights travel as one run of bytes. What a
model declares to work before the first step alone (`before_first_step`, names of modules in the order of their calls)
takes its turn in the same buffers, and does not come again. What is left comes with the stage. Weights are read only:
what was changed on the device is lost when they leave.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.plan import Plan
from sgl_diffusion.runtime.weights import Source

ALIGNMENT = 256  # bytes; kernels compiled for tensors of PyTorch's allocator rely on as much
HOST_HEADROOM = 2 * 1024**3  # bytes of host memory left to everything else


# -- the device ---------------------------------------------------------------------


class DeviceStreams(Protocol):
    """A device that computes and copies at the same time. Events are the device's own."""

    def allocate(self, size: int) -> Tensor:
        """Bytes on the device."""

    def pin(self, host: Tensor) -> Callable[[], None]:
        """Locks the bytes in host memory, at their exact size, and returns what unlocks them.

        Raises:
            RuntimeError: the system refuses.
        """

    def copy(self, transfer: Callable[[], None], after: Sequence[Any]) -> Any:
        """Issues the transfer on the copy stream, behind the events; the event of its end."""

    def computed(self) -> Any:
        """The event of the end of all computation issued so far."""

    def compute_waits(self, event: Any) -> None:
        """Computation issued from now on starts after the event."""


class CudaStreams:
    """A GPU: computation on the current stream, copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def pin(self, host: Tensor) -> Callable[[], None]:
        # PyTorch's pinned allocator rounds up to a power of two, which wastes up to half of the memory
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = host.data_ptr()
        torch.cuda.check_error(runtime.cudaHostRegister(address, host.numel(), 1))  # 1: for all of the machine's GPUs
        return partial(runtime.cudaHostUnregister, address)

    def copy(self, transfer: Callable[[], None], after: Sequence[torch.cuda.Event]) -> torch.cuda.Event:
        with torch.cuda.stream(self.copies):
            for event in after:
                self.copies.wait_event(event)
            transfer()
            done: torch.cuda.Event = self.copies.record_event()
        return done

    def computed(self) -> torch.cuda.Event:
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event

    def compute_waits(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)


def available_host_memory() -> int:
    """Bytes that can be used without swapping, as Linux counts them."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


# -- weights that travel together ---------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A tensor's place in a parcel."""

    tensor: Tensor  # a parameter or buffer: it stays the same object, and its data moves
    start: int
    sources: Sequence[Source]  # where there is no copy in host memory

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel() * self.tensor.itemsize

    def view(self, space: Tensor) -> Tensor:
        return space[self.start : self.stop].view(self.tensor.dtype).view(self.tensor.shape)


class Parcel:
    """Tensors that travel together, as one run of bytes.

    Args:
        mapped: the sources of every tensor, by its id, where its file is the only copy on the host.
    """

    def __init__(self, tensors: Sequence[Tensor], mapped: Mapping[int, Sequence[Source]]) -> None:
        self.pieces: list[Piece] = []
        self.size = 0
        for tensor in tensors:
            piece = Piece(tensor, self.size, mapped.get(id(tensor), ()))
            self.pieces.append(piece)
            self.size = -(-piece.stop // ALIGNMENT) * ALIGNMENT
        self.host: Tensor | None = None

    def store(self, host: Tensor) -> None:
        """Moves the tensors into these bytes of host memory; what they had is free after each of them."""
        self.host = host
        for piece in self.pieces:
            piece.tensor.data = piece.view(host).copy_(piece.tensor)

    def transfer(self, space: Tensor) -> None:
        """Copies the weights to the beginning of some device memory."""
        if self.host is not None:
            space[: self.size].copy_(self.host, non_blocking=True)
            return
        for piece in self.pieces:
            tensor = piece.view(space)
            for source in piece.sources:
                tensor[source.slot.start : source.slot.stop].copy_(source.read())

    def arrive(self, space: Tensor) -> None:
        """The tensors are those in this device memory."""
        for piece in self.pieces:
            piece.tensor.data = piece.view(space)

    def leave(self) -> None:
        """The tensors are those of the host; those that only a file has are NaN, without memory of their own."""
        for piece in self.pieces:
            t = piece.tensor
            if self.host is not None:
                t.data = piece.view(self.host)
            else:
                t.data = torch.full((), float("nan"), dtype=t.dtype).expand(t.shape)


class Layout:
    """How a module's weights travel: a stem for the whole stage, and layers one by one.

    Args:
        prefetch: None for a module that moves whole; else how many layers are copied ahead, as `Plan.prefetch`.
        mapped: as `Parcel`'s.

    Attributes:
        preparation: layers that work before the first step alone; `layers` begins with them.
        ahead: layers copied ahead, of those that come again.
    """

    def __init__(
        self, module: nn.Module, prefetch: float | None, mapped: Mapping[int, Sequence[Source]] | None = None
    ) -> None:
        self.preparation: list[nn.Module] = []
        self.layers: list[nn.Module] = []
        self.ahead = 0
        if prefetch is not None:
            early = [module.get_submodule(name) for name in getattr(module, "before_first_step", ())]
            self.preparation = [layer for part in early for layer in find_layers(part) or [part]]
            again = [layer for layer in find_layers(module) if layer not in self.preparation]
            self.layers, self.ahead = self.preparation + again, layers_ahead(prefetch, len(again))
        self.stem, *self.parcels = [Parcel(tensors, mapped or {}) for tensors in partition(module, self.layers)]

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return self.stem.size + sum(parcel.size for parcel in self.parcels)

    @property
    def at_work(self) -> int:
        """Bytes on the device during the stage."""
        return self.stem.size + (self.ahead + 1) * max((parcel.size for parcel in self.parcels), default=0)


# -- a few layers at a time ---------------------------------------------------------


@dataclass(eq=False)
class Buffer:
    """Device memory of one layer at a time."""

    space: Tensor
    layer: int | None = None
    filled: Any = None  # event: the layer's weights are there
    read: list[Any] = field(default_factory=list)  # events: what the buffer was used for is over


class Window:
    """The layers on the device: the one at work and those copied ahead, each in one of `ahead` + 1 equal buffers.

    A layer is at work from the call of any module in it to the call of a module in another layer.

    Args:
        cyclic: the first layer follows the last, as in a denoiser; but for layers of its preparation.
    """

    def __init__(self, layout: Layout, cyclic: bool, streams: DeviceStreams) -> None:
        self.parcels, self.first, self.ahead = layout.parcels, len(layout.preparation), layout.ahead
        self.cyclic, self.streams = cyclic, streams
        self.buffers: list[Buffer] = []
        self.current: int | None = None
        self.copied = Counter[int]()  # bytes, by layer
        self.late = 0  # copies that nothing had asked for before their layer's turn
        for i, layer in enumerate(layout.layers):
            for module in layer.modules():
                module.register_forward_pre_hook(partial(self._called, i))

    def open(self) -> None:
        """Takes the buffers, and begins to fill them with the first layers."""
        size = max(parcel.size for parcel in self.parcels)
        self.buffers = [Buffer(self.streams.allocate(size)) for _ in range(self.ahead + 1)]
        before = self.streams.computed()  # the memory may still be in use by work issued before
        for layer, buffer in enumerate(self.buffers):
            buffer.read.append(before)
            self._fill(buffer, layer)

    def close(self) -> None:
        """Gives the buffers back, in order behind the copies that still write to them."""
        for buffer in self.buffers:
            if buffer.filled is not None:
                self.streams.compute_waits(buffer.filled)
            if buffer.layer is not None:
                self.parcels[buffer.layer].leave()
        self.buffers, self.current = [], None

    def _called(self, layer: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Forward pre-hook of every module of a layer."""
        if layer == self.current:
            return
        if not self.buffers:
            raise RuntimeError(f"{type(module).__name__} of layer {layer} was called while its weights are on the host")
        with _plain_tensors():
            self._enter(layer)

    def _enter(self, layer: int) -> None:
        held = {buffer.layer: buffer for buffer in self.buffers}
        if self.current is not None:
            held[self.current].read.append(self.streams.computed())
        n, following = len(self.parcels), range(layer, layer + self.ahead + 1)
        wanted = [i if i < n else self.first + i - n for i in following if self.cyclic or i < n]
        spare = [buffer for buffer in self.buffers if buffer.layer not in wanted]
        self.late += layer not in held
        for i in wanted:
            if i not in held:
                held[i] = spare.pop(0)
                self._fill(held[i], i)
        self.streams.compute_waits(held[layer].filled)
        self.current = layer

    def _fill(self, buffer: Buffer, layer: int) -> None:
        if buffer.layer is not None:
            self.parcels[buffer.layer].leave()
        parcel = self.parcels[layer]
        buffer.filled = self.streams.copy(partial(parcel.transfer, buffer.space), buffer.read)
        buffer.layer, buffer.read = layer, []
        parcel.arrive(buffer.space)
        self.copied[layer] += parcel.size


# -- components -----------------------------------------------------------------------


class Offloaded:
    """A component whose weights live on the host.

    Args:
        prefetch: None to move the component whole; else how many layers are copied ahead, as `Plan.prefetch`.
        cyclic: it is called again and again.
        pin: lock the weights in host memory.
        mapped: its weights' sources, if they stay in their files; those of the module are not read.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        streams: DeviceStreams,
        *,
        prefetch: float | None = None,
        cyclic: bool = False,
        pin: bool = False,
        mapped: Sequence[Source] = (),
    ) -> None:
        sources: dict[int, list[Source]] = {}
        for source in mapped:
            sources.setdefault(id(module.get_parameter(source.slot.parameter)), []).append(source)
        self.layout = layout = Layout(module, prefetch, sources)
        if prefetch is not None and not layout.layers:
            raise UserError(f"layerwise_offload_components={name}: it has no lists of layers")
        self.stem, self.size = layout.stem, layout.size
        self.streams, self.pinned, self.mapped = streams, pin and not mapped, bool(mapped)
        self.copied = 0
        self.space: Tensor | None = None
        self.window = None if prefetch is None else Window(layout, cyclic, streams)
        if mapped:
            self._leave()
        else:
            self._store(name, [self.stem, *layout.parcels])

    def _store(self, name: str, parcels: Sequence[Parcel]) -> None:
        """One run of host memory for all weights: it is locked once, and at its exact size."""
        host, start = torch.empty(self.size, dtype=torch.uint8), 0
        for parcel in parcels:
            parcel.store(host[start : start + parcel.size])
            start += parcel.size
        if not self.pinned:
            return
        try:
            weakref.finalize(self, self.streams.pin(host))
        except RuntimeError as e:
            told = f"the system does not lock {self.size} bytes for {name}: {str(e).splitlines()[0]}"
            raise UserError(f"pin_cpu_memory=true: {told}; --pin-cpu-memory false does without") from e

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The component can compute inside of the block; its weights are back on the host however the block ends."""
        try:
            with _plain_tensors():
                self._bring()
            yield
        finally:
            with _plain_tensors():
                self._leave()

    def _bring(self) -> None:
        self.space = self.streams.allocate(self.stem.size)
        filled = self.streams.copy(partial(self.stem.transfer, self.space), [self.streams.computed()])
        self.streams.compute_waits(filled)
        self.stem.arrive(self.space)
        self.copied += self.stem.size
        if self.window is not None:
            self.window.open()

    def _leave(self) -> None:
        if self.window is not None:
            self.window.close()
        self.stem.leave()
        self.space = None

    def report(self, steps: int | None = None) -> dict[str, Any]:
        """What took effect, and what was copied since the last report; `steps` is how often its layers were run."""
        told: dict[str, Any] = {
            "mode": "component" if self.window is None else "layerwise",
            "host": "mapped files" if self.mapped else "pinned memory" if self.pinned else "pageable memory",
            "host_bytes": 0 if self.mapped else self.size,
            "pinned_bytes": self.size if self.pinned else 0,
            "mapped_bytes": self.size if self.mapped else 0,
            "device_bytes": self.layout.at_work,
            "copied_bytes": self.copied + (self.window.copied.total() if self.window else 0),
        }
        self.copied = 0
        if self.window is not None:
            w = self.window
            told |= {"layers": len(w.parcels) - w.first, "prefetch": w.ahead, "late_layers": w.late}
            if steps is not None:
                again = sum(size for layer, size in w.copied.items() if layer >= w.first)
                told["copied_bytes_per_step"] = again // steps
            w.copied.clear()
            w.late = 0
        return told


class Offload:
    """The components of a pipeline that live on the host.

    Args:
        parts, kinds: those of the pipeline's family, by component key.
        mapped: sources of the components that stay in their files.
        streams: the device; None for the plan's GPU.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        kinds: Mapping[str, str],
        plan: Plan,
        mapped: Mapping[str, Sequence[Source]],
        streams: DeviceStreams | None = None,
    ) -> None:
        self.kinds = kinds
        self.modes = dict(plan.offload)
        self.components: dict[str, Offloaded] = {}
        for key in (key for key, place in plan.offload.items() if place != "resident"):
            streams = streams or CudaStreams(plan.device)
            self.components[key] = Offloaded(
                key,
                parts[key],
                streams,
                prefetch=plan.prefetch if plan.offload[key] == "layerwise" else None,
                cyclic=kinds[key] == "denoiser",
                pin=plan.pin_memory,
                mapped=mapped.get(key, ()),
            )

    @contextmanager
    def on_device(self, kind: str, only: str | None = None) -> Iterator[None]:
        """Components of a kind can compute inside of the block, or `only` the one of them with this key."""
        with ExitStack() as brought:
            for key, component in self.components.items():
                if self.kinds[key] == kind and only in (None, key):
                    brought.enter_context(component.on_device())
            yield

    def moves(self, kind: str) -> bool:
        """Whether weights of such components have no fixed address."""
        return any(self.kinds[key] == kind for key in self.components)

    def report(self, steps: Mapping[str, int]) -> dict[str, Any]:
        """Where the weights of every component live; counts since the last report, of a request in which the denoisers
        took so many steps.
        """
        told: dict[str, Any] = {key: {"mode": mode} for key, mode in self.modes.items()}
        for key, component in self.components.items():
            told[key] = component.report(steps.get(key))
        return told


def fits_host_memory(module: nn.Module, dtype: torch.dtype, taken: int = 0) -> bool:
    """Whether a module's weights, in this dtype, leave room for everything else. The module may be on meta.

    Args:
        taken: bytes that others will have taken by then.
    """
    size = sum(p.numel() for p in module.parameters()) * dtype.itemsize
    return taken + size + HOST_HEADROOM <= available_host_memory()


def layers_ahead(prefetch: float, layers: int) -> int:
    """How many layers are copied ahead: 0 is one, below 1 a share of the layers, from 1 on a count."""
    ahead = int(prefetch) if prefetch >= 1 else max(1, round(prefetch * layers))
    return min(ahead, layers - 1)


def find_layers(module: nn.Module) -> list[nn.Module]:
    """Children of the outermost ModuleLists, in the order of declaration, which is about that of execution."""
    found: list[nn.Module] = []
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else find_layers(child)
    return found


def partition(module: nn.Module, layers: Sequence[nn.Module]) -> list[list[Tensor]]:
    """Parameters and buffers: first those outside of the layers or tied beyond one of them, then every layer's own."""
    users = _users(module)
    own = [{key for key, n in _users(layer).items() if n == users[key]} for layer in layers]
    shared = users.keys() - set().union(*own)
    groups = [[t for t in _tensors(layer) if id(t) in keys] for layer, keys in zip(layers, own, strict=True)]
    return [[t for t in _tensors(module) if id(t) in shared], *groups]


def _tensors(module: nn.Module, *, recurse: bool = True) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]


def _users(module: nn.Module) -> Counter[int]:
    """How many modules hold a tensor, by its id."""
    return Counter(id(t) for owner in module.modules() for t in _tensors(owner, recurse=False))


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Tensors that may become parameters; those made in inference mode may be used in that mode only."""
    with torch.inference_mode(False), torch.no_grad():
        yield
