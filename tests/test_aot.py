"""Kernels compile cleanly for GPUs that are not here: no spills, no impossible memory, tensor cores in use.

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

AOT = "sgl_diffusion.bench.aot"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=compiled | env, capture_output=True, text=True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_cleanly(arch: str, tmp_path: Path) -> None:
    report = tmp_path / "aot.json"
    done = python("-m", AOT, "--arch", arch, "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {row["op"] for row in rows} == set(OPS)
    assert all(row["registers"] > 0 and row["occupancy"] > 0 for row in rows)


def test_the_gate_closes() -> None:
    """A tile far beyond registers and shared memory: exit code 1 and the reasons."""
    program = (
        "import sys; from dataclasses import replace; from sgl_diffusion.bench import aot;"
        "tile = {'BLOCK_Q': 128, 'BLOCK_S': 256, 'STAGES': 4, 'num_warps': 4};"
        "aot.launch.tile_table('sm_89')['attention'][:] = [{'tile': tile}];"
        "op = aot.OPS['attention']; aot.DTYPES = (aot.torch.bfloat16,);"
        "aot.OPS['attention'] = replace(op, production=op.production[1:2]);"
        "sys.argv = ['aot', '--arch', 'sm_89', '--op', 'attention']; sys.exit(aot.main())"
    )
    done = python("-c", program)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "spills:" in done.stdout
    assert "shared memory" in done.stdout


def test_interpreted_kernels_are_refused() -> None:
    done = python("-m", AOT, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
