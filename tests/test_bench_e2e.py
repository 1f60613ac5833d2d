"""`sglang bench e2e` through the command line: ours against diffusers, whole generations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from test_bench import bench
from tiny_checkpoints import build_flux

from sgl_diffusion.bench import e2e
from sgl_diffusion.cli.main import main

SMALL = ("--device", "cpu", "--height", "64", "--width", "64", "--steps", "2", "--rounds", "2", "--text-tokens", "24")


def test_sides_take_turns_and_figures_are_whole(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    report, plot = tmp_path / "e.json", tmp_path / "e.svg"
    files = ("--json", str(report), "--plot", str(plot))
    code, out, err = bench("e2e", "--model", str(tiny("flux")), *SMALL, *files)
    assert code == 0, out + err
    found = json.loads(report.read_text())
    native, diffusers = found["sides"]
    assert (native["name"], diffusers["name"]) == ("native", "diffusers")
    assert native["step_ratio"] == native["total_ratio"] == 1 and native["peak_memory_mb"] is None
    for side in (native, diffusers):
        assert side["step_ratio"] == pytest.approx(side["step_ms"] / native["step_ms"])
        assert 0 < side["step_share"] < 1 and 0 < side["total_share"] < 1
        assert 2 * side["step_ms"] < 1.5 * side["stages_ms"]["denoising"] < 1.5 * side["total_ms"]
    (bound,) = (stage["bound_ms"] for stage in found["accounting"]["stages"] if stage["name"] == "denoising")
    assert native["step_share"] == pytest.approx(bound / 2 / native["step_ms"])
    # the bound is the same for both: a share is as much smaller as the time is longer
    assert native["step_share"] / diffusers["step_share"] == pytest.approx(diffusers["step_ratio"])
    assert diffusers["psnr_db"] > 60 and len(found["accounting"]["largest_losses"]) == 3
    assert found["rounds"] == 2 and found["settings"]["num_inference_steps"] == 2
    svg = plot.read_text()
    assert svg.startswith("<svg") and svg.count("<rect") == 2 + 2 * 4


def test_dummy_weights_are_the_same_on_both_sides(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    report = tmp_path / "e.json"
    model = ("--model", str(tiny("flux")), "--load-format", "dummy", "--precision", "bf16", "--warmup", "0")
    code, out, err = bench("e2e", *model, *SMALL, "--json", str(report))
    assert code == 0, out + err
    assert json.loads(report.read_text())["sides"][1]["psnr_db"] > 40


def test_defaults_are_the_same_on_both_sides(tmp_path: Path) -> None:
    """Ours reads 256 tokens of this checkpoint's text, diffusers 512 and takes 28 steps, unless told."""
    model, report = build_flux(tmp_path / "schnell", guidance_embeds=False), tmp_path / "e.json"
    size = ("--height", "64", "--width", "64", "--rounds", "1", "--warmup", "0")
    assert main(["bench", "e2e", "--device", "cpu", "--model", str(model), *size, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["settings"]["max_sequence_length"] == 256 and found["settings"]["num_inference_steps"] == 4
    assert found["sides"][1]["psnr_db"] > 80


def test_another_picture_is_not_timed(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"component_paths": {"transformer": str(build_flux(tmp_path / "other", seed=1) / "transformer")}}
    monkeypatch.setitem(e2e.RIVALS, "diffusers", e2e.RIVALS["diffusers"] | other)
    assert main(["bench", "e2e", "--model", str(tiny("flux")), *SMALL]) == 1
    assert "failed: the picture of diffusers differs from ours: PSNR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--compare", "diffuser"),
            "compare=diffuser: expected any of diffusers, diffusers-compile; did you mean diffusers?",
        ),
        (("--rounds", "0"), "rounds=0: must be at least 1"),
        (("--plot", "e.png"), "plot=e.png: expected a name ending in .svg"),
        (("--json", "none/e.json"), "json=none/e.json: the folder none does not exist"),
        (("--steps", "0"), "num_inference_steps=0: must be at least 1"),
        (("--precision", "fp8"), "precision=fp8: expected 'auto', 'fp32', 'bf16' or 'fp16'"),
        (("--model", "random-100x1"), "model=random-100x1: the width must be a multiple of 128"),
        (("--model", "flux1-def", "--load-format", "dummy"), "model_path=flux1-def: load_format=dummy needs"),
    ],
)
def test_a_mistake_is_named(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "e2e", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_presets_have_short_names() -> None:
    assert (
        e2e._model_path("flux1-dev", Path()) == e2e._model_path("flux.1-dev", Path()) == "black-forest-labs/FLUX.1-dev"
    )
    for short in ("wan2.1-t2v-14b", "wan2.1-14b", "wan21-14b"):
        assert e2e._model_path(short, Path()) == "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    assert e2e._model_path("wan2.1-1.3b", Path()) == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert e2e._model_path("some/folder", Path()) == "some/folder"
