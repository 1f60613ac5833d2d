"""Activation functions of fp32 numbers that a kernel holds; their formulas are those of `activation.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu_tanh(x):
    # (1 + tanh(u)) / 2 = 1 / (1 + 2^(-2 u log2(e))); the factor below is -2 sqrt(2 / pi) log2(e)
    return x / (1.0 + tl.math.exp2(-2.302208198144325 * (x + 0.044715 * x * x * x)))


@triton.jit
def gelu_erf(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def silu(x):
    return x / (1.0 + tl.math.exp2(x * -1.4426950408889634))
