"""Writes a small variant of a published model, to be timed on a CPU: random weights, and blocks as in the large one.

python tests/small_variants.py z-image FOLDER
sglang bench e2e --model FOLDER --threads 1 --height 256 --width 256 --steps 4
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from tiny_flux2 import build_flux2, build_flux2_klein
from tiny_qwen import build_qwen
from tiny_z_image import build_z_image

HEAD_DIM = 128


@dataclass(frozen=True)
class Variant:
    """A tiny checkpoint, and what its transformer's config becomes."""

    build: Callable[[Path], Path]
    transformer: Mapping[str, Any]


def _flux2(heads: int) -> dict[str, Any]:
    axes = [HEAD_DIM // 4] * 4
    blocks = {"num_layers": 2, "num_single_layers": 7}
    return {**blocks, "num_attention_heads": heads, "attention_head_dim": HEAD_DIM, "axes_dims_rope": axes}


VARIANTS = {
    "flux2-klein": Variant(build_flux2_klein, _flux2(3)),
    "flux2-klein-wide": Variant(build_flux2_klein, _flux2(6)),
    "flux2-dev": Variant(build_flux2, _flux2(3)),
    "qwen-image": Variant(
        build_qwen,
        {"num_layers": 5, "num_attention_heads": 3, "attention_head_dim": HEAD_DIM, "axes_dims_rope": [16, 56, 56]},
    ),
    "z-image": Variant(
        build_z_image,
        {"dim": 3 * HEAD_DIM, "n_heads": 3, "n_kv_heads": 3, "n_layers": 10, "n_refiner_layers": 2,
         "axes_dims": [32, 48, 48]},
    ),
}  # fmt: skip


def write_variant(name: str, path: Path) -> float:
    """Writes the checkpoint anew. Returns the transformer's millions of parameters."""
    variant = VARIANTS[name]
    shutil.rmtree(path, ignore_errors=True)
    folder = variant.build(path) / "transformer"
    config = json.loads((folder / "config.json").read_text()) | variant.transformer
    torch.manual_seed(0)
    model = getattr(diffusers, config["_class_name"]).from_config(config)
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters()) / 1e6


if __name__ == "__main__":
    print(f"{sys.argv[1]}: {write_variant(sys.argv[1], Path(sys.argv[2])):.0f} million parameters")
