"""What only a GPU can show: the compiled kernels inside whole generations, and times and memory of the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sgl_diffusion.models.embedded import world
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; runs wherever there is one"),
]
PARAMS = SamplingParams(prompt=["a red circle left of a blue square on a yellow background"], seed=1, save_output=False)


def picture(**server: object) -> np.ndarray:
    result = Engine.load(ServerArgs.model_validate(server)).run(PARAMS)
    return np.asarray(result.outputs[0].image, dtype=np.float64)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255.0**2 / max(np.mean((a - b) ** 2), 1e-9)))


@pytest.mark.parametrize("attention", ["torch_sdpa", "triton"])
def test_the_gpu_draws_what_the_cpu_draws(attention: str) -> None:
    gpu = picture(device="cuda", precision="fp32", attention_backend=attention)
    assert psnr(gpu, picture(device="cpu")) > 40


def test_the_same_request_gives_the_same_bytes() -> None:
    assert np.array_equal(picture(device="cuda"), picture(device="cuda"))


def test_bf16_on_the_gpu_meets_the_score() -> None:
    engine = Engine.load(ServerArgs(device="cuda"))
    scenes = world.draw_scenes(world.split_scenes(held_out=True), np.random.default_rng(2), 100)
    result = engine.run(SamplingParams(prompt=[world.caption(s) for s in scenes], seed=1, save_output=False))
    pictures = [np.asarray(o.image, np.float32).transpose(2, 0, 1) / 127.5 - 1 for o in result.outputs]
    score = world.score(pictures, scenes)
    assert score["scene"] >= 0.90 and score["shapes"] >= 0.80, score


@pytest.mark.parametrize("pin", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize(
    "offload",
    [{"performance_mode": "memory", "vae_tiling": False}]
    + [{"layerwise_offload_components": "all", "dit_offload_prefetch_size": n} for n in (0, 0.5, 3)],
    ids=["component", "one ahead", "half ahead", "three ahead"],
)
def test_offloaded_weights_draw_the_same_bytes(offload: dict[str, object], pin: bool) -> None:
    resident = picture(device="cuda", enable_cuda_graph="false")
    engine = Engine.load(ServerArgs.model_validate({"device": "cuda", "pin_cpu_memory": pin, **offload}))
    for _ in range(2):
        result = engine.run(PARAMS)
        assert np.array_equal(np.asarray(result.outputs[0].image, dtype=np.float64), resident)
    told = result.report.effective["offload"]
    assert all(t["host"] == ("pinned memory" if pin else "pageable memory") for t in told.values())


def test_times_and_memory_come_from_the_device() -> None:
    report = Engine.load(ServerArgs(device="cuda")).run(PARAMS).report
    assert report.effective["precision"]["transformer"] == "bf16"
    assert report.memory_checkpoints["after_forward"].peak_allocated_mb > 1
    assert all(s.duration_ms > 0 for s in report.denoise_steps_ms)
    stages = sum(s.duration_ms for s in report.steps)
    assert 0.2 * report.total_duration_ms < stages < 1.05 * report.total_duration_ms
    assert report.versions["driver"]
