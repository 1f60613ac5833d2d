"""The embedded model draws what a prompt says: measured by code on scenes it was never trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sgl_diffusion.models.embedded import world
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.checkpoint import open_checkpoint
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.verify import verify

HELD_OUT = world.split_scenes(held_out=True)
SIZE_LIMIT_BYTES = 15_000_000


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(ServerArgs(device="cpu"))


def test_it_draws_held_out_scenes(engine: Engine) -> None:
    """100 prompts: background, colours and layout all right in at least 90, shapes in at least 80."""
    scenes = world.draw_scenes(HELD_OUT, np.random.default_rng(2), 100)
    assert not set(scenes) & {s for pool in world.split_scenes(held_out=False) for s in pool}
    pictures = []
    for start in range(0, 100, 25):
        prompts = [world.caption(s) for s in scenes[start : start + 25]]
        result = engine.run(SamplingParams(prompt=prompts, seed=1000 + start, save_output=False))
        for output in result.outputs:
            pixels = np.asarray(output.image, np.float32).transpose(2, 0, 1)
            pictures.append(pixels / 127.5 - 1)
    score = world.score(pictures, scenes)
    assert score["scene"] >= 0.90, score
    assert score["shapes"] >= 0.80, score


def test_the_judge_can_tell_right_from_wrong() -> None:
    rng = np.random.default_rng(3)
    scenes = world.draw_scenes(HELD_OUT, rng, 60)
    pictures = [world.render(s, rng) for s in scenes]
    assert set(world.score(pictures, scenes).values()) == {1.0}
    shifted = world.score(pictures[1:] + pictures[:1], scenes)
    assert shifted["scene"] < 0.1 and shifted["shapes"] < 0.2
    noise = [rng.uniform(-1, 1, p.shape).astype(np.float32) for p in pictures]
    assert world.score(noise, scenes)["scene"] == 0


def test_the_score_falls_when_the_runtime_is_wrong(engine: Engine) -> None:
    """A model whose guidance of the picture by the text is cut off draws scenes at random."""
    scenes = world.draw_scenes(HELD_OUT, np.random.default_rng(4), 20)
    result = engine.run(SamplingParams(prompt=[""] * len(scenes), save_output=False))
    pictures = [np.asarray(o.image, np.float32).transpose(2, 0, 1) / 127.5 - 1 for o in result.outputs]
    assert world.score(pictures, scenes)["scene"] < 0.3


def test_native_equals_diffusers_on_trained_weights() -> None:
    result = verify(
        ServerArgs(device="cpu"), SamplingParams(prompt=world.caption(HELD_OUT[1][0]), seed=1, save_output=False)
    )
    assert result.passed and result.tolerance == 1e-4


def test_classifier_free_guidance_removes_what_the_negative_prompt_names(engine: Engine) -> None:
    result = engine.run(
        SamplingParams(
            prompt="a red circle on a white background",
            negative_prompt="a blue square on a black background",
            true_cfg_scale=2.0,
            save_output=False,
        )
    )
    scene = world.Scene("white", (world.Thing("red", "circle", "centre"),))
    picture = np.asarray(result.outputs[0].image, np.float32).transpose(2, 0, 1) / 127.5 - 1
    assert world.judge(picture, scene) == world.Verdict(True, True, True, True)


def test_it_is_small_and_carries_its_card_and_licence() -> None:
    root = open_checkpoint("embedded", None, {}).root
    files = [f for f in root.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= SIZE_LIMIT_BYTES
    card = Path(root.parent, "README.md").read_text()
    assert "Apache-2.0" in card and "held out" in card
    assert Path(root.parent, "LICENSE").is_file()
