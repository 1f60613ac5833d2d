"""Makes Triton's CPU interpreter right about bfloat16 and fp8, which it holds as raw bit patterns.

Unrepaired (seen on Triton 3.6 and 3.9) it answers wrongly without a word: fp32 -> bf16 truncates instead of rounding to
nearest even, `tl.dot` multiplies bit patterns, and so does arithmetic on bf16 values; fp32 -> fp8 neither carries into
the exponent nor saturates as a GPU does; `tl.dot_scaled` takes scales in e4m3 for exponents, where there is one (3.9).
Conversions and products are repaired here. Arithmetic on bf16 is refused instead: our kernels widen to fp32 first, on a
GPU too. One more repair is for Triton 3.6 beside NumPy 2.4: loop bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

WIDENED = "widen bf16 to fp32 before arithmetic"
FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


@contextmanager
def repaired_interpreter() -> Iterator[None]:
    """The repair holds inside the `with`."""
    builder = InterpreterBuilder
    with (
        mock.patch.object(builder, "cast_impl", _convert(builder.cast_impl)),
        mock.patch.object(builder, "create_fp_to_fp", _convert(builder.create_fp_to_fp)),
        mock.patch.object(builder, "create_dot", _widen_operands(builder.create_dot)),
        mock.patch.object(builder, "create_dot_scaled", _dot_scaled, create=True),
        mock.patch.object(builder, "binary_op", _refuse_bf16(builder.binary_op)),
        mock.patch.object(builder, "unary_op", _refuse_bf16(builder.unary_op)),
        mock.patch.object(builder, "create_fma", _refuse_bf16(builder.create_fma)),
        mock.patch.object(interpreter.ReduceOps, "apply_impl", _refuse_bf16_reduction),
        mock.patch.object(interpreter, "_patch_lang_tensor", _index_one_element),
    ):
        yield


def _convert(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def convert(self: Any, source: TensorHandle, target: tl.dtype, *rounding: object) -> TensorHandle:
        if _is_bf16(source):
            fp32 = TensorHandle(_widen(source.data), tl.float32)
            return fp32 if target.scalar == tl.float32 else original(self, fp32, target, *rounding)
        if target.scalar == tl.bfloat16:
            return TensorHandle(_narrow(source.data), tl.bfloat16)
        if target.scalar in FP8 and source.dtype.scalar in (tl.float32, tl.float16):
            return TensorHandle(_saturate(source.data, FP8[target.scalar]), target.scalar)
        return original(self, source, target, *rounding)

    return convert


def _widen_operands(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """Tensor cores multiply 16-bit floats exactly and add in fp32; so does NumPy once they are fp32."""

    def dot(self: Any, a: TensorHandle, b: TensorHandle, acc: TensorHandle, *options: object) -> TensorHandle:
        if _is_bf16(a):
            a, b = (TensorHandle(_widen(x.data), tl.float32) for x in (a, b))
        elif a.dtype.scalar == tl.float16:
            a, b = (TensorHandle(x.data.astype(np.float32), tl.float32) for x in (a, b))
        return original(self, a, b, acc, *options)

    return dot


def _dot_scaled(
    self: Any, a: TensorHandle, a_scale: TensorHandle, a_format: object, b: TensorHandle, b_scale: TensorHandle,
    b_format: object, fast_math: bool, a_packed: bool, b_packed: bool, acc: TensorHandle,
) -> TensorHandle:  # fmt: skip
    """Of codes in e4m3 or e2m1, packed along the columns of both."""
    product = _scaled(a.data, a_scale) @ _scaled(b.data.T, b_scale).T
    return TensorHandle(product + acc.data, tl.float32)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def _scaled(codes: np.ndarray, scale: TensorHandle) -> np.ndarray:
    nvfp4 = scale.dtype.scalar == tl.float8e4nv
    bits = torch.from_numpy(scale.data).view(torch.float8_e4m3fn if nvfp4 else torch.float8_e8m0fnu)
    if nvfp4:
        values = E2M1[np.stack((codes & 0xF, codes >> 4), axis=-1)].reshape(len(codes), -1)
    else:
        values = torch.from_numpy(np.ascontiguousarray(codes)).view(torch.float8_e4m3fn).float().numpy()
    result: np.ndarray = values * bits.float().numpy().repeat(values.shape[1] // bits.shape[1], axis=1)
    return result


def _refuse_bf16(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def operate(self: Any, *operands: Any) -> TensorHandle:
        if any(map(_is_bf16, operands)):
            raise TypeError(WIDENED)
        return original(self, *operands)

    return operate


_reduce = interpreter.ReduceOps.apply_impl


def _refuse_bf16_reduction(self: Any, operands: tuple[Any, ...]) -> Any:
    if any(_is_bf16(x.handle) for x in operands):
        raise TypeError(WIDENED)
    return _reduce(self, operands)


_patch_tensor = interpreter._patch_lang_tensor


def _index_one_element(tensor: Any, scope: Any) -> None:
    """A loop bound is an array of one element; Triton 3.6 asks NumPy to take it for a number, which 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def _is_bf16(x: object) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def _widen(bits: np.ndarray) -> np.ndarray:
    # a bf16 number is the upper half of the fp32 number of the same value
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    fp32 = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    bits: np.ndarray = fp32.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return bits.reshape(np.shape(values))


def _saturate(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """As `cvt.rn.satfinite`: to nearest, ties to even, and what is too large to the largest number."""
    largest = torch.finfo(dtype).max
    fp32 = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).clamp(-largest, largest)
    bits: np.ndarray = fp32.to(dtype).view(torch.uint8).numpy()
    return bits.reshape(np.shape(values))
