"""Same request, same bytes: whatever is drawn beside it, and wherever it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sgl_diffusion.models.family import Size
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.batch import Neighbours
from sgl_diffusion.runtime.card import card, check
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.events import Drawing, StepDone
from sgl_diffusion.runtime.snapshots import Snapshot, read_snapshot, save_snapshot

Tiny = Callable[[str], Path]
PICTURE = {"height": 48, "width": 80, "num_inference_steps": 4, "max_sequence_length": 24}
CLIP = {**PICTURE, "height": 64, "width": 96, "num_frames": 5}
GUIDED = {"negative_prompt": "a white cross", "true_cfg_scale": 3.0}


@pytest.fixture(scope="module")
def load(tiny: Tiny) -> Callable[..., Engine]:
    engines: dict[str, Engine] = {}

    def loaded(name: str) -> Engine:
        if name not in engines:
            engines[name] = Engine.load(ServerArgs(model_path=str(tiny(name)), device="cpu"))
        return engines[name]

    return loaded


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("given") / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 72, 3), np.uint8)).save(path)
    return str(path)


def files(engine: Engine, folder: Path, **asked: Any) -> list[bytes]:
    name = "0.mp4" if engine.backend.draws_video else "0.png"
    result = engine.run(SamplingParams(output_path=str(folder), output_file_name=name, **asked))
    return [path.read_bytes() for path in result.paths]


# -- neighbours ---------------------------------------------------------------------


@pytest.mark.parametrize("agree", [None, False], ids=["measured", "apart"])
@pytest.mark.parametrize(("name", "sampling"), [("flux", PICTURE), ("flux", PICTURE | GUIDED), ("wan", CLIP)])
def test_a_batch_is_the_bytes_of_its_requests(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sampling: dict[str, Any], agree: bool | None
) -> None:
    engine = load(name)
    if agree is not None:
        monkeypatch.setattr(Neighbours, "_measured", lambda *a: agree)
    asked = {"a": 7, "a red circle": 7, "two blue squares above a cross": 99}
    alone = [
        file
        for i, (prompt, seed) in enumerate(asked.items())
        for file in files(engine, tmp_path / str(i), prompt=prompt, seed=seed, num_outputs_per_prompt=2, **sampling)
    ]
    batch = files(
        engine, tmp_path / "all", prompt=list(asked), seed=list(asked.values()), num_outputs_per_prompt=2, **sampling
    )
    assert len(set(batch)) == 6
    assert batch == alone


def test_a_report_tells_how_a_batch_was_computed(load: Any, tmp_path: Path) -> None:
    """Of its own request, not of one that was left."""
    engine = load("flux")
    interrupted(engine, 1, tmp_path, prompt=["a", "b"], **PICTURE)
    for count in (1, 2):
        asked = SamplingParams(prompt="a", num_outputs_per_prompt=count, save_output=False, **PICTURE)
        told = engine.run(asked).report.effective["batch"]
        assert list(told) == (["denoising", "decoding"] if count == 2 else [])


class Family:
    """Decodes a batch otherwise than its parts, once it is longer than `largest`."""

    def __init__(self, largest: int) -> None:
        self.largest, self.calls = largest, 0

    def decode(self, x: Tensor, size: Size, execute: Any = None) -> Iterator[Tensor]:
        self.calls += 1
        yield x if len(x) <= self.largest else x + 1e-7 * x


@pytest.mark.parametrize(("largest", "calls"), [(4, 1), (1, 4)])
def test_bits_are_measured_once_for_a_shape(largest: int, calls: int) -> None:
    family, neighbours = Family(largest), Neighbours()
    torch.manual_seed(0)
    for round in range(2):
        x = torch.randn(4, 3, 8, 8)
        (found,) = neighbours.decode(family, x, Size(8, 8), None, tiling=False)  # type: ignore[arg-type]
        assert torch.equal(found, x)
        assert family.calls == 5 + calls * (round + 1)
    assert neighbours.took["decoding"].startswith("together" if largest == 4 else "one by one")


@pytest.mark.parametrize(
    ("given", "expected"), [([5], [5, 6, 7, 8]), ([5, 50], [5, 6, 50, 51]), (None, [42, 43, 44, 45])]
)
def test_seeds_are_one_or_one_for_each_prompt(load: Any, given: list[int] | None, expected: list[int]) -> None:
    asked = SamplingParams(prompt=["a", "b"], seed=given, num_outputs_per_prompt=2, save_output=False, **PICTURE)
    assert [output.seed for output in load("flux").run(asked).outputs] == expected


def test_other_numbers_of_seeds_are_refused(load: Any) -> None:
    asked = SamplingParams(prompt=["a", "b", "c"], seed=[1, 2], save_output=False, **PICTURE)
    with pytest.raises(UserError, match="seed=1 2: 2 for 3 prompts; expected 1 or 3"):
        load("flux").run(asked)


def test_requests_of_one_batch_key_make_one_request(load: Any, picture: str) -> None:
    def key(name: str = "flux", **asked: Any) -> str | None:
        shape = CLIP if name.startswith("wan") else PICTURE | {"width": 112}  # a size that nothing here has drawn
        found: str | None = check(load(name), SamplingParams(**{"prompt": "a", **shape, **asked})).batch_key
        return found

    assert key() == key(prompt="b", seed=3, output_file_name="x.png") is not None
    others = [{"height": 64}, {"num_inference_steps": 2}, GUIDED, {"num_outputs_per_prompt": 2}, {"guidance_scale": 2}]
    assert len({key(), *(key(**other) for other in others)}) == 1 + len(others)
    assert key("wan22_ti2v", image_path=picture) is None  # a batch has one picture


def test_requests_that_gain_nothing_beside_others_have_no_batch_key(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = load("flux"), {**PICTURE, "height": 80}
    assert check(engine, SamplingParams(prompt="a", **asked)).batch_key is not None
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    engine.run(SamplingParams(prompt=["a", "b"], save_output=False, **asked))
    assert check(engine, SamplingParams(prompt="a", **asked)).batch_key is None


# -- between steps ------------------------------------------------------------------


def interrupted(engine: Engine, after: int, folder: Path, **asked: Any) -> Snapshot:
    """Of a request that is left after a step, through a file."""
    events = engine.generate(SamplingParams(save_output=False, **asked))
    drawing = next(e.drawing for e in events if isinstance(e, StepDone) and e.step == after)
    assert drawing is not None
    save_snapshot(drawing.snapshot(), folder / "s.safetensors")
    events.close()  # type: ignore[attr-defined]
    return read_snapshot(folder / "s.safetensors")


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("flux", PICTURE | GUIDED),
        ("wan", CLIP),  # a solver that remembers
        ("wan_dmd", CLIP | {"num_inference_steps": None}),  # fresh noise at every step
        ("wan22", CLIP),  # two denoisers
        ("wan22_ti2v", CLIP | {"image_path": 1}),
    ],
)
def test_a_resumed_request_ends_in_the_same_bytes(
    load: Any, tmp_path: Path, picture: str, name: str, sampling: dict[str, Any], after: int
) -> None:
    engine, sampling = load(name), dict(sampling)
    if "image_path" in sampling:
        sampling["image_path"] = picture
    after = min(after, 2) if name == "wan_dmd" else after
    asked = {"prompt": "a red circle", "seed": 5, **sampling}
    whole = files(engine, tmp_path / "whole", **asked)
    snapshot = interrupted(engine, after, tmp_path, **asked)
    params = SamplingParams(
        output_path=str(tmp_path / "resumed"),
        output_file_name="0.mp4" if engine.backend.draws_video else "0.png",
        **asked,
    )
    events = list(engine.generate(params, snapshot))
    assert [e.step for e in events if isinstance(e, StepDone)][0] == after + 1
    result = events[-1].result  # type: ignore[union-attr]
    assert [path.read_bytes() for path in result.paths] == whole
    assert result.report.effective["resumed_after_step"] == after


def test_part_of_a_batch_is_resumed_alone(load: Any, tmp_path: Path) -> None:
    engine = load("wan")
    alone = files(engine, tmp_path / "alone", prompt="b", seed=9, **CLIP)
    part = interrupted(engine, 2, tmp_path, prompt=["a", "b"], seed=[1, 9], **CLIP).part(slice(1, 2))
    params = SamplingParams(prompt="b", seed=9, output_path=str(tmp_path / "part"), output_file_name="0.mp4", **CLIP)
    *_, end = engine.generate(params, part)
    assert [path.read_bytes() for path in end.result.paths] == alone


@pytest.mark.parametrize(
    "change", [{"prompt": "b"}, {"seed": 2}, {"height": 96}, {"num_inference_steps": 5}, {"num_outputs_per_prompt": 2}]
)
def test_another_request_does_not_resume(load: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    engine, asked = load("flux"), {"prompt": "a", "seed": 1, **PICTURE}
    snapshot = interrupted(engine, 2, tmp_path, **asked)
    with pytest.raises(UserError, match="resume: the snapshot is of another request"):
        list(engine.generate(SamplingParams(save_output=False, **{**asked, **change}), snapshot))


def test_a_broken_snapshot_is_told(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    interrupted(load("flux"), 2, tmp_path, prompt="a", **PICTURE)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        read_snapshot(path)


@pytest.mark.parametrize(("name", "sampling"), [("flux", PICTURE), ("wan", CLIP), ("wan_dmd", CLIP)])
def test_a_preview_comes_to_be_the_result(load: Any, name: str, sampling: dict[str, Any]) -> None:
    engine = load(name)
    steps = {"num_inference_steps": None} if name == "wan_dmd" else {}
    asked = SamplingParams(prompt=["a", "b"], save_output=False, **{**sampling, **steps})
    seen: list[list[np.ndarray[Any, Any]]] = []
    result = None
    for event in engine.generate(asked):
        if isinstance(event, StepDone):
            drawing: Drawing | None = event.drawing
            assert drawing is not None
            seen.append(drawing.preview())
        result = getattr(event, "result", None)
    assert result is not None
    final = [np.asarray(o.image) if o.frames is None else o.frames[0] for o in result.outputs]
    errors = [max(np.abs(a.astype(int) - b).mean() for a, b in zip(step, final, strict=True)) for step in seen]
    assert errors[-1] < 1 and errors[0] > errors[-1]
    again = engine.run(asked).outputs
    assert all(
        np.array_equal(a.image if a.frames is None else a.frames, b.image if b.frames is None else b.frames)
        for a, b in zip(again, result.outputs, strict=True)
    )  # looking changed nothing


def test_a_card_tells_what_can_be_asked_for(load: Any) -> None:
    assert SimpleNamespace(**card(load("flux"))).takes_pictures == [0]
    told = card(load("wan22_ti2v"))
    assert (told["draws_video"], told["takes_pictures"], told["size_step"], told["frame_step"]) == (True, [0, 1], 32, 4)
    assert told["defaults"]["num_frames"] % 4 == 1 and told["negative_prompt_by_default"]
