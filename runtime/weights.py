"""Checkpoint tensors -> parameters: straight into the packed parameter, its device and dtype; strict about names and
shapes. How the bytes are read is `runtime.reading`'s."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.reading import Loader, LoadTimes, Stored, stored_tensors

if TYPE_CHECKING:
    from sgl_diffusion.runtime.offload import DeviceStreams

ONES = ("weight", "running_var")  # ends of names of dummies that are not zero, among vectors
SHOWN = 6  # names of each kind listed in an error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component, by its shard index if it has one.

    Raises:
        UserError: no file, or the index names a file that is not there.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = sorted(set(read_json(indexes[0])["weight_map"].values()))
        if missing := [n for n in names if not (folder / n).is_file()]:
            raise UserError(f"{indexes[0]}: shard {missing[0]} is missing")
        return [folder / n for n in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no safetensors file in it")
    return files


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint tensor goes: rows `start` to `stop` of a parameter."""

    parameter: str
    start: int
    stop: int


def slots(module: nn.Module) -> dict[str, Slot]:
    """Checkpoint name -> slot, for every tensor the module needs.

    A parameter has its own name in the checkpoint unless a module declares it as packed:
    `packed = {"to_qkv": {"to_q": 1, "to_k": 1, "to_v": 1}}` gives the checkpoint's names, in row order, and their
    shares of the rows.
    """
    parts: dict[str, dict[str, int]] = {}
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        for target, shares in getattr(owner, "packed", {}).items():
            parts[prefix + target] = {prefix + name: share for name, share in shares.items()}
    found = {}
    for name, p in module.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        if prefix not in parts:
            found[name] = Slot(name, 0, len(p))
            continue
        unit, start = len(p) // sum(parts[prefix].values()), 0
        for source, share in parts[prefix].items():
            found[f"{source}.{leaf}"] = Slot(name, start, start + share * unit)
            start += share * unit
    return found


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor and its place in the module. Nothing is read until `read` is called."""

    stored: Stored
    slot: Slot

    def read(self) -> Tensor:
        """The tensor, which stays a view of the mapped file."""
        return self.stored.mapped()


def load_weights(
    module: nn.Module,
    files: Sequence[Path],
    device: torch.device,
    dtype: torch.dtype,
    streams: DeviceStreams | None = None,
) -> LoadTimes:
    """Fills a module built under the meta device. Host memory beyond the parameters stays within `reading`'s buffers.

    Args:
        streams: of the device, for uploads that overlap with reading.
    Raises:
        UserError: a corrupt file, or missing, unexpected or mis-shaped weights, listing their names.
    """
    found = find_weights(module, files)
    module.to(dtype).to_empty(device=device)
    parameters = dict(module.named_parameters())
    with Loader(streams) as loader:
        loader.load([(s.stored, parameters[s.slot.parameter].data[s.slot.start : s.slot.stop]) for s in found])
    return loader.times


def find_weights(module: nn.Module, files: Sequence[Path]) -> list[Source]:
    """A source for every slot of the module, in the order of the files' bytes.

    Raises:
        UserError: a corrupt file, or missing, unexpected, repeated or mis-shaped weights, listing their names.
    """
    shapes, wanted = {name: p.shape for name, p in module.named_parameters()}, slots(module)
    skipped = tuple(getattr(module, "unused_weights", tuple)())
    found: dict[str, Source] = {}
    unexpected, repeated, misshaped = [], [], []
    for stored in (stored for path in files for stored in stored_tensors(path)):
        name = stored.name
        if name.startswith(skipped):
            continue
        if (slot := wanted.get(name)) is None:
            unexpected.append(name)
            continue
        if name in found:
            repeated.append(name)
        found[name] = Source(stored, slot)
        expected = (slot.stop - slot.start, *shapes[slot.parameter][1:])
        if stored.shape != expected:
            misshaped.append(f"{name} {stored.shape} instead of {expected}")
    missing = [name for name in wanted if name not in found]
    problems = {"missing": missing, "unexpected": unexpected, "repeated": repeated, "mis-shaped": misshaped}
    if any(problems.values()):
        told = "; ".join(f"{kind} weights: {some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{files[0].parent}: {told}")
    return [*found.values()]


def some(names: Sequence[str]) -> str:
    """The first names of a list, for an error."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@torch.no_grad()
def fill_dummy(
    module: nn.Module, device: torch.device, dtype: torch.dtype, drawn_on: torch.device | None = None
) -> None:
    """Seeded random weights at true shape: matrices keep the scale of activations, norm weights and variances are 1,
    biases and means 0.

    A tensor depends on its name in the checkpoint alone, so that diffusers' module of a component gets the same ones,
    and on the kind of device it is drawn on: `drawn_on`, where that is not the one the weights stay on.
    """
    if any(p.is_meta for p in module.parameters()):
        module.to(dtype).to_empty(device=device)
    parameters = dict(module.named_parameters())
    for name, slot in slots(module).items():
        rows = parameters[slot.parameter].data[slot.start : slot.stop]
        if rows.ndim > 1:
            generator = torch.Generator(drawn_on or device).manual_seed(zlib.crc32(name.encode()))
            drawn = rows if drawn_on in (None, device) else torch.empty(rows.shape, dtype=rows.dtype, device=drawn_on)
            rows.copy_(drawn.normal_(0, rows[0].numel() ** -0.5, generator=generator))
        else:
            rows.fill_(1.0 if name.endswith(ONES) else 0.0)
    for name, statistic in module.named_buffers():  # of diffusers' batch norms; ours hold theirs as parameters
        if name.endswith(("running_mean", "running_var")):
            statistic.fill_(1.0 if name.endswith(ONES) else 0.0)
