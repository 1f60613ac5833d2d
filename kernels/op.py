"""What every kernel file declares about its operation.

Tests, AOT checks, the benchmark and the table in `docs/kernels.md` are derived from the `Op`s that
`catalog.py` lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.kernels.launch import FLOAT_DTYPES, Impl, Tile

Inputs = dict[str, Any]
Size = dict[str, Any]
Result = Tensor | tuple[Tensor, ...] | None
# largest relative L2 error of a result against float64, by the result's dtype: a few roundings in fp32, one of the
# result in half precision; codes of 8 bits are compared with codes: a step here and there, where a tie falls otherwise
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 3e-3,
    torch.float16: 4e-4,
    torch.float8_e4m3fn: 1e-2,
    torch.int8: 2e-3,
}
TWO_FACTORS = 1.5  # times the error of one: theirs add up, about as the root of the sum of squares


@dataclass(frozen=True)
class Case:
    """One size of an op in one dtype; the inputs are built when asked for."""

    op: Op
    size: Size
    dtype: torch.dtype

    def inputs(self, device: str) -> Inputs:
        return self.op.inputs(device, self.dtype, **self.size)

    def tolerance(self, dtype: torch.dtype) -> float:
        """Largest relative L2 error of a result of that dtype."""
        multiplies = any(self.size.get(name) is not None for name in self.op.multiplied_with)
        return self.op.tolerance[dtype] * (TWO_FACTORS if multiplies else 1)

    def __str__(self) -> str:
        parts = [f"{name}{_compact(value)}" for name, value in self.size.items()]
        return "-".join([*parts, _compact(self.dtype)])


@dataclass(frozen=True, kw_only=True)
class Op:
    """A fused operation.

    Attributes:
        formula, replaces: what it computes, and the PyTorch launches it stands for, for the docs.
        launch: the public launcher; takes the keyword arguments `inputs` makes, and `impl`.
        reference: the same in plain PyTorch; what CPU tensors run. In float64 if the inputs are.
        eager: the sequence of PyTorch operations diffusers runs for it, over the same arguments.
        inputs: (device, dtype, **size) -> keyword arguments; "meta" tensors are fine.
        tiny: awkward sizes for tests, within reach of the interpreter.
        production: sizes of real models, for benchmarks and AOT checks; together they use every tile.
        cpu: sizes for the benchmark of the reference: out of the caches, within reach of one core.
        bytes: memory traffic of one call if everything is read and written once.
        flops: floating point operations of one call if tensor cores do the work, else None.
        written: arguments the launcher writes instead of, or besides, returning tensors.
        dtypes: of the inputs, in tests.
        tolerance: largest relative L2 error of a result, by its dtype.
        multiplied_with: arguments beside which a result is the product of two numbers that may both have been rounded.
        narrow_loads: why kernels of this op may load half-precision data in words under 8 bytes; empty
            where every load of data is promised to be wide, which the AOT check then demands.
        forms: tiles to start from when tuning, beside the table's, where an op has several kernels.
    """

    name: str
    formula: str
    replaces: str
    launch: Callable[..., Result]
    reference: Callable[..., Result]
    eager: Callable[..., object]
    inputs: Callable[..., Inputs]
    tiny: tuple[Size, ...]
    production: tuple[Size, ...]
    cpu: tuple[Size, ...]
    bytes: Callable[[Inputs], int]
    flops: Callable[[Inputs], int] | None = None
    written: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)
    multiplied_with: tuple[str, ...] = ()
    narrow_loads: str = ""
    forms: tuple[Tile, ...] = ()

    def cases(self, sizes: tuple[Size, ...]) -> Iterator[Case]:
        """Every size in every dtype."""
        for size in sizes:
            for dtype in self.dtypes:
                yield Case(self, size, dtype)

    def run(self, inputs: Inputs, impl: Impl = "auto") -> tuple[Tensor, ...]:
        """All results of one call, also those written into arguments."""
        return self.collect(self.launch(**inputs, impl=impl), inputs)

    def exact(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The reference's results in float64. Arguments that are written are copies: `inputs` stay."""
        wide = {name: in_float64(value) for name, value in inputs.items()}
        return self.collect(self.reference(**wide), wide)

    def collect(self, returned: Result, inputs: Inputs) -> tuple[Tensor, ...]:
        """What a call returned, and what it wrote into its arguments."""
        results = () if returned is None else (returned,) if isinstance(returned, Tensor) else returned
        return (*results, *(inputs[name] for name in self.written if inputs[name] is not None))


def in_float64(value: Any) -> Any:
    """Tensors, also inside sequences, as copies, of floats in float64; everything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if isinstance(value, tuple | list):
        wide = [in_float64(v) for v in value]
        return type(value)(*wide) if hasattr(value, "_fields") else type(value)(wide)
    return value


def rel_l2(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; nan if either holds one."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def noise(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Standard normal values, the same for the same seed; on "meta" only the shape."""
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """NaN everywhere: what a kernel forgets to write, or reads out of bounds, shows in the result."""
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def inside(wide: Tensor, values: Tensor, *where: slice | int) -> Tensor:
    """Puts `values` into `wide[..., *where]` and returns that view: a strided input in poisoned ground."""
    view = wide[(..., *where)]
    return view.copy_(values) if values.device.type != "meta" else view


def _compact(value: object) -> str:
    """For names of cases: 5x7 for (5, 7), float32 for torch.float32."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")
