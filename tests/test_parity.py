"""The native pipeline equals diffusers, stage by stage, on tiny random checkpoints: fp32, 1e-4 of the std."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.verify import Verification, verify
from tiny_checkpoints import build_flux

STAGES = ("pooled_projections", "encoder_hidden_states", "initial_latents", "timesteps", "final_latents", "pixels")


def check(folder: Path, server: dict[str, Any] | None = None, **sampling: Any) -> Verification:
    request = {
        "prompt": "a red fox beside a quiet lake",
        "height": 64,
        "width": 96,
        "num_inference_steps": 3,
        "max_sequence_length": 48,
        "seed": 3,
        "save_output": False,
        **sampling,
    }
    return verify(ServerArgs(model_path=str(folder), device="cpu", **(server or {})), SamplingParams(**request))


def assert_equal(result: Verification) -> None:
    assert set(STAGES) <= {c.stage for c in result.comparisons}
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
    for name, options in shapes.items():
        build_flux(root / name, **options)
    return {name: root / name for name in shapes}


@pytest.mark.parametrize("name", ["2x64", "3x32", "1x128"])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"num_outputs_per_prompt": 2},
        {"prompt": ["a red fox", "two robots playing chess in a neon city"]},
        {"negative_prompt": "blurry", "true_cfg_scale": 3.5},
        {"height": 112, "width": 48, "num_inference_steps": 1},
    ],
    ids=["one", "batch", "prompts", "truecfg", "tall"],
)
def test_every_stage_equals_diffusers(checkpoints: dict[str, Path], name: str, sampling: dict[str, Any]) -> None:
    assert_equal(check(checkpoints[name], **sampling))


def test_guidance_embedding_changes_the_prediction(checkpoints: dict[str, Path]) -> None:
    weak, strong = (check(checkpoints["2x64"], guidance_scale=g) for g in (1.0, 9.0))
    assert_equal(weak)
    assert_equal(strong)


@pytest.mark.parametrize("server", [{"vae_tiling": True}, {"vae_slicing": True}, {"performance_mode": "memory"}])
def test_tiled_and_sliced_decoding_equal_diffusers(checkpoints: dict[str, Path], server: dict[str, Any]) -> None:
    assert_equal(check(checkpoints["2x64"], server, height=128, width=160, num_outputs_per_prompt=2))


def test_half_precision_follows_the_roundings_of_diffusers(checkpoints: dict[str, Path]) -> None:
    """bf16 noise differs from fp32 noise, so equal initial latents show that the dtype is followed, too."""
    result = check(checkpoints["2x64"], {"precision": "bf16"})
    by_stage = {c.stage: c for c in result.comparisons}
    assert by_stage["initial_latents"].max_abs == 0
    assert by_stage["timesteps"].max_abs == 0
    assert by_stage["prediction_0"].relative_l2 < 0.02  # bf16 has 8 bits; both sides round, at different places


def test_every_weight_is_noticed(checkpoints: dict[str, Path]) -> None:
    """A native model that dropped a bias or a norm weight would still agree with itself: parity must see each tensor.

    Both backends read the same mutated checkpoint, so they stay equal; and the picture must differ from the unmutated.
    """
    folder = checkpoints["2x64"]
    params = SamplingParams(
        prompt="a fox", height=32, width=32, num_inference_steps=1, max_sequence_length=16, save_output=False
    )
    from sgl_diffusion.runtime.engine import Engine

    def latents(path: Path) -> Any:
        engine = Engine.load(ServerArgs(model_path=str(path), backend="sglang", device="cpu"))
        return engine.run(params).outputs[0].image.tobytes()

    original = latents(folder)
    blind = [f"{component}.{tensor}" for component, tensor, copy in mutations(folder) if latents(copy) == original]
    # key biases cancel in softmax; the text side of the last joint block feeds nothing... but single blocks read it
    assert [b for b in blind if not b.endswith(("to_k.bias", "add_k_proj.bias"))] == []


def test_verify_refuses_a_model_without_native_implementation(tiny_sdxl: Path) -> None:
    with pytest.raises(UserError, match="StableDiffusionXLPipeline has no native implementation"):
        check(tiny_sdxl)
