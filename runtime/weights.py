"""Checkpoint tensors -> parameters: memory-mapped, straight to the device and dtype, strict about names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.errors import UserError

SHOWN = 6  # names of each kind listed in an error
DUMMY_STD = 0.02


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


def packed_sources(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Packed parameter prefix -> prefixes of the checkpoint, in row order, from the modules' `packed` declarations."""
    sources = {}
    for path, part in module.named_modules():
        for target, names in getattr(part, "packed", {}).items():
            prefix = f"{path}." if path else ""
            sources[prefix + target] = tuple(prefix + n for n in names)
    return sources


def load_weights(module: nn.Module, files: Sequence[Path], device: torch.device, dtype: torch.dtype) -> None:
    """Fills a module built under the meta device. Host memory stays near one tensor: files are memory-mapped.

    Raises:
        UserError: a corrupt file, or missing, unexpected or mis-shaped weights, listing their names.
    """
    module.to(dtype).to_empty(device=device)
    sources = packed_sources(module)
    parameters = dict(module.named_parameters())
    skipped = tuple(getattr(module, "unused_weights", tuple)())
    filled: dict[str, list[str]] = {name: [] for name in parameters}  # parameter -> checkpoint names seen
    rows: dict[str, dict[str, Tensor]] = {}  # parts of packed parameters, until their order of rows is known
    unexpected, misshaped = [], []

    owner = {source: target for target, names in sources.items() for source in names}
    for name, read in _tensors(files):
        if name.startswith(skipped):
            continue
        prefix, _, leaf = name.rpartition(".")
        if prefix in owner and (parameter := f"{owner[prefix]}.{leaf}") in parameters:
            rows.setdefault(parameter, {})[prefix] = read()
            filled[parameter].append(name)
            if len(rows[parameter]) == len(sources[owner[prefix]]):
                parts = rows.pop(parameter)
                whole = [parts[s] for s in sources[owner[prefix]]]
                if not _copy_rows(parameters[parameter], whole):
                    misshaped.append(f"{owner[prefix]}.{leaf}")
        elif name in parameters:
            tensor = read()
            filled[name].append(name)
            if tensor.shape == parameters[name].shape:
                parameters[name].data.copy_(tensor)
            else:
                misshaped.append(f"{name} {tuple(tensor.shape)} instead of {tuple(parameters[name].shape)}")
        else:
            unexpected.append(name)

    missing = []
    for name, seen in filled.items():
        prefix, _, leaf = name.rpartition(".")
        wanted = [f"{s}.{leaf}" for s in sources[prefix]] if prefix in sources else [name]
        missing += [w for w in wanted if w not in seen]
    problems = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    if any(problems.values()):
        told = "; ".join(f"{kind} weights: {_some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{files[0].parent}: {told}")


def _copy_rows(parameter: Tensor, parts: Sequence[Tensor]) -> bool:
    if sum(len(p) for p in parts) != len(parameter) or any(p.shape[1:] != parameter.shape[1:] for p in parts):
        return False
    start = 0
    for part in parts:
        parameter.data[start : start + len(part)].copy_(part)
        start += len(part)
    return True


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
    """Seeded random weights at true shape: matrices N(0, 0.02), norm weights 1, biases 0."""
    if any(p.is_meta for p in module.parameters()):
        module.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.normal_(0, DUMMY_STD, generator=generator)
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
