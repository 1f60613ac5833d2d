"""The native pipeline equals diffusers, stage by stage, on tiny random checkpoints: fp32, 1e-4 of the std."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import build_flux, neutral

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.request import resolve_request
from sgl_diffusion.runtime.trace import Stopwatch
from sgl_diffusion.runtime.verify import Verification, verify

STAGES = {"pooled_projections", "encoder_hidden_states", "initial_latents", "timesteps", "final_latents", "pixels"}
PROMPT = "a red circle left of a blue square"


def check(folder: Path, server: dict[str, Any] | None = None, **sampling: Any) -> Verification:
    request = {
        "prompt": PROMPT,
        "height": 64,
        "width": 96,
        "num_inference_steps": 3,
        "max_sequence_length": 24,
        "seed": 3,
        "save_output": False,
        **sampling,
    }
    return verify(ServerArgs(model_path=str(folder), device="cpu", **(server or {})), SamplingParams(**request))


def assert_equal(result: Verification) -> None:
    assert {c.stage for c in result.comparisons} >= STAGES
    assert result.tolerance == 1e-4
    assert result.passed, "\n".join(f"{c.stage}: {c.relative_max:.1e}" for c in result.comparisons)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flux")
    shapes: dict[str, dict[str, Any]] = {
        "2x64": {"heads": 2, "head_dim": 64},
        "3x32": {"heads": 3, "head_dim": 32, "double": 1, "single": 3},
        "1x128": {"heads": 1, "head_dim": 128, "guidance_embeds": False, "dynamic_shift": False},
    }
    return {name: build_flux(root / name, **options) for name, options in shapes.items()}


@pytest.mark.parametrize("name", ["2x64", "3x32", "1x128"])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"num_outputs_per_prompt": 2},
        {"prompt": [PROMPT, "a white cross on a black background"]},
        {"negative_prompt": "a green triangle", "true_cfg_scale": 3.5},
        {"height": 112, "width": 48, "num_inference_steps": 1},
    ],
    ids=["one", "batch", "prompts", "truecfg", "tall"],
)
def test_every_stage_equals_diffusers(checkpoints: dict[str, Path], name: str, sampling: dict[str, Any]) -> None:
    assert_equal(check(checkpoints[name], **sampling))


@pytest.mark.parametrize("strength", [1.0, 9.0])
def test_guidance_embedding(checkpoints: dict[str, Path], strength: float) -> None:
    assert_equal(check(checkpoints["2x64"], guidance_scale=strength))


@pytest.mark.parametrize("server", [{"vae_tiling": True}, {"vae_slicing": True}, {"performance_mode": "memory"}])
def test_tiled_and_sliced_decoding(checkpoints: dict[str, Path], server: dict[str, Any]) -> None:
    assert_equal(check(checkpoints["2x64"], server, height=128, width=160, num_outputs_per_prompt=2))


def test_tiles_of_another_size(checkpoints: dict[str, Path]) -> None:
    tiles = {"vae_tiling": True, "vae_config": {"tile_sample_min_height": 96, "tile_sample_min_width": 96}}
    assert_equal(check(checkpoints["2x64"], tiles, height=128, width=160))


def test_half_precision_follows_the_roundings_of_diffusers(checkpoints: dict[str, Path]) -> None:
    """bf16 noise is other noise than fp32's, so equal initial latents show that the dtype is followed, too."""
    result = check(checkpoints["2x64"], {"precision": "bf16"})
    stages = {c.stage: c for c in result.comparisons}
    assert stages["initial_latents"].max_abs == 0
    assert stages["timesteps"].max_abs == 0
    # bf16 keeps 8 bits and both sides round at different places of the same formulas
    assert stages["prediction_0"].relative_l2 < 0.02


def final_latents_and_pixels(engine: Engine) -> list[torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    params = SamplingParams(prompt=PROMPT, height=32, width=32, num_inference_steps=2, max_sequence_length=16)
    request = resolve_request(params, {}, engine.args)
    assert isinstance(engine.backend, NativePipeline)
    job = engine.backend.prepare(request)
    list(engine.backend.run(job, Stopwatch(engine.device), lambda name, t: seen.__setitem__(name, t.clone())))
    return [seen["final_latents"], seen["pixels"]]


def test_every_small_weight_is_noticed(checkpoints: dict[str, Path]) -> None:
    """Forgetting any bias or norm weight moves the result: none is dropped, doubled or read from another's place."""
    folder = checkpoints["2x64"]
    engine = Engine.load(ServerArgs(model_path=str(folder), device="cpu", backend="sglang"))
    assert isinstance(engine.backend, NativePipeline)
    before = final_latents_and_pixels(engine)
    blind = []
    for component in ("transformer", "vae"):
        for name, p in engine.backend.parts[component].named_parameters():
            if (forgotten := neutral(name, p)) is None:
                continue
            kept = p.clone()
            p.copy_(forgotten)
            after = final_latents_and_pixels(engine)
            p.copy_(kept)
            moved = max(((a - b).abs().max() / b.std()).item() for a, b in zip(after, before, strict=True))
            if moved < 1e-4:
                blind.append(f"{component}.{name}")
    # a key bias of the VAE's attention adds one number to all scores of a query, which softmax takes out again
    assert blind == ["vae.decoder.mid_block.attentions.0.to_k.bias"]


def test_the_native_model_reads_every_tensor_of_the_checkpoint(checkpoints: dict[str, Path]) -> None:
    engine = Engine.load(ServerArgs(model_path=str(checkpoints["2x64"]), device="cpu", backend="sglang"))
    assert isinstance(engine.backend, NativePipeline)
    ours = sum(p.numel() for p in engine.backend.parts["transformer"].parameters())
    (file,) = (checkpoints["2x64"] / "transformer").glob("*.safetensors")
    assert ours == sum(t.numel() for t in load_file(file).values())


def test_verify_refuses_a_model_without_native_implementation(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="StableDiffusionXLPipeline has no native implementation"):
        check(tiny("sdxl"))
