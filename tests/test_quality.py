"""What quantization costs is measured, every scheme keeps within what it declares, and a broken one does not."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sgl_diffusion.cli.main import main
from sgl_diffusion.models.layers import Linear
from sgl_diffusion.runtime import quality, similarity
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.quality import (
    SceneScores,
    draw,
    draw_scenes,
    held_out_scenes,
    layer_checks,
    layer_errors,
    of_scenes,
    picture_errors,
    scene_checks,
    score,
)
from sgl_diffusion.runtime.quantization.convert import quantize_checkpoint
from sgl_diffusion.runtime.quantization.layers import LAYERS, SideBySide
from sgl_diffusion.runtime.quantization.schemes import SCHEMES, Scheme
from sgl_diffusion.runtime.quantization.weight import QuantizedWeight
from sgl_diffusion.runtime.similarity import Lpips, psnr, ssim

FEW = of_scenes(held_out_scenes(4), steps=4)
STEPS = 2  # the score is that of the model's own 20, which `sglang bench quality` draws
JUDGED = 50  # scenes, of which one is two points
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def full() -> Engine:
    return Engine.load(ServerArgs(device="cpu"))


def quantized(scheme: str) -> Engine:
    return Engine.load(ServerArgs(device="cpu", quantization=scheme))


# -- schemes ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_keeps_what_it_declares(name: str, full: Engine) -> None:
    engine = quantized(name)
    layers, judge = layer_errors(full, engine, FEW)
    assert len(layers) == 24 and {error.format for error in layers} == {name}
    pictures = picture_errors(judge, draw(engine, FEW))
    right = score(judge, held_out_scenes(4))
    checks = layer_checks(layers) + scene_checks(name, pictures, SceneScores(4, right, right))[:1]
    assert len(checks) == 4 and all(check.passed for check in checks), checks
    # and declares not much more than it costs: a worse one would be found
    assert all(check.worst > check.allowed / (10 if "rows" in check.what else 3) for check in checks), checks


@pytest.mark.parametrize(("name", "points"), [("fp8", 2), ("int8", 2), ("int4", 5), ("svdquant", 2)])
def test_scenes_stay_right(name: str, points: float) -> None:
    """As near to all of them as a model in full could be, which cannot have more."""
    assert SCHEMES[name].tolerance.points == points
    scenes = held_out_scenes(JUDGED)
    right = score(draw_scenes(quantized(name), scenes, STEPS), scenes)
    assert SceneScores(JUDGED, {"scene": 1.0, "shapes": 1.0}, right).points_lost <= points, right


def swapped(weight: QuantizedWeight) -> QuantizedWeight:
    """With the codes of two columns, or of two pairs of them, in each other's place."""
    codes = weight.codes.clone()
    for column, other in ((0, 1), (1, 0)):
        codes[:, column] = weight.codes[:, other]
    return replace(weight, codes=codes)


def doubled(weight: QuantizedWeight) -> QuantizedWeight:
    """With the first scale of its rows twice as large."""
    name = "scale" if weight.global_scale is None else "global_scale"
    scale = getattr(weight, name).clone()
    scale[0] = scale[0] + 1 if weight.kind == "mxfp8" else scale[0] * 2  # exponents
    return replace(weight, **{name: scale})


