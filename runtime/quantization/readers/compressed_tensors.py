"""compressed-tensors, the format of llm-compressor and vLLM.

    float-quantized        e4m3, one scale, one for each row, or one for 128 x 128
    int-quantized          int8, one scale or one for each row
    naive-quantized        either
    pack-quantized         4 or 8 bits in words of 32, scales and zero points of groups of columns
    nvfp4-pack-quantized   e2m1 with scales of 16 columns, all divided by weight_global_scale
    mxfp8-quantized        e4m3 with exponents of 32 columns
    mixed-precision        a group of layers as one of these

Layout: compressed-tensors 0.20, `compressors` and `quantization/quant_scheme.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers.scaled import (
    FLOATS,
    ONE,
    Parts,
    by_layer,
    codes_of_nvfp4,
    demand,
    demand_groups,
    eight_bit,
    fp8_blocks,
    matrix,
    mxfp8,
    tensors_of,
    told,
    weights_only,
    with_activations_as_they_are,
)
from sgl_diffusion.runtime.quantization.stored import QuantizedCheckpoint, StoredLayer
from sgl_diffusion.runtime.quantization.weight import BLOCK, QuantizedWeight

PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape",
    "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
FORMATS = (
    "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized", "mxfp8-quantized",
    "mixed-precision",
)  # fmt: skip


def read(files: Sequence[Path], config: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """
    Raises:
        UserError: a corrupt file, or a scheme that is not read.
    """
    if config.get("quant_method") != "compressed-tensors":
        return None
    config_groups = config.get("config_groups", {})
    _check(f"{files[0].parent}: quantization_config", config, config_groups)
    found, plain = by_layer(tensors_of(files), "weight_scale", PARTS)
    layers, notes = {}, set()
    for layer, parts in found.items():
        group = _group(f"{files[0].parent}: {layer}", layer, config_groups)
        layers[layer] = _layer(layer, parts, group["weights"], group.get("input_activations"))
        notes |= {note} if (note := _activations(parts, group)) else set()
    own = {group.get("format") or config["format"] for group in config_groups.values()}
    return QuantizedCheckpoint(f"compressed-tensors ({', '.join([*sorted(own), *sorted(notes)])})", layers, plain)


def _check(where: str, config: Mapping[str, Any], config_groups: Mapping[str, Any]) -> None:
    if (status := config.get("quantization_status", "compressed")) != "compressed":
        raise UserError(f"{where}: quantization_status={status}; expected compressed")
    for field in ("transform_config", "sparsity_config", "kv_cache_scheme"):
        if config.get(field):
            raise UserError(f"{where}: {field} is given; expected none")
    for name, group in config_groups.items():
        if not isinstance(group, Mapping) or not group.get("weights"):
            raise UserError(f"{where}: config_groups.{name} says nothing of weights; expected a scheme written out")
        if (format := group.get("format") or config.get("format")) not in FORMATS:
            raise UserError(f"{where}: format={format}; expected one of {', '.join(FORMATS)}")
        if group.get("output_activations"):
            raise UserError(f"{where}: config_groups.{name}.output_activations is given; expected none")
        if (group.get("input_activations") or {}).get("symmetric", True) is not True:
            raise UserError(f"{where}: config_groups.{name}.input_activations.symmetric=false; expected true")


def _group(where: str, layer: str, config_groups: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scheme of a layer: of its name, else of a pattern that it matches, else of its class."""
    ranked: list[tuple[int, Mapping[str, Any]]] = []
    for group in config_groups.values():
        for target in group.get("targets", ()):
            if target == layer:
                ranked.append((0, group))
            elif target.startswith("re:") and re.match(target[len("re:") :], layer):
                ranked.append((1, group))
            elif target == "Linear":
                ranked.append((2, group))
    if not ranked:
        raise UserError(f"{where} has codes, but no group of config_groups targets it")
    return min(ranked, key=lambda found: found[0])[1]


