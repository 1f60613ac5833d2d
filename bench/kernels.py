"""`sglang bench kernels`: times every kernel beside what it replaces, after checking that its answers are right.

On a GPU the launchers run their Triton kernels in bf16 at production sizes. On the CPU they run their PyTorch
references in fp32 at small sizes: those figures say what CPU users get, nothing about the kernels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from sgl_diffusion.bench.plot import Bar, bars
from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.catalog import OPS
from sgl_diffusion.kernels.op import Case, Inputs, Op, rel_l2
from sgl_diffusion.runtime.attention import BACKENDS
from sgl_diffusion.runtime.attention import Case as AttentionCase
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.limits import Limits, limits, medians_us
from sgl_diffusion.runtime.report import commit_hash

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}  # of the runs
# eager PyTorch rounds after every operation, a fused kernel once
EAGER_ROUNDINGS = 8
IMPLEMENTATIONS = {
    "triton": "our kernels",
    "torch": "their PyTorch references",
    "eager": "the sequence of operations diffusers runs",
    "compile": "that sequence under torch.compile",
    "cudnn": "cuDNN's attention through PyTorch",
    "fa": "the flash-attn package",
}


@dataclass(frozen=True)
class Row:
    """One implementation on one case. `us` is a median; a wrong answer, or none, is not timed and says `why`."""

    op: str
    case: str
    impl: str
    rel_l2: float | None = None
    us: float | None = None
    speedup: float | None = None  # over eager
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    of_limit: float | None = None  # share of what this device reached in a copy or a matrix product
    why: str = ""


# -- implementations --------------------------------------------------------------


class Refused(Exception):
    """An implementation does not run a case."""


def caller(op: Op, impl: str, inputs: Inputs) -> Callable[[], Any]:
    """A call of one implementation.

    Raises:
        Refused: it does not run this op or these arguments.
    """
    if impl in ("triton", "torch"):
        return partial(op.launch, **inputs, impl=impl)
    if impl == "eager":
        return partial(op.eager, **inputs)
    if impl == "compile":
        return partial(torch.compile(op.eager, dynamic=False), **inputs)
    if op.name != "attention":
        raise Refused("for attention only")
    plain = ("q_BLHK", "k_BLHK", "v_BLHK", "out", "scale")
    if unusual := [n for n, value in inputs.items() if n not in plain and value is not None and value is not False]:
        raise Refused(f"not timed with {', '.join(unusual)}")
    q, k, v, out = (inputs[name] for name in ("q_BLHK", "k_BLHK", "v_BLHK", "out"))
    if why := BACKENDS[impl].reasons(AttentionCase(q.device, q.dtype, q.shape[-1], k.shape[1])):
        raise Refused("; ".join(why))
    return partial(BACKENDS[impl].run, q, k, v, out=out)


# -- measuring --------------------------------------------------------------------


def worst(case: Case, device: str, impl: str = "auto") -> tuple[float, bool]:
    """Largest relative L2 error of a result against the reference in float64, and whether all are within bounds."""
    op, inputs = case.op, case.inputs(device)
    exact = op.exact(inputs)
    results = op.collect(op.launch(**inputs, impl="auto") if impl == "auto" else caller(op, impl, inputs)(), inputs)
    ours = impl in ("auto", "triton", "torch")
    pairs = zip(results, exact, strict=ours)  # what it replaces may not give a log-sum beside its result
    errors = []
    for got, want in pairs:
        limit = case.tolerance(got.dtype)
        if not ours:  # what is in fp32, as the scales of codes, is made of rounded numbers there
            limit = EAGER_ROUNDINGS * max(limit, op.tolerance.get(case.dtype, 0))
        errors.append((rel_l2(got, want), limit))
    return max(e for e, _ in errors), all(e <= limit for e, limit in errors)


def measure(case: Case, impls: Sequence[str], device: str, limit: Limits) -> list[Row]:
    """A row for every implementation."""
    op, rows, calls = case.op, {}, {}
    for impl in impls:
        row = Row(op.name, str(case), impl)
        try:
            wrong, right = worst(case, device, impl)
            rows[impl] = replace(row, rel_l2=wrong, why="" if right else "WRONG ANSWER, not timed")
            if right:
                calls[impl] = caller(op, impl, case.inputs(device))
        except (Refused, launch.Unsupported) as e:
            rows[impl] = replace(row, why=str(e))
    inputs = case.inputs(device)
    for impl, us in medians_us(calls, torch.device(device)).items():
        gb, tflop = op.bytes(inputs) / us / 1e3, op.flops(inputs) / us / 1e6 if op.flops else None
        share = gb / limit.copy_gb_per_s if tflop is None else tflop / limit.matmul_tflop_per_s
        rows[impl] = replace(rows[impl], us=us, gb_per_s=gb, tflop_per_s=tflop, of_limit=share)
    eager_us = rows["eager"].us
    return [
        row if row.us is None or eager_us is None else replace(row, speedup=eager_us / row.us) for row in rows.values()
    ]


def measure_all(ops: Sequence[Op], impls: Sequence[str], device: str, limit: Limits) -> Iterator[Row]:
    """fp32 on the CPU; bf16 at production sizes on a GPU."""
    dtype = DTYPES[device]
    for op in ops:
        for size in op.production if device == "cuda" else op.cpu:
            yield from measure(Case(op, size, dtype), impls, device, limit)


# -- report -----------------------------------------------------------------------


def show(row: Row) -> None:
    start = f"{row.op:20}{row.impl:9}"
    if row.us is None:
        print(f"{start}{row.why:>48}  {row.case}", flush=True)
        return
    rate = f"{row.gb_per_s:8.0f} GB/s  " if row.tflop_per_s is None else f"{row.tflop_per_s:8.2f} TFLOP/s"
    speedup = "" if row.speedup is None else f"{row.speedup:6.2f}x"
    print(f"{start}{row.us:10.1f} us{speedup:>8} {rate}{row.of_limit:6.0%}  {row.rel_l2:.1e}  {row.case}", flush=True)


def machine(device: str) -> dict[str, Any]:
    """What the figures hold for."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__, "commit": commit_hash()}


