"""torchao's tensors in safetensors files, as diffusers writes them: every weight a class of tensor, whose tensors have
names of their own in the file, and whose other attributes are in the file's metadata.

    Float8Tensor               e4m3, scales of rows, of the whole, or of blocks
    Int8Tensor                 int8, likewise, or of groups of columns
    IntxUnpackedToInt8Tensor   1 to 8 bits in int8, scales and zero points of groups of columns
    Int4Tensor                 two of 4 bits in a byte, scales and offsets of groups of columns, transposed

Layout: torchao 0.18, `prototype/safetensors` and `quantization/quantize_/workflows`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers.scaled import (
    FLOATS,
    Parts,
    demand,
    demand_groups,
    eight_bit,
    fp8_blocks,
    matrix,
    metadata_of,
    tensors_of,
    told,
    weights_only,
    with_activations_as_they_are,
)
from sgl_diffusion.runtime.quantization.stored import InFile, QuantizedCheckpoint, StoredLayer
from sgl_diffusion.runtime.quantization.weight import BLOCK, QuantizedWeight
from sgl_diffusion.runtime.reading import Stored

TENSORS = ("qdata", "scale", "zero_point", "act_quant_scale")
FEWER_THAN_EIGHT_BITS = tuple(f"int{bits}" for bits in range(1, 8))


def read(files: Sequence[Path], config: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """
    Raises:
        UserError: a pickle, a corrupt file, or a tensor that is not read.
    """
    named = config.get("quant_method") == "torchao"
    if pickles := [path for path in files if path.suffix != ".safetensors"]:
        if not named:
            return None
        raise UserError(
            f"{pickles[0]}: a pickle, which can run code as it is loaded; save the model with safe_serialization=True"
            " (torchao from 0.16 on)"
        )
    attributes = _attributes(tensors := tensors_of(files))
    if not attributes:
        if named:
            raise UserError(
                f"{files[0]}: torchao weights, but its metadata has no tensor_names; torchao wrote it before 0.16"
            )
        return None
    plain: dict[str, InFile] = dict(tensors)
    layers: dict[str, StoredLayer] = {}
    formats: set[str] = set()
    for name, told_of in attributes.items():
        if told_of["_type"] == "Tensor":
            continue
        layer, _, leaf = name.rpartition(".")
        stored = {f"{layer}._{leaf}_{part}": part for part in told_of["_tensor_data_names"]}
        if missing := stored.keys() - tensors.keys():
            raise UserError(f"{files[0].parent}: weight {min(missing)} is missing")
        for whole in stored:
            del plain[whole]
        parts = {part: tensors[whole] for whole, part in stored.items()}
        if unknown := parts.keys() - set(TENSORS):
            raise UserError(
                f"{told(parts, layer)}: {told_of['_type']} with {min(unknown)}; expected {', '.join(TENSORS)}"
            )
        if leaf != "weight" or told_of["_type"] not in READ:
            raise UserError(
                f"{told(parts, layer)}: its {leaf} is of {told_of['_type']}; expected a weight of {', '.join(READ)}"
            )
        layers[layer], format = READ[told_of["_type"]](layer, parts, told_of["_data"])
        formats.add(format)
    return QuantizedCheckpoint(f"torchao ({'; '.join(sorted(formats)) or 'not quantised'})", layers, plain)


def _attributes(tensors: Mapping[str, Stored]) -> dict[str, dict[str, Any]]:
    """Class and attributes of every weight, by its name. Every shard tells of all of them."""
    found: dict[str, dict[str, Any]] = {}
    for metadata in metadata_of(tensors):
        for name in json.loads(metadata.get("tensor_names", "[]")):
            found[name] = json.loads(metadata[name])
    return found


def _float8(layer: str, parts: Parts, data: Mapping[str, Any]) -> tuple[StoredLayer, str]:
    N, K = matrix(layer, parts, "qdata", torch.float8_e4m3fn)
    named = {"weight": parts["qdata"], "weight_scale": parts["scale"]}
    of_blocks = data["block_size"] == [BLOCK, BLOCK]
    if not of_blocks and data["block_size"] not in ([1, K], [N, K]):
        raise UserError(
            f"{told(parts, layer)}: scales of {data['block_size']};"
            f" expected of rows, of the tensor or of {BLOCK} x {BLOCK}"
        )
    stored = (fp8_blocks if of_blocks else eight_bit)(layer, named)
    if data["act_quant_kwargs"] is None:
        return with_activations_as_they_are(stored), "float8 weights only"
    return stored, f"float8 {_activations(data, parts)}"


def _int8(layer: str, parts: Parts, data: Mapping[str, Any]) -> tuple[StoredLayer, str]:
    """Its zero points are all zero: both of torchao's configurations are symmetric."""
    N, K = matrix(layer, parts, "qdata", torch.int8)
    if data["act_quant_kwargs"] is None and data["block_size"][0] == 1:
        demand(layer, parts, "scale", FLOATS, (N, K // data["block_size"][1]))
        demand_groups(layer, parts, K, parts["scale"].shape[1])
        named = {"codes": parts["qdata"], "scale": parts["scale"]}
        return StoredLayer(named, lambda codes, scale: QuantizedWeight("w8", codes, scale)), "int8 weights only"
    named = {"weight": parts["qdata"], "weight_scale": parts["scale"]}
    if data["act_quant_kwargs"] is None:
        return weights_only(layer, named), "int8 weights only"
    if (mapping := data["act_quant_kwargs"]["_data"]["mapping_type"]["_data"]) != "SYMMETRIC":
        raise UserError(f"{told(parts, layer)}: {mapping} activations; expected SYMMETRIC")
    if "act_quant_scale" in parts:
        named["input_scale"] = parts["act_quant_scale"]
    return eight_bit(layer, named), f"int8 {_activations(data, parts)}"


def _fewer_bits(layer: str, parts: Parts, data: Mapping[str, Any]) -> tuple[StoredLayer, str]:
    N, K = matrix(layer, parts, "qdata", torch.int8)
    if (dtype := data["target_dtype"]["_data"]) not in FEWER_THAN_EIGHT_BITS:
        raise UserError(f"{told(parts, layer)}: IntxUnpackedToInt8Tensor of {dtype}; expected int1 to int7")
    if data["activation_quantization"] is not None:
        raise UserError(f"{told(parts, layer)}: activations {data['activation_quantization']}; expected none quantised")
    demand(layer, parts, "scale", FLOATS, (N, K // data["block_size"][1]))
    demand(layer, parts, "zero_point", (torch.int8,), parts["scale"].shape)
    demand_groups(layer, parts, K, parts["scale"].shape[1])
    return StoredLayer(parts, _around_zero), f"{dtype} weights only, in int8"


def _around_zero(qdata: Tensor, scale: Tensor, zero_point: Tensor) -> QuantizedWeight:
    """Codes of fewer than 8 bits, less their zero points, fit in int8."""
    columns = qdata.shape[1] // scale.shape[1]
    return QuantizedWeight("w8", qdata - zero_point.repeat_interleave(columns, 1), scale)


def _int4(layer: str, parts: Parts, data: Mapping[str, Any]) -> tuple[StoredLayer, str]:
    N, byte_columns = matrix(layer, parts, "qdata", torch.int8)
    K = 2 * byte_columns
    demand(layer, parts, "scale", FLOATS, (K // data["block_size"][1], N))
    demand(layer, parts, "zero_point", FLOATS, parts["scale"].shape)
    demand_groups(layer, parts, K, parts["scale"].shape[0])
    activations = data["activation_dtype"]["_data"]
    wide = "" if activations == "bfloat16" else f", run without {activations} activations"
    return StoredLayer(parts, _in_unsigned_codes), f"int4 weights only{wide}"


def _in_unsigned_codes(qdata: Tensor, scale: Tensor, zero_point: Tensor) -> QuantizedWeight:
    """Of two's complements, which stand for scale * code + zero_point: the zero point is a float."""
    offset = zero_point.float() - 8 * scale.float()
    return QuantizedWeight("w4", qdata.view(torch.uint8) ^ 0x88, scale.T.contiguous(), offset.T.contiguous())


def _activations(data: Mapping[str, Any], parts: Parts) -> str:
    """Of a layer whose codes are multiplied by codes: as torchao has them, and as they are here where that differs."""
    if "act_quant_scale" in parts:
        return "with calibrated activations"
    if data["act_quant_kwargs"]["_data"]["granularity"]["_type"] == "PerTensor":
        return "with activations of one scale, run with one for each row"
    return "with 8-bit activations"


READ = {"Float8Tensor": _float8, "Int8Tensor": _int8, "IntxUnpackedToInt8Tensor": _fewer_bits, "Int4Tensor": _int4}