def _layer(layer: str, parts: Parts, weights: Mapping[str, Any], activations: Mapping[str, Any] | None) -> StoredLayer:
    if "weight_g_idx" in parts:
        raise UserError(f"{told(parts, layer)} has weight_g_idx: its columns are in another order; expected none")
    if "weight_global_scale" in parts:
        return _nvfp4(layer, parts)
    if "weight_packed" in parts:
        return _packed(layer, parts, weights)
    codes = {part: parts[part] for part in ("weight", "weight_scale", "input_scale") if part in parts}
    if parts["weight_scale"].dtype == torch.uint8:
        return mxfp8(layer, codes)
    if weights["strategy"] == "block" and weights["block_structure"] == [BLOCK, BLOCK]:
        stored = fp8_blocks(layer, codes)
        return stored if activations else with_activations_as_they_are(stored)
    if weights["strategy"] not in ("tensor", "channel") or not weights["symmetric"]:
        symmetric = "" if weights["symmetric"] else ", not symmetric"
        raise UserError(
            f"{told(parts, layer)}: scales of a {weights['strategy']}{symmetric};"
            f" expected of the tensor, a channel or a block of {BLOCK} x {BLOCK}, symmetric"
        )
    return (weights_only if activations is None else eight_bit)(layer, codes)


def _nvfp4(layer: str, parts: Parts) -> StoredLayer:
    N, byte_columns = matrix(layer, parts, "weight_packed", torch.uint8)
    demand(layer, parts, "weight_scale", (torch.float8_e4m3fn,), (N, byte_columns // 8))
    demand(layer, parts, "weight_global_scale", FLOATS, *ONE)
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    return StoredLayer({name: parts[name] for name in names}, _over_global_scale)


def _over_global_scale(weight_packed: Tensor, weight_scale: Tensor, weight_global_scale: Tensor) -> QuantizedWeight:
    return codes_of_nvfp4(weight_packed, weight_scale, 1 / weight_global_scale.float())


def _packed(layer: str, parts: Parts, weights: Mapping[str, Any]) -> StoredLayer:
    """`weight_packed` int32 (N, K * bits / 32), `weight_scale` (N, G); `weight_zero_point` packed along N."""
    N, words = matrix(layer, parts, "weight_packed", torch.int32)
    if (bits := weights["num_bits"]) not in (4, 8):
        raise UserError(f"{told(parts, layer)}: codes of {bits} bits; expected 4 or 8")
    K = words * 32 // bits
    demand(layer, parts, "weight_scale", FLOATS)
    if len(shape := parts["weight_scale"].shape) != 2 or shape[0] != N:
        raise UserError(f"{told(parts, layer)}: weight_scale is of shape {shape}; expected ({N}, groups of columns)")
    demand_groups(layer, parts, K, shape[1])
    named = {"packed": parts["weight_packed"], "scale": parts["weight_scale"]}
    if not weights["symmetric"]:
        demand(layer, parts, "weight_zero_point", (torch.int32,), (N * bits // 32, shape[1]))
        named["zero_point"] = parts["weight_zero_point"]
    return StoredLayer(named, _four_bits if bits == 4 else _eight_bits)


def _four_bits(packed: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> QuantizedWeight:
    codes = packed.view(torch.uint8)
    if zero_point is None:
        return QuantizedWeight("w4", codes, scale)
    two = zero_point.T.contiguous().view(torch.uint8)
    zero = torch.stack([two & 0xF, two >> 4], dim=2).flatten(1).T
    return QuantizedWeight("w4", codes, scale, offset=(-scale.float() * zero).contiguous())


def _eight_bits(packed: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> QuantizedWeight:
    """Stored as the code over -128, which is its two's complement with the highest bit flipped."""
    codes = (packed.view(torch.uint8) ^ 0x80).view(torch.int8)
    if zero_point is None:
        return QuantizedWeight("w8", codes, scale)
    zero = (zero_point.T.contiguous().view(torch.uint8) ^ 0x80).view(torch.int8).T
    return QuantizedWeight("w8", codes, scale, offset=(-scale.float() * zero).contiguous())


def _activations(parts: Parts, group: Mapping[str, Any]) -> str | None:
    """What is done another way than the scheme says."""
    activations, wide = group.get("input_activations"), "weight_packed" in parts and "weight_global_scale" not in parts
    if wide:
        return None if activations is None else "run with activations that are not quantised"
    if activations is None:
        return None
    if "input_global_scale" in parts or (activations["strategy"] == "tensor" and "input_scale" not in parts):
        return "activations with one scale for each row"
    return None
