"""Who offloads what: flags, performance modes, and the first way to hold all weights that the device has room for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import sglang

from sgl_diffusion.cli import generate
from sgl_diffusion.cli.flags import Parser, parse_command_line
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs, parse_args
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.memory import MemoryPlanner
from sgl_diffusion.runtime.plan import Plan, first_that_fits, make_plan, ways_to_hold
from sgl_diffusion.runtime.rehearsal import Workload
from sgl_diffusion.runtime.request import resolve_request
from sgl_diffusion.runtime.resolve import resolve

WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2")

KINDS = {
    "transformer": "denoiser",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder",
    "tokenizer": "tokenizer",
    "scheduler": "scheduler",
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch answers as if there were a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def parse(words: str) -> ServerArgs:
    parser = Parser(allow_abbrev=False)
    generate.add_arguments(parser)
    return parse_args(parse_command_line(parser, words.split()))[0]


@pytest.mark.parametrize(
    ("words", "places"),
    [
        ("", {}),
        ("--mode memory", dict.fromkeys(WEIGHTS, "component")),
        ("--mode memory --vae-cpu-offload false", dict.fromkeys(WEIGHTS, "component") | {"vae": "resident"}),
        ("--mode memory --dit-layerwise-offload", dict.fromkeys(WEIGHTS, "component") | {"transformer": "layerwise"}),
        ("--mode speed --text-encoder-cpu-offload", dict.fromkeys(WEIGHTS[2:], "component")),
        ("--mode manual --dit-cpu-offload", {"transformer": "component"}),
        ("--layerwise-offload-components vae text_encoder_2", {"vae": "layerwise", "text_encoder_2": "layerwise"}),
        ("--layerwise-offload-modules all", dict.fromkeys(WEIGHTS, "layerwise")),
    ],
)
def test_flags_win_over_the_mode(gpu: None, words: str, places: dict[str, str]) -> None:
    plan = make_plan(parse(words), KINDS, choose_offload=lambda plan, ways: (next(iter(ways)), {}))
    assert plan.offload == dict.fromkeys(WEIGHTS, "resident") | places
    assert plan.pin_memory


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--image-encoder-cpu-offload", "image_encoder_cpu_offload=true: this pipeline has no image encoder"),
        ("--dit-cpu-offload --dit-layerwise-offload", "transformer: asked to be offloaded both whole and layer by"),
        ("--layerwise-offload-components vea", "layerwise_offload_components=vea: expected all or any of transformer,"),
        ("--layerwise-offload-components vea", "did you mean vae?"),
        ("--dit-offload-prefetch-size 2", "dit_offload_prefetch_size=2: no effect without --dit-layerwise-offload"),
        ("--dit-offload-prefetch-size 2.5 --dit-layerwise-offload", "dit_offload_prefetch_size=2.5: expected 0, a"),
        ("--dit-offload-prefetch-size -1 --dit-layerwise-offload", "dit_offload_prefetch_size=-1: must be at least 0"),
        ("--pin-cpu-memory", "pin_cpu_memory=true: no effect: no component is offloaded"),
        ("--enable-torch-compile --dit-layerwise-offload", "enable_torch_compile=true: not with the layerwise offload"),
    ],
)  # fmt: skip
def test_offload_without_effect_is_an_error(gpu: None, words: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(parse(words), KINDS)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_the_diffusers_backend_has_no_offload(gpu: None) -> None:
    with pytest.raises(UserError, match="vae_cpu_offload=true: the diffusers backend has no offload"):
        make_plan(parse("--vae-cpu-offload"), KINDS, native=False)
    assert set(make_plan(parse("--mode memory"), KINDS, native=False).offload.values()) == {"resident"}


def test_the_report_names_what_the_mode_chose(gpu: None, tiny: Callable[[str], Path]) -> None:
    plan = make_plan(parse("--mode memory --vae-cpu-offload --vae-slicing false"), KINDS)
    components = ("transformer", "text_encoder", "text_encoder_2")
    assert plan.chosen == {"vae_tiling": True, "offload": dict.fromkeys(components, "component")}
    engine = Engine.load(ServerArgs(model_path=str(tiny("flux")), device="cpu", performance_mode="memory"))
    params = SamplingParams(prompt=["a cross"], height=64, width=64, num_inference_steps=1, save_output=False)
    told = engine.run(params).report.effective["performance_mode"]
    assert told == {"mode": "memory", "chose": {"vae_tiling": True, "vae_slicing": True}}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--text-encoder-cpu-offload", "text_encoder_cpu_offload=true"),
        ("--layerwise-offload-components vae transformer", "layerwise_offload_components=vae transformer"),
        ("--dit-layerwise-offload --dit-offload-prefetch-size 2", "dit_layerwise_offload=true"),
        ("--dit-offload-prefetch-size 0", "dit_offload_prefetch_size=0.0"),
        ("--pin-cpu-memory", "pin_cpu_memory=true"),
    ],
)
def test_a_cpu_has_nothing_to_offload(words: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(parse(f"--device cpu {words}"), KINDS)
    assert str(caught.value) == f"{told}: on a CPU there is nothing to offload"
    accepted = make_plan(parse("--device cpu --mode memory --vae-cpu-offload false"), KINDS)
    assert set(accepted.offload.values()) == {"resident"}


def test_the_command_line_refuses_before_any_work(tmp_path: Path) -> None:
    done = sglang("generate", "--prompt", "x", "--device", "cpu", "--dit-cpu-offload", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.endswith("dit_cpu_offload=true: on a CPU there is nothing to offload")
    assert not list(tmp_path.iterdir())


# -- automatic -------------------------------------------------------------------------------

ENCODERS = {"text_encoder": "component", "text_encoder_2": "component"}


def test_the_ways_to_hold_weights() -> None:
    ways = ways_to_hold({key: KINDS[key] for key in WEIGHTS}, {})
    assert list(ways.values()) == [
        dict.fromkeys(WEIGHTS, "resident") | more
        for more in ({}, ENCODERS, ENCODERS | {"transformer": "component"}, ENCODERS | {"transformer": "layerwise"})
    ]
    kept = ways_to_hold({key: KINDS[key] for key in WEIGHTS}, {"transformer": "resident"})
    assert [way["transformer"] for way in kept.values()] == ["resident"] * 2  # no way twice
    whole = ways_to_hold({key: KINDS[key] for key in WEIGHTS}, {}, layerwise=False)
    assert all("layerwise" not in way.values() for way in whole.values())


@pytest.mark.parametrize(
    ("available", "way"),
    [(2000, "all"), (1050, "all"), (1049, "some"), (629, "few"), (105, "few"), (10, "fewest")],
)
def test_the_first_way_that_fits_with_a_margin(available: int, way: str) -> None:
    assert first_that_fits({"all": 1000, "some": 600, "few": 100, "fewest": 99}, available) == way
    assert first_that_fits({"all": 10, "none helps": 10}, 5) == "all"


def test_what_was_chosen_and_why_is_told(gpu: None) -> None:
    def choose(plan: Plan, ways: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return "text encoders offloaded", {"available_mb": 7}

    plan = make_plan(parse("--vae-tiling false"), KINDS, choose_offload=choose)
    assert plan.offload == dict.fromkeys(WEIGHTS, "resident") | ENCODERS
    assert plan.chosen == {"offload": ENCODERS, "offload_numbers": {"available_mb": 7}}


def planner_of(**sampling: Any) -> tuple[MemoryPlanner, Workload]:
    args = ServerArgs(model_path="embedded", device="cpu", enable_cuda_graph="false")
    memory = resolve(args).memory
    assert memory is not None
    params = SamplingParams.model_validate({"prompt": ["a"], "height": 128, "width": 128, **sampling})
    return memory, memory.rehearsal.workload(resolve_request(params, {}, args))


def test_offload_is_chosen_by_what_the_request_makes() -> None:
    memory, work = planner_of()
    _, larger = planner_of(height=256, width=256)
    ways = ways_to_hold({key: KINDS[key] for key in WEIGHTS}, {})

    def chosen(mib: float, *works: Workload) -> tuple[str, dict[str, Any]]:
        memory.limit_mb = mib  # type: ignore[assignment]
        return memory.choose_offload(ways, works)

    way, told = chosen(1000, work)
    needed = told["needed_mb"]
    assert way == told["way"] == "resident" and told["for"] == ["1 of 128x128"] and told["available_mb"] == 1000
    for name, places in ways.items():  # what a plan of that offload says
        assert needed[name] == pytest.approx(memory.with_offload(places).report(work, False).peak_mb, abs=0.1)
    for name in ways:
        assert chosen(needed[name] * 1.06, work)[0] == name
        assert chosen(needed[name] * 1.03, work)[0] != name or name == "denoiser layer by layer"
    assert chosen(needed["resident"] * 1.06, work, larger)[0] != "resident"  # the same weights, more activations


def test_one_rehearsal_serves_every_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, work = planner_of()
    calls: list[int] = []
    predictor = memory.rehearsal.family.predictor
    monkeypatch.setattr(memory.rehearsal.family, "predictor", lambda *args: calls.append(1) or predictor(*args))
    memory.limit_mb = 1000
    memory.choose_offload(ways_to_hold({key: KINDS[key] for key in WEIGHTS}, {}), [work])
    assert len(calls) == 1


ON_A_GPU = """
import sys, torch
from sgl_diffusion.bench.absent import GPUS, absent
from sgl_diffusion.cli.main import main

torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 1)
torch.cuda.memory_reserved = lambda device: 0
for gibibytes in (80, 34, 16):
    torch.cuda.mem_get_info = lambda device: (gibibytes * 2**30, 80 * 2**30)
    with absent(GPUS["sm_90"]):
        assert main(["plan", "--load-format", "dummy", "--device", "cuda", *sys.argv[1:]]) == 0
"""


def test_plan_chooses_for_a_gpu_that_is_not_here() -> None:
    """11.9 billion parameters in bf16 are 22,700 MiB, the text encoders 9,300; the layers' window is 900."""
    command = [sys.executable, "-c", ON_A_GPU, "--model-path", "black-forest-labs/FLUX.1-schnell"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("performance mode auto chose: ")]
    for line, way in zip(lines, ("resident", "text encoders offloaded", "denoiser layer by layer"), strict=True):
        assert line.startswith(f"performance mode auto chose: {way} (resident 3"), line
        assert "denoiser offloaded too 2" in line
    pinned = [line for line in done.stdout.splitlines() if line.startswith("peak ")]
    assert "host memory" not in pinned[0]
    assert "pinned host memory 9,3" in pinned[1] and "pinned host memory 31,99" in pinned[2]
