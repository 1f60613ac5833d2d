"""The users' documents on models that run through the diffusers backend: their commands, with tiny checkpoints."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hub import publish
from PIL import Image

from sgl_diffusion.cli.main import main

OVIS = """sglang generate
  --model-path AIDC-AI/Ovis-Image-7B
  --backend diffusers
  --trust-remote-code
  {attention}
  --prompt "A serene Japanese garden with cherry blossoms"
  --height 1024
  --width 1024
  --num-inference-steps 30
  --save-output
  --output-path outputs
  --output-file-name ovis_garden.png"""
FLASH = "--diffusers-attention-backend flash"
SDXL = "sglang generate --model-path stabilityai/stable-diffusion-xl-base-1.0"
NOT_NATIVE = "with the diffusers backend (StableDiffusionXLPipeline has no native implementation)"

Command = Callable[[str], tuple[int, str]]


@pytest.fixture(scope="module")
def hub(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    publish(tiny("ovis"), "AIDC-AI/Ovis-Image-7B", cache)
    small = {"height": 64, "width": 96, "num_inference_steps": 2}
    publish(tiny("sdxl"), "stabilityai/stable-diffusion-xl-base-1.0", cache, small)
    return cache


@pytest.fixture
def run(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A command in an empty folder: its exit code, and what it wrote to stderr."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(tmp_path)

    def command(words: str) -> tuple[int, str]:
        code = main(shlex.split(words)[1:])
        return code, capsys.readouterr().err

    return command


# -- Ovis-Image ---------------------------------------------------------------------


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="there is flash attention here")
def test_attention_that_is_not_installed_is_refused(run: Command, tmp_path: Path) -> None:
    code, told = run(OVIS.format(attention=FLASH))
    *progress, error = told.splitlines()  # a terminal would show none of the former
    assert code == 2 and error.startswith("error: diffusers_attention_backend=flash: ")
    assert not any("error" in line for line in progress)
    assert not list(tmp_path.iterdir())


def test_the_command_but_for_the_attention_of_a_gpu(run: Command, tmp_path: Path) -> None:
    code, told = run(OVIS.format(attention=""))
    assert code == 0 and "with the diffusers backend (asked for with backend=diffusers)" in told
    assert Image.open(tmp_path / "outputs" / "ovis_garden.png").size == (1024, 1024)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("flash_attn") is None, reason="needs an NVIDIA GPU and flash-attn"
)
def test_the_command_word_for_word(run: Command, tmp_path: Path) -> None:
    code, told = run(OVIS.format(attention=FLASH))
    assert code == 0, told
    assert (tmp_path / "outputs" / "ovis_garden.png").is_file()


# -- SDXL -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pictures"),
    [
        ('--prompt "A serene landscape with mountains and a lake at sunset"', 1),
        # fewer steps, of a smaller picture, than in the document: 100 of 1024x1024
        (
            """--prompt "A futuristic city with flying cars" --negative-prompt "blurry, low quality, distorted"
            --num-inference-steps 3 --guidance-scale 9.0 --height 128 --width 128 --seed 42""",
            1,
        ),
        ('--prompt "Abstract art with vibrant colors" --num-samples 4 --seed 42', 4),
    ],
    ids=["basic", "custom settings", "batch"],
)
def test_pictures_of_a_model_without_native_implementation(
    run: Command, tmp_path: Path, options: str, pictures: int
) -> None:
    """`auto` takes the diffusers backend, and says so."""
    code, told = run(f"{SDXL} {options}")
    assert code == 0 and NOT_NATIVE in told
    size = (128, 128) if "--height" in options else (96, 64)
    drawn = [Image.open(path) for path in (tmp_path / "outputs").glob("*.png")]
    assert [picture.size for picture in drawn] == [size] * pictures


def test_a_configuration_file(run: Command, tmp_path: Path) -> None:
    config = {
        "model_path": "stabilityai/stable-diffusion-xl-base-1.0",
        "prompt": "A majestic dragon flying over mountains",
        "negative_prompt": "blurry, low quality",
        "num_inference_steps": 2,  # 50 in the document, of 1024x1024
        "guidance_scale": 7.5,
        "height": 64,
        "width": 64,
        "seed": 12345,
        "num_samples": 2,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    code, told = run("sglang generate --config generation_config.json")
    assert code == 0 and NOT_NATIVE in told
    assert len(list((tmp_path / "outputs").glob("*.png"))) == 2


def test_a_report_after_a_warm_up(run: Command, tmp_path: Path) -> None:
    asked = '--prompt "Test image" --perf-dump-path performance_metrics.json --warmup --warmup-steps 3'
    code, told = run(f"{SDXL} {asked}")
    assert code == 0 and "INFO: warmed up in" in told
    assert json.loads((tmp_path / "performance_metrics.json").read_text())["denoise_steps_ms"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--backend diffusers --num-gpus 4 --sp-degree 2 --tp-size 2", "num_gpus=4: "),
        ("--dit-cpu-offload --vae-cpu-offload --text-encoder-cpu-offload", "dit_cpu_offload=true: "),
    ],
)
def test_placement_that_diffusers_does_not_take_is_refused(
    run: Command, tmp_path: Path, options: str, told: str
) -> None:
    code, error = run(f'{SDXL} --prompt "A beautiful forest scene" {options}')
    assert code == 2 and error.startswith(f"error: {told}") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
