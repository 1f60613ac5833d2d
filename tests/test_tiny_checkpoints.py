"""The tiny checkpoints can judge: diffusers runs them, two builds are equal, and every small weight counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_file
from tiny_checkpoints import build_flux, copy, link_into_hub_cache, neutral, reshard

Tiny = Callable[[str], Path]
NAMES = ["flux", "sdxl", "sd3", "ovis", "wan", "wan_i2v", "wan_flf2v", "wan22", "wan22_i2v", "wan22_ti2v"]
VIDEO = {"num_frames": 5, "max_sequence_length": 16}
FIRST, LAST = (
    {name: Image.new("RGB", (40, 60), colour)} for name, colour in (("image", "red"), ("last_image", "blue"))
)
PROMPT, OTHER_PROMPT = "a red circle left of a blue square", "a white cross on a black background"
MEGABYTES = 10  # the largest, FLUX with two of each block at width 128, has 9; the others have 1 to 3


def pipeline(folder: Path) -> Any:
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(loaded: Any, prompt: str = PROMPT, seed: int = 0, **options: Any) -> np.ndarray:
    """The pixels of two steps at 48x32 (height x width), or of five such frames."""
    call = {"height": 48, "width": 32, "num_inference_steps": 2, "output_type": "np", **options}
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(loaded(prompt=prompt, generator=generator, return_dict=False, **call)[0])


# -- every builder ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published_class", "options"),
    [
        ("flux", "FluxPipeline", {"max_sequence_length": 16}),
        ("sdxl", "StableDiffusionXLPipeline", {}),
        ("sd3", "StableDiffusion3Pipeline", {"max_sequence_length": 16}),
        ("ovis", "OvisImagePipeline", {}),
        *((name, "WanPipeline", VIDEO) for name in ("wan", "wan22", "wan22_ti2v")),
        *((name, "WanImageToVideoPipeline", VIDEO | FIRST) for name in ("wan_i2v", "wan22_i2v")),
        ("wan_flf2v", "WanImageToVideoPipeline", VIDEO | FIRST | LAST),
    ],
)
def test_diffusers_draws_from_prompt_and_seed(
    tiny: Tiny, name: str, published_class: str, options: dict[str, Any]
) -> None:
    folder = tiny(name)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == published_class
    assert sum(f.stat().st_size for f in folder.rglob("*")) < MEGABYTES * 1e6
    loaded = pipeline(folder)
    pixels = draw(loaded, **options)
    assert np.isfinite(pixels).all()
    assert pixels.std() > 0.01, "a flat picture hides mistakes"
    assert ((pixels > 0) & (pixels < 1)).mean() > 0.8, "clipped pixels hide mistakes"
    assert np.array_equal(pixels, draw(loaded, **options))
    assert np.abs(pixels - draw(loaded, OTHER_PROMPT, **options)).mean() > 1e-3
    assert np.abs(pixels - draw(loaded, seed=1, **options)).mean() > 1e-3


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("distilled", [True, False], ids=["dev", "schnell"])
def test_both_published_variants_at_every_head_width(tmp_path: Path, head_dim: int, distilled: bool) -> None:
    shape = {"heads": 1, "head_dim": head_dim, "double": 1, "single": 1}
    folder = build_flux(tmp_path / "flux", **shape, guidance_embeds=distilled, dynamic_shift=distilled)
    loaded = pipeline(folder)
    weak, strong = (draw(loaded, guidance_scale=g, max_sequence_length=16) for g in (1.0, 9.0))
    assert np.isfinite(weak).all()
    assert np.array_equal(weak, strong) != distilled
    assert loaded.scheduler.config.use_dynamic_shifting == distilled


def test_two_builds_have_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    first, second = tiny("flux"), build_flux(tmp_path / "flux")
    names = sorted(str(f.relative_to(first)) for f in first.rglob("*") if f.is_file())
    assert names == sorted(str(f.relative_to(second)) for f in second.rglob("*") if f.is_file())
    assert [n for n in names if (first / n).read_bytes() != (second / n).read_bytes()] == []


# -- what the weights show ----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_norm_or_bias_has_its_default(tiny: Tiny, name: str) -> None:
    """Defaults (weight 1, bias 0) would let a forgotten or swapped tensor pass."""
    files = sorted(tiny(name).glob("*/*.safetensors"))
    assert files
    for file in files:
        for tensor_name, tensor in load_file(file).items():
            assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all()
            assert tensor.numel() == 1 or tensor.std() > 0, f"{file.parent.name}.{tensor_name} is constant"
            forgotten = neutral(tensor_name, tensor)
            if forgotten is not None:
                assert (tensor - forgotten).abs().max() > 0.02, f"{file.parent.name}.{tensor_name} is near its default"


def test_diffusers_notices_forgotten_weights(tiny: Tiny) -> None:
    """A sample over the depth of both models; the native pipeline is shown to notice all of them elsewhere."""
    loaded = pipeline(tiny("flux"))
    small = [
        (name, p)
        for name, p in [*loaded.transformer.named_parameters(), *loaded.vae.decoder.named_parameters()]
        if neutral(name, p) is not None and not name.endswith("to_k.bias")  # softmax takes a VAE key bias out again
    ]
    before = draw(loaded, max_sequence_length=16)
    for name, p in small[:: math.ceil(len(small) / 12)]:
        kept = p.detach().clone()
        with torch.no_grad():
            p.copy_(neutral(name, p))
            moved = np.abs(draw(loaded, max_sequence_length=16) - before).max()
            p.copy_(kept)
        assert moved > 1e-4 * before.std(), f"{name} can be forgotten unnoticed"


# -- variations ---------------------------------------------------------------------------


def test_shards_hold_the_same_tensors(tiny: Tiny, tmp_path: Path) -> None:
    sharded = copy(tiny("flux"), tmp_path / "sharded")
    reshard(sharded, "transformer", 4)
    assert len(list((sharded / "transformer").glob("*.safetensors"))) == 4
    one, many = (diffusers.FluxTransformer2DModel.from_pretrained(f / "transformer") for f in (tiny("flux"), sharded))
    assert all(torch.equal(t, many.state_dict()[name]) for name, t in one.state_dict().items())


def test_a_hub_cache_answers_to_branches_and_commits(tiny: Tiny, tmp_path: Path) -> None:
    for revision in ("main", "v2"):
        link_into_hub_cache(tmp_path, "some-org/some-model", tiny("flux"), revision)
    resolve = {"cache_dir": tmp_path, "local_files_only": True}
    latest, older = (Path(snapshot_download("some-org/some-model", revision=r, **resolve)) for r in (None, "v2"))
    assert latest != older
    assert Path(snapshot_download("some-org/some-model", revision=older.name, **resolve)) == older
    assert (older / "model_index.json").read_bytes() == (tiny("flux") / "model_index.json").read_bytes()
