"""Wan's published checkpoints: configs at true size, defaults, launches of a step, and which denoiser takes it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from test_bench import bench

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.family import SETTINGS, Guidance, Phase
from sgl_diffusion.models.wan import Wan
from sgl_diffusion.models.wan.transformer import WanTransformer

BILLIONS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1.419,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14.288,
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": 16.395,
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": 16.395,
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": 16.396,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 14.288,
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 14.289,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 5.000,
}


def test_all_published_checkpoints_have_a_preset() -> None:
    assert set(Wan.presets()) == set(BILLIONS)
    for preset in Wan.presets().values():
        assert ("transformer_2" in preset.components) == (preset.components[SETTINGS]["boundary_ratio"] is not None)
        assert ("transformer_2" in preset.components) == (preset.defaults.guidance_scale_2 is not None)
        assert ("image_encoder" in preset.components) == (preset.components["transformer"]["image_dim"] is not None)
        assert preset.defaults.num_frames % 4 == 1
        assert Wan.defaults(preset.components) == preset.defaults
        diffusers.UniPCMultistepScheduler.from_config(dict(preset.components["scheduler"]))


@pytest.mark.parametrize("name", BILLIONS)
def test_presets_are_the_published_sizes(name: str) -> None:
    for key, config in Wan.presets()[name].components.items():
        if not key.startswith("transformer"):
            continue
        with torch.device("meta"):
            module = Wan.build(key, config, partial(attention, impl="auto"), {})
            theirs = diffusers.WanTransformer3DModel.from_config(dict(config))
        assert isinstance(module, WanTransformer)
        parameters = sum(p.numel() for p in module.parameters())
        assert parameters == sum(p.numel() for p in theirs.parameters())
        assert parameters / 1e9 == pytest.approx(BILLIONS[name], abs=0.001)


@pytest.mark.parametrize("name", ["Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"])
def test_autoencoders_are_the_published_sizes(name: str) -> None:
    config = Wan.presets()[name].components["vae"]
    with torch.device("meta"):
        module = Wan.build("vae", config, partial(attention, impl="auto"), {"with_encoder": True})
        theirs = diffusers.AutoencoderKLWan.from_config(dict(config))
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    ("model", "size", "launches_of_a_block", "blocks", "diffusers_total"),
    [
        ("wan21-t2v-14b", (720, 1280, 81), 13, 40, 2433),
        ("wan2.1-t2v-1.3b", (480, 832, 81), 13, 30, 1833),
        ("wan21-i2v-14b-480p", (480, 832, 81), 15, 40, 2643),
        ("wan22-i2v-a14b", (720, 1280, 81), 13, 40, 2433),
        ("wan22-ti2v-5b", (704, 1280, 121), 13, 30, 1832),
    ],
)
def test_a_step_takes_few_launches(
    tmp_path: Path, model: str, size: tuple[int, ...], launches_of_a_block: int, blocks: int, diffusers_total: int
) -> None:
    """13 launches a block, where diffusers takes 60; a picture to look at costs an attention and a sum."""
    report = tmp_path / "launches.json"
    code, out, err = bench("launches", "--model", model, "--json", str(report))
    assert code == 0, out + err
    counts = json.loads(report.read_text())
    assert (counts["height"], counts["width"], counts["frames"]) == size
    assert sum(counts["diffusers"].values()) == diffusers_total
    ours = counts["ours"]
    assert sum(ours.values()) <= launches_of_a_block * blocks + 6
    assert ours["qk_norm_rope_kernel"] == blocks
    assert not {"copy_", "cat", "add", "mul"} & set(ours)
    assert ours["_to_copy"] == 1, "the state is fp32 whatever the model's dtype; nothing else is converted"


# -- two denoisers ----------------------------------------------------------------------


def phases(timesteps: list[float], ratio: float | None, guidance: Guidance | None = None) -> list[Phase]:
    small = {**Wan.presets()["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"].components["transformer"], "num_layers": 1}
    with torch.device("meta"):
        denoiser = Wan.build("transformer", small, partial(attention, impl="auto"), {})
    keys = ("transformer",) if ratio is None else ("transformer", "transformer_2")
    return [
        *Wan({**dict.fromkeys(keys, denoiser), SETTINGS: {"boundary_ratio": ratio}}).phases(
            timesteps, guidance or Guidance(None)
        )
    ]


@pytest.mark.parametrize(
    "name", [name for name, preset in Wan.presets().items() if "transformer_2" in preset.components]
)
@pytest.mark.parametrize("steps", [1, 2, 4, 40])
def test_steps_are_shared_out_as_in_diffusers(name: str, steps: int) -> None:
    """`WanPipeline` asks at every step whether t >= boundary_ratio * num_train_timesteps."""
    ratio = Wan.presets()[name].components[SETTINGS]["boundary_ratio"]
    scheduler = diffusers.UniPCMultistepScheduler.from_config(dict(Wan.presets()[name].components["scheduler"]))
    scheduler.set_timesteps(steps)
    theirs = ["transformer" if t >= ratio * 1000 else "transformer_2" for t in scheduler.timesteps]
    runs = phases(scheduler.timesteps.tolist(), ratio)
    assert [run.denoiser for run in runs for _ in run.steps] == theirs
    assert [step for run in runs for step in run.steps] == list(range(steps))
    assert len(runs) == len(set(theirs)), "each denoiser is loaded once"


def test_phases_at_the_boundary() -> None:
    first, second = Phase("transformer", range(2), 4.0), Phase("transformer_2", range(2, 4), 3.0)
    assert phases([1000, 900, 899.9, 10], 0.9, Guidance(None, 4.0, 3.0)) == [first, second]
    assert phases([899, 10], 0.9, Guidance(None, 4.0)) == [Phase("transformer_2", range(2), 4.0)]
    assert phases([999, 10, 0], None) == [Phase("transformer", range(3), 1.0)]
