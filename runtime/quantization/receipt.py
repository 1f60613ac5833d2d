"""What a component's quantization came to, for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sgl_diffusion.runtime.quantization.layers import QuantizedLinear
from sgl_diffusion.runtime.quantization.selection import layer_class

MIB = 1024 * 1024


def receipt(format: str, module: nn.Module, kept: Mapping[str, str], dtype: torch.dtype) -> dict[str, Any]:
    """Layers by what multiplies in them, in all and by class, those that are kept by why, and MiB of the weights and of
    the same in full.

    Args:
        module: with its weights.
        kept: why, by path of the layer.
        dtype: of weights that are not quantised.
    """
    by_path = {path: layer for path, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}
    quantized = [*by_path.values()]
    classes: dict[str, set[str]] = {}
    for path, layer in by_path.items():
        classes.setdefault(layer_class(path), set()).add(layer.product)
    size = sum(t.nbytes for t in module.parameters())
    codes = sum(layer.quantized.nbytes for layer in quantized)
    in_full = sum(layer.out_features * layer.in_features for layer in quantized) * dtype.itemsize
    return {
        "format": format,
        "layers": len(quantized),
        "products": dict(Counter(layer.product for layer in quantized)),
        "classes": {name: ", ".join(sorted(products)) for name, products in classes.items()},
        "kept": dict(Counter(kept.values())),
        "weights_mb": size / MIB,
        "in_full_mb": (size - codes + in_full) / MIB,
    }
