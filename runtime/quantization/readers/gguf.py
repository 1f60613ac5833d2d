"""GGUF files, as `ComfyUI-GGUF` and llama.cpp's tools write them: every tensor in a type of its own.

Headers are read by the `gguf` package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers.gguf_blocks import BLOCKS, decode
from sgl_diffusion.runtime.quantization.stored import InFile, QuantizedCheckpoint, StoredLayer

MAGIC = b"GGUF"
PREFIX = "model.diffusion_model."  # of names, in files that were made of whole checkpoints
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Mapped:
    """A tensor of a GGUF file: its numbers, or of quantised ones rows of bytes."""

    file: Tensor  # its bytes
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def mapped(self) -> Tensor:
        size = math.prod(self.shape) * self.dtype.itemsize
        return self.file[self.start : self.start + size].view(self.dtype).view(self.shape)


def read(files: Sequence[Path], config: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """Names are those of the files, without the prefix.

    Raises:
        UserError: a corrupt file, the `gguf` package is not installed, or a type that cannot be decoded.
    """
    if not all(_is_gguf(path) for path in files):
        return None
    layers: dict[str, StoredLayer] = {}
    tensors: dict[str, InFile] = {}
    types: set[str] = set()
    for path in files:
        for name, type, tensor in _tensors(path):
            if type in PLAIN:
                tensors[name] = tensor
                continue
            if type not in BLOCKS:
                raise UserError(f"{path}: {name} is of type {type}; expected one of {', '.join([*PLAIN, *BLOCKS])}")
            layer = name.removesuffix(".weight")
            if layer == name or len(tensor.shape) != 2:
                raise UserError(f"{path}: {name} is of type {type}; only weights of linear layers may be quantised")
            layers[layer] = StoredLayer({"rows": tensor}, partial(decode, type=type))
            types.add(type)
    return QuantizedCheckpoint(f"GGUF ({', '.join(sorted(types)) or 'not quantised'})", layers, tensors)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _tensors(path: Path) -> list[tuple[str, str, Mapped]]:
    """Name, type and tensor, in the order of the file."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as e:
        raise UserError(f"{path} needs gguf: pip install 'sgl-diffusion[gguf]'") from e
    try:
        header = GGUFReader(path)
    except (ValueError, KeyError, IndexError) as e:
        raise UserError(f"{path}: not a readable GGUF file: {str(e).splitlines()[0]}") from e
    if header.byte_order != "I":
        raise UserError(f"{path}: its numbers have their bytes in the other order; this machine's was expected")
    file = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    found = []
    for tensor in header.tensors:
        type = tensor.tensor_type.name
        # the package's shapes of quantised tensors and of BF16 are in bytes
        shape = tuple(reversed(tensor.shape.tolist())) if type in PLAIN else tensor.data.shape
        # tensors of five dimensions, which the format does not have, are stored flat by ComfyUI-GGUF
        if (original := header.get_field(f"comfy.gguf.orig_shape.{tensor.name}")) is not None:
            shape = tuple(original.contents())
        dtype = PLAIN.get(type, torch.uint8)
        found.append((tensor.name.removeprefix(PREFIX), type, Mapped(file, tensor.data_offset, dtype, shape)))
    return found
