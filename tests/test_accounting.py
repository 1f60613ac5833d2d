"""What the work of a run bounds its time to: counted as PyTorch counts it, measured, reported, shown; traces; NVML."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from sgl_diffusion.cli.main import main
from sgl_diffusion.runtime.accounting import Work, account, counted
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.limits import Limits
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.report import Report, StageTime
from sgl_diffusion.runtime.request import resolve_request, settle
from sgl_diffusion.runtime.telemetry import Telemetry

REQUEST: Mapping[str, Any] = {"prompt": ["a", "b"], "height": 64, "width": 96, "num_inference_steps": 3, "seed": 1,
                              "max_sequence_length": 17}  # fmt: skip
GUIDED = {"negative_prompt": "c", "true_cfg_scale": 2.0}


@pytest.fixture(scope="module")
def engine(tiny: Callable[[str], Path]) -> Engine:
    return Engine.load(ServerArgs(model_path=str(tiny("flux")), device="cpu"))


def native(engine: Engine) -> NativePipeline:
    assert isinstance(engine.backend, NativePipeline)
    return engine.backend


def stages(engine: Engine, **sampling: Any) -> dict[str, Work]:
    request = resolve_request(SamplingParams(**{**REQUEST, **sampling}), engine.model.sampling_defaults, engine.args)
    pipeline = native(engine)
    return pipeline.accountant.work(pipeline.prepare(request))


# -- counting -----------------------------------------------------------------------------


def sdpa_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """PyTorch's formula, which it does not apply to its kernel for CPUs."""
    flops: int = sdpa_flop_count(q, k, v)
    return flops


SDPA_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flops}


def by_class(counter: FlopCounterMode) -> dict[str, int]:
    found = {"gemm": 0, "attention": 0, "conv": 0}
    for operation, flops in counter.get_flop_counts()["Global"].items():
        name = str(operation)
        found["attention" if "attention" in name else "conv" if "conv" in name else "gemm"] += flops
    return found


