"""What formats of safetensors files have in common: codes of linear layers with their scales beside them.

Readers find the tensors of a layer and say what they are; shapes are checked here, from headers, and codes converted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sgl_diffusion.kernels.grouped import GROUPS
from sgl_diffusion.kernels.microscaling import BLOCK as COLUMNS
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.stored import InFile, StoredLayer
from sgl_diffusion.runtime.quantization.weight import BLOCK, Kind, QuantizedWeight
from sgl_diffusion.runtime.reading import Stored, stored_tensors

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ONE: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))  # shapes of one number

# N rows (outputs)  K columns (inputs)

Parts = Mapping[str, Stored]
"""The tensors of a layer, by what comes after its name and a dot, in the file or as the readers call it."""


def tensors_of(files: Sequence[Path]) -> dict[str, Stored]:
    """The tensors of all files by name, from headers alone.

    Raises:
        UserError: a corrupt file, or a tensor that two files have.
    """
    found: dict[str, Stored] = {}
    for stored in (stored for path in files for stored in stored_tensors(path)):
        if (other := found.setdefault(stored.name, stored)) is not stored:
            raise UserError(f"{stored.path}: {stored.name} is in {other.path.name} as well")
    return found


def metadata_of(tensors: Mapping[str, Stored]) -> list[dict[str, str]]:
    """What the files of these tensors say of themselves."""
    files = {stored.path: stored.file for stored in tensors.values()}
    return [file.metadata() or {} for file in files.values()]  # type: ignore[no-untyped-call]


def by_layer(
    tensors: Mapping[str, Stored], marker: str, parts: Sequence[str]
) -> tuple[dict[str, dict[str, Stored]], dict[str, InFile]]:
    """Layers that have a tensor named `marker`, each with those of `parts` that are there; and all other tensors."""
    plain: dict[str, InFile] = dict(tensors)
    layers: dict[str, dict[str, Stored]] = {}
    for name in tensors:
        layer, _, leaf = name.rpartition(".")
        if leaf == marker:
            layers[layer] = {part: tensors[f"{layer}.{part}"] for part in parts if f"{layer}.{part}" in tensors}
            for part in layers[layer]:
                del plain[f"{layer}.{part}"]
    return layers, plain


def told(parts: Parts, layer: str) -> str:
    """Where a layer is, for an error."""
    return f"{next(iter(parts.values())).path}: {layer}"


def demand(layer: str, parts: Parts, part: str, dtypes: Sequence[torch.dtype], *shapes: tuple[int, ...]) -> None:
    """That a layer has a tensor of one of these dtypes and, where they are given, shapes.

    Raises:
        UserError: it has not.
    """
    if (stored := parts.get(part)) is None:
        raise UserError(f"{told(parts, layer)} has no {part}")
    if stored.dtype not in dtypes or (shapes and stored.shape not in shapes):
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        allowed += " of shape " + " or ".join(map(str, shapes)) if shapes else ""
        raise UserError(
            f"{told(parts, layer)}: {part} is {str(stored.dtype).removeprefix('torch.')} of shape {stored.shape};"
            f" expected {allowed}"
        )


def matrix(layer: str, parts: Parts, part: str, *dtypes: torch.dtype) -> tuple[int, int]:
    """The shape of a layer's codes.

    Raises:
        UserError: there are none, they are of another dtype, or not of a linear layer.
    """
    demand(layer, parts, part, dtypes)
    if len(shape := parts[part].shape) != 2:
        raise UserError(
            f"{told(parts, layer)}: {part} has {len(shape)} dimensions; only linear layers may be quantised"
        )
    return shape[0], shape[1]


# -- codes that are multiplied by codes of activations ---------------------------------


def eight_bit(layer: str, parts: Parts) -> StoredLayer:
    """`weight` (N, K) in e4m3 or int8, `weight_scale` of all of it or of every row, and `input_scale` if there is one.

    Raises:
        UserError: other dtypes or shapes.
    """
    N, _ = matrix(layer, parts, "weight", torch.float8_e4m3fn, torch.int8)
    demand(layer, parts, "weight_scale", FLOATS, *ONE, (N,), (N, 1))
    if "input_scale" in parts:
        demand(layer, parts, "input_scale", FLOATS, *ONE)
    named = ("weight", "weight_scale", "input_scale")
    return StoredLayer({part: parts[part] for part in named if part in parts}, codes_of_rows)


def codes_of_rows(weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None = None) -> QuantizedWeight:
    calibrated = None if input_scale is None else input_scale.float().reshape(1)
    kind: Kind = "int8" if weight.dtype == torch.int8 else "fp8"
    return QuantizedWeight(kind, weight, of_rows(weight_scale, len(weight)), input_scale=calibrated)


def of_rows(scale: Tensor, N: int) -> Tensor:
    """fp32 (N,), of one for all rows or of one for each."""
    return scale.float().reshape(-1).expand(N).contiguous()


def fp8_blocks(layer: str, parts: Parts) -> StoredLayer:
    """`weight` (N, K) in e4m3 and `weight_scale` of every 128 x 128 of it; blocks at the edges are smaller.

    Raises:
        UserError: other dtypes or shapes, or calibrated activations.
    """
    if "input_scale" in parts:
        raise UserError(f"{told(parts, layer)}: calibrated activations beside scales of blocks; expected dynamic ones")
    N, K = matrix(layer, parts, "weight", torch.float8_e4m3fn)
    demand(layer, parts, "weight_scale", FLOATS, (math.ceil(N / BLOCK), math.ceil(K / BLOCK)))
    return StoredLayer(parts, codes_of_blocks)


def codes_of_blocks(weight: Tensor, weight_scale: Tensor) -> QuantizedWeight:
    return QuantizedWeight("fp8_block", weight, weight_scale.float())


# -- microscaling ----------------------------------------------------------------------


def nvfp4(layer: str, parts: Parts) -> StoredLayer:
    """`weight` (N, K / 2), two e2m1 a byte with the even column in the lower bits; `weight_scale` (N, K / 16) in e4m3,
    and `weight_scale_2`, which multiplies them all.

    Raises:
        UserError: other dtypes or shapes.
    """
    N, byte_columns = matrix(layer, parts, "weight", torch.uint8)
    demand(layer, parts, "weight_scale", (torch.float8_e4m3fn,), (N, byte_columns * 2 // COLUMNS["nvfp4"]))
    demand(layer, parts, "weight_scale_2", FLOATS, *ONE)
    return StoredLayer({part: parts[part] for part in ("weight", "weight_scale", "weight_scale_2")}, codes_of_nvfp4)


def codes_of_nvfp4(weight: Tensor, weight_scale: Tensor, weight_scale_2: Tensor) -> QuantizedWeight:
    return QuantizedWeight("nvfp4", weight, weight_scale, global_scale=of_rows(weight_scale_2, len(weight)))


def mxfp8(layer: str, parts: Parts) -> StoredLayer:
    """`weight` (N, K) in e4m3 and `weight_scale` (N, K / 32): exponents in uint8.

    Raises:
        UserError: other dtypes or shapes.
    """
    N, K = matrix(layer, parts, "weight", torch.float8_e4m3fn)
    demand(layer, parts, "weight_scale", (torch.uint8,), (N, K // COLUMNS["mxfp8"]))
    return StoredLayer(
        {part: parts[part] for part in ("weight", "weight_scale")},
        lambda weight, weight_scale: QuantizedWeight("mxfp8", weight, weight_scale),
    )


# -- codes that are multiplied by activations as they are ------------------------------


def weights_only(layer: str, parts: Parts) -> StoredLayer:
    """`weight` (N, K) in int8 or e4m3, `weight_scale` of all of it or of every row.

    Raises:
        UserError: other dtypes or shapes.
    """
    if parts["weight"].dtype == torch.float8_e4m3fn:
        return with_activations_as_they_are(eight_bit(layer, parts))
    N, _ = matrix(layer, parts, "weight", torch.int8)
    demand(layer, parts, "weight_scale", FLOATS, *ONE, (N,), (N, 1))
    return StoredLayer({part: parts[part] for part in ("weight", "weight_scale")}, codes_of_one_group)


def with_activations_as_they_are(layer: StoredLayer) -> StoredLayer:
    """The same codes, which are decoded where they are multiplied."""

    def convert(**tensors: Tensor) -> QuantizedWeight:
        weight = layer.convert(**tensors)
        if weight.kind == "int8":
            return QuantizedWeight("w8", weight.codes, weight.scale[:, None])
        return replace(weight, input_scale=None, weight_only=True)

    return replace(layer, convert=convert)


def codes_of_one_group(weight: Tensor, weight_scale: Tensor) -> QuantizedWeight:
    return QuantizedWeight("w8", weight, of_rows(weight_scale, len(weight))[:, None])


def demand_groups(layer: str, parts: Parts, columns: int, count: int) -> None:
    """That the columns of a layer are in groups that kernels multiply.

    Raises:
        UserError: they are not.
    """
    if columns % count or (columns // count not in GROUPS and count != 1):
        sizes = ", ".join(map(str, GROUPS))
        raise UserError(f"{told(parts, layer)}: {count} scales for {columns} columns; expected one for {sizes} or all")
