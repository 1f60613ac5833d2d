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

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def aot(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sgl_diffusion.bench.aot", *arguments]
    return subprocess.run(command, env=clean | env, capture_output=True, text=True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_cleanly(arch: str, tmp_path: Path) -> None:
    report = tmp_path / "aot.json"
    done = aot("--arch", arch, "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {row["op"] for row in rows} == set(OPS)
    assert all(row["registers"] > 0 and row["occupancy"] > 0 for row in rows)


def test_the_gate_closes(tmp_path: Path) -> None:
    """The smallest shared memory and a tile that needs far more of it: exit code 1 and the reason."""
    # a copy of the table with a tile that cannot be, put in front of the real one
    program = (
        "import sys; from sgl_diffusion.kernels import launch; from sgl_diffusion.bench import aot;"
        "row = {'BLOCK_Q': 128, 'BLOCK_S': 128, 'STAGES': 4, 'num_warps': 4};"
        "launch.tile_table('sm_89')['attention'][:] = [{'tile': row}];"
        "sys.argv = ['aot', '--arch', 'sm_89', '--op', 'attention']; sys.exit(aot.main())"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "spills:" in done.stdout
    assert "shared memory" in done.stdout


def test_interpreted_kernels_are_refused() -> None:
    done = aot(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
