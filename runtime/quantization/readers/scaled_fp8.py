"""ComfyUI's safetensors files: float8 with a scale for every layer, or formats that the file names layer by layer.

    no marker                   weights in e4m3 as they are: a scale of 1
    a tensor `scaled_fp8`       e4m3 with `scale_weight` and, where they were calibrated, `scale_input`
    tensors `comfy_quant`       JSON of a layer: its format, of float8_e4m3fn, int8_tensorwise, nvfp4 and mxfp8
    `_quantization_metadata`    the same of all layers, in the file's metadata

Scales of nvfp4 and mxfp8 are in cuBLAS' order, and the even column of nvfp4 is in the upper bits of a byte.
Names may stand below `model.diffusion_model.`; whatever else such a file holds, text encoders and autoencoders, is not
looked at. Layout: comfy-kitchen 0.2.40, and ComfyUI's QUANTIZATION.md.
"""

from __future__ import annotations

import json
import math
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
    codes_of_nvfp4,
    codes_of_rows,
    demand,
    eight_bit,
    matrix,
    metadata_of,
    tensors_of,
    with_activations_as_they_are,
)
from sgl_diffusion.runtime.quantization.stored import InFile, QuantizedCheckpoint, StoredLayer
from sgl_diffusion.runtime.quantization.weight import QuantizedWeight
from sgl_diffusion.runtime.reading import Stored

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
PARTS = {
    "weight": "weight", "weight_scale": "weight_scale", "scale_weight": "weight_scale", "input_scale": "input_scale",
    "scale_input": "input_scale", "weight_scale_2": "weight_scale_2",
}  # fmt: skip
FORMATS = ("float8_e4m3fn", "int8_tensorwise", "nvfp4", "mxfp8")
TILE_ROWS, TILE_COLUMNS = 128, 4  # of scales in cuBLAS' order


def read(files: Sequence[Path], config: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """Names are those of the files, without the prefix.

    Raises:
        UserError: a corrupt file, or a format that is not read.
    """
    if config or any(path.suffix != ".safetensors" for path in files):
        return None
    found = tensors_of(files)
    plain, prefix = _below(found)
    described = {layer.removeprefix(prefix): own for layer, own in _metadata(found).items()}
    for name in [name for name in plain if name.endswith(".comfy_quant")]:
        described[name.removesuffix(".comfy_quant")] = json.loads(bytes(plain.pop(name).mapped().tolist()))
    marker = plain.pop("scaled_fp8", None)
    for layer in (name.removesuffix(".scale_weight") for name in list(plain) if name.endswith(".scale_weight")):
        described[layer] = {"format": "float8_e4m3fn", "full_precision_matrix_mult": _of_two(marker)}
    unscaled = [
        name.removesuffix(".weight")
        for name, tensor in plain.items()
        if name.endswith(".weight") and tensor.dtype == torch.float8_e4m3fn and len(tensor.shape) == 2
    ]
    layers: dict[str, StoredLayer] = {}
    formats: set[str] = set()
    for layer in dict.fromkeys([*described, *unscaled]):
        own = described.get(layer, {"format": "float8_e4m3fn"})
        parts = {PARTS[leaf]: plain.pop(f"{layer}.{leaf}") for leaf in PARTS if f"{layer}.{leaf}" in plain}
        stored = _layer(files[0], layer, own, parts)
        # without scales, or by its own word, ComfyUI multiplies numbers
        alone = "weight_scale" not in parts or own.get("full_precision_matrix_mult")
        layers[layer] = with_activations_as_they_are(stored) if alone else stored
        formats.add(own["format"] + ("" if "weight_scale" in parts else " without scales"))
    if not layers:
        return None
    return QuantizedCheckpoint(f"ComfyUI ({', '.join(sorted(formats))})", layers, dict[str, InFile](plain))


def _below(tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], str]:
    """The denoiser's tensors, and what their names in the file begin with."""
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, prefix
    return dict(tensors), ""


def _metadata(tensors: Mapping[str, Stored]) -> dict[str, dict[str, Any]]:
    """What the metadata of the files says of their layers."""
    found: dict[str, dict[str, Any]] = {}
    for metadata in metadata_of(tensors):
        found |= json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
    return found


def _of_two(marker: Stored | None) -> bool:
    """ComfyUI's sign, in a tensor that says nothing else, that activations are to stay as they are."""
    return marker is not None and marker.shape == (2,)