def plot(path: Path, rows: list[Row], title: str) -> None:
    """Shares of the device's limit as bars, a group for every case."""
    shown = [row for row in rows if row.of_limit is not None]
    path.write_text(bars(title, [Bar(f"{r.op} {r.case}", r.impl, r.of_limit or 0.0) for r in shown]))


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Exit code 1 if an answer is wrong."""
    known = "; ".join(f"{name}: {what}" for name, what in IMPLEMENTATIONS.items())
    parser.add_argument("--op", action="append", choices=OPS, help="operation; may be repeated (default: all)")
    parser.add_argument("--impl", metavar="A,B", help=f"to time beside eager, of {known} (default: all that run here)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw shares of the device's limits, as .svg")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: PyTorch sees no CUDA device")
    if args.plot and args.plot.suffix != ".svg":
        raise UserError(f"plot={args.plot}: expected a name ending in .svg")
    impls = _implementations(args.impl, device)
    about, limit = machine(device), limits(torch.device(device), DTYPES[device])
    print(" | ".join(f"{key} {value}" for key, value in about.items()))
    print(f"limits: copy {limit.copy_gb_per_s:.0f} GB/s, matrix product {limit.matmul_tflop_per_s:.2f} TFLOP/s")
    if device == "cpu":
        print("CPU: our launchers run their PyTorch references; this says nothing about the Triton kernels")
    print(f"{'op':20}{'impl':9}{'median':>13} {'eager/':>7} {'rate':>13}{'limit':>8}  rel_l2   case")
    rows = []
    for row in measure_all([OPS[name] for name in args.op or OPS], impls, device, limit):
        show(row)
        rows.append(row)
    if args.json:
        report = {**about, "limits": asdict(limit), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(report, indent=1))
    if args.plot:
        plot(args.plot, rows, f"{about['device']}, torch {about['torch']}, triton {about['triton']}")
    return 1 if any(row.rel_l2 is not None and row.us is None for row in rows) else 0


def _implementations(asked: str | None, device: str) -> list[str]:
    """eager first, as what the others are compared with."""
    here = ["triton", "compile", "cudnn", "fa"] if device == "cuda" else ["torch"]
    impls = here if asked is None else asked.split(",")
    for impl in impls:
        if impl not in IMPLEMENTATIONS:
            raise UserError(f"impl={impl}: expected {', '.join(IMPLEMENTATIONS)}")
        if device == "cpu" and impl in ("triton", "cudnn", "fa"):
            raise UserError(f"impl={impl}: needs a CUDA device")
    return ["eager", *(impl for impl in impls if impl != "eager")]
