"""Checkpoint tensors -> parameters: memory-mapped, straight to the device and dtype, strict about names and shapes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.errors import UserError

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

    file: safe_open
    name: str
    slot: Slot

    def read(self) -> Tensor:
        """The tensor, which stays a view of the mapped file."""
        tensor: Tensor = self.file.get_tensor(self.name)  # type: ignore[no-untyped-call]
        return tensor


def load_weights(module: nn.Module, files: Sequence[Path], device: torch.device, dtype: torch.dtype) -> None:
    """Fills a module built under the meta device. Host memory stays near one tensor: files are memory-mapped.

    Raises:
        UserError: a corrupt file, or missing, unexpected or mis-shaped weights, listing their names.
    """
    found = find_weights(module, files)
    module.to(dtype).to_empty(device=device)
    parameters = dict(module.named_parameters())
    for source in found:
        slot = source.slot
        parameters[slot.parameter].data[slot.start : slot.stop].copy_(source.read())


def find_weights(module: nn.Module, files: Sequence[Path]) -> list[Source]:
    """A source for every slot of the module; its files stay open and mapped.

    Raises:
        UserError: a corrupt file, or missing, unexpected or mis-shaped weights, listing their names.
    """
    shapes, wanted = {name: p.shape for name, p in module.named_parameters()}, slots(module)
    skipped = tuple(getattr(module, "unused_weights", tuple)())
    found, unexpected, misshaped = [], [], []
    for file, name in _tensors(files):
        if name.startswith(skipped):
            continue
        if (slot := wanted.get(name)) is None:
            unexpected.append(name)
            continue
        found.append(Source(file, name, slot))
        shape = tuple(file.get_slice(name).get_shape())  # type: ignore[no-untyped-call]
        expected = (slot.stop - slot.start, *shapes[slot.parameter][1:])
        if shape != expected:
            misshaped.append(f"{name} {shape} instead of {expected}")
    seen = {source.name for source in found}
    missing = [name for name in wanted if name not in seen]
    problems = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    if any(problems.values()):
        told = "; ".join(f"{kind} weights: {_some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{files[0].parent}: {told}")
    return found


def _tensors(files: Sequence[Path]) -> Iterator[tuple[safe_open, str]]:
    for path in files:
        try:
            file = safe_open(path, framework="pt")
            names = file.keys()  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path}: not a readable safetensors file: {e}") from e
        yield from ((file, name) for name in names)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@torch.no_grad()
def fill_dummy(
    module: nn.Module, device: torch.device, dtype: torch.dtype, drawn_on: torch.device | None = None
) -> None:
    """Seeded random weights at true shape: matrices keep the scale of activations, norm weights 1, biases 0.

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
            rows.fill_(1.0 if name.endswith("weight") else 0.0)
