"""Sharded weights: a rank keeps some rows of every weight, and has a layer whole while the layer computes.

For models that do not fit on one device. Layers are the children of a module's outermost ModuleLists, as for offload;
what is left of the module stays whole. torch's `fully_shard` (FSDP2) gathers a layer's weights from all ranks before
its forward, while the layer before it in the list computes, and frees them after. Nothing is summed: what is gathered
is what was stored, so that results are those of whole weights, bit for bit.

A layer is entered by its forward, and by the methods that it names in `entries`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.offload import DeviceStreams, find_layers, partition
from sgl_diffusion.runtime.parallel.group import Group
from sgl_diffusion.runtime.reading import Loader, LoadTimes, Run
from sgl_diffusion.runtime.weights import draw_dummy, find_weights, slots

GATHERED = 3  # layers at once: the one at work, the next one's messages, and its weights as they are laid out of them


def check_sharding(tp: int, offload: Mapping[str, str]) -> None:
    """Raises UserError where something else has a say in where a denoiser's weights are.

    Args:
        tp: ranks that share weights.
        offload: of the denoisers, as `Plan.offload`.
    """
    if tp > 1:
        raise UserError(f"use_fsdp_inference=true: not with tp_size={tp}, by which ranks share the same weights")
    for key, place in offload.items():
        if place != "resident":
            raise UserError(
                f"use_fsdp_inference=true: not with the {place} offload of {key}, whose weights are sharded"
            )


@dataclass(frozen=True)
class Footprint:
    """Bytes of a module's weights on every rank.

    Attributes:
        layers: how many are sharded.
        whole: outside of the layers.
        shards: the rank's own of all layers; the last ranks may have less.
        at_work: beside these, of layers while they compute.
        gathered: that a rank receives for one pass through all layers.
    """

    layers: int
    whole: int
    shards: int
    at_work: int
    gathered: int

    @classmethod
    def of(cls, module: nn.Module, ranks: int) -> Footprint:
        """Of a module that is whole, or on "meta"."""
        layers = find_layers(module)
        rest, *groups = partition(module, layers)
        own = [sum(-(-len(t) // ranks) * t[:1].nbytes for t in group) for group in groups]
        sizes = [sum(t.nbytes for t in group) for group in groups]
        return cls(
            layers=len(layers),
            whole=sum(t.nbytes for t in rest),
            shards=sum(own),
            at_work=min(GATHERED, len(layers)) * max(sizes, default=0),
            gathered=(ranks - 1) * sum(own),
        )


def load_sharded(
    name: str,
    module: nn.Module,
    files: Sequence[Path] | None,
    device: torch.device,
    dtype: torch.dtype,
    world: Group,
    streams: DeviceStreams | None = None,
) -> LoadTimes:
    """Shards a module of shapes alone ("meta") over all ranks and fills what is this rank's, without reading more.

    Args:
        name: of the component.
        files: None for the dummies that `weights.fill_dummy` draws.
        world: all ranks of the process group there is.
        streams: of the device, for uploads that overlap with reading.
    Raises:
        UserError: as `weights.load_weights`; or the module has no lists of layers.
    """
    found = [] if files is None else find_weights(module, files)
    wanted, lengths = slots(module), {key: len(p) for key, p in module.named_parameters()}
    module.to(dtype)
    root = _shard(name, module, device, world.size)
    module.to_empty(device=device)
    root()
    here = {key: _Rows.of(p, lengths[key], world) for key, p in module.named_parameters()}
    if files is None:
        for key, slot in wanted.items():
            rows = here[slot.parameter]
            first, own = rows.between(slot.start, slot.stop)
            whole = torch.empty(slot.shape, dtype=own.dtype, device=device)
            own.copy_(draw_dummy(key, whole)[first : first + len(own)])
        return LoadTimes()
    with Loader(streams) as loader:
        pairs = []
        for source in found:
            first, own = here[source.slot.parameter].between(source.slot.start, source.slot.stop)
            pairs.append((Run(source.stored, first=first), own))
        loader.load(pairs)
    return loader.times


def report(module: nn.Module) -> dict[str, Any]:
    """Of a sharded module: how many parameters, and bytes held between passes; empty for another."""
    parameters = [*module.parameters()]
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    if not sharded:
        return {}
    return {
        "sharded_parameters": len(sharded),
        "sharded_bytes": sum(p.to_local().nbytes for p in sharded),
        "whole_bytes": sum(p.nbytes for p in parameters if not isinstance(p, DTensor)),
    }


@dataclass(frozen=True)
class _Rows:
    """Rows of a parameter that are here, from one on."""

    first: int
    rows: Tensor

    @classmethod
    def of(cls, p: Tensor, length: int, world: Group) -> _Rows:
        if not isinstance(p, DTensor):
            return cls(0, p.data)
        each = -(-length // world.size)  # as `torch.chunk` cuts: the last ranks may have less, or nothing
        return cls(min(world.rank * each, length), p.to_local())

    def between(self, start: int, stop: int) -> tuple[int, Tensor]:
        """Those of a range that are here, and where in the range they begin."""
        lower = min(max(start, self.first), stop)
        upper = max(min(stop, self.first + len(self.rows)), lower)
        offset = min(max(lower - self.first, 0), len(self.rows))
        return lower - start, self.rows[offset : offset + upper - lower]


class _Layers(nn.ModuleList):
    """The layers of a module under one root, which FSDP asks for: streams are theirs in common."""

    def forward(self) -> None:
        """Nothing but FSDP's preparation."""


def _shard(name: str, module: nn.Module, device: torch.device, ranks: int) -> nn.Module:
    layers = find_layers(module)
    if not layers:
        raise UserError(f"use_fsdp_inference=true: {name} has no lists of layers")
    mesh = init_device_mesh(device.type, (ranks,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        for entry in getattr(layer, "entries", ()):
            register_fsdp_forward_method(layer, entry)
    for in_order in _lists(module):
        for layer, following in zip(in_order, in_order[1:], strict=False):
            layer.set_modules_to_forward_prefetch([following])
    root = _Layers(layers)
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    return root


def _lists(module: nn.Module) -> Iterator[list[Any]]:
    """The layers of each outermost ModuleList: those are called one after the other."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield list(child)
        else:
            yield from _lists(child)
