"""What this device reaches, measured: its bandwidth in a copy, its arithmetic in a product of large matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
import triton

CPU_RUNS = 15
LIMIT_RUNS = 5  # of a copy and of a product on a CPU: tens of milliseconds each


@dataclass(frozen=True)
class Limits:
    """Copying much memory, and multiplying large matrices of a dtype."""

    copy_gb_per_s: float
    matmul_tflop_per_s: float


def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measured once a process, so that shares hold for this very device, its clock and its neighbours.

    Raises:
        torch.OutOfMemoryError: a GPU has less than about a gigabyte left.
    """
    return Limits(_copy_gb_per_s(device), _matmul_tflop_per_s(device, dtype))


@cache
def _copy_gb_per_s(device: torch.device) -> float:
    source = torch.empty(2**29 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    us = medians_us({"copy": lambda: target.copy_(source)}, device, LIMIT_RUNS)["copy"]
    return 2 * source.nbytes / us / 1e3


@cache
def _matmul_tflop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    # random numbers: a GPU clocks higher on zeros, which no model has
    matrix = torch.randn(n, n, generator=torch.Generator(device).manual_seed(0), device=device)
    us = medians_us({"matmul": _product(matrix, dtype)}, device, LIMIT_RUNS)["matmul"]
    return 2 * n**3 / us / 1e6


def _product(matrix: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Of a square matrix with itself. A CPU multiplies 8-bit codes as our references do: in fp32."""
    if dtype.itemsize > 1 or matrix.device.type == "cpu":
        wide = matrix.to(dtype) if dtype.itemsize > 1 else matrix
        return lambda: wide @ wide
    if dtype == torch.int8:
        codes = (32 * matrix).clamp(-127, 127).to(dtype)
        return lambda: torch._int_mm(codes, codes.mT)
    codes, one = matrix.to(dtype), torch.ones((), device=matrix.device)
    return lambda: torch._scaled_mm(codes, codes.mT, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def medians_us(
    calls: Mapping[str, Callable[[], object]], device: torch.device, cpu_runs: int = CPU_RUNS
) -> dict[str, float]:
    """On a GPU with events, the L2 cache flushed between runs; on the CPU by the wall clock, in turns."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return {name: 1e3 * float(triton.testing.do_bench(c, return_mode="median")) for name, c in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(cpu_runs + 1):
        for name, call in calls.items():
            start = time.perf_counter_ns()
            call()
            if turn:  # the first is a warm-up
                times[name].append((time.perf_counter_ns() - start) / 1e3)
    return {name: statistics.median(t) for name, t in times.items()}