@pytest.mark.parametrize("broken", [swapped, doubled])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_broken_scheme_is_found(
    name: str, broken: Callable[[QuantizedWeight], QuantizedWeight], full: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Scheme = SCHEMES[name]

    def quantize(weight_NK: Tensor) -> QuantizedWeight:
        return right.quantize(weight_NK) if weight_NK.is_meta else broken(right.quantize(weight_NK))

    monkeypatch.setitem(SCHEMES, name, replace(right, quantize=quantize))  # type: ignore[arg-type]
    layers, _ = layer_errors(full, quantized(name), of_scenes(held_out_scenes(1), steps=1))
    weights, rows, outputs = layer_checks(layers)
    assert not rows.passed, (weights, rows, outputs)


def test_points_are_lost_where_pictures_are_wrong(full: Engine) -> None:
    scenes = held_out_scenes(4)
    judge = draw(full, FEW)
    right, wrong = score(judge, scenes), score(replace(judge, pixels=judge.pixels[::-1]), scenes)
    assert right["scene"] == 1 and wrong["scene"] < 1
    lost = SceneScores(4, right, wrong)
    assert lost.points_lost == 100 * max(right[n] - wrong[n] for n in ("scene", "shapes")) >= 25
    checks = scene_checks("fp8", picture_errors(judge, judge), lost)
    assert [check.passed for check in checks] == [True, False]


# -- layers -----------------------------------------------------------------------


def test_a_layer_is_judged_on_the_inputs_of_the_model_in_full(full: Engine) -> None:
    """At the first, the middle and the last of five steps, and not at the others."""
    engine, path = quantized("int8"), "single_transformer_blocks.2.proj_out"
    request, seen = of_scenes(held_out_scenes(1), steps=5), []
    pipeline = full.backend
    layer = pipeline.parts["transformer"].get_submodule(path)
    graphs = pipeline.graphs["denoising"]
    hook = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    graphs.why_not = "a test"
    judge = draw(full, request)
    hook.remove()
    graphs.why_not = ""
    draw(full, request)  # captured: from here on, a step calls no layer
    other = engine.backend.parts["transformer"].get_submodule(path)
    compared = [seen[i] for i in (0, 2, 4)]
    with torch.inference_mode():
        wrong = sum((other(x) - layer.forward(x)).square().sum().item() for x in compared)
        whole = sum(layer.forward(x).square().sum().item() for x in compared)
    errors, again = layer_errors(full, engine, request)
    error = next(e for e in errors if e.layer == path)
    assert error.outputs == pytest.approx(math.sqrt(wrong / whole), rel=1e-5)
    difference = other.quantized.dequantized(torch.float32) - layer.weight
    assert error.weights == pytest.approx((difference.norm() / layer.weight.norm()).item(), rel=1e-5)
    assert error.worst_row == pytest.approx((difference.norm(dim=1) / layer.weight.norm(dim=1)).max().item(), rel=1e-5)
    assert error.layer_class == "single_transformer_blocks.*.proj_out"
    # the model in full is left as it was
    assert torch.equal(judge.latents, again.latents) and graphs.why_not == ""
    assert not layer._forward_pre_hooks


def test_layers_side_by_side_are_one() -> None:
    weight = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    plain = Linear(32, 32, bias=False)
    plain.weight = nn.Parameter(weight[:32])
    codes = SCHEMES["int8"].quantize(weight[32:])
    packed = SideBySide([plain, LAYERS["int8"](codes, None)])
    layer = Linear(32, 96, bias=False)
    layer.weight = nn.Parameter(weight)
    found = quality.quantized_layers(nn.ModuleDict({"to_qkv": packed}))
    assert found == {"to_qkv": packed}
    listener = quality._Listener(packed, lambda: True)
    with torch.no_grad():
        listener(layer, (torch.randn(4, 32, generator=torch.Generator().manual_seed(1)),))
    assert listener.weights is not None and 0 < listener.weights[0] < 0.012 and 0 < listener.outputs < 0.03


# -- pictures ---------------------------------------------------------------------


def test_psnr_of_known_differences() -> None:
    a = RNG.integers(0, 200, (24, 20, 3), np.uint8)
    assert psnr(a, a) == math.inf
    assert psnr(a + 5, a) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(np.stack([a, a + 5]), np.stack([a, a])) == pytest.approx(20 * math.log10(255 / 5) + 10 * math.log10(2))


def test_ssim_is_its_definition() -> None:
    a = RNG.integers(0, 256, (13, 12, 3), np.uint8)
    b = np.clip(a.astype(int) + RNG.integers(-40, 41, a.shape), 0, 255).astype(np.uint8)
    offset = np.arange(11) - 5
    window = np.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = (p @ np.array([0.299, 0.587, 0.114]) for p in (a, b))
    values = []
    for i in range(3):
        for j in range(2):
            u, v = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mu, mv = (window * u).sum(), (window * v).sum()
            uu, vv, uv = ((window * p).sum() for p in ((u - mu) ** 2, (v - mv) ** 2, (u - mu) * (v - mv)))
            c1, c2 = 2.55**2, 7.65**2
            values.append((2 * mu * mv + c1) * (2 * uv + c2) / ((mu**2 + mv**2 + c1) * (uu + vv + c2)))
    assert ssim(b, a) == pytest.approx(np.mean(values), rel=1e-9) and ssim(a, a) == pytest.approx(1)
    assert ssim(np.stack([b, a]), np.stack([a, a])) == pytest.approx((np.mean(values) + 1) / 2)
    with pytest.raises(ValueError, match="SSIM of 10x13: expected sides of 11 pixels or more"):
        ssim(a[:, :10], a[:, :10])


def test_lpips_says_why_it_is_not_there_and_takes_signed_pictures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(similarity.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="lpips is not installed"):
        Lpips()
    monkeypatch.setattr(similarity.importlib.util, "find_spec", lambda name: name == "lpips")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ImportError, match=f"lpips: no {tmp_path}/checkpoints/alexnet"):
        Lpips()

    class Distance(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert net == "alex" and not verbose

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            assert a.shape == b.shape == (1, 3, 4, 6) and a.dtype == torch.float32
            return (a - b).abs().amax((1, 2, 3), keepdim=True)

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / similarity.BACKBONE).touch()
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Distance))
    black, white = (np.full((2, 4, 6, 3), value, np.uint8) for value in (0, 255))
    assert Lpips()(white, black) == 2 and Lpips()(white[0], white[0]) == 0


