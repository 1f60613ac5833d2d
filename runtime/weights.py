"""Checkpoint tensors -> parameters: straight into the packed parameter, its device and dtype; strict about names and
shapes. How the bytes are read is `runtime.reading`'s."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.reading import Loader, LoadTimes, Run, Stored, stored_tensors

if TYPE_CHECKING:
    from sgl_diffusion.runtime.offload import DeviceStreams
    from sgl_diffusion.runtime.quantization.component import Online

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
class Share:
    """What a rank has of a layer whose weights ranks share; the layer's attribute `share`.

    Attributes:
        dim: 0 for some rows of the weight and of the bias, 1 for some columns of the weight and all of the bias.
        parts: shares of the whole dimension, which lie side by side; a rank has an equal run of each.
    """

    dim: int
    parts: tuple[int, ...]
    rank: int
    ranks: int

    def runs(self, whole: int) -> list[slice]:
        """Of a dimension of so many."""
        runs, start, unit = [], 0, whole // sum(self.parts)
        for part in self.parts:
            own = part * unit // self.ranks
            runs.append(slice(start + self.rank * own, start + (self.rank + 1) * own))
            start += part * unit
        return runs

    def of(self, whole: Tensor) -> Tensor:
        """A copy of the rank's own."""
        if self.dim >= whole.ndim:
            return whole.clone()
        own = _joined(whole, self.dim, self.runs(whole.shape[self.dim]))
        return own.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint tensor goes: rows `start` to `stop` of a parameter.

    Attributes:
        shape: of the checkpoint tensor.
        dim, runs: what of it goes there, one after the other, where ranks share it.
    """

    parameter: str
    start: int
    stop: int
    shape: tuple[int, ...]
    dim: int = 0
    runs: tuple[slice, ...] | None = None

    def cut(self, whole: Tensor) -> Tensor:
        """What goes into the rows, of the checkpoint tensor: a view of it, where it is one run."""
        return whole if self.runs is None else _joined(whole, self.dim, self.runs)


def _joined(whole: Tensor, dim: int, runs: Sequence[slice]) -> Tensor:
    cut = [whole.narrow(dim, run.start, run.stop - run.start) for run in runs]
    return cut[0] if len(cut) == 1 else torch.cat(cut, dim)


def slots(module: nn.Module) -> dict[str, Slot]:
    """Checkpoint name -> slot, for every tensor the module needs.

    A parameter has its own name in the checkpoint unless a module declares it as packed:
    `packed = {"to_qkv": {"to_q": 1, "to_k": 1, "to_v": 1}}` gives the checkpoint's names, in row order, and their
    shares of the rows. Where ranks share a layer, the checkpoint has all of it.
    """
    parts: dict[str, dict[str, int]] = {}
    shares: dict[str, Share] = {}
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        for target, rows in getattr(owner, "packed", {}).items():
            parts[prefix + target] = {prefix + name: share for name, share in rows.items()}
        if (share := getattr(owner, "share", None)) is not None:
            shares[path] = share
    found: dict[str, Slot] = {}
    for name, p in module.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        share, rows = shares.get(prefix), parts.get(prefix, {prefix: 1})
        found |= {f"{source}.{leaf}".removeprefix("."): slot for source, slot in _slots_of(name, p, rows, share)}
    return found


def _slots_of(name: str, p: Tensor, rows: dict[str, int], share: Share | None) -> Iterator[tuple[str, Slot]]:
    """Those of one parameter, by what it is packed of."""
    whole = list(p.shape)
    if share is not None and share.dim < p.ndim:
        whole[share.dim] *= share.ranks
    unit, first, start = whole[0] // sum(rows.values()), 0, 0
    for source, part in rows.items():
        n = part * unit
        shape, stop = (n, *whole[1:]), start + n
        slot = Slot(name, start, stop, shape)
        if share is not None and share.dim < p.ndim:
            runs = share.runs(whole[share.dim])
            if share.dim == 0:  # those in the rows of this source, counted from its first
                runs = [slice(max(r.start - first, 0), min(r.stop - first, n)) for r in runs]
                runs = [r for r in runs if r.start < r.stop]
                stop = start + sum(r.stop - r.start for r in runs)
            slot = replace(slot, stop=stop, dim=share.dim, runs=tuple(runs))
        yield source, slot
        first, start = first + n, stop


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor and its place in the module. Nothing is read until `read` is called."""

    stored: Stored
    slot: Slot

    def read(self) -> Tensor:
        """What goes into the slot: a view of the mapped file, or of some of its runs one copy."""
        return self.slot.cut(self.stored.mapped())

    def runs(self, parameter: Tensor) -> Iterator[tuple[Run, Tensor]]:
        """What is to be read, and where in the parameter it goes."""
        slot, start = self.slot, 0
        rows = parameter[slot.start : slot.stop]
        if slot.runs is None:
            yield Run(self.stored), rows
            return
        for run in slot.runs:
            n = run.stop - run.start
            yield Run(self.stored, slot.dim, run.start), rows.narrow(slot.dim, start, n)
            start += n


