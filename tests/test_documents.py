"""The example commands of the users' documents, with tiny checkpoints under the published names."""

from __future__ import annotations

import base64
import io
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import av
import openai
import pytest
import torch
from forks import SGLANG
from hub import publish
from PIL import Image
from server_process import serving

from sgl_diffusion.runtime.output import read_metadata

FEW_STEPS = {"num_inference_steps": 2, "max_sequence_length": 64}
SMALL = {"height": 64, "width": 96, **FEW_STEPS}
CLIP = {**SMALL, "num_frames": 5}
CHECKPOINTS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("wan", CLIP),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("wan22", CLIP),
    "Qwen/Qwen-Image": ("qwen", SMALL),
    "Qwen/Qwen-Image-Edit": ("qwen_edit", FEW_STEPS),
    "black-forest-labs/FLUX.2-dev": ("flux2", {**SMALL, "max_sequence_length": 128}),
    "fal/FLUX.2-Tiny-AutoEncoder": ("flux2_tiny_vae", {}),
}

RACCOON = """sglang generate --model-path Wan-AI/Wan2.2-T2V-A14B-Diffusers {placement}
    --prompt "A curious raccoon" --save-output --output-path outputs --output-file-name {name}"""
STREET = """sglang generate --model-path Wan-AI/Wan2.2-T2V-A14B-Diffusers {placement}
    --prompt "A quiet city street after rain" """
USP = "--num-gpus 4 --ulysses-degree=2 --ring-degree=2"
OFFLOAD = "--text-encoder-cpu-offload --pin-cpu-memory"
LAYERWISE = (
    "--dit-layerwise-offload --layerwise-offload-components transformer text_encoder --dit-offload-prefetch-size 0"
)


@pytest.fixture(scope="module")
def hub(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    for repo_id, (name, defaults) in CHECKPOINTS.items():
        publish(tiny(name), repo_id, cache, defaults)
    return cache


def test_another_autoencoder(hub: Path, tmp_path: Path) -> None:
    """From a complete component folder; the server below finds it by its published name."""
    (where,) = hub.glob("models--fal--FLUX.2-Tiny-AutoEncoder/snapshots/*")
    command = f"sglang generate --model-path black-forest-labs/FLUX.2-dev --vae-path={where} --prompt cat --save-output"
    done = run(command, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    (picture,) = (tmp_path / "outputs").glob("cat_*.png")
    assert Image.open(picture).size == (96, 64)


def test_another_autoencoder_is_served(hub: Path, tmp_path: Path) -> None:
    """And pictures are edited: the model is told of them."""
    models = ["--model-path", "black-forest-labs/FLUX.2-dev", "--vae-path", "fal/FLUX.2-Tiny-AutoEncoder"]
    with serving(tmp_path / "data", [*models, "--device", "cpu"], {"HF_HUB_CACHE": str(hub)}) as server:
        client = openai.OpenAI(base_url=server.api, api_key="none")
        drawn = client.images.generate(prompt="cat", response_format="b64_json").data or []
        given = io.BytesIO()
        Image.new("RGB", (80, 112), "orange").save(given, "PNG")
        edited = client.images.edit(prompt="cat", image=given.getvalue(), response_format="b64_json").data or []
    pictures = [Image.open(io.BytesIO(base64.b64decode(each.b64_json or ""))) for each in (*drawn, *edited)]
    assert [picture.size for picture in pictures] == [(96, 64), (96, 64)]


def run(command: str, hub: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    _, *words = shlex.split(command)
    env = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([SGLANG, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (RACCOON.format(placement=USP, name='"a-curious-raccoon.mp4"'), "a-curious-raccoon.mp4"),
        (RACCOON.format(placement="", name='"A curious raccoon.mp4"'), "A curious raccoon.mp4"),
        (STREET.format(placement=""), "A-quiet-city-street-after-rain_*.mp4"),
    ],
)
def test_a_clip_by_its_published_name(hub: Path, tmp_path: Path, command: str, name: str) -> None:
    done = run(command, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    (clip,) = (tmp_path / "outputs").glob(name)
    metadata = read_metadata(clip)
    assert metadata is not None and metadata["model"] == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        assert (stream.width, stream.height, frames) == (96, 64, 5)


@pytest.mark.parametrize(
    ("command", "size"),
    [
        (
            """sglang generate --model-path Qwen/Qwen-Image --prompt "A beautiful sunset over the mountains"
            --save-output""",
            (96, 64),
        ),
        (
            """sglang generate --model-path Qwen/Qwen-Image --prompt "A curious raccoon" --width 720 --height 720
            --save-output --output-path outputs""",
            (720, 720),
        ),
        (
            """sglang generate --model-path Qwen/Qwen-Image-Edit --prompt "Convert 2D style to 3D style"
            --image-path path/to/input.jpg --width 1024 --height 1536 --save-output --output-path outputs""",
            (1024, 1536),
        ),
    ],
)
def test_a_picture_by_its_published_name(hub: Path, tmp_path: Path, command: str, size: tuple[int, int]) -> None:
    (tmp_path / "path" / "to").mkdir(parents=True)
    Image.effect_mandelbrot((120, 90), (-3, -2.5, 2, 2.5), 100).save(tmp_path / "path" / "to" / "input.jpg")
    done = run(command, hub, tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "outputs").glob("*.png")
    assert "native family" in done.stderr and Image.open(path).size == size


@pytest.mark.parametrize(
    ("placement", "told"),
    [
        (OFFLOAD, "text_encoder_cpu_offload=true: "),
        (LAYERWISE, "dit_layerwise_offload=true: "),
    ],
)
def test_placement_that_this_machine_has_no_devices_for_is_refused(
    hub: Path, tmp_path: Path, placement: str, told: str
) -> None:
    done = run(STREET.format(placement=placement + " --device cpu"), hub, tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {told}"), done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("placement", [OFFLOAD, LAYERWISE])
def test_offload_takes_effect(hub: Path, tmp_path: Path, placement: str) -> None:
    done = run(STREET.format(placement=placement), hub, tmp_path)
    assert done.returncode == 0, done.stderr
