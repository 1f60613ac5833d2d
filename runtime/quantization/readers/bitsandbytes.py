"""Checkpoints that diffusers and transformers save of bitsandbytes' layers: NF4 and FP4 (QLoRA: Dettmers et al. 2023,
arXiv 2305.14314), LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.kernels.grouped import GROUPS
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers.scaled import demand, matrix, tensors_of
from sgl_diffusion.runtime.quantization.stored import QuantizedCheckpoint, StoredLayer
from sgl_diffusion.runtime.quantization.weight import QuantizedWeight
from sgl_diffusion.runtime.reading import Stored

METHOD = "bitsandbytes"
STATE = ".weight.quant_state.bitsandbytes__"  # JSON in a tensor, by the layer's name before and "nf4" or "fp4" after it
# tensors of a layer, in four bits by the names of `from_four_bit`'s arguments
FOUR_BIT = {
    "weight": "packed",
    "weight.quant_map": "table",
    "weight.absmax": "largest",
    "weight.nested_quant_map": "nested_table",
    "weight.nested_absmax": "nested_largest",
}
INT8 = ("weight", "SCB", "weight_format")


def read(files: Sequence[Path], config: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """Layers in four bits, or in eight.

    Raises:
        UserError: a corrupt file, a layer with tensors missing, or with blocks that are not parts of its rows.
    """
    stored = tensors_of([path for path in files if path.suffix == ".safetensors"])
    types = {name.partition(STATE)[0]: name.partition(STATE)[2] for name in stored if STATE in name}
    int8 = [name.removesuffix(".SCB") for name in stored if name.endswith(".SCB")]
    if config.get("quant_method", METHOD) != METHOD or not (types or int8):
        return None
    layers = {name: _four_bit(name, type, stored) for name, type in types.items()}
    layers |= {name: _int8(name, stored) for name in int8}
    own = {f"{name}{STATE}{type}" for name, type in types.items()}
    own |= {f"{name}.{leaf}" for name in layers for leaf in (*FOUR_BIT, *INT8)}
    formats = sorted({type.upper() for type in types.values()})
    if int8:
        formats.append("int8, run without splitting off outliers of the activations")
    plain = {name: tensor for name, tensor in stored.items() if name not in own}
    return QuantizedCheckpoint(f"bitsandbytes ({', '.join(formats)})", layers, plain)


def _four_bit(name: str, type: str, stored: Mapping[str, Stored]) -> StoredLayer:
    described = stored[f"{name}{STATE}{type}"]
    state = json.loads(bytes(described.mapped().tolist()))
    shape, block = tuple(state["shape"]), state["blocksize"]
    if len(shape) != 2 or shape[1] % block or block not in GROUPS:
        raise UserError(
            f"{described.path}: {name}.weight has shape {shape} and blocks of {block}; expected blocks of "
            f"{', '.join(map(str, GROUPS))} that are parts of rows"
        )
    parts = {leaf: stored[f"{name}.{leaf}"] for leaf in FOUR_BIT if f"{name}.{leaf}" in stored}
    nested, blocks = "nested_offset" in state, math.prod(shape) // block
    demand(name, parts, "weight.quant_map", (torch.float32,), (16,))
    demand(name, parts, "weight.absmax", (torch.uint8 if nested else torch.float32,), (blocks,))
    if nested:
        demand(name, parts, "weight.nested_quant_map", (torch.float32,), (256,))
        demand(name, parts, "weight.nested_absmax", (torch.float32,), (-(-blocks // state["nested_blocksize"]),))
    offset, nested_block = state.get("nested_offset", 0.0), state.get("nested_blocksize", 0)
    return StoredLayer(
        {FOUR_BIT[leaf]: tensor for leaf, tensor in parts.items()},
        partial(from_four_bit, shape=shape, offset=offset, nested_block=nested_block),
    )


def from_four_bit(
    packed: Tensor,
    table: Tensor,
    largest: Tensor,
    nested_table: Tensor | None = None,
    nested_largest: Tensor | None = None,
    *,
    shape: tuple[int, int],
    offset: float,
    nested_block: int,
) -> QuantizedWeight:
    """Weights (N, K): in a byte of the file the even column has the upper four bits.

    Args:
        packed: any dtype (`bnb_4bit_quant_storage`) whose bytes are N * K / 2.
        table: the 16 numbers, of which the largest magnitude is 1.
        largest: magnitude in every block, fp32; or with double quantisation codes, uint8, of its part above `offset`.
        nested_table, nested_largest: 256 numbers, and the largest magnitude of every `nested_block` codes.
    """
    if nested_table is not None and nested_largest is not None:
        of_block = nested_largest.repeat_interleave(nested_block)[: len(largest)]
        largest = nested_table[largest.int()] * of_block + offset
    pairs = packed.flatten().view(torch.uint8).view(shape[0], -1)
    return QuantizedWeight("w4", pairs >> 4 | pairs << 4, largest.view(shape[0], -1), table=table)


def _int8(name: str, stored: Mapping[str, Stored]) -> StoredLayer:
    parts = {leaf: stored[f"{name}.{leaf}"] for leaf in INT8 if f"{name}.{leaf}" in stored}
    N, _ = matrix(name, parts, "weight", torch.int8)
    demand(name, parts, "SCB", (torch.float32,), (N,))
    order = parts.pop("weight_format", None)
    if order is not None and (found := int(order.mapped())) != 0:
        raise UserError(f"{order.path}: {name}.weight is in the order of format {found}; expected 0, row by row")
    return StoredLayer({"codes": parts["weight"], "largest": parts["SCB"]}, from_int8)


def from_int8(codes: Tensor, largest: Tensor) -> QuantizedWeight:
    """Of int8 (N, K) and the largest magnitude of every row, fp32 (N,)."""
    return QuantizedWeight("w8", codes, largest.view(-1, 1) / 127)
