"""Captured steps, with a recorder that stands in for a GPU's; and that a native step can be captured at all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sgl_diffusion.bench.launches import counted, find, on_meta
from sgl_diffusion.models.family import Size
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.denoise import EulerStep
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.graphs import CAPACITY, CAPTURED, REFUSALS, Graphs, capturing, make_graphs

CPU = torch.device("cpu")


class Replays:
    """As CUDA graphs do: the results stay where they were, and a replay sees nothing but the static arguments."""

    name = "test"

    def record(self, function: Any, arguments: Any) -> Any:
        results = function(*arguments)

        def replay() -> None:
            for result, value in zip(results, function(*arguments), strict=True):
                result.copy_(value)

        return results, replay


class CannotRecord:
    name = "test"

    def __init__(self) -> None:
        self.attempts = 0

    def record(self, function: Any, arguments: Any) -> Any:
        self.attempts += 1
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


PROMPTS = ["a red circle on a blue background", "a white cross above a black triangle on a red background"]


def picture(engine: Engine, prompt: str, seed: int, size: int = 64, **more: Any) -> np.ndarray:
    params = SamplingParams(
        prompt=[prompt], seed=seed, height=size, width=size, num_inference_steps=3, save_output=False, **more
    )
    return np.asarray(engine.run(params).outputs[0].image)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(ServerArgs(device="cpu"))


def graphed(engine: Engine, recorder: Any, why_not: str = "") -> dict[str, Graphs]:
    graphs = {stage: Graphs(recorder, why_not) for stage in CAPTURED}
    engine.backend.graphs = graphs  # type: ignore[union-attr]
    return graphs


def test_replays_draw_what_eager_steps_draw(engine: Engine) -> None:
    """One capture serves every prompt and seed of a size; guidance of any strength, and another size, have one."""
    graphed(engine, None, "eager")
    requests: list[dict[str, Any]] = [
        {"prompt": PROMPTS[0], "seed": 1},
        {"prompt": PROMPTS[1], "seed": 2},
        {"prompt": PROMPTS[0], "seed": 3, "size": 32},
        {"prompt": PROMPTS[1], "seed": 1, "negative_prompt": PROMPTS[0], "true_cfg_scale": 2.0},
        {"prompt": PROMPTS[0], "seed": 9},
        {"prompt": PROMPTS[0], "seed": 1, "negative_prompt": PROMPTS[1], "true_cfg_scale": 3.0},
    ]
    want = [picture(engine, **request) for request in requests]
    graphs, totals = graphed(engine, Replays()), Counter[str]()
    for request, eager in zip(requests, want, strict=True):
        params = {"prompt": [request["prompt"]], **{k: v for k, v in request.items() if k not in ("prompt", "size")}}
        size = request.get("size", 64)
        result = engine.run(SamplingParams(**params, height=size, width=size, num_inference_steps=3, save_output=False))
        assert np.array_equal(np.asarray(result.outputs[0].image), eager)
        for stage, counts in result.report.effective["cuda_graph"].items():
            assert counts["eager"] == {}
            totals.update({f"{stage} {k}": counts[k] for k in ("captures", "replays")})
    assert totals == {
        "text_encoding captures": 2,  # one of each encoder; negative prompts are prompts
        "text_encoding replays": 2 * 8 - 2,
        "denoising captures": 3,
        "denoising replays": 6 * 3 - 3,
        "decoding captures": 2,
        "decoding replays": 6 - 2,
    }
    assert len(graphs["denoising"]._graphs) == 3


def test_after_a_warm_up_nothing_new_is_captured(engine: Engine) -> None:
    graphs = graphed(engine, Replays())
    with capturing(graphs, shapes=1):
        picture(engine, PROMPTS[0], 1)
    for prompt in PROMPTS:
        params = SamplingParams(prompt=[prompt], height=64, width=64, num_inference_steps=2, save_output=False)
        effective = engine.run(params).report.effective["cuda_graph"]
        assert [(c["captures"], c["eager"]) for c in effective.values()] == [(0, {})] * 3
    small = SamplingParams(prompt=[PROMPTS[0]], height=32, width=32, num_inference_steps=2, save_output=False)
    effective = engine.run(small).report.effective["cuda_graph"]
    assert effective["denoising"] == {
        "captures": 0,
        "replays": 0,
        "eager": {"this shape was not warmed up": 2},
        "recorder": "test",
    }
    assert effective["decoding"]["eager"] == {"this shape was not warmed up": 1}
    assert effective["text_encoding"] == {"captures": 0, "replays": 2, "eager": {}, "recorder": "test"}


def test_a_warm_up_keeps_all_that_it_captured() -> None:
    graphs = {"denoising": Graphs(Replays())}
    with capturing(graphs, shapes=CAPACITY + 2):
        for size in range(1, CAPACITY + 3):
            graphs["denoising"](double, torch.zeros(size))
    for size in range(1, CAPACITY + 3):
        graphs["denoising"](double, torch.zeros(size))
    assert graphs["denoising"].report() == {
        "captures": CAPACITY + 2,
        "replays": CAPACITY + 2,
        "eager": {},
        "recorder": "test",
    }


def test_graphs_asked_for_are_captured_even_after_a_warm_up() -> None:
    graphs = {"denoising": Graphs(Replays(), required=True)}
    with capturing(graphs, shapes=1):
        graphs["denoising"](double, torch.zeros(1))
    graphs["denoising"](double, torch.zeros(2))
    assert graphs["denoising"].report() == {"captures": 2, "replays": 0, "eager": {}, "recorder": "test"}


def test_results_outlive_the_next_replay() -> None:
    graphs = Graphs(Replays())
    results = [graphs(double, torch.full((2,), float(i)))[0] for i in range(4)]
    assert [float(r[0]) for r in results] == [0, 2, 4, 6]


def double(x: Tensor, *rest: Any) -> tuple[Tensor]:
    return (2 * x,)


def test_few_graphs_are_kept_and_the_oldest_goes() -> None:
    graphs = Graphs(Replays())
    for size in [*range(1, CAPACITY + 2), 2]:
        graphs(double, torch.zeros(size))
    assert (graphs.captures, graphs.replays) == (CAPACITY + 1, 1)
    graphs(double, torch.zeros(1))
    assert graphs.captures == CAPACITY + 2


def test_a_shape_class_is_shapes_dtypes_and_plain_values() -> None:
    graphs = Graphs(Replays())
    x = torch.zeros(2)
    for arguments in ((x,), (x.bfloat16(),), (x, 1), (x, 2)):
        graphs(double, *arguments)
    assert graphs.captures == 4
    graphs(double, x, 2)
    assert graphs.captures == 4


def test_a_failed_capture_is_told_or_an_error() -> None:
    graphs = Graphs(CannotRecord())
    for _ in range(2):
        assert float(graphs(double, torch.ones(1))[0]) == 2
    assert graphs.report()["eager"] == {"a capture failed: operation not permitted when stream is capturing": 2}
    with pytest.raises(UserError, match="enable_cuda_graph=true: a capture failed: operation not permitted"):
        Graphs(CannotRecord(), required=True)(double, torch.ones(1))


def test_the_latest_failures_are_remembered_and_no_more() -> None:
    graphs = Graphs(CannotRecord())
    sizes = [*range(1, REFUSALS + 2), REFUSALS + 1, 2, 1]  # all are remembered but for the first
    for size in sizes:
        graphs(double, torch.zeros(size))
    assert graphs.recorder.attempts == REFUSALS + 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("asked", "prevented_by", "why"),
    [("false", "", "switched off"), ("auto", "offload", "offload"), ("false", "offload", "switched off")],
)
def test_the_reason_for_eager_steps_is_reported(asked: str, prevented_by: str, why: str) -> None:
    graphs = make_graphs(asked, Replays(), {"denoising": prevented_by} if prevented_by else {})["denoising"]
    graphs(double, torch.ones(1))
    assert graphs.report() == {"captures": 0, "replays": 0, "eager": {why: 1}, "recorder": None}
    assert graphs.report() == {"captures": 0, "replays": 0, "eager": {}, "recorder": None}


def test_asked_for_and_not_to_be_had_is_an_error() -> None:
    with pytest.raises(UserError, match="enable_cuda_graph=true: the device is cpu"):
        Engine.load(ServerArgs(device="cpu", enable_cuda_graph="true"))
    with pytest.raises(UserError, match="enable_cuda_graph=true: weights have no address"):
        make_graphs("true", Replays(), {"denoising": "weights have no address"})
    assert ServerArgs.model_validate({"enable_cuda_graph": False}).enable_cuda_graph == "false"


# -- a step can be captured -------------------------------------------------------

SYNCHRONISES = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique_consecutive"}
ALLOCATES_NOTHING = {"view", "slice", "select", "split", "unbind", "permute", "transpose", "t", "expand", "alias"}


class Watch(TorchDispatchMode):
    """Operations of a step with the shapes they make; fails on what no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, Any]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        assert name not in SYNCHRONISES, f"{name} waits for the device"
        boolean = [a for a in tensors[1:] if a.dtype == torch.bool]
        assert not (name == "index" and boolean), "boolean indexing waits for the device"
        result = func(*args, **(kwargs or {}))
        made = [r for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, Tensor)]
        devices = {t.device for t in [*tensors, *made]}
        assert len(devices) <= 1, f"{name} moves data between {devices}"
        if name not in ALLOCATES_NOTHING:
            self.seen[name, tuple((tuple(r.shape), r.dtype) for r in made)] += 1
        return result