def _layer(path: Path, layer: str, own: Mapping[str, Any], parts: Parts) -> StoredLayer:
    if (format := own.get("format")) not in FORMATS:
        raise UserError(f"{path}: {layer} is of format {format}; expected one of {', '.join(FORMATS)}")
    if own.get("convrot") or own.get("params", {}).get("convrot"):
        raise UserError(f"{path}: {layer} is of {format} with convrot: its columns are rotated; expected none")
    if "weight" not in parts:
        raise UserError(f"{path}: {layer} is of format {format}, but has no weight")
    if format == "nvfp4":
        return _nvfp4(layer, parts)
    if format == "mxfp8":
        return _mxfp8(layer, parts)
    # ComfyUI writes a scale of 1 where there was no calibration, and takes it for none
    if (calibrated := parts.get("input_scale")) is not None and calibrated.mapped().item() == 1:
        parts = {part: tensor for part, tensor in parts.items() if part != "input_scale"}
    if format == "float8_e4m3fn" and parts["weight"].dtype == torch.uint8:
        matrix(layer, parts, "weight", torch.uint8)
        demand(layer, parts, "weight_scale", FLOATS, *ONE)
        return StoredLayer(parts, _bytes_of_float8)
    if "weight_scale" not in parts:
        matrix(layer, parts, "weight", torch.float8_e4m3fn)
        return StoredLayer(parts, _without_scale)
    return eight_bit(layer, parts)


def _bytes_of_float8(weight: Tensor, **scales: Tensor) -> QuantizedWeight:
    return codes_of_rows(weight.view(torch.float8_e4m3fn), **scales)


def _without_scale(weight: Tensor, input_scale: Tensor | None = None) -> QuantizedWeight:
    return codes_of_rows(weight, torch.ones((), device=weight.device), input_scale)


# -- scales in the order of cuBLAS -------------------------------------------------------


def _nvfp4(layer: str, parts: Parts) -> StoredLayer:
    N, byte_columns = matrix(layer, parts, "weight", torch.uint8)
    demand(layer, parts, "weight_scale", (torch.float8_e4m3fn, torch.uint8), _tiled(N, byte_columns // 8))
    demand(layer, parts, "weight_scale_2", FLOATS, *ONE)
    return StoredLayer({part: parts[part] for part in ("weight", "weight_scale", "weight_scale_2")}, _nvfp4_in_rows)


def _nvfp4_in_rows(weight: Tensor, weight_scale: Tensor, weight_scale_2: Tensor) -> QuantizedWeight:
    N, byte_columns = weight.shape
    scale = in_rows(weight_scale, N, byte_columns // 8).view(torch.float8_e4m3fn)
    return codes_of_nvfp4(weight << 4 | weight >> 4, scale, weight_scale_2)


def _mxfp8(layer: str, parts: Parts) -> StoredLayer:
    N, K = matrix(layer, parts, "weight", torch.float8_e4m3fn)
    demand(layer, parts, "weight_scale", (torch.uint8, torch.float8_e8m0fnu), _tiled(N, K // 32))
    return StoredLayer({part: parts[part] for part in ("weight", "weight_scale")}, _mxfp8_in_rows)


def _mxfp8_in_rows(weight: Tensor, weight_scale: Tensor) -> QuantizedWeight:
    N, K = weight.shape
    return QuantizedWeight("mxfp8", weight, in_rows(weight_scale, N, K // 32))


def _tiled(rows: int, columns: int) -> tuple[int, int]:
    """The shape of so many scales in whole tiles."""
    return math.ceil(rows / TILE_ROWS) * TILE_ROWS, math.ceil(columns / TILE_COLUMNS) * TILE_COLUMNS


def in_rows(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """Scales as uint8 (rows, columns), of those in cuBLAS' order, whose tiles lie one after the other, row of tiles by
    row of tiles; row r of a tile stands at (r % 32, r // 32) of 32 x 4 runs of four.

    Source: "1D Block Scaling Factors Layout", cuBLAS 12.9 documentation.
    """
    down, across = tiled.shape[0] // TILE_ROWS, tiled.shape[1] // TILE_COLUMNS
    tiles = tiled.view(torch.uint8).view(down, across, 32, TILE_ROWS // 32, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(tiled.shape)[:rows, :columns].contiguous()
