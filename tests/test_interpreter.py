"""The repaired interpreter is right where Triton's own is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from interpreter import repaired_interpreter
from kernel_checks import DEVICE

from sgl_diffusion.kernels.op import rel_l2

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="kernels are compiled here; runs where there is no GPU")


@triton.jit
def _convert_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x, out_dtype=tl.float32))


@triton.jit
def _add_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x + x)


@triton.jit
def _dot_scaled_kernel(codes_ptr, scale_ptr, y_ptr, BLOCK: tl.constexpr, BYTES: tl.constexpr):
    """Of codes in e2m1 with one e4m3 scale for 16 of a row."""
    row = tl.arange(0, BLOCK)[:, None]
    codes = tl.load(codes_ptr + row * BYTES + tl.arange(0, BYTES)[None, :])
    scale = tl.load(scale_ptr + row * (BYTES // 8) + tl.arange(0, BYTES // 8)[None, :])
    y = tl.dot_scaled(codes, scale, "e2m1", codes.T, scale, "e2m1")
    tl.store(y_ptr + row * BLOCK + tl.arange(0, BLOCK)[None, :], y)


def rounds_to_bf16() -> bool:
    x, y = torch.randn(256), torch.empty(256, dtype=torch.bfloat16)
    _convert_kernel[(1,)](x, y, BLOCK=256)
    return torch.equal(y, x.bfloat16())


def multiplies_bf16() -> bool:
    x, y = torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    _dot_kernel[(1,)](x, y, BLOCK=16)
    return rel_l2(y, x.double() @ x.double()) < 1e-6


def multiplies_blocks() -> bool:
    codes, scales = torch.full((16, 16), 0x2A, dtype=torch.uint8), torch.full((16, 2), 0.375)  # -1 and 1
    y = torch.empty(16, 16)
    _dot_scaled_kernel[(1,)](codes, scales.to(torch.float8_e4m3fn), y, BLOCK=16, BYTES=16)
    return bool((y == 32 * 0.375**2).all())


def converts_fp8(dtype: torch.dtype) -> bool:
    """Every code, the midpoints between neighbours, both sides of the largest number, and NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    codes = codes[codes.isfinite()].sort().values
    largest = float(codes[-1])
    edges = torch.tensor([1.03, 1.2, 10.0, -1.03, -10.0]) * largest
    x = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, edges, torch.tensor([float("nan")])])
    x = torch.nn.functional.pad(x, (0, 1024 - len(x)))
    y = torch.empty(1024, dtype=dtype)
    _convert_kernel[(1,)](x, y, BLOCK=1024)
    want = x.clamp(-largest, largest).to(dtype).float()
    return torch.equal(y.float().nan_to_num(nan=1e9), want.nan_to_num(nan=1e9))


def e4m3() -> bool:
    return converts_fp8(torch.float8_e4m3fn)


def e5m2() -> bool:
    return converts_fp8(torch.float8_e5m2)


@pytest.mark.parametrize("right", [rounds_to_bf16, multiplies_bf16, multiplies_blocks, e4m3, e5m2])
def test_the_repair_is_needed_and_repairs(right: Callable[[], bool]) -> None:
    assert not right(), "Triton's interpreter is right by itself now: this repair can go"
    with repaired_interpreter():
        assert right()


def test_arithmetic_on_bf16_is_refused() -> None:
    x = torch.zeros(16, dtype=torch.bfloat16)
    with repaired_interpreter(), pytest.raises(triton.runtime.errors.InterpreterError, match="widen bf16 to fp32"):
        _add_kernel[(1,)](x, x.clone(), BLOCK=16)
