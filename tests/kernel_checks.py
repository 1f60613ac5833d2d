"""What every test of a kernel file does: each case of its ops, as Triton kernel and as reference, against a formula.

The formula is written a second time here in the tests, as plainly as it can be, and computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import triton
from torch import Tensor

from sgl_diffusion.kernels.launch import Impl
from sgl_diffusion.kernels.op import Case, Op, in_float64, rel_l2

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
Formula = Callable[..., Tensor | tuple[Tensor, ...]]


def cases(ops: Sequence[Op]) -> Iterator[Case]:
    """Tiny sizes; on a GPU production sizes as well."""
    for op in ops:
        yield from op.cases(op.tiny if DEVICE == "cpu" else op.tiny + op.production)


def check(case: Case, impl: Impl, formula: Formula) -> None:
    """Values, shapes and dtypes of every result of one call."""
    inputs = case.inputs(DEVICE)
    want = formula(**{name: in_float64(value) for name, value in inputs.items()})
    want = want if isinstance(want, tuple) else (want,)
    for got, exact in zip(case.op.run(inputs, impl), want, strict=True):
        assert got.shape == exact.shape
        error, limit = rel_l2(got, exact), case.tolerance(got.dtype)
        assert error <= limit, f"{case.op.name} {case}: rel_l2 {error:.2e}, at most {limit:.0e}"