# -- the command ------------------------------------------------------------------

ONE_STEP = ("--device", "cpu", "--num-inference-steps", "1")


def test_verify_shows_layers_pictures_scores_and_what_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "q.json"
    asked = ("--quantization", "int8", "--scenes", "3", "--prompt", "a red circle", "a blue cross", "--seed", "5")
    assert main(["verify", *asked, *ONE_STEP, "--output", str(file)]) == 0
    shown, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "transformer: int8, 24 layers, 9.53 MiB instead of 19.61" in shown and "passed" in shown
    assert "single_transformer_blocks.*.proj_out (mean of 4)" in shown and "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert "scene right: 100.0% in full, 100.0% quantised, of 3 held-out scenes" in shown
    assert len(found["layers"]) == 24 and [p["seed"] for p in found["pictures"]] == [5, 6]
    assert found["scores"]["scenes"] == 3 and found["settings"]["num_inference_steps"] == 1
    assert [c["what"] for c in found["checks"]] == [
        "weights of transformer", "rows of weights of transformer", "outputs of transformer",
        "final latents of scenes", "points lost",
    ]  # fmt: skip
    assert all(p["lpips"] is None for p in found["pictures"]) == ("no LPIPS" in shown) == bool(found["lpips"])
    full, ours = found["step_ms"]["full"], found["step_ms"]["quantized"]
    verdict = "slower" if ours > full > 0 else "not slower"
    assert f"a step takes {ours:.2f} ms, in full {full:.2f} ms: quantised is {verdict} here" in shown
    strict = replace(SCHEMES["int8"], tolerance=replace(SCHEMES["int8"].tolerance, latents=1e-6))
    monkeypatch.setitem(SCHEMES, "int8", strict)  # type: ignore[arg-type]
    assert main(["verify", "--quantization", "int8", "--scenes", "1", *ONE_STEP]) == 1
    shown = capsys.readouterr().out
    assert "final latents of scenes: at worst" in shown and "allowed 1e-06: FAIL" in shown and "FAILED" in shown


