"""Times every kernel against the PyTorch operations it replaces, after checking that its answer is right.

    python -m sgl_diffusion.bench.kernels [--op attention] [--device cuda|cpu] [--json kernels.json]

On the CPU the launchers run their PyTorch references, at small sizes: the figures say what CPU users get, nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton

from sgl_diffusion.kernels.catalog import OPS
from sgl_diffusion.kernels.op import Case, Inputs, Op

CPU_RUNS = 15


@dataclass(frozen=True)
class Row:
    """Medians; `rel_l2` is the error against float64. A wrong answer is not timed."""

    op: str
    case: str
    rel_l2: float
    us: float | None = None
    eager_us: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None


# -- measuring --------------------------------------------------------------------


def worst(case: Case, device: str) -> tuple[float, bool]:
    """Largest relative L2 error of a result against the reference in float64, and whether all are within bounds."""
    inputs = case.inputs(device)
    exact = case.op.exact(inputs)
    errors = [case.op.error(g, w) for g, w in zip(case.op.run(inputs), exact, strict=True)]
    return max(e for e, _ in errors), all(e <= limit for e, limit in errors)


def median_us(call: Callable[[], object], device: str) -> float:
    """On a GPU with events, caches flushed between runs; on the CPU by the wall clock."""
    if device == "cuda":
        return 1e3 * float(triton.testing.do_bench(call, return_mode="median"))
    call()
    times = []
    for _ in range(CPU_RUNS):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times)


def measure(case: Case, device: str) -> Row:
    op = case.op
    wrong, right = worst(case, device)
    if not right:
        return Row(op.name, str(case), wrong)
    inputs: Inputs = case.inputs(device)
    us = median_us(lambda: op.run(inputs), device)
    eager_us = median_us(lambda: op.eager(**inputs), device)
    return Row(
        op.name, str(case), wrong, us, eager_us,
        gb_per_s=op.bytes(inputs) / us / 1e3,
        tflop_per_s=op.flops(inputs) / us / 1e6 if op.flops else None,
    )  # fmt: skip


def run(ops: list[Op], device: str) -> Iterator[Row]:
    """fp32 on the CPU; bf16 at production sizes on a GPU."""
    for op in ops:
        sizes = op.production if device == "cuda" else op.cpu
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        for size in sizes:
            yield measure(Case(op, size, dtype), device)


def show(row: Row) -> None:
    if row.us is None or row.eager_us is None:
        print(f"{row.op:16}{row.case:44} WRONG ANSWER, not timed: rel_l2 {row.rel_l2:.1e}", flush=True)
        return
    rate = f"{row.gb_per_s:8.0f} GB/s" if row.tflop_per_s is None else f"{row.tflop_per_s:8.2f} TFLOP/s"
    times = f"{row.us:10.1f} us {row.eager_us:10.1f} us {row.eager_us / row.us:6.2f}x"
    print(f"{row.op:16}{row.case:44}{times} {rate:16} rel_l2 {row.rel_l2:.1e}", flush=True)


def machine(device: str) -> dict[str, Any]:
    """What the figures hold for."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sgl_diffusion.bench.kernels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--op", action="append", choices=OPS, help="operation; may be repeated (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device")
    about = machine(device)
    print(" | ".join(f"{key} {value}" for key, value in about.items()))
    if device == "cpu":
        print("CPU: the launchers run their PyTorch references; this says nothing about the Triton kernels")
    print(f"{'op':16}{'case':44}{'ours':>13} {'eager':>13}")
    rows = []
    for row in run([OPS[name] for name in args.op or OPS], device):
        show(row)
        rows.append(row)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**about, "rows": [asdict(row) for row in rows]}, file, indent=1)
    return 1 if any(row.us is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
