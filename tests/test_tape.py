"""A taped call gives the bits of the call itself, whatever it is given, and refuses what it could not repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgl_diffusion.runtime import tape
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.graphs import CAPTURED, Graphs, capturing
from sgl_diffusion.runtime.tape import Tapes

PROMPTS = ["a red circle on a blue background", "a white cross above a black triangle on a red background"]


def chained(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Composite operations, views of results, in-place changes, results of several tensors, a slice that is written."""
    y = F.linear(F.layer_norm(x, x.shape[-1:]), w, w[0])
    y = F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None])[:, 0]
    first, second = y.add_(1).chunk(2, dim=-1)
    z = torch.cat([second.contiguous(), first.reshape(y.shape[0], -1, first.shape[-1])], dim=-1)
    z[:, 0] = F.gelu(z[:, 0], approximate="tanh")
    values, places = z.max(dim=-1)
    return z.transpose(0, 1).contiguous(), values, places


def by_runs(x: Tensor, group: Tensor) -> tuple[Tensor, ...]:
    """Python goes on by what an argument holds."""
    _, counts = torch.unique_consecutive(group, return_counts=True)
    return (torch.cat([part * len(part) for part in x.split(counts.tolist())]),)


@torch.inference_mode()
@pytest.mark.parametrize("function", [chained, by_runs])
def test_a_replay_gives_the_bits_of_the_call(function: Callable[..., tuple[Tensor, ...]]) -> None:
    graphs, torch_rng = Graphs(Tapes()), torch.Generator().manual_seed(0)
    group = torch.tensor([0, 0, 1, 1, 1, 2], dtype=torch.int32)
    for _ in range(4):
        x = torch.randn(6, 5, 8, generator=torch_rng)
        rest = torch.randn(8, 8, generator=torch_rng) if function is chained else group
        want = function(x.clone(), rest)
        got = graphs(function, x, rest)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (graphs.captures, graphs.replays) == (1, 3)


@torch.inference_mode()
def test_a_value_that_python_went_by_is_recorded_again_when_it_changes() -> None:
    graphs, x = Graphs(Tapes()), torch.randn(6, 2)
    groups = [torch.tensor(g, dtype=torch.int32) for g in ([0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1])]
    for group in (*groups, groups[0], groups[0].clone()):
        assert torch.equal(graphs(by_runs, x, group)[0], by_runs(x, group)[0])
    assert (graphs.captures, graphs.replays) == (3, 1)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: (x * float((x + 1).sum()),), "aten._local_scalar_dense.default reads a value that was computed"),
        (lambda x: (x[(x > 0)],), "aten.index.Tensor reads a value that was computed"),
        (lambda x: ((x + 1).nonzero(),), "aten.nonzero.default reads a value that was computed"),
    ],
)
def test_what_a_tape_cannot_repeat_runs_as_it_stands(function: Any, reason: str) -> None:
    graphs, x = Graphs(Tapes()), torch.randn(8)
    for _ in range(2):
        assert torch.equal(graphs(function, x)[0], function(x)[0])
    assert graphs.report()["eager"] == {f"a capture failed: {reason}": 2}


@torch.inference_mode()
def test_a_tape_holds_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "LIMIT", 3 * 1024**2)
    graphs = Graphs(Tapes())
    for size, fits in ((1024, True), (1024**2, False), (2048, True)):
        graphs(lambda_free_sum, torch.ones(size))
        assert bool(graphs.report()["captures"]) == fits
    graphs(lambda_free_sum, torch.ones(1024**2))
    assert graphs.report()["eager"] == {"a capture failed: what it makes in between is more than 3 MiB": 1}


def lambda_free_sum(x: Tensor) -> tuple[Tensor]:
    return ((x + 1) * 2,)


@torch.inference_mode()
def test_weights_changed_in_place_are_seen() -> None:
    layer, graphs, x = nn.Linear(4, 4), Graphs(Tapes()), torch.randn(2, 4)

    def call(x: Tensor) -> tuple[Tensor]:
        return (layer(x),)

    for _ in range(3):
        assert torch.equal(graphs(call, x)[0], layer(x))
        layer.weight.mul_(2)
    assert (graphs.captures, graphs.replays) == (1, 2)


# -- in a pipeline ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(ServerArgs(device="cpu"))


def pictures(engine: Engine, **more: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
    """One for each prompt, and how the last one's stages ran."""
    drawn, stages = [], {}
    for i, prompt in enumerate(PROMPTS):
        params = SamplingParams(prompt=[prompt], seed=i, num_inference_steps=3, save_output=False, **more)
        result = engine.run(params)
        drawn.append(np.asarray(result.outputs[0].image))
        stages = result.report.effective["cuda_graph"]
    return drawn, stages


@pytest.mark.parametrize("more", [{}, {"negative_prompt": "", "true_cfg_scale": 2.0}, {"num_outputs_per_prompt": 2}])
def test_every_stage_taped_draws_the_same_bytes(engine: Engine, more: dict[str, Any]) -> None:
    backend: Any = engine.backend
    backend.graphs = {stage: Graphs(Tapes(), "eager") for stage in CAPTURED}
    want, _ = pictures(engine, **more)
    backend.graphs = {stage: Graphs(Tapes()) for stage in CAPTURED}
    with capturing(backend.graphs, shapes=1):
        warmed, _ = pictures(engine, **more)
    got, stages = pictures(engine, **more)
    for a, b, c in zip(want, warmed, got, strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)
    for stage in stages.values():
        assert stage["replays"] > 0 and stage["captures"] == 0 and stage["eager"] == {}


def test_auto_tapes_the_steps_of_a_small_model() -> None:
    engine = Engine.load(ServerArgs(device="cpu"))
    params = SamplingParams(prompt=[PROMPTS[0]], num_inference_steps=4, save_output=False)
    counts = [engine.run(params).report.effective["cuda_graph"]["denoising"] for _ in range(2)]
    assert counts[0] == {"captures": 1, "replays": 3, "eager": {}, "recorder": "CPU tape"}
    assert counts[1] == {"captures": 0, "replays": 4, "eager": {}, "recorder": "CPU tape"}
