"""`sglang bench`: the checks and measurements themselves, through the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from kernel_checks import DEVICE  # noqa: F401 (chooses the interpreter before Triton is imported)
from test_aot import python

from sgl_diffusion.bench import kernels, tables
from sgl_diffusion.bench.tune import neighbours, search
from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.attention import OP

MAIN = "sgl_diffusion.cli.main"


def bench(*arguments: str) -> tuple[int, str, str]:
    done = python("-m", MAIN, "bench", *arguments)
    return done.returncode, done.stdout, done.stderr


# -- launches ---------------------------------------------------------------------


def test_a_flux_step_takes_few_launches(tmp_path: Path) -> None:
    """Targets of the project: 430 of ours, where diffusers takes 2,674."""
    report = tmp_path / "launches.json"
    code, out, err = bench("launches", "--model", "flux1-dev", "--json", str(report))
    assert code == 0, out + err
    counts = json.loads(report.read_text())
    assert sum(counts["diffusers"].values()) == 2674
    assert sum(counts["ours"].values()) <= 430
    kernels = {name: n for name, n in counts["ours"].items() if name.endswith("kernel")}
    assert kernels["qk_norm_rope_kernel"] == 19 + 38
    assert counts["diffusers"]["scaled_dot_product_attention"] == 19 + 38
    assert not {"_to_copy", "copy_"} & set(counts["ours"]), "a step copies or converts something"


def test_an_unknown_model_is_named() -> None:
    code, _, err = bench("launches", "--model", "flux1-def")
    assert code == 2
    assert "model=flux1-def: expected one of flux1-dev, flux1-schnell, " in err
    assert "; did you mean flux1-dev?" in err


# -- kernels ----------------------------------------------------------------------


def test_figures_and_plot_of_the_cpu(tmp_path: Path) -> None:
    report, plot = tmp_path / "k.json", tmp_path / "k.svg"
    code, out, err = bench("kernels", "--op", "rope", "--device", "cpu", "--json", str(report), "--plot", str(plot))
    assert code == 0, out + err
    assert "this says nothing about the Triton kernels" in out
    rows = json.loads(report.read_text())["rows"]
    assert {row["impl"] for row in rows} == {"eager", "torch"}
    assert all(row["us"] > 0 and row["of_limit"] > 0 and row["rel_l2"] < 1e-6 for row in rows)
    assert all(row["speedup"] == 1 for row in rows if row["impl"] == "eager")
    svg = plot.read_text()
    assert svg.startswith("<svg") and svg.count("<rect") == 2 + len(rows)


def test_a_wrong_answer_is_not_timed() -> None:
    program = (
        "import sys; from dataclasses import replace; from sgl_diffusion.bench import kernels as k;"
        "from sgl_diffusion.cli.main import main; op = k.OPS['rope'];"
        "wrong = lambda **a: op.launch(**a).add_(1e-3);"
        "k.OPS['rope'] = replace(op, launch=wrong); sys.exit(main(['bench', 'kernels', '--op', 'rope']))"
    )
    done = python("-c", program, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG ANSWER, not timed" in done.stdout


def test_what_other_attentions_do_not_take_is_told() -> None:
    """Of every case: masks, packed sequences, log-sums and codes are ours alone, and here is no GPU."""
    told = {}
    for case in OP.cases(OP.tiny):
        with pytest.raises(kernels.Refused) as refusal:
            kernels.caller(OP, "cudnn", case.inputs("cpu"))
        told[str(case)] = str(refusal.value)
    plain = {case for case, why in told.items() if why.startswith("needs an NVIDIA GPU")}
    assert plain and {why for case, why in told.items() if case not in plain} == {
        "not timed with return_lse",
        "not timed with causal, return_lse",
        "not timed with causal, return_lse, key_mask_BS",
        "not timed with return_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q",
        "not timed with causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q",
        "not timed with code_scale",
        "not timed with code_scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernels", "--impl", "tritton"), "impl=tritton: expected triton, torch, eager, compile, cudnn, fa"),
        (("kernels", "--device", "cpu", "--impl", "fa"), "impl=fa: needs a CUDA device"),
        (("kernels", "--plot", "k.jpg"), "plot=k.jpg: expected a name ending in .svg"),
        (("kernels", "--op", "ropes"), "invalid choice: 'ropes'"),
        (("tune", "--seconds", "0"), "seconds=0.0: expected more than 0"),
        (
            ("tunes",),
            "expected one of aot, e2e, kernels, launches, links, load, parallel, quality, serve, tune, vae; did you",
        ),
    ],
)
def test_a_mistake_is_named(arguments: tuple[str, ...], message: str) -> None:
    code, _, err = bench(*arguments)
    assert code == 2
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1


# -- tuning -----------------------------------------------------------------------


def test_the_search_walks_to_the_cheapest_tile_and_stops_in_time() -> None:
    def cost(tile: launch.Tile) -> float:
        if tile["BLOCK"] > 256:
            return math.inf  # does not fit
        return 1 + abs(math.log2(tile["BLOCK"]) - 7) + abs(tile["num_stages"] - 3)

    start = {"form": "pointer", "BLOCK": 16, "num_stages": 1}
    best, price = search([start], cost, seconds=60)
    assert best == {"form": "pointer", "BLOCK": 128, "num_stages": 3} and price == 1
    assert search([start], cost, seconds=0) == (start, cost(start))
    assert search([start, best], cost, seconds=0)[0] == best


def test_neighbours_stay_within_limits() -> None:
    near = list(neighbours({"form": "tma", "BLOCK": 1, "num_warps": 16, "STAGES": 1}))
    assert near == [
        {"form": "tma", "BLOCK": 2, "num_warps": 16, "STAGES": 1},
        {"form": "tma", "BLOCK": 1, "num_warps": 8, "STAGES": 1},
        {"form": "tma", "BLOCK": 1, "num_warps": 16, "STAGES": 2},
    ]


def test_a_table_is_measured_once_all_its_ops_were_timed_on_one_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    here = {"device": "H200", "triton": "3.6.0"}
    path = tables.put("sm_90", "a", [{"tile": {"BLOCK": 1}}])
    tables.put("sm_90", "b", [{"tile": {"BLOCK": 2}}], tuned_on=here)
    assert json.loads(path.read_text())["measured"] is False
    tables.put("sm_90", "a", [{"tile": {"BLOCK": 4}}], tuned_on=here)
    table = json.loads(path.read_text())
    assert table["measured"] is True and table["device"] == "H200"
    assert table["ops"] == {"a": [{"tile": {"BLOCK": 4}}], "b": [{"tile": {"BLOCK": 2}}]}
    tables.put("sm_90", "a", [{"tile": {"BLOCK": 8}}], tuned_on={**here, "device": "H100"})
    assert json.loads(path.read_text())["measured"] is False


def test_forced_tiles_and_versions_of_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    row = launch.tile("rope", heads=4)
    with launch.forced_tile("rope", {"BLOCK_H": 7}):
        assert launch.tile("rope", heads=4) == {"BLOCK_H": 7}
    assert launch.tile("rope", heads=4) == row

    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr(launch.resources, "files", lambda package: tmp_path.parent)
    monkeypatch.setattr(tables, "FOLDER", tmp_path.parent / "tuned")
    tables.FOLDER.mkdir()
    tables.put("sm_90", "a", [{"tile": {"BLOCK": 1}}])
    tables.put("sm_90", "b", [{"tile": {"BLOCK": 1}}])
    tables.put("sm_90", "a", [{"tile": {"BLOCK": 3}}], triton_minor="3.6")
    monkeypatch.setattr(triton, "__version__", "3.6.1")
    launch.tile_table.cache_clear()
    assert [launch.tile_row("sm_90", op)[1]["BLOCK"] for op in "ab"] == [3, 1]
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    launch.tile_table.cache_clear()
    assert [launch.tile_row("sm_90", op)[1]["BLOCK"] for op in "ab"] == [1, 1]
    launch.tile_table.cache_clear()


def test_the_smallest_and_largest_size_of_a_row() -> None:
    rows = [{"at_least": {"m": 8}, "at_most": {"m": 16}, "tile": {"BLOCK": 1}}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "tile_table", lambda arch: {"op": rows})
        assert launch.tile_row("sm_90", "op", m=8)[0] == launch.tile_row("sm_90", "op", m=16)[0] == 0
        for m in (7, 17):
            with pytest.raises(ValueError, match="op: no tile for"):
                launch.tile_row("sm_90", "op", m=m)
