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


def load_weights(module: nn.Module, files: Sequence[Path], device: torch.device, dtype: torch.dtype) -> None:
    """Fills a module built under the meta device. Host memory stays near one tensor: files are memory-mapped.

    Raises:
        UserError: a corrupt file, or missing, unexpected or mis-shaped weights, listing their names.
    """
    module.to(dtype).to_empty(device=device)
    parameters, wanted = dict(module.named_parameters()), slots(module)
    skipped = tuple(getattr(module, "unused_weights", tuple)())
    unexpected, misshaped, seen = [], [], set()
    for name, read in _tensors(files):
        if name.startswith(skipped):
            continue
        if (slot := wanted.get(name)) is None:
            unexpected.append(name)
            continue
        seen.add(name)
        rows = parameters[slot.parameter].data[slot.start : slot.stop]
        tensor = read()
        if tensor.shape == rows.shape:
            rows.copy_(tensor)
        else:
            misshaped.append(f"{name} {tuple(tensor.shape)} instead of {tuple(rows.shape)}")
    missing = [name for name in wanted if name not in seen]
    problems = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    if any(problems.values()):
        told = "; ".join(f"{kind} weights: {_some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{files[0].parent}: {told}")


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Reader]]:
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
                    yield name, Reader(tensors, name)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: not a readable safetensors file: {e}") from e


@dataclass(frozen=True)
class Reader:
    """Reads one tensor of an open file when called."""

    file: safe_open
    name: str

    def __call__(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.name)  # type: ignore[no-untyped-call]
        return tensor


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@torch.no_grad()
def fill_dummy(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Seeded random weights at true shape: matrices keep the scale of activations, norm weights 1, biases 0.

    A tensor depends on its name in the checkpoint alone, so that diffusers' module of a component gets the same ones.
    """
    if any(p.is_meta for p in module.parameters()):
        module.to(dtype).to_empty(device=device)
    parameters = dict(module.named_parameters())
    for name, slot in slots(module).items():
        rows = parameters[slot.parameter].data[slot.start : slot.stop]
        if rows.ndim > 1:
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            rows.normal_(0, rows[0].numel() ** -0.5, generator=generator)
        else:
            rows.fill_(1.0 if name.endswith("weight") else 0.0)
