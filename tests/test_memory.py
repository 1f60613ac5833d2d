"""Memory: predicted from configs, counted in a run, checked against the allocator; refusals, tiles, kept latents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import sglang
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from sgl_diffusion.cli.main import main
from sgl_diffusion.runtime import offload
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.live_bytes import LiveBytes, module_bytes
from sgl_diffusion.runtime.memory import MemoryPlanner
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.rehearsal import FusedAttention, OneStep
from sgl_diffusion.runtime.report import MIB, MemoryReport
from sgl_diffusion.runtime.request import resolve_request
from sgl_diffusion.runtime.resolve import resolve
from sgl_diffusion.runtime.trace import Stopwatch

REQUEST: Mapping[str, Any] = {"prompt": ["a red circle"], "num_inference_steps": 3, "seed": 1}
SMALL = {"height": 64, "width": 96}
TILED = {"vae_tiling": True, "vae_config": {"tile_sample_min_height": 64, "tile_sample_min_width": 64}}
PRESET = "black-forest-labs/FLUX.1-schnell"


def load(model: str | Path, **server: Any) -> Engine:
    return Engine.load(ServerArgs(model_path=str(model), device="cpu", **server))


def native(engine: Engine) -> NativePipeline:
    assert isinstance(engine.backend, NativePipeline)
    return engine.backend


def measured(engine: Engine, **sampling: Any) -> MemoryReport:
    report = engine.run(SamplingParams(**{**REQUEST, "save_output": False, "measure_memory": True, **sampling})).report
    assert report.memory is not None
    return report.memory


# -- counting -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_held_counts_once_and_what_is_dropped_no_more(device: str) -> None:
    outside = torch.empty(8, 8, device=device)
    live = LiveBytes(device)
    with torch.inference_mode(), live:
        x = torch.empty(4, 8, device=device)  # 128 bytes
        y = torch.nn.functional.linear(x, outside)  # 128 more
        view = y.flatten()[3:]
        del y
        outside.add_(1)
        assert (live.now, live.peak) == (256, 256)
        del view
        assert (live.now, live.peak) == (128, 256)
        z = torch.cat([x, x])
    assert (live.now, live.peak) == (384, 384)
    del x, z
    assert live.now == 0


def test_the_host_does_not_count_for_a_device() -> None:
    live = LiveBytes("meta", granularity=512)
    with live:
        x = torch.ones(100).to("meta")
    assert live.now == 512
    del x


def test_shapes_attend_as_the_fused_kernel_does() -> None:
    """Of narrow heads, the log-sums are an eighth of what attention makes."""
    peaks = {}
    for device in ("cpu", "meta"):
        q = torch.randn(2, 40, 3, 8, device=device).transpose(1, 2)
        live = LiveBytes(device)
        with torch.inference_mode(), live, FusedAttention() if device == "meta" else nullcontext():
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        peaks[device] = live.peak
    assert peaks["meta"] == peaks["cpu"] == 2 * 40 * 3 * (8 + 1) * 4


@pytest.mark.parametrize("steps", [2, 4])
def test_a_step_that_is_not_repeated_counts_as_one_that_is(steps: int) -> None:
    """Steps that keep their results, in a state that is larger than they are."""

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.cat([x] * 5)
        return x + wide[: len(x)], wide[:3].clone()

    found = []
    for once in (True, False):
        live = LiveBytes("meta")
        execute = OneStep(live) if once else lambda function, *arguments: function(*arguments)
        with torch.inference_mode(), live:
            x, left = torch.empty(100, device="meta"), []
            for _ in range(steps):
                x, velocity = execute(step, x)
                left.append(velocity)
        found.append((live.now, live.peak))
    assert found[0] == found[1]


# -- predicted against counted, and against the allocator ---------------------------------


@pytest.mark.parametrize(
    ("server", "sampling"),
    [
        ({}, {}),
        ({"precision": "bf16"}, {}),
        ({}, {"num_outputs_per_prompt": 2}),
        ({}, {"negative_prompt": "b", "true_cfg_scale": 2.0}),
        (TILED, {"height": 128, "width": 128}),
        ({"vae_slicing": True}, {"num_outputs_per_prompt": 2}),
        ({"quantization": "int8"}, {}),
    ],
)
@pytest.mark.parametrize("model", ["embedded", "flux"])
def test_prediction_is_what_a_run_holds(
    model: str, server: dict[str, Any], sampling: dict[str, Any], tiny: Callable[[str], Path]
) -> None:
    engine = load(model if model == "embedded" else tiny(model), **server)
    memory = measured(engine, **{**SMALL, **sampling})
    assert memory.decode == ("tiles" if server is TILED else "whole")
    for stage in memory.stages:
        assert stage.measured_mb is not None
        if stage.name in ("denoising", "decoding"):
            counted = stage.measured_mb - stage.weights_mb
            assert stage.activations_mb == pytest.approx(counted, rel=0.05), stage


@pytest.mark.parametrize("graphs", ["auto", "false"])
def test_steps_that_are_taped_hold_what_they_make(
    graphs: str, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a tape gives up half way, because it would hold too much."""
    found = {}
    for mib in (256, 1):
        monkeypatch.setattr("sgl_diffusion.runtime.tape.LIMIT", mib * MIB)
        engine = load(tiny("flux"), enable_cuda_graph=graphs)
        stage = next(s for s in measured(engine, **SMALL).stages if s.name == "denoising")
        assert stage.measured_mb is not None
        assert stage.activations_mb == pytest.approx(stage.measured_mb - stage.weights_mb, rel=0.05)
        found[mib] = stage.activations_mb
    assert found[256] > 3 * found[1] if graphs == "auto" else found[256] == found[1]