@pytest.mark.parametrize("change", [{}, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("tiling", [False, True])
def test_a_run_computes_what_was_counted(
    engine: Engine, change: dict[str, Any], tiling: bool, tiny: Callable[[str], Path]
) -> None:
    """PyTorch's own counter, on the real run, stage by stage and class by class."""
    if tiling:
        engine = Engine.load(ServerArgs(model_path=str(tiny("flux")), device="cpu", vae_tiling=True))
    expected = {name: {c: f for c, f in w.flops.items() if f} for name, w in stages(engine, **change).items()}
    counters: dict[str, FlopCounterMode] = {}
    params = SamplingParams(**{**REQUEST, **change, "save_output": False})
    engine.run(params)  # a batch of a new shape is computed apart, too, and compared
    for event in engine.generate(params):
        name = getattr(event, "name", "")
        if type(event).__name__ == "StageStarted" and name in expected:
            counters[name] = FlopCounterMode(display=False, custom_mapping=SDPA_ON_CPU)
            counters[name].__enter__()
        if type(event).__name__ == "StageFinished" and name in expected:
            counters[name].__exit__(None, None, None)
    found = {name: {c: f for c, f in by_class(counter).items() if f} for name, counter in counters.items()}
    assert found == expected


def test_half_the_bytes_in_half_precision(engine: Engine, tiny: Callable[[str], Path]) -> None:
    half = Engine.load(ServerArgs(model_path=str(tiny("flux")), device="cpu", precision="bf16"))
    wide, narrow = stages(engine)["denoising"], stages(half)["denoising"]
    assert wide.flops == narrow.flops
    assert {c: 2 * b for c, b in narrow.bytes.items() if c != "other"} == pytest.approx(
        {c: b for c, b in wide.bytes.items() if c != "other"}, rel=0.03
    )  # tables of the rotation stay fp32


def test_a_product_moves_its_operands_once() -> None:
    from sgl_diffusion.models.layers import Linear

    with torch.device("meta"):
        layer, x = Linear(64, 32), torch.empty(5, 64)
    with counted() as work:
        layer(x, gelu_from=0)
    assert work == Work({"gemm": 2 * 5 * 64 * 32}, {"gemm": 4 * (5 * 64 + 64 * 32 + 5 * 32)})


def test_real_tensors_are_computed_meanwhile() -> None:
    from sgl_diffusion.models.layers import Linear

    layer, x = Linear(8, 4), torch.randn(3, 8)
    with counted() as work, torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert work == Work()


def test_a_shape_is_counted_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first = stages(engine, num_inference_steps=4)
    accountant = native(engine).accountant
    monkeypatch.setattr(accountant, "_after_encoding", None)
    again = stages(engine, num_inference_steps=4, prompt=["other", "words"], seed=9)
    assert again["denoising"] is first["denoising"]
    with pytest.raises(TypeError):
        stages(engine, num_inference_steps=4, height=32)


def test_nothing_is_counted_unless_it_is_read(tiny: Callable[[str], Path]) -> None:
    engine = Engine.load(ServerArgs(model_path=str(tiny("flux")), device="cpu"))
    report = engine.run(SamplingParams(**REQUEST, save_output=False)).report
    assert report.accounting is None and "parts" not in vars(native(engine).accountant)


def test_the_published_size_counts_as_published() -> None:
    """FLUX.1-dev: 74.4 TFLOP a step at 1024x1024, 94 ms at 790 TFLOP/s."""
    from sgl_diffusion.bench.launches import find
    from sgl_diffusion.models.text import HashTokenizer
    from sgl_diffusion.runtime.accounting import Accountant
    from sgl_diffusion.runtime.blueprint import Blueprint
    from sgl_diffusion.runtime.plan import make_plan

    family, preset = find("flux1-dev")
    args = ServerArgs(device="cpu", precision="bf16")
    plan = make_plan(args, family.components())
    tokenizers = {
        key: HashTokenizer.beside(key, preset.components)
        for key, kind in family.components().items()
        if kind == "tokenizer"
    }
    options = {"tile_height": None, "tile_width": None, "with_encoder": False}
    blueprint = Blueprint(family, preset.components, preset.defaults, plan, options)
    accountant = Accountant(blueprint, tokenizers)
    request = resolve_request(SamplingParams(prompt=["a cat"], num_inference_steps=10), {}, args)
    work = accountant.work(settle(request, preset.defaults, accountant.family, blueprint.sampler()))
    assert sum(work["denoising"].flops.values()) / 10 / 790e12 == pytest.approx(94e-3, rel=0.005)
    assert work["denoising"].bytes["gemm"] / 10 > 2 * 11e9, "every weight is read in every step"


# -- beside the measured times ------------------------------------------------------------


def test_bounds_shares_and_losses() -> None:
    limit = {torch.float32: Limits(copy_gb_per_s=10, matmul_tflop_per_s=1)}
    work = {
        "denoising": Work({"gemm": 3_000_000_000, "attention": 1_000_000_000}, {"gemm": 10_000_000}),
        "decoding": Work({"conv": 1_000_000}, {"conv": 20_000_000}),
    }
    measured = [("denoising", 6.0), ("decoding", 10.0), ("denoising", 2.0), ("saving", 1.5)]
    found = account(work, dict.fromkeys(work, limit), [StageTime(name=n, duration_ms=t) for n, t in measured], 20.0)
    denoising, decoding = found.stages
    assert (denoising.bound_ms, denoising.bound_by, denoising.share) == (4.0, "compute", 0.5)
    assert (decoding.bound_ms, decoding.bound_by, decoding.share) == (2.0, "memory", 0.2)
    assert [(loss.where, loss.ms) for loss in found.largest_losses] == [
        ("decoding", 8.0), ("denoising", 4.0), ("saving", 1.5)
    ]  # fmt: skip


def test_a_dump_says_what_was_lost_where(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "perf.json"
    engine.run(SamplingParams(**REQUEST, save_output=False, perf_dump_path=str(path)))
    report = Report.read(path)
    assert report.accounting is not None and report.telemetry is None
    assert [s.name for s in report.accounting.stages] == [s.name for s in report.steps]
    assert all(0 < s.share < 1 for s in report.accounting.stages)
    assert report.accounting.limits.copy_gb_per_s > 0.1 and report.accounting.limits.matmul_tflop_per_s["fp32"] > 0.001
    losses = report.accounting.largest_losses
    assert len(losses) == 3 and losses == sorted(losses, key=lambda loss: -loss.ms)
    assert main(["perf", "show", str(path), "--plot", str(tmp_path / "t.html")]) == 0
    shown = capsys.readouterr().out
    assert f"largest losses: {losses[0].where} {losses[0].ms:.1f} ms" in shown and "latent_preparation" in shown
    page = (tmp_path / "t.html").read_text()
    assert all(f"bound of {s.name}: " in page for s in report.accounting.stages)


def test_the_diffusers_backend_has_no_account(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    engine = Engine.load(ServerArgs(model_path=str(tiny("flux")), device="cpu", backend="diffusers"))
    engine.run(SamplingParams(**REQUEST, save_output=False, perf_dump_path=str(tmp_path / "p.json")))
    assert Report.read(tmp_path / "p.json").accounting is None


# -- traces -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sglang", "diffusers"])
def test_a_trace_names_the_spans_and_holds_the_operations(
    backend: Any, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = Engine.load(ServerArgs(model_path=str(tiny("flux")), device="cpu", backend=backend))
    saved = {"output_path": str(tmp_path), "output_file_name": "a.png"}
    result = engine.run(SamplingParams(**{**REQUEST, "prompt": "a"}, **saved, profile=True))
    trace = tmp_path / "a.trace.json.gz"
    assert list(result.paths) == [tmp_path / "a.png", trace] and str(trace) in result.report.outputs
    names = [event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]]
    assert names.count("denoise_step") >= 3 and {"text_encoding", "denoising", "decoding"} <= set(names)
    assert "aten::addmm" in names and "aten::convolution" in names
    assert (tmp_path / "a.png").read_bytes() == drawn_without_a_trace(engine, tmp_path)


def drawn_without_a_trace(engine: Engine, folder: Path) -> bytes:
    saved = {"output_path": str(folder), "output_file_name": "b.png"}
    engine.run(SamplingParams(**{**REQUEST, "prompt": "a"}, **saved))
    return (folder / "b.png").read_bytes()


def test_a_trace_needs_a_place_of_its_own(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="profile=true: the trace is written beside the results"):
        engine.run(SamplingParams(**REQUEST, save_output=False, profile=True))
    (tmp_path / "a.trace.json.gz").touch()
    saved = {"output_path": str(tmp_path), "output_file_name": "a.png"}
    with pytest.raises(UserError, match=r"a\.trace\.json\.gz exists already"):
        engine.run(SamplingParams(**{**REQUEST, "prompt": "a"}, **saved, profile=True))


# -- the driver's view ----------------------------------------------------------------------


class FakeNvml(SimpleNamespace):
    """As much of pynvml as is used: power climbs by a watt a sample, the memory clock cannot be read."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, samples: int) -> None:
        super().__init__(samples=samples, taken=0, open=0, threads=set(), enough=threading.Event())

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return f"handle of {uuid}"

    def nvmlDeviceGetClockInfo(self, gpu: str, clock: int) -> int:
        if clock == self.NVML_CLOCK_MEM:
            raise self.NVMLError("not supported")
        return 1980

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        assert gpu == "handle of GPU-1" and self.open == 1
        self.threads.add(threading.current_thread().name)
        self.taken += 1
        if self.taken == self.samples:
            self.enough.set()
        return 1000 * (99 + self.taken)

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> SimpleNamespace:
        return SimpleNamespace(used=2**30)

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> int:
        return 40


def test_samples_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(samples=4)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Telemetry("GPU-1") as telemetry:
        assert nvml.enough.wait(timeout=30), "nothing samples while the block runs"
    ranges = telemetry.ranges()
    assert "telemetry" in nvml.threads and len(nvml.threads) == 2 and nvml.open == 0
    assert (ranges["power_w"].min, ranges["power_w"].max) == (100, 99 + nvml.taken) and nvml.taken >= 5
    assert ranges["power_w"].median == pytest.approx((199 + nvml.taken) / 2)
    assert ranges["sm_clock_mhz"].median == 1980 and ranges["memory_used_mb"].max == 1024
    assert "memory_clock_mhz" not in ranges
    assert "telemetry" not in {thread.name for thread in threading.enumerate()}
