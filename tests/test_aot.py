"""Kernels compile cleanly for GPUs that are not here: no spills, no impossible memory, wide loads, tensor cores in use.

In a process of their own, since this one may run Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgl_diffusion.kernels.catalog import OPS
from sgl_diffusion.kernels.launch import tile_table

SGLANG = ("-m", "sgl_diffusion.cli.main", "bench", "aot")


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=compiled | env, capture_output=True, text=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    # fp32, and sm_89, take minutes more: `sglang bench aot` by hand. CI compiles for sm_90 with the Triton of GPUs
    "arch",
    ["sm_80", "sm_100"],
)
def test_every_kernel_compiles_cleanly(arch: str, tmp_path: Path) -> None:
    report = tmp_path / "aot.json"
    done = python(*SGLANG, "--arch", arch, "--dtype", "bf16", "--json", str(report))
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "PROBLEM" in line) + done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {row["op"] for row in rows} == set(OPS)
    compiled = [row for row in rows if row["kernel"]]
    assert all(row["registers"] > 0 and row["occupancy"] > 0 for row in compiled)
    skipped = {row["op"] for row in rows if row["skipped"]}
    # before sm_100 no tensor core multiplies microscaled codes by each other
    refused = set() if arch == "sm_100" else {"gemm_mx"}
    assert skipped <= refused or arch == "sm_80", f"refused on {arch}: {skipped}"


def gate(change: str, arch: str, op: str) -> subprocess.CompletedProcess[str]:
    """The check of one op after a change to tables or kernels in that process."""
    program = (
        "import sys, torch; from dataclasses import replace; from sgl_diffusion.bench import aot;"
        "from sgl_diffusion.cli.main import main;"
        f"aot.DTYPES = {{'bf16': torch.bfloat16}}; op = aot.OPS['{op}']; {change};"
        f"sys.exit(main(['bench', 'aot', '--arch', '{arch}', '--op', '{op}']))"
    )
    return python("-c", program)


def table(arch: str, op: str, tile: dict[str, object]) -> str:
    return f"aot.launch.tile_table('{arch}')['{op}'][:] = [{{'tile': {tile}}}]"


PLAIN = "aot.OPS['attention'] = replace(op, production=op.production[1:2])"


@pytest.mark.parametrize(
    ("change", "arch", "op", "reasons"),
    [
        (
            f"{PLAIN}; {table('sm_89', 'attention', {'BLOCK_Q': 128, 'BLOCK_S': 256, 'STAGES': 4, 'num_warps': 4})}",
            "sm_89",
            "attention",
            ("spills:", "shared memory", "above 101376"),
        ),
        (  # 8 warps: Triton ignores warp specialisation there without a word
            f"{PLAIN}; "
            + table("sm_90", "attention", {"form": "ws", "BLOCK_Q": 128, "BLOCK_S": 64, "STAGES": 2, "num_warps": 8}),
            "sm_90",
            "attention",
            ("form ws without warp specialisation",),
        ),
        (  # tiles too low for wgmma
            "aot.OPS['attention_int8'] = replace(op, production=op.production[:1]); "
            + table("sm_90", "attention_int8", {"BLOCK_Q": 32, "BLOCK_S": 64, "STAGES": 2, "num_warps": 4}),
            "sm_90",
            "attention_int8",
            ("no IGMMA instruction for products of i8", "no HGMMA instruction for products of bf16"),
        ),
        (  # heads an odd number of elements apart: no two loads can be one
            "make = op.inputs; odd = lambda *a, **k: make(*a, **k) | {'x_BLHK': "
            "torch.empty(1, 64, 8, 67, dtype=torch.bfloat16, device='meta')[..., :64], 'out': None};"
            "size = op.production[-1] | {'B': 1, 'L': 64};"
            "aot.OPS['rope'] = replace(op, inputs=odd, production=(size,))",
            "sm_90",
            "rope",
            ("narrow loads: ",),
        ),
        (
            "aot.launch.tile_table('sm_90')['rope'].append({'tile': {'BLOCK_H': 4}})",
            "sm_90",
            "rope",
            ("tuned/sm_90.json: no production size uses row 2",),
        ),
    ],
)
def test_the_gate_closes(change: str, arch: str, op: str, reasons: tuple[str, ...]) -> None:
    done = gate(change, arch, op)
    assert done.returncode == 1, done.stdout + done.stderr
    for reason in reasons:
        assert reason in done.stdout


def test_interpreted_kernels_are_refused() -> None:
    done = python(*SGLANG, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def test_the_tables_say_whether_they_were_measured() -> None:
    import sgl_diffusion.kernels

    for path in (Path(sgl_diffusion.kernels.__path__[0]) / "tuned").glob("sm_*.json"):
        table = json.loads(path.read_text())
        assert table["measured"] in (True, False)
        assert not table["measured"] or {"device", "torch", "triton"} <= set(table)
    assert set(tile_table("sm_90")) == set(OPS)