def load_weights(
    module: nn.Module,
    files: Sequence[Path],
    device: torch.device,
    dtype: torch.dtype,
    streams: DeviceStreams | None = None,
    quantization: Online | None = None,
) -> LoadTimes:
    """Fills a module built under the meta device. Host memory beyond the parameters stays within `reading`'s buffers.

    Args:
        streams: of the device, for uploads that overlap with reading.
        quantization: of some layers, whose weights are there in full one by one.
    Raises:
        UserError: a corrupt file, or missing, unexpected or mis-shaped weights, listing their names.
    """
    found: dict[str, list[Source]] = {}
    for source in find_weights(module, files):
        found.setdefault(source.slot.parameter, []).append(source)
    module.to(dtype)
    with Loader(streams) as loader:

        def load(parameters: Mapping[str, Tensor]) -> None:
            loader.load([run for name, p in parameters.items() for s in found[name] for run in s.runs(p)])

        _fill(module, device, load, quantization)
    return loader.times


def _fill(
    module: nn.Module,
    device: torch.device,
    fill: Callable[[Mapping[str, Tensor]], None],
    quantization: Online | None,
) -> None:
    """Gives a module memory on the device and has its parameters filled, by name: those of layers to quantise one by
    one, which are codes when the next one comes; then all others.
    """
    wanted = [name for name, _ in module.named_parameters()]
    for path in quantization.select(module).layers if quantization else ():
        layer = module.get_submodule(path)
        weight = torch.empty_like(layer.get_parameter("weight"), device=device)
        fill({f"{path}.weight": weight})
        layer.weight = nn.Parameter(weight, requires_grad=False)
        quantization.quantize(module, path)  # type: ignore[union-attr]
    give_memory(module, device)
    parameters = dict(module.named_parameters())
    fill({name: parameters[name].data for name in wanted if name in parameters})


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Memory on the device for tensors that are shapes alone ("meta"); others are moved there."""

    def apply(t: Tensor) -> Tensor:
        return torch.empty_like(t, device=device) if t.is_meta else t.to(device)

    module._apply(apply)  # type: ignore[no-untyped-call]


def find_weights(module: nn.Module, files: Sequence[Path]) -> list[Source]:
    """A source for every slot of the module, in the order of the files' bytes.

    Raises:
        UserError: a corrupt file, or missing, unexpected, repeated or mis-shaped weights, listing their names.
    """
    wanted = slots(module)
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
        if stored.shape != slot.shape:
            misshaped.append(f"{name} {stored.shape} instead of {slot.shape}")
    missing = [name for name in wanted if name not in found]
    problems = {"missing": missing, "unexpected": unexpected, "repeated": repeated, "mis-shaped": misshaped}
    if any(problems.values()):
        raise UserError(f"{files[0].parent}: {told(problems)}")
    return [*found.values()]


def told(problems: Mapping[str, Sequence[str]]) -> str:
    """Names by what is wrong with them, for an error."""
    return "; ".join(f"{kind} weights: {some(names)}" for kind, names in problems.items() if names)


def some(names: Sequence[str]) -> str:
    """The first names of a list, for an error."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@torch.no_grad()
def fill_dummy(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    drawn_on: torch.device | None = None,
    quantization: Online | None = None,
) -> None:
    """Seeded random weights at true shape: matrices keep the scale of activations, norm weights and variances are 1,
    biases and means 0.

    A tensor depends on its name in the checkpoint alone, so that diffusers' module of a component gets the same ones,
    and on the kind of device it is drawn on: `drawn_on`, where that is not the one the weights stay on. Of a layer that
    ranks share, all of it is drawn. Layers may be quantised, as in `load_weights`.
    """
    wanted: dict[str, list[tuple[str, Slot]]] = {}
    for name, slot in slots(module).items():
        wanted.setdefault(slot.parameter, []).append((name, slot))

    def draw(parameters: Mapping[str, Tensor]) -> None:
        for parameter, p in parameters.items():
            for name, slot in wanted[parameter]:
                rows = p[slot.start : slot.stop]
                if drawn_on in (None, device) and slot.runs is None:
                    draw_dummy(name, rows)
                else:
                    whole = torch.empty(slot.shape, dtype=rows.dtype, device=drawn_on or device)
                    rows.copy_(slot.cut(draw_dummy(name, whole)))

    if any(p.is_meta for p in module.parameters()):
        module.to(dtype)
        _fill(module, device, draw, quantization)
    else:
        draw({name: p.data for name, p in module.named_parameters()})
    for name, statistic in module.named_buffers():  # of diffusers' batch norms; ours hold theirs as parameters
        if name.endswith(("running_mean", "running_var")):
            statistic.fill_(1.0 if name.endswith(ONES) else 0.0)


def draw_dummy(name: str, whole: Tensor) -> Tensor:
    """Fills all of a checkpoint tensor, as `fill_dummy`, and returns it."""
    if whole.ndim == 1:
        return whole.fill_(1.0 if name.endswith(ONES) else 0.0)
    generator = torch.Generator(whole.device).manual_seed(zlib.crc32(name.encode()))
    return whole.normal_(0, whole[0].numel() ** -0.5, generator=generator)