def test_steps_are_timed_once_everything_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median step of the second request each, as the first may compile."""
    drawn: list[str] = []

    def draw(engine: str, params: SamplingParams) -> SimpleNamespace:
        drawn.append(engine)
        steps = {"full": [90.0, 3.0, 5.0], "quantized": [7.0, 7.5, 60.0]}[engine]
        return SimpleNamespace(step_ms=[900.0] * 3 if drawn.count(engine) == 1 else steps)

    monkeypatch.setattr(quality, "draw", draw)
    params = SamplingParams(prompt="a red circle")
    times = quality.step_times("full", "quantized", params)  # type: ignore[arg-type]
    assert (times.full, times.quantized, times.is_slower) == (5, 7.5, True)
    assert drawn == ["full", "quantized"] * 2


def test_weights_from_a_file_are_judged_by_the_models_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "int8"
    quantize_checkpoint(ServerArgs(device="cpu", quantization="int8"), folder)
    file, online = tmp_path / "f.json", tmp_path / "o.json"
    other = ("--transformer-weights-path", str(folder / "transformer"))
    for name, how in ((file, other), (online, ("--quantization", "int8"))):
        assert main(["verify", *how, "--scenes", "0", *ONE_STEP, "--output", str(name)]) == 0
    a, b = (json.loads(name.read_text()) for name in (file, online))
    assert a["layers"] == b["layers"] and a["pictures"] == b["pictures"] and a["checks"] == b["checks"]
    capsys.readouterr()
    assert main(["verify", str(folder), *ONE_STEP]) == 2
    assert f"model_path={folder}: its weights are quantised; there are none in full" in capsys.readouterr().err


def test_clips_are_judged_frame_by_frame(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a text encoder and a denoiser in two schemes, which declare nothing of both together."""
    file = tmp_path / "q.json"
    size = ("--height", "32", "--width", "32", "--num-frames", "5", "--num-inference-steps", "2", "--device", "cpu")
    how = ("--quantization", "fp8", "--component-quantizations", "text_encoder=int8", "--prompt", "a cat")
    assert main(["verify", str(tiny("wan")), *how, *size, "--output", str(file)]) == 0
    found = json.loads(file.read_text())
    assert {(e["component"], e["format"]) for e in found["layers"]} == {
        ("transformer", "fp8"),
        ("text_encoder", "int8"),
    }
    (clip,) = found["pictures"]
    assert 0 < clip["latents"] < 0.5 and 20 < clip["psnr"] < 80 and 0.5 < clip["ssim"] < 1
    assert found["scores"] is None and len(found["checks"]) == 6
    asked = SamplingParams(prompt=["a cat"], height=32, width=32, num_frames=5, num_inference_steps=1)
    drawn = draw(Engine.load(ServerArgs(model_path=str(tiny("wan")), device="cpu")), asked)
    assert drawn.pixels[0].shape == (5, 32, 32, 3)
    capsys.readouterr()
    assert main(["verify", str(tiny("wan")), "--quantization", "fp8", "--scenes", "3", "--device", "cpu"]) == 2
    assert "scenes=3: expected 0 or more, of model_path=embedded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quantization", "fp8", "--scenes", "-1"), "scenes=-1: expected 0 or more"),
        (("--quantization", "fp8", "--tolerance", "0.1"), "tolerance=0.1: of the comparison with diffusers"),
        (("--scenes", "3"), "scenes=3: has no effect without quantised layers"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *ONE_STEP, *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_bench_writes_a_row_for_every_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "b.json"
    few = ("--scenes", "2", "--steps", "1", "--schemes", "int8", "int4", "--device", "cpu")
    assert main(["bench", "quality", *few, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    int8, int4 = found["schemes"]
    assert (int8["scheme"], int4["scheme"]) == ("int8", "int4") and int8["scene"] == 1.0
    assert int4["latent_error"] > int8["latent_error"] > 0 and int4["psnr_db"] < int8["psnr_db"]
    assert int4["weights_mb"] < int8["weights_mb"] < int8["in_full_mb"] and found["settings"]["steps"] == 1
    assert "in full 100.0% right" in capsys.readouterr().out
    assert main(["bench", "quality", "--scenes", "0"]) == 2
    assert "error: scenes=0: must be at least 1" in capsys.readouterr().err
