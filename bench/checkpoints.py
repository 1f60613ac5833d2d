"""A checkpoint of any width for benchmarks: the embedded model's folder with a larger, random denoiser."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import torch

from sgl_diffusion.runtime.checkpoint import EMBEDDED, open_checkpoint
from sgl_diffusion.runtime.errors import UserError

HEAD_DIM, ROTARY_AXES = 128, [16, 56, 56]


def write_denoiser_checkpoint(work: Path, width: int, blocks: int) -> Path:
    """Writes (once) and returns the folder. Weights are diffusers' default initialisation under a fixed seed.

    Raises:
        UserError: a width that is no multiple of the head dim.
    """
    if width == 0 or width % HEAD_DIM:
        raise UserError(f"model=random-{width}x{blocks}: the width must be a multiple of {HEAD_DIM}")
    out = work / f"random-{width}x{blocks}"
    if (out / "model_index.json").is_file():
        return out
    source = open_checkpoint(EMBEDDED, None, {})
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source.root, part, ignore=shutil.ignore_patterns("sampling_defaults.json"))
    config = source.config("transformer") | {
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "axes_dims_rope": ROTARY_AXES,
        "num_layers": blocks,
        "num_single_layers": blocks,
    }
    cls = getattr(diffusers, json.loads((part / "model_index.json").read_text())["transformer"][1])
    torch.manual_seed(0)
    shutil.rmtree(part / "transformer")
    cls.from_config(config).save_pretrained(part / "transformer")
    part.rename(out)
    return out
