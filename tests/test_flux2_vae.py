"""Tiny autoencoders in the place of large ones, and autoencoders whose code comes with their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_checkpoints import neutral
from tiny_flux2 import build_flux2_tiny_vae
from torch import Tensor

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.autoencoders.catalog import build_autoencoder
from sgl_diffusion.models.autoencoders.tiny import AutoencoderTiny
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import Size
from sgl_diffusion.models.flux2.references import prepared
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.verify import verify
from sgl_diffusion.runtime.weights import load_weights, weight_files

Tiny = Callable[[str], Path]
CHANNELS = {"AutoencoderTiny": None}


@pytest.fixture(scope="module")
def folder(tiny: Tiny) -> Path:
    return tiny("flux2_tiny_vae")


def native(folder: Path, **options: Any) -> AutoencoderTiny:
    with torch.device("meta"):
        vae = build_autoencoder(read_json(folder / "config.json"), attention, options, CHANNELS)
    load_weights(vae, weight_files(folder), torch.device("cpu"), torch.float32)
    assert isinstance(vae, AutoencoderTiny)
    return vae.requires_grad_(False)


def judge(folder: Path) -> Any:
    return diffusers.AutoencoderTiny.from_pretrained(str(folder)).requires_grad_(False)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.std())


def test_it_encodes_and_decodes_as_diffusers(folder: Path) -> None:
    ours, theirs, pictures = native(folder, with_encoder=True), judge(folder), noise(2, 3, 48, 80).clamp(-1, 1)
    (latents,) = ours.encode(pictures)
    assert off(latents, theirs.encode(pictures).latents) < 1e-5
    z = 3 * noise(2, 32, 6, 10)  # beyond what the decoder bends back
    assert off(ours.decode(z), theirs.decode(z).sample) < 1e-5


def test_slices_are_exact_and_tiles_are_near(folder: Path) -> None:
    z = noise(2, 32, 20, 28)
    whole = native(folder).decode(z)
    assert torch.equal(
        native(folder, slicing=True).decode(z), torch.cat([native(folder).decode(z_1) for z_1 in z.split(1)])
    )
    tiles = native(folder, tiling=True, tile_height=128, tile_width=128).decode(z)
    assert off(tiles, whole) > 0
    # far from the seams, a tile sees what the whole sees
    assert off(tiles[:, :, :32, :32], whole[:, :, :32, :32]) < 1e-5


def test_every_weight_is_noticed(folder: Path) -> None:
    vae, z, pictures = native(folder, with_encoder=True), noise(1, 32, 4, 4), noise(1, 3, 32, 32)
    before = vae.decode(z), vae.encode(pictures)[0]
    for name, p in vae.named_parameters():
        kept, forgotten = p.clone(), neutral(name, p)
        p.copy_(torch.zeros_like(p) if forgotten is None else forgotten)
        moved = max(off(vae.decode(z), before[0]), off(vae.encode(pictures)[0], before[1]))
        p.copy_(kept)
        assert moved > 1e-4, name


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("upsample_fn", "bilinear", "upsample_fn='bilinear'"),
        ("upsampling_scaling_factor", 4, "upsampling_scaling_factor=4"),
        ("act_fn", "tanh", "act_fn='tanh': expected one of relu, silu"),
        (
            "decoder_block_out_channels",
            [8, 8, 8, 4],
            r"decoder_block_out_channels=\[8, 8, 8, 4\]: expected 4 equal widths",
        ),
        ("num_encoder_blocks", [1, 1, 1], r"encoder_block_out_channels=\[8, 8, 8, 8\]: expected 3 equal widths"),
        ("new", 1, "new=1 is not understood"),
    ],
)
def test_a_config_it_does_not_implement_is_refused(folder: Path, key: str, value: object, told: str) -> None:
    config = read_json(folder / "config.json") | {key: value}
    with pytest.raises(ConfigError, match=f"config key {told}"):
        build_autoencoder(config, attention, {}, CHANNELS)


# -- in pipelines -----------------------------------------------------------------------


def asked(**sampling: Any) -> SamplingParams:
    usual = {
        "prompt": "a red circle", "height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": 80,
        "seed": 3, "save_output": False,
    }  # fmt: skip
    return SamplingParams.model_validate(usual | sampling)


def test_the_first_generation_draws_with_one_as_in_diffusers(tiny: Tiny, tmp_path: Path) -> None:
    own = build_flux2_tiny_vae(tmp_path / "vae", latent_channels=16)
    result = verify(ServerArgs(model_path=str(tiny("flux")), device="cpu", component_paths={"vae": str(own)}), asked())
    assert result.passed, "\n".join(f"{c.stage}: {c.relative_max:.1e}" for c in result.comparisons)


def test_the_second_generation_draws_in_its_latents(tiny: Tiny, folder: Path, tmp_path: Path) -> None:
    """Which need no statistics: they are taken from tokens, and given pictures' are made tokens, as they are."""
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (64, 80, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    args = ServerArgs(model_path=str(tiny("flux2")), device="cpu", component_paths={"vae": str(folder)})
    engine = Engine.load(args)
    assert isinstance(engine.backend, NativePipeline)
    family, size, theirs = engine.backend.family, Size(32, 48), judge(folder)
    with torch.inference_mode():
        x = family.noise(size, [torch.Generator().manual_seed(1)])
        z = diffusers.Flux2Pipeline._unpatchify_latents(x.mT.unflatten(2, (2, 3)))
        assert off(next(family.decode(x, size)), theirs.decode(z).sample) < 1e-5
        picture = Image.open(tmp_path / "p.png")
        seen = family.encode_pictures([picture], size).tensors["latent_condition"]
        patches = diffusers.Flux2Pipeline._patchify_latents(theirs.encode(prepared(picture)).latents)
        assert off(seen, patches.flatten(2).mT) < 1e-5
    output = engine.run(asked(image_path=[str(tmp_path / "p.png")])).outputs[0]
    assert output.image is not None and output.image.size == (96, 64)


def test_latents_of_another_model_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    own = build_flux2_tiny_vae(tmp_path / "vae", latent_channels=16)
    args = ServerArgs(model_path=str(tiny("flux2")), device="cpu", backend="sglang", component_paths={"vae": str(own)})
    with pytest.raises(UserError, match="vae: config key latent_channels=16: this model draws 32"):
        Engine.load(args)


def test_code_of_its_own_runs_with_leave_alone(tiny: Tiny, tmp_path: Path) -> None:
    """On the diffusers backend, which such code is written for."""
    own = tmp_path / "own"
    shutil.copytree(tiny("flux2") / "vae", own)
    (own / "own.py").write_text(
        "from diffusers import AutoencoderKLFlux2\n\n\n"
        "class OwnAutoencoder(AutoencoderKLFlux2):\n"
        "    def decode(self, *args, **kwargs):\n"
        "        return (-super().decode(*args, **kwargs)[0],)\n"
    )
    config = read_json(own / "config.json")
    config |= {"_class_name": "OwnAutoencoder", "auto_map": {"AutoModel": "own.OwnAutoencoder"}}
    (own / "config.json").write_text(json.dumps(config))
    server = {"model_path": str(tiny("flux2")), "device": "cpu", "component_paths": {"vae": str(own)}}
    with pytest.raises(UserError, match="OwnAutoencoder is code of its own; .* --trust-remote-code") as e:
        Engine.load(ServerArgs.model_validate(server))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="_class_name='OwnAutoencoder': expected one of AutoencoderKLFlux2, "):
        Engine.load(ServerArgs.model_validate(server | {"backend": "sglang", "trust_remote_code": True}))
    inverted = Engine.load(ServerArgs.model_validate(server | {"trust_remote_code": True}))
    plain = Engine.load(ServerArgs(model_path=str(tiny("flux2")), device="cpu"))
    a, b = (np.asarray(engine.run(asked()).outputs[0].image).astype(int) for engine in (inverted, plain))
    assert np.abs(255 - a - b).max() <= 2