def allocator_peaks(engine: Engine, **sampling: Any) -> dict[str, float]:
    """MiB that PyTorch's CPU allocator had given out, by span: the truth that the counter did not make."""
    params = SamplingParams(**{**REQUEST, **sampling})
    request = resolve_request(params, engine.model.sampling_defaults, engine.args)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in native(engine).run(native(engine).prepare(request), Stopwatch(engine.device, annotate=True)):
            pass
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    times, held = [t for t, _ in changes], list(accumulate(n for _, n in changes))
    peaks: dict[str, float] = {}
    for e in events:
        if e.name() in ("denoise_step", "decoding"):
            during = held[bisect_left(times, e.start_ns()) : bisect_right(times, e.end_ns())]
            peaks[e.name()] = max(peaks.get(e.name(), 0.0), max(during) / MIB)
    return peaks


@pytest.mark.parametrize("model", ["embedded", "flux"])
def test_the_allocator_agrees_but_for_scratch_of_convolutions(model: str, tiny: Callable[[str], Path]) -> None:
    """The prediction and the count share their counter: this is the check that does not."""
    path = model if model == "embedded" else tiny(model)
    stages = {s.name: s.activations_mb for s in measured(load(path), **SMALL).stages}
    truth = allocator_peaks(load(path), **SMALL)  # a fresh engine: it captures its steps, as the measured one did
    assert stages["denoising"] == pytest.approx(truth["denoise_step"], rel=0.05)
    # a convolution unfolds its input inside of the operation, where no tensor is seen
    assert stages["decoding"] <= truth["decoding"] * 1.01 and truth["decoding"] < 1.6 * stages["decoding"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_are_those_that_are_loaded(precision: str, tiny: Callable[[str], Path]) -> None:
    engine = load(tiny("flux"), precision=precision)
    report = native(engine).memory.report(native(engine).memory.rehearsal.workload(request_of(engine)), False)
    for key, component in report.components.items():
        assert component.weights_mb * MIB == module_bytes([native(engine).parts[key]]), key


def request_of(engine: Engine, **sampling: Any) -> Any:
    return resolve_request(
        SamplingParams(**{**REQUEST, **SMALL, **sampling}), engine.model.sampling_defaults, engine.args
    )


def test_nothing_is_planned_or_counted_where_nobody_asks(tiny: Callable[[str], Path]) -> None:
    engine = load(tiny("flux"))
    assert engine.run(SamplingParams(**{**REQUEST, **SMALL, "save_output": False})).report.memory is None
    assert "parts" not in vars(native(engine).memory.rehearsal)


@pytest.mark.parametrize(("free", "mapped"), [(10**12, []), (2 * 1024**3, ["transformer", "vae"])])
def test_weights_on_the_host_are_told_by_where_they_are(
    free: int, mapped: list[str], tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after they are loaded."""
    monkeypatch.setattr(offload, "available_host_memory", lambda: free)
    model = resolve(ServerArgs(model_path=str(tiny("flux")), device="cpu"))
    assert model.blueprint is not None
    places = {"transformer": "layerwise", "vae": "component", "text_encoder": "component", "text_encoder_2": "resident"}
    for pin, tier in ((True, "pinned"), (False, "pageable")):
        blueprint = replace(model.blueprint, plan=replace(model.plan, offload=places, pin_memory=pin))
        memory = MemoryPlanner(blueprint, ServerArgs(model_path=str(tiny("flux")), device="cpu"))
        work = memory.rehearsal.workload(request_of(load(tiny("flux"))))
        told = memory.report(work, False)
        size = {key: c.weights_mb for key, c in told.components.items()}
        where = {key: c.host for key, c in told.components.items()}
        assert where == {k: None if v == "resident" else "mapped" if k in mapped else tier for k, v in places.items()}
        held = {name: getattr(told, f"{name}_host_mb") for name in ("pinned", "pageable", "mapped")}
        moved = sum(size.values()) - size["text_encoder_2"]
        assert held["mapped"] == pytest.approx(sum(size[key] for key in mapped), rel=0.02)
        assert sum(held.values()) == pytest.approx(moved, rel=0.02) == held[tier] + held["mapped"]


def test_components_leave_each_other_less_host_memory(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resolve(ServerArgs(model_path=str(tiny("flux")), device="cpu"))
    assert model.blueprint is not None
    plan = replace(model.plan, offload=dict.fromkeys(model.plan.offload, "component"))
    memory = MemoryPlanner(replace(model.blueprint, plan=plan), ServerArgs(model_path=str(tiny("flux")), device="cpu"))
    first = memory.weights["transformer"].host
    monkeypatch.setattr(offload, "available_host_memory", lambda: offload.HOST_HEADROOM + first)
    assert memory.mapped == ["vae"]


GPU_PLAN = """
import json, torch
from dataclasses import replace
from sgl_diffusion.bench.absent import GPUS, absent
from sgl_diffusion.models.family import Guidance, Size
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.memory import MemoryPlanner
from sgl_diffusion.runtime.rehearsal import Workload
from sgl_diffusion.runtime.resolve import resolve

args = ServerArgs(
    model_path="MODEL", load_format="dummy", precision="bf16", device="cpu", device_memory_limit_mb=141000
)
blueprint = resolve(args).blueprint
work = Workload(1, 1, False, Size(1024, 1024), Guidance(None), blueprint.sampler().schedule(4, 4096), 256, False)
told = {}
for mode in ("resident", "component", "layerwise"):
    offload = dict.fromkeys(blueprint.plan.offload, mode)
    if mode == "layerwise":
        offload["vae"] = "resident"
    plan = replace(blueprint.plan, device=torch.device("cuda", 0), offload=offload)
    with absent(GPUS["sm_90"]):
        report = MemoryPlanner(replace(blueprint, plan=plan), args).report(work, False)
    told[mode] = report.model_dump()
print(json.dumps(told))
"""


def test_a_gpu_that_is_not_here_and_its_offload() -> None:
    """Shapes take the kernels' path there; 11.9 billion parameters in bf16 are 22,700 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", GPU_PLAN.replace("MODEL", PRESET)],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = {mode: MemoryReport(**report) for mode, report in json.loads(done.stdout.splitlines()[-1]).items()}
    resident, component, layers = told["resident"], told["component"], told["layerwise"]
    assert resident.components["transformer"].weights_mb == pytest.approx(22_680, rel=0.01)
    assert (resident.pinned_host_mb, resident.graphs_mb > 0) == (0, True)
    assert component.graphs_mb == layers.graphs_mb == 0  # their weights have no fixed address
    total = sum(c.weights_mb for c in component.components.values())
    assert component.pinned_host_mb == pytest.approx(total, rel=0.001)
    weights = {s.name: s.weights_mb for s in component.stages}
    assert weights["denoising"] == pytest.approx(22_680, rel=0.01) and weights["decoding"] < 200
    # by hand: two double blocks of 24 square matrices; slices of the modulation layers are as large as half of one
    square = 3072**2 * 2 / MIB
    assert layers.components["transformer"].device_mb == pytest.approx(2 * 24 * square, rel=0.02)
    # (1, 4352, 5 * 3072) of bf16 for [attention, MLP], and Q, K, V and more beside it: no matrix of 4352^2 scores
    assert 128 < {s.name: s.activations_mb for s in resident.stages}["denoising"] < 1000


# -- what cannot fit ------------------------------------------------------------------------


def limit(engine: Engine, mb: float) -> None:
    """The same engine on a smaller device."""
    native(engine).memory.limit_mb = mb  # type: ignore[assignment]


def test_a_request_that_cannot_fit_is_refused_before_any_work(tiny: Callable[[str], Path]) -> None:
    engine = load(tiny("flux"))
    weights = measured(engine, **SMALL).stages[0].weights_mb
    limit(engine, weights + 0.5)
    events = []
    with pytest.raises(UserError) as refused:
        for event in engine.generate(SamplingParams(**{**REQUEST, **SMALL, "save_output": False})):
            events.append(event)
    told = str(refused.value)
    assert not events and "\n" not in told
    for part in (
        "height=64, width=96",
        "needs",
        f"weights {weights:,.1f} MiB",
        f"{weights + 0.5:,.1f} MiB are available",
    ):
        assert part in told


@pytest.mark.parametrize(("mb", "told"), [(1, "the weights cannot fit on cpu"), (26, "height=512, width=512")])
def test_refused_before_loading(mb: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgl_diffusion.runtime.parts.load_weights", None)  # is not reached
    args = ServerArgs(model_path="embedded", device="cpu", device_memory_limit_mb=mb)
    with pytest.raises(UserError, match=told):
        Engine.load(args, like=SamplingParams(prompt=["a"], height=512, width=512))


def test_a_decode_that_does_not_fit_is_done_in_tiles(tiny: Callable[[str], Path]) -> None:
    asked = {**REQUEST, "height": 192, "width": 192, "max_sequence_length": 32, "save_output": False}
    tiles = {"vae_config": TILED["vae_config"]}
    in_tiles = load(tiny("flux"), **TILED)
    engine, need = load(tiny("flux"), **tiles), {}
    for name, other in (("tiles", in_tiles), ("whole", engine)):
        need[name] = {s.name: s.predicted_mb for s in measured(other, **asked).stages}
    assert max(need["tiles"].values()) < need["whole"]["decoding"]  # there is room between the two
    between = (max(need["tiles"].values()) + need["whole"]["decoding"]) / 2
    limit(engine, between)
    result, expected = engine.run(SamplingParams(**asked)), in_tiles.run(SamplingParams(**asked))
    assert result.report.memory is not None and result.report.memory.decode == "tiles"
    assert result.report.effective["vae"]["tiling"] is True
    assert result.outputs[0].image == expected.outputs[0].image
    whole = load(tiny("flux"), vae_tiling=False, **tiles)
    limit(whole, between)
    with pytest.raises(UserError, match="decoding needs"):  # what was asked for is not overruled
        whole.run(SamplingParams(**asked))


def test_the_diffusers_backend_has_no_limit(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="device_memory_limit_mb=100: the diffusers backend"):
        load(tiny("flux"), backend="diffusers", device_memory_limit_mb=100)


# -- sglang plan ------------------------------------------------------------------------------


def test_plan_needs_no_weights(tmp_path: Path, tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of configs gives the numbers of the checkpoint."""
    bare = tmp_path / "bare"
    for source in tiny("flux").rglob("*.json"):
        target = bare / source.relative_to(tiny("flux"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    found = []
    for folder, more in ((bare, ["--load-format", "dummy"]), (tiny("flux"), [])):
        file = tmp_path / "plan.json"
        words = ["plan", "--model-path", str(folder), "--device", "cpu", "--height", "64", "--width", "96", *more]
        assert main([*words, "--json", str(file)]) == 0
        found.append(MemoryReport.model_validate_json(file.read_text()))
        assert "denoising" in capsys.readouterr().out
    assert found[0] == found[1]
    loaded = measured(load(tiny("flux")), height=64, width=96, num_inference_steps=50)
    assert loaded.peak_mb == pytest.approx(found[0].peak_mb, rel=0.01)


def test_plan_tells_the_numbers_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model-path", "embedded", "--device", "cpu", "--device-memory-limit-mb", "20"]) == 2
    shown = capsys.readouterr()
    assert "available 20.0" in shown.out and shown.err.count("\n") == 1 and "20.0 MiB are available" in shown.err


def test_plan_measures_what_it_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    words = ["plan", "--model-path", "embedded", "--device", "cpu", "--height", "64", "--width", "64", "--measure"]
    assert main([*words, "--json", str(file)]) == 0
    shown, told = capsys.readouterr().out, MemoryReport.model_validate_json(file.read_text())
    for stage in told.stages:
        assert stage.measured_mb is not None
        assert stage.predicted_mb == pytest.approx(stage.measured_mb, rel=0.01)
        assert f"{stage.measured_mb:,.1f}" in next(line for line in shown.splitlines() if stage.name in line)
    assert "error" in shown


# -- latents that outlive a failed decode ---------------------------------------------------


def fail_once(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    pipeline = native(engine)

    def decode(x: torch.Tensor, *_: Any) -> Any:
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(pipeline.family, "decode", decode)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too much"), RunFailure("not a picture")])
def test_latents_are_kept_and_decoded_by_the_cli(
    error: Exception, tmp_path: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny("flux"))
    asked = {**REQUEST, **SMALL, "num_outputs_per_prompt": 2}
    whole = engine.run(SamplingParams(**asked, save_output=False)).outputs
    fail_once(engine, monkeypatch, error)
    dump = tmp_path / "report.json"
    params = SamplingParams(**asked, output_path=str(tmp_path), output_file_name="a.png", perf_dump_path=str(dump))
    kept = tmp_path / "a_0.latents.safetensors"
    with pytest.raises(RunFailure, match=f"--resume-latents {kept}"):
        engine.run(params)
    assert kept.is_file() and json.loads(dump.read_text())["outputs"] == [str(kept)]

    out = tmp_path / "resumed"
    words = ["--model-path", str(tiny("flux")), "--device", "cpu", "--output-path", str(out)]
    words += ["--output-file-name", "b.png", "--resume-latents", str(kept), "--perf-dump-path", str(dump)]
    done = sglang("generate", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for i, output in enumerate(whole):
        assert output.image is not None
        assert Image.open(out / f"b_{i}.png").convert("RGB").tobytes() == output.image.tobytes()
    stages = [s["name"] for s in json.loads(dump.read_text())["steps"]]
    assert stages == ["decoding", "saving"]  # nothing was denoised again


def test_latents_of_nan_are_not_kept(
    tmp_path: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny("flux"))

    def decode(x: torch.Tensor, *_: Any) -> Any:
        x.fill_(float("nan"))
        raise RunFailure("not a picture")

    monkeypatch.setattr(native(engine).family, "decode", decode)
    with pytest.raises(RunFailure, match="the decode failed: not a picture$"):
        engine.run(SamplingParams(**REQUEST, **SMALL, output_path=str(tmp_path), output_file_name="a.png"))
    assert list(tmp_path.iterdir()) == []


def test_latents_are_not_decoded_as_something_else(
    tmp_path: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny("flux"))
    fail_once(engine, monkeypatch, RunFailure("not a picture"))
    with pytest.raises(RunFailure):
        engine.run(SamplingParams(**REQUEST, **SMALL, output_path=str(tmp_path), output_file_name="a.png"))
    kept = str(tmp_path / "a.latents.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    refusals = [
        (engine, {"resume_latents": kept, "seed": 3}, r"seed=\[3\]: no effect with resume_latents"),
        (engine, {"resume_latents": str(tmp_path / "broken.safetensors")}, "cannot be read"),
        (engine, {"resume_latents": str(tmp_path / "none.safetensors")}, "cannot be read"),
        (load("embedded"), {"resume_latents": kept}, "made with model_path="),
        (load(tiny("flux"), backend="diffusers"), {"resume_latents": kept}, "the diffusers backend cannot do it"),
    ]
    for other, sampling, told in refusals:
        with pytest.raises(UserError, match=told) as refused:
            other.run(SamplingParams(**sampling, output_path=str(tmp_path)))
        assert "\n" not in str(refused.value)


def test_a_limit_puts_the_prediction_into_the_report() -> None:
    engine = load("embedded", device_memory_limit_mb=1000)
    memory = engine.run(SamplingParams(**REQUEST, save_output=False)).report.memory
    assert memory is not None and memory.available_mb == 1000 and memory.measured_peak_mb is None
