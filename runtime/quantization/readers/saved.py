"""What `sglang quantize` writes: every tensor of a `QuantizedWeight` by its name, behind that of our packed layer.

config.json says so: "quantization_config": {"quant_method": "sgl_diffusion", "scheme": "int4", "layers": {path: kind}}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.stored import InFile, QuantizedCheckpoint, StoredLayer
from sgl_diffusion.runtime.quantization.weight import QuantizedWeight
from sgl_diffusion.runtime.reading import stored_tensors

METHOD = "sgl_diffusion"
PARTS = tuple(f.name for f in fields(QuantizedWeight) if f.name != "kind")


def read(files: Sequence[Path], config: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """None if it is something else. Raises UserError for a layer without codes or scales."""
    if config.get("quant_method") != METHOD:
        return None
    found: dict[str, InFile] = {t.name: t for path in files for t in stored_tensors(path)}
    layers = {}
    for layer, kind in config["layers"].items():
        own = {part: found.pop(f"{layer}.{part}") for part in PARTS if f"{layer}.{part}" in found}
        if missing := {"codes", "scale"} - own.keys():
            raise UserError(f"{files[0].parent}: missing weights: {layer}.{min(missing)}")
        layers[layer] = StoredLayer(own, partial(QuantizedWeight, kind))
    return QuantizedCheckpoint(str(config["scheme"]), layers, found)
