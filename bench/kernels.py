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
import torch.nn.functional as F
import triton
from torch import Tensor

from sgl_diffusion.kernels.catalog import OPS
from sgl_diffusion.kernels.op import Case, Inputs, Op, Size, rel_l2

CPU_RUNS = 15
# CPU sizes: large enough to leave the caches, small enough for one core
CPU_SIZES: dict[str, Size] = {
    "norm_modulate": {"B": 1, "L": 1024, "D": 768},
    "gate_residual": {"B": 1, "L": 1024, "D": 768},
    "qk_norm_rope": {"B": 1, "L": 1024, "H": 12, "K": 64},
    "gelu_tanh": {"B": 1, "L": 1024, "D": 3072},
    "attention": {"B": 1, "Q": 1024, "S": 1024, "H": 12, "K": 64},
    "group_norm": {"B": 1, "C": 128, "HW": (128, 128), "groups": 32, "silu": True},
    "euler_step": {"N": (1, 4096, 64), "dt_on": "host"},
}


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


# -- the sequences replaced, as they stand in diffusers ---------------------------


def eager_norm_modulate(x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor) -> Tensor:
    return F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=1e-6) * (1 + scale_BD[:, None]) + shift_BD[:, None]


def eager_gate_residual(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    return x_BLD + gate_BD.unsqueeze(1) * y_BLD


def eager_gelu_tanh(x_MD: Tensor, out: Tensor) -> Tensor:
    return out.copy_(F.gelu(x_MD, approximate="tanh"))


def eager_attention(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, out: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
    return out.copy_(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


def eager_qk_norm_rope(
    qkv_BL3HK: Tensor, q_weight_K: Tensor, k_weight_K: Tensor, cos_LP: Tensor, sin_LP: Tensor,
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor,
) -> None:  # fmt: skip
    cos, sin = (table.repeat_interleave(2, dim=-1)[:, None] for table in (cos_LP, sin_LP))
    q, k, v = qkv_BL3HK.unbind(2)
    for x, weight, out in ((q, q_weight_K, q_BLHK), (k, k_weight_K, k_BLHK)):
        variance = x.float().pow(2).mean(-1, keepdim=True)
        x = (x * torch.rsqrt(variance + 1e-6)).to(weight.dtype) * weight
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        out.copy_((x.float() * cos + turned.float() * sin).to(x.dtype))
    v_BLHK.copy_(v)


def eager_group_norm(x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, silu: bool) -> Tensor:
    y = F.group_norm(x_BCHW, groups, weight_C, bias_C, 1e-6)
    return F.silu(y) if silu else y


def eager_euler_step(x: Tensor, velocity: Tensor, dt: float | Tensor) -> Tensor:
    return (x.float() + dt * velocity).to(x.dtype)


EAGER: dict[str, Callable[..., object]] = {name: globals()[f"eager_{name}"] for name in OPS}


# -- measuring --------------------------------------------------------------------


def error(case: Case, device: str) -> float:
    """Largest relative L2 error of a result, against the reference in float64."""
    op, inputs = case.op, case.inputs(device)
    got = op.run(inputs)
    wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    result = op.reference(**wide)
    want = [*([] if result is None else [result]), *(wide[name] for name in op.written)]
    return max(rel_l2(g, w) for g, w in zip(got, want, strict=True))


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
    op, wrong = case.op, error(case, device)
    if not wrong <= op.tolerance[case.dtype]:
        return Row(op.name, str(case), wrong)
    inputs: Inputs = case.inputs(device)
    us = median_us(lambda: op.run(inputs), device)
    eager_us = median_us(lambda: EAGER[op.name](**inputs), device)
    return Row(
        op.name, str(case), wrong, us, eager_us,
        gb_per_s=op.bytes(inputs) / us / 1e3,
        tflop_per_s=op.flops(inputs) / us / 1e6 if op.flops else None,
    )  # fmt: skip


def run(ops: list[Op], device: str) -> Iterator[Row]:
    """fp32 on the CPU; bf16 at production sizes on a GPU."""
    for op in ops:
        sizes = op.production if device == "cuda" else (CPU_SIZES[op.name],)
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
