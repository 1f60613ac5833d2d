"""`quant_method: fp8`, as transformers and vLLM know it: e4m3 with scales of 128 x 128 blocks (DeepSeek-V3: arXiv
2412.19437), of rows, or of whole layers.

What transformers calls the inverse of a scale is what codes are multiplied by, like all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers.scaled import (
    ONE,
    Parts,
    by_layer,
    eight_bit,
    fp8_blocks,
    matrix,
    tensors_of,
)
from sgl_diffusion.runtime.quantization.stored import QuantizedCheckpoint, StoredLayer
from sgl_diffusion.runtime.quantization.weight import BLOCK

PARTS = {
    "weight": "weight", "weight_scale_inv": "weight_scale", "weight_scale": "weight_scale",
    "activation_scale": "input_scale", "input_scale": "input_scale",
}  # fmt: skip
KNOWN = {
    "fmt": ("e4m3", "float8_e4m3fn"), "scale_fmt": ("float",), "activation_scheme": ("dynamic", "static"),
    "weight_block_size": (None, [BLOCK, BLOCK]),
}  # fmt: skip


def read(files: Sequence[Path], config: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """
    Raises:
        UserError: a corrupt file, or a variant that is not read.
    """
    if config.get("quant_method") != "fp8":
        return None
    for field, allowed in KNOWN.items():
        if config.get(field, allowed[0]) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise UserError(f"{files[0].parent}: quantization_config: {field}={config[field]}; expected {expected}")
    tensors = tensors_of(files)
    inverse = any(name.endswith(".weight_scale_inv") for name in tensors)
    found, plain = by_layer(tensors, "weight_scale_inv" if inverse else "weight_scale", tuple(PARTS))
    layers = {layer: _layer(layer, {PARTS[part]: t for part, t in parts.items()}) for layer, parts in found.items()}
    activations = config.get("activation_scheme", "dynamic")
    return QuantizedCheckpoint(f"fp8 ({activations} activations)", layers, plain)


def _layer(layer: str, parts: Parts) -> StoredLayer:
    N, _ = matrix(layer, parts, "weight", torch.float8_e4m3fn)
    of_rows = parts["weight_scale"].shape in (*ONE, (N,), (N, 1))
    return (eight_bit if of_rows else fp8_blocks)(layer, parts)
