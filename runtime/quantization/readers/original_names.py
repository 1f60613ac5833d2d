"""Files with the names that a denoiser's authors gave its weights -> diffusers' names, as families declare them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sgl_diffusion.models.family import OriginalNames
from sgl_diffusion.runtime.quantization.stored import InFile, QuantizedCheckpoint, Rows, StoredLayer
from sgl_diffusion.runtime.quantization.weight import QuantizedWeight, side_by_side

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a block, the first in a name


@dataclass(frozen=True)
class Swapped:
    """A tensor in a file, its second half of rows first."""

    whole: InFile

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def mapped(self) -> Tensor:
        first, second = self.whole.mapped().chunk(2)
        return torch.cat([second, first])


def renamed(found: QuantizedCheckpoint, original: OriginalNames) -> QuantizedCheckpoint:
    """With diffusers' names and rows. Names that are not declared, diffusers' own among them, stay."""
    layers: dict[str, StoredLayer] = {}
    for name, layer in found.layers.items():
        shares = _shares(name, original) or {name: 1}
        for ours, start, stop in _runs(shares, layer.shapes().shape[0]):
            if ours in original.swapped and ours != name:
                layer = replace(layer, convert=partial(_swapped, layer.convert))
            layers[ours] = layer if len(shares) == 1 else replace(layer, rows=(start, stop))
    tensors: dict[str, InFile] = {}
    for name, tensor in found.tensors.items():
        layer_name, _, leaf = name.rpartition(".")
        of_layer = {f"{ours}.{leaf}": share for ours, share in _shares(layer_name, original).items()}
        shares = _shares(name, original) or of_layer or {name: 1}
        for ours, start, stop in _runs(shares, tensor.shape[0] if len(shares) > 1 else 1):
            if ours.rpartition(".")[0] in original.swapped and ours != name:
                tensors[ours] = Swapped(tensor)
            else:
                tensors[ours] = tensor if len(shares) == 1 else Rows(tensor, start, stop)
    return replace(found, layers=layers, tensors=tensors)


def _shares(name: str, original: OriginalNames) -> dict[str, int]:
    """Diffusers' names of a layer or a tensor, with their shares of its rows; none where it is not declared."""
    ours = original.names.get(NUMBER.sub("{}", name, count=1), {})
    number = found[0] if (found := NUMBER.search(name)) else ""
    return {n.format(number): share for n, share in ({ours: 1} if isinstance(ours, str) else ours).items()}


def _runs(shares: Mapping[str, int], rows: int) -> Iterator[tuple[str, int, int]]:
    """Names, each with its first row and the one after its last."""
    start, unit = 0, rows // sum(shares.values())
    for name, share in shares.items():
        yield name, start, start + share * unit
        start += share * unit


def _swapped(convert: Callable[..., QuantizedWeight], **tensors: Tensor) -> QuantizedWeight:
    weight = convert(**tensors)
    N = weight.shape[0]
    halves = side_by_side([weight.rows(N // 2, N), weight.rows(0, N // 2)])
    assert halves is not None, "halves of one weight are alike"
    return halves
