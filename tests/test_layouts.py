"""The layout planner: what it predicts of a step, which layouts it lists, and what it says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import sglang

from sgl_diffusion.bench import parallel
from sgl_diffusion.bench.parallel import MARKER, Row, Subject
from sgl_diffusion.cli.flags import Parser
from sgl_diffusion.cli.main import main
from sgl_diffusion.kernels.launch import rehearsing
from sgl_diffusion.runtime.accounting import counted
from sgl_diffusion.runtime.args import ServerArgs, parse_args
from sgl_diffusion.runtime.batch import predictor_of
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parallel.costs import (
    BranchWork,
    Gathered,
    Machine,
    Prediction,
    Rates,
    StepWork,
    predict,
    slower_than_fewer,
)
from sgl_diffusion.runtime.parallel.layout import Layout
from sgl_diffusion.runtime.parallel.links import COLLECTIVES, Line, Links
from sgl_diffusion.runtime.parallel.machines import H200_TFLOP_PER_S, PRODUCTS_REACH, machine_of, read_rates
from sgl_diffusion.runtime.parallel.mesh import Mesh
from sgl_diffusion.runtime.parallel.steps import Observer, warning_of
from sgl_diffusion.runtime.parallel.tensor import share_denoiser
from sgl_diffusion.runtime.parallel.usp import Usp
from sgl_diffusion.runtime.parallel.volume import Attended, attend_bytes, whole_bytes
from sgl_diffusion.runtime.rehearsal import FusedAttention
from sgl_diffusion.runtime.request import resolve_request
from sgl_diffusion.runtime.resolve import resolve

Tiny = Callable[[str], Path]
RATES = Rates("a device", "made up", matmul_tflop_per_s=100.0, attention_tflop_per_s=50.0, copy_gb_per_s=1000.0)


def links(gb_per_s: float, latency_us: float = 10.0) -> Links:
    return Links(f"{gb_per_s:g} GB/s", "made up", dict.fromkeys(COLLECTIVES, Line(latency_us, gb_per_s)))


def machine(gb_per_s: float = 100.0, between: float = 10.0, gpus_per_host: int = 8) -> Machine:
    return Machine(RATES, links(gb_per_s), links(between, 30.0), gpus_per_host)


# -- arithmetic -----------------------------------------------------------------------------------

ATTENDED = Attended((512, 4096), 24, 128, 2)
GATHERED = Gathered(1, 4096, 64, 2)
BRANCH = BranchWork(
    attended={ATTENDED: 57},
    gathered={GATHERED: 1},
    flops={"gemm": 10**13},
    bytes={"gemm": 10**9, "norm/elementwise": 5 * 10**9},
    reduces=114,
    reduced=10**9,
)
STEP = StepWork([BRANCH], velocity_bytes=4096 * 64 * 2)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (4, 1), (1, 2), (1, 4), (2, 2), (4, 2), (5, 3)])
def test_bytes_of_a_step_are_those_of_the_formulas(ulysses: int, ring: int) -> None:
    p = predict(STEP, Layout(ulysses=ulysses, ring=ring), machine())
    each = attend_bytes(ATTENDED, ulysses, ring)
    whole = whole_bytes(4096, 64, 2, ulysses * ring)
    expected = {"ulysses": 57 * each.all_to_all, "ring": 57 * each.exchange, "sp": whole}
    assert {of: size for of, size in p.sent.items() if of != "tp"} == {k: v for k, v in expected.items() if v}


def test_time_is_products_attention_passes_and_waits() -> None:
    p = predict(STEP, Layout(ulysses=4), machine())
    assert p.products == pytest.approx(10**13 / 100e12 * 1e3)
    attention = 57 * 4 * 4608**2 * 24 * 128 / 4
    assert p.attention == pytest.approx(attention / 50e12 * 1e3)
    packed = 57 * 2 * 2 * 4 * 1152 * 24 * 128  # q, k, v and the result, read and written once each
    assert p.rest == pytest.approx((5e9 + packed) / 1000e9 * 1e3)
    assert p.waits["ulysses"] == pytest.approx(114 * 0.01 + p.sent["ulysses"] / 100e9 * 1e3)
    assert p.step_ms == pytest.approx(p.products + p.attention + p.rest + sum(p.waits.values()))
    more = replace(BRANCH, bytes={"gemm": 10**12})  # bound by what it reads
    assert predict(replace(STEP, branches=[more]), Layout(), machine()).products == pytest.approx(1000.0)


def test_a_ring_waits_for_what_attention_does_not_hide() -> None:
    hidden = predict(STEP, Layout(ring=4), machine(gb_per_s=1000))
    assert hidden.waits["ring"] == 0.0
    seen = predict(STEP, Layout(ring=4), machine(gb_per_s=1))
    block_ms = attend_bytes(ATTENDED, 1, 4).exchange / 3 / 1e9 * 1e3 + 0.01
    assert seen.waits["ring"] == pytest.approx(57 * 3 * (block_ms - seen.attention / 57 / 4))


def test_collectives_between_hosts_take_their_links() -> None:
    """Ranks of tp are next to each other, then those of ulysses, of a ring and of cfg."""
    near = predict(STEP, Layout(ring=2, ulysses=8), machine(gpus_per_host=8))
    far = predict(STEP, Layout(ring=2, ulysses=8), machine(gpus_per_host=4))
    assert near.waits["ring"] == far.waits["ring"] > 0
    inside, outside = (near.sent["ulysses"] * n / 7 for n in (3, 4))
    assert near.waits["ulysses"] == pytest.approx(114 * 0.01 + near.sent["ulysses"] / 100e9 * 1e3)
    assert far.waits["ulysses"] == pytest.approx(114 * 0.03 + outside / 10e9 * 1e3)
    assert inside / 100e9 < outside / 10e9
    both = predict(STEP, Layout(ulysses=4, tp=2), machine(gpus_per_host=4))  # every other rank: one peer near, two far
    assert both.waits["ulysses"] == pytest.approx(114 * 0.03 + both.sent["ulysses"] * 2 / 3 / 10e9 * 1e3)
    tp = [predict(STEP, Layout(tp=8), machine(gpus_per_host=n)).waits["tp"] for n in (8, 4)]
    assert tp == pytest.approx([114 * 0.01 + 10.0, 114 * 0.03 + 100.0])


def test_branches_take_turns_or_a_group_each() -> None:
    longer = replace(BRANCH, flops={"gemm": 2 * 10**13})
    both = replace(STEP, branches=[BRANCH, longer])
    one, cfg = predict(both, Layout(), machine()), predict(both, Layout(cfg=2), machine())
    assert one.products == pytest.approx(300.0) and cfg.products == pytest.approx(200.0)
    assert cfg.sent["cfg"] == STEP.velocity_bytes
    assert cfg.waits["cfg"] == pytest.approx(0.01 + STEP.velocity_bytes / 100e9 * 1e3)
    turns = predict(both, Layout(ulysses=2), machine())
    assert turns.sent["ulysses"] == 2 * predict(STEP, Layout(ulysses=2), machine()).sent["ulysses"]


def prediction(layout: Layout, ms: float) -> Prediction:
    return Prediction(layout, ms, 0.0, 0.0, {"ulysses": 5.0}, {"ulysses": 10**7})


def test_fewer_gpus_that_are_faster_are_told() -> None:
    chosen, fewer = prediction(Layout(ulysses=4), 20.0), [prediction(Layout(), 18.0), prediction(Layout(tp=2), 15.0)]
    told = slower_than_fewer(chosen, fewer)
    assert told is not None and "\n" not in told
    assert "25.00 ms on 4 GPUs" in told and "5.00 ms of it waiting for 10.0 MB; 20.00 ms on 2 GPUs" in told
    assert "tp 2)" in told
    assert slower_than_fewer(chosen, [prediction(Layout(), 21.0), prediction(Layout(ring=8), 1.0)]) is None
    assert slower_than_fewer(chosen, []) is None


# -- a model's step -------------------------------------------------------------------------------


def observe(folder: Path, **more: Any) -> tuple[Observer, ServerArgs]:
    server, sampling = parse_args({"model_path": str(folder), "prompt": ["x"], "device": "cpu", **more})
    planner = resolve(server, [sampling]).memory
    assert planner is not None
    return Observer(planner, planner.rehearsal.workload(resolve_request(sampling, {}, server))), server


SIZE = {"height": 64, "width": 96, "num_inference_steps": 2}
CLIP = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "negative_prompt": "blurred"}


EVERYTHING = Layout(ring=2, ulysses=2, tp=2)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("flux", Layout(ulysses=2)), ("flux", EVERYTHING), ("wan", Layout(ring=4)), ("wan", EVERYTHING),
        ("qwen", EVERYTHING), ("z_image", Layout(ring=2, ulysses=2)), ("flux2", Layout(ring=3, ulysses=2)),
        ("flux2_klein", Layout(ulysses=2)),
    ],
)  # fmt: skip
def test_what_is_predicted_to_be_sent_is_what_ranks_send(name: str, layout: Layout, tiny: Tiny) -> None:
    """The model itself with its communicators, whose first rank counts: of shapes alone, all else is as in a run."""
    observer, _ = observe(tiny(name), **(CLIP if name == "wan" else SIZE))
    rehearsal, work, mesh = observer.planner.rehearsal, observer.workload, Mesh.stand_in(layout)
    blueprint = observer.planner.blueprint
    key = rehearsal.family.phases(work.schedule.timesteps, work.guidance)[0].denoiser
    predicted = predict(observer.step(layout), layout, machine())
    attention = blueprint.attention_on(torch.device("cpu"))(key)
    with torch.device("meta"):
        model = blueprint.family.build(key, blueprint.configs[key], attention, {}, Usp.of(mesh)).eval()
    share_denoiser(key, model, mesh.tp)
    family = blueprint.family_of({**rehearsal.parts, key: model})
    branches = rehearsal.conditions(work)
    groups = [mesh.ulysses, mesh.ring, mesh.sp, mesh.tp]
    with torch.inference_mode(), rehearsing("cpu"), FusedAttention():
        x = family.noise(work.size, [torch.Generator()])
        predictors = [
            predictor_of(family, told, work.size, work.guidance, work.schedule.timesteps, key) for told in branches
        ]
        before = [sum(t.bytes for t in group.traffic.values()) for group in groups]
        with counted():
            for predictor in predictors:
                predictor(x, 0)
    after = [sum(t.bytes for t in group.traffic.values()) for group in groups]
    sent = {group.name: b - a for group, a, b in zip(groups, before, after, strict=True)}
    assert {of: size for of, size in sent.items() if size} == predicted.sent
    assert {of for of in ("ulysses", "ring", "tp") if getattr(layout, of) > 1} <= predicted.sent.keys()


def test_ranks_divide_the_work(tiny: Tiny) -> None:
    """Products, attention and passes of two ranks are halves, but for what they do for each other."""
    observer, _ = observe(tiny("flux"), **SIZE)
    one, two = (predict(observer.step(layout), layout, machine()) for layout in (Layout(), Layout(ring=2)))
    flops = [sum(observer.step(layout).branches[0].flops.values()) for layout in (Layout(), Layout(ring=2))]
    assert flops[1] == pytest.approx(flops[0] / 2, rel=0.01)
    assert two.attention == pytest.approx(one.attention / 2, rel=0.01)


def test_valid_layouts_are_listed_and_no_others(tiny: Tiny) -> None:
    def listed(ranks: int, **more: Any) -> set[Layout]:
        observer, server = observe(tiny("flux"), **SIZE, **more)
        return set(observer.layouts(server, ranks))

    heads = observe(tiny("flux"))[0].planner.blueprint.family.attention_heads(
        observe(tiny("flux"))[0].planner.blueprint.configs
    )
    four = listed(4)
    assert all(layout.ranks == 4 and layout.dp == layout.cfg == 1 for layout in four)
    assert Layout(ring=4) in four and Layout(ring=2, ulysses=2) in four
    assert (Layout(ulysses=4) in four) == (heads >= 4)
    assert all(heads % layout.tp == 0 for layout in listed(12))
    guided = listed(4, negative_prompt="y", true_cfg_scale=3.0)
    assert Layout(cfg=2, ulysses=2) in guided and Layout(cfg=2, ring=2) in guided
    several = listed(4, num_outputs_per_prompt=3)
    assert Layout(dp=2, ring=2) in several and Layout(dp=4) not in several
    assert Layout(ring=3) in listed(3)
    assert listed(24) and not listed(25)  # 24 tokens


def test_memory_of_a_rank_is_less_where_it_shares(tiny: Tiny) -> None:
    observer, _ = observe(tiny("flux"), **SIZE)
    whole, tp = observer.memory(Layout()), observer.memory(Layout(tp=2))
    assert tp < whole
    assert observer.memory(Layout(ring=2)) <= whole


def test_slow_links_are_warned_of(tiny: Tiny) -> None:
    observer, _ = observe(tiny("flux"), **SIZE, num_gpus=2)
    planner = observer.planner
    assert planner.plan.layout.ranks == 2
    told = warning_of(planner, observer.workload, machine(gb_per_s=1e-3))
    assert told is not None and "on 2 GPUs" in told and "on one GPU" in told
    slow_device = replace(RATES, matmul_tflop_per_s=1e-3, attention_tflop_per_s=1e-3, copy_gb_per_s=0.1)
    assert warning_of(planner, observer.workload, replace(machine(), rates=slow_device)) is None


# -- machines -------------------------------------------------------------------------------------


def test_a_machine_is_given_by_names_and_files(tmp_path: Path) -> None:
    args = ServerArgs(model_path="embedded", nnodes=2)
    told = machine_of(args, 16, torch.device("cpu"), torch.bfloat16, "h200", "pcie5,loopback")
    assert told.gpus_per_host == 8 and (told.within.name, told.between.name) == ("pcie5", "loopback")
    assert told.rates.matmul_tflop_per_s == PRODUCTS_REACH * H200_TFLOP_PER_S["bf16"]
    assert machine_of(args, 16, torch.device("cpu"), torch.bfloat16, "h200").within.name == "nvlink"

    file = tmp_path / "kernels.json"
    rows = [
        {"op": "attention", "impl": impl, "us": us, "tflop_per_s": rate}
        for impl, us, rate in (("triton", 10.0, 300.0), ("triton", 99.0, 420.0), ("cudnn", 500.0, 600.0))
    ]
    limits = {"copy_gb_per_s": 4000.0, "matmul_tflop_per_s": 650.0}
    file.write_text(json.dumps({"device": "NVIDIA H200", "limits": limits, "rows": rows}))
    rates = read_rates(file)
    assert (rates.matmul_tflop_per_s, rates.attention_tflop_per_s, rates.copy_gb_per_s) == (650.0, 420.0, 4000.0)
    for text, message in (("{}", "expected a file of `sglang bench kernels"), ("x", "not readable as JSON")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_rates(file)
    with pytest.raises(UserError, match="gpu=h300: expected here, h200 or a file"):
        machine_of(args, 16, torch.device("cpu"), torch.bfloat16, "h300")


# -- command lines --------------------------------------------------------------------------------


def test_plan_lists_layouts_and_marks_the_best(
    tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    file = tmp_path / "plan.json"
    words = ["plan", "--model-path", str(tiny("flux")), "--device", "cpu", "--height", "64", "--width", "96"]
    words += ["--num-gpus", "4", "--ring-degree", "4", "--gpu", "h200", "--links", "loopback", "--json", str(file)]
    assert main(words) == 0
    out = capsys.readouterr().out
    layouts = json.loads(file.read_text())["layouts"]
    assert "PREDICTED by an analytic model, not measured: H200 in bf16" in out and "links loopback" in out
    assert "warning: a step is predicted to take" in out  # of so small a model
    rows = [line for line in out.splitlines() if " ring " in line and "warning" not in line]
    assert len(rows) == len(layouts) and "best" in rows[0] and sum("chosen" in row for row in rows) == 1
    assert "ring 4" in next(row for row in rows if "chosen" in row)
    assert [p["step_ms"] for p in layouts] == sorted(p["step_ms"] for p in layouts)
    for option, value in (("--gpu", "h200"), ("--links", "nvlink")):
        assert main(["plan", "--model-path", str(tiny("flux")), "--device", "cpu", option, value]) == 2
        assert f"{option[2:]}={value}: no effect without several GPUs" in capsys.readouterr().err


def test_plan_of_a_published_model(tmp_path: Path) -> None:
    words = "plan --num-gpus 2 --model-path black-forest-labs/FLUX.1-dev --load-format dummy --device cpu --gpu h200"
    done = sglang(*words.split(), cwd=tmp_path, env={"COLUMNS": "160"})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if line.split()[:1] in (["ulysses"], ["ring"], ["tp"])]
    assert len(rows) == 3 and "best" in rows[0] and "warning" not in done.stdout
    megabytes = {" ".join(row.split()[:2]): row.split()[-2] for row in rows}
    sent = (57 * attend_bytes(ATTENDED, 2, 1).total + whole_bytes(4096, 64, 2, 2)) / 1e6
    assert megabytes["ulysses 2"] == f"{sent:,.1f}"


def test_predictions_of_presets_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows_of(subject: Subject, hub_id: str, machines: dict[int, Any]) -> list[Row]:
        args, told = machines[2]
        assert (hub_id, args.num_gpus, told.between.name) == ("black-forest-labs/FLUX.1-dev", 2, "infiniband-400")
        layouts = Layout(cfg=2), Layout(ring=2), Layout(ulysses=2)
        found = [Row(str(subject), 1, 1, Layout(), 20.0, 1.0, {}, {}, 2048.0)]
        return found + [
            Row(str(subject), 2, 1, layout, ms, 20 / ms, {"sp": 1.0}, {"sp": 10**6}, 1024.0)
            for layout, ms in zip(layouts, (11.0, 12.0, 13.0), strict=True)
        ]

    monkeypatch.setattr(parallel, "rows_of", rows_of)
    page, file, plot = tmp_path / "page.md", tmp_path / "p.json", tmp_path / "p.svg"
    page.write_text(f"before\n{MARKER}\nold\n{MARKER}\nafter\n")
    words = ["FLUX.1-dev:1024x768", "--gpus", "2", "--json", str(file), "--markdown", str(page), "--plot", str(plot)]
    assert parallel.run(Parser(), words) == 0
    report = json.loads(file.read_text())
    assert "not measured" in report["about"] and "not measured" in capsys.readouterr().out
    assert [row["step_ms"] for row in report["rows"]] == [20.0, 11.0, 12.0, 13.0]
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "**FLUX.1-dev 1024x768**, predicted" in text and "| 2 | cfg 2 | 11.0 | 1.82 | 1.00 | 1.0 | 1.0 |" in text
    assert "not measured" in plot.read_text() and ">91%<" in plot.read_text()
    with pytest.raises(UserError, match="request=Wan:1x1: expected CHECKPOINT:WIDTHxHEIGHT"):
        parallel.run(Parser(), ["Wan:1x1"])
