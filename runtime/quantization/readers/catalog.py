"""Which readers there are, and what is asked of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.stored import QuantizedCheckpoint

READERS = (
    "saved", "torchao", "modelopt", "compressed_tensors", "finegrained_fp8", "bitsandbytes", "gguf", "svdquant",
    "scaled_fp8",
)  # fmt: skip
"""Modules of this package, each with a `read`, in the order in which they are asked: the last takes whatever has codes
in e4m3 and says no more."""


def read_quantized(files: Sequence[Path], config: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """What these weight files hold, if it is quantised; None if it is plain weights.

    Args:
        config: `quantization_config` of the component, {} where it has none.
    Raises:
        UserError: quantised in a way that no reader knows, or knows but cannot run exactly.
    """
    for name in READERS:
        reader = importlib.import_module(f"{__package__}.{name}")
        found: QuantizedCheckpoint | None = reader.read(files, config)
        if found is not None:
            return found
    if config:
        method = config.get("quant_method", config.get("quant_type", "no quant_method"))
        raise UserError(f"{files[0].parent}: quantization_config of {method}: expected one of {', '.join(READERS)}")
    return None
