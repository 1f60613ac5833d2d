"""The example commands of the users' documents, with tiny checkpoints under the published names."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch
from hub import publish

from sgl_diffusion.runtime.output import read_metadata

SGLANG = Path(sys.executable).with_name("sglang")
SMALL = {"height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 64}
CHECKPOINTS = {"Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan", "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan22"}

RACCOON = """sglang generate --model-path Wan-AI/Wan2.2-T2V-A14B-Diffusers {placement}
    --prompt "A curious raccoon" --save-output --output-path outputs --output-file-name {name}"""
STREET = """sglang generate --model-path Wan-AI/Wan2.2-T2V-A14B-Diffusers {placement}
    --prompt "A quiet city street after rain" """
OFFLOAD = "--text-encoder-cpu-offload --pin-cpu-memory"
LAYERWISE = (
    "--dit-layerwise-offload --layerwise-offload-components transformer text_encoder --dit-offload-prefetch-size 0"
)


@pytest.fixture(scope="module")
def hub(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    for repo_id, name in CHECKPOINTS.items():
        publish(tiny(name), repo_id, cache, SMALL)
    return cache


def run(command: str, hub: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    _, *words = shlex.split(command)
    env = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([SGLANG, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (RACCOON.format(placement="", name='"a-curious-raccoon.mp4"'), "a-curious-raccoon.mp4"),
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
    ("placement", "told"),
    [
        (OFFLOAD, "text_encoder_cpu_offload=true: "),
        (LAYERWISE, "dit_layerwise_offload=true: "),
        ("--num-gpus 4", "num_gpus=4: "),
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
