"""NVIDIA ModelOpt's exports of models of diffusers (`export_hf_checkpoint`): codes, and scales beside them.

    FP8, FP8_PER_CHANNEL_PER_TOKEN   e4m3, one scale or one for each row
    NVFP4, W4A16_NVFP4               e2m1 with scales of 16 columns, all of them multiplied by weight_scale_2
    MXFP8                            e4m3 with exponents of 32 columns
    MIXED_PRECISION                  a layer as one of these

Layout: nvidia-modelopt 0.47, `torch/export`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers.scaled import (
    Parts,
    by_layer,
    eight_bit,
    mxfp8,
    nvfp4,
    tensors_of,
    told,
)
from sgl_diffusion.runtime.quantization.stored import QuantizedCheckpoint, StoredLayer

PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale")
TRANSFORMS = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION")


def read(files: Sequence[Path], config: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """
    Raises:
        UserError: a corrupt file, or an algorithm that is not read.
    """
    if config.get("quant_method") != "modelopt":
        return None
    where = f"{files[0].parent}: quantization_config"
    if (algorithm := config.get("quant_algo")) is None:
        raise UserError(
            f"{where}: no quant_algo; weights that diffusers saved with ModelOpt's own modules are not read: export"
            " the model with modelopt.torch.export.export_hf_checkpoint"
        )
    layers_have = {layer: own["quant_algo"] for layer, own in config.get("quantized_layers", {}).items()}
    for name in {algorithm, *layers_have.values()}:
        if name not in ALGORITHMS:
            raise UserError(f"{where}: quant_algo={name}; expected {', '.join(ALGORITHMS)}")
    found, plain = by_layer(tensors_of(files), "weight_scale", (*PARTS, *TRANSFORMS))
    layers = {layer: _layer(layer, parts) for layer, parts in found.items()}
    named = algorithm if algorithm != "MIXED_PRECISION" else ", ".join(sorted(set(layers_have.values())))
    return QuantizedCheckpoint(f"ModelOpt {named}{_ours(named)}", layers, plain)


def _layer(layer: str, parts: Parts) -> StoredLayer:
    if transforms := [part for part in TRANSFORMS if part in parts]:
        raise UserError(f"{told(parts, layer)} has {', '.join(transforms)}; expected {', '.join(PARTS)}")
    if "weight_scale_2" in parts:
        return nvfp4(layer, parts)
    return mxfp8(layer, parts) if parts["weight_scale"].dtype == torch.uint8 else eight_bit(layer, parts)


def _ours(algorithms: str) -> str:
    """What is done another way."""
    told_of = []
    if "W4A16" in algorithms:
        told_of.append("activations in 4 bits where the GPU has instructions for it")
    elif "NVFP4" in algorithms:
        told_of.append("activations with a scale for each row in place of the calibrated one")
    return f" ({', '.join(told_of)})" if told_of else ""