@pytest.mark.parametrize(
    "model", ["flux1-dev", "flux1-schnell", "flux.2-dev", "wan2.1-t2v-1.3b", "qwen-image-edit-2511", "z-image"]
)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "cfg"])
def test_a_step_waits_for_nothing_moves_nothing_and_makes_the_same_every_time(model: str, guided: bool) -> None:
    """At true size on shape-only tensors, which take the path of a GPU's."""
    family, preset = find(model)
    size = Size(preset.defaults.height, preset.defaults.width, preset.defaults.num_frames)
    predict, x = on_meta(family, preset, size, "sm_90")
    step = EulerStep(predict.call, predict.call if guided else None)
    watches = []
    for i in range(2):
        branches = [(predict.steps[i], *predict.request)] * (2 if guided else 1)
        with counted("sm_90") as launches, Watch() as watch:
            step(x, *torch.empty(2, device="meta"), *branches)
        watches.append(watch)
        assert launches.total() > 250
    assert watches[0].seen and watches[0].seen == watches[1].seen


@pytest.mark.parametrize("stage", ["text_encoding", "decoding"])
def test_an_encoding_and_a_decode_wait_for_nothing(engine: Engine, stage: str) -> None:
    class Watched(Graphs):
        def __call__(self, function: Any, *arguments: Any) -> Any:
            with Watch() as self.watch:
                return function(*arguments)

    graphs = graphed(engine, None, "eager")
    graphs[stage] = watched = Watched(Replays())
    picture(engine, PROMPTS[0], 1)
    assert watched.watch.seen


def test_the_watch_sees_what_a_graph_cannot_hold() -> None:
    x = torch.arange(4.0)
    for sin, told in (
        (lambda: x.sum().item(), "waits for the device"),
        (lambda: x[x > 1], "waits for the device"),
        (lambda: x.nonzero(), "waits for the device"),
        (lambda: torch.empty(2, device="meta").copy_(x[:2]), "moves data"),
    ):
        with pytest.raises(AssertionError, match=told), Watch():
            sin()
