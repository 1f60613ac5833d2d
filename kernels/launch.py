"""What every launcher does before its kernel: choose an implementation, look up tiles, check arguments.

A wrong shape, dtype or stride is a ValueError: the argument, what it is and what it has to be.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from importlib import resources
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

Impl = Literal["auto", "triton", "torch"]
HALF_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (torch.float32, *HALF_DTYPES)


class Unsupported(ValueError):
    """The arguments are right, but this GPU cannot run them: fp8 before sm_89."""


# -- which implementation, where --------------------------------------------------

_shapes_stand_for: ContextVar[str] = ContextVar("the kind of device that shape-only tensors stand for", default="cuda")


def runs_triton(impl: Impl, x: Tensor) -> bool:
    """auto: Triton for CUDA tensors, and for shape-only ones ("meta"), which stand for them in counts and compile
    checks unless `rehearsing` says otherwise; the PyTorch reference for all others.

    Raises:
        ValueError: an unknown `impl`, or "triton" for CPU tensors outside Triton's interpreter.
    """
    if impl == "auto":
        return x.is_cuda or (x.is_meta and _shapes_stand_for.get() == "cuda")
    if impl == "torch":
        return False
    if impl != "triton":
        raise ValueError(f"impl={impl!r}: expected auto, triton or torch")
    if x.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("impl='triton': the tensors are on the CPU; use impl='torch', or set TRITON_INTERPRET=1")
    return True


def on_cpu(x: Tensor) -> bool:
    """Whether the tensor is on the CPU, or stands for one that is."""
    return x.is_cpu or (x.is_meta and _shapes_stand_for.get() == "cpu")


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; this makes it the tensor's. Nothing on the CPU."""
    return torch.cuda.device_of(x)


@contextmanager
def compiling_only() -> Iterator[None]:
    """Inside the `with`, a launch compiles its kernel and runs nothing: for tensors that are shapes alone."""
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_instead
    try:
        yield
    finally:
        JITFunction.run = run


@contextmanager
def rehearsing(device_type: str) -> Iterator[None]:
    """Inside the `with`, shape-only tensors take the path of tensors on such a device; their launches run nothing."""
    run = JITFunction.run

    def run_unless_shapes_only(self: Any, *args: Any, **options: Any) -> Any:
        tensors = (getattr(x, "base", x) for x in args)  # a descriptor's base is its tensor
        if any(isinstance(x, Tensor) and x.is_meta for x in tensors):
            return None
        return run(self, *args, **options)  # another thread's

    JITFunction.run = run_unless_shapes_only
    token = _shapes_stand_for.set(device_type)
    try:
        yield
    finally:
        _shapes_stand_for.reset(token)
        JITFunction.run = run


def widen(x: Tensor) -> Tensor:
    """Half precision to fp32, for references, which compute in fp32; fp32 and fp64 stay."""
    return x.float() if x.dtype in HALF_DTYPES else x


# -- tiles ------------------------------------------------------------------------

Tile = dict[str, Any]
"""Constexprs, launch options and, where an op has several kernels, the `form` to take."""

_forced: ContextVar[Mapping[str, Tile]] = ContextVar("forced tiles", default=types.MappingProxyType({}))


def tile(op: str, **size: int) -> Tile:
    """The tile for `op`: the first row of its table whose `at_most` and `at_least` hold `size`.

    Tables are `tuned/<architecture>.json`; nothing is timed at run time, so a request always runs
    the same code.
    """
    if (tile := _forced.get().get(op)) is not None:
        return dict(tile)
    return tile_row(architecture(), op, **size)[1]


@contextmanager
def forced_tile(op: str, tile: Tile) -> Iterator[None]:
    """Inside the `with`, `op` runs with this tile whatever its table says: for tuning and for tests."""
    token = _forced.set({**_forced.get(), op: tile})
    try:
        yield
    finally:
        _forced.reset(token)


def tile_row(arch: str, op: str, **size: int) -> tuple[int, Tile]:
    """The number of the row `tile` would pick on `arch`, and its values.

    Raises:
        ValueError: no row holds the size.
    """
    for number, row in enumerate(tile_table(arch)[op]):
        if all(size[name] <= limit for name, limit in row.get("at_most", {}).items()) and all(
            size[name] >= limit for name, limit in row.get("at_least", {}).items()
        ):
            return number, dict(row["tile"])
    raise ValueError(f"{op}: no tile for {size} in tuned/{arch}.json")


@functools.cache
def tile_table(arch: str) -> Mapping[str, list[dict[str, Any]]]:
    """Rows of tiles by op. `arch` is sm_80, sm_89, sm_90, sm_100 or interpreter.

    Where a Triton version needs other tiles, `<arch>.triton-<minor>.json` holds the ops that differ.
    """
    tuned = resources.files(__package__).joinpath("tuned")
    table: dict[str, Any] = json.loads(tuned.joinpath(f"{arch}.json").read_text())
    ops: dict[str, list[dict[str, Any]]] = table["ops"]
    minor = ".".join(triton.__version__.split(".")[:2])
    special = tuned.joinpath(f"{arch}.triton-{minor}.json")
    return {**ops, **json.loads(special.read_text())["ops"]} if special.is_file() else ops


def architecture() -> str:
    """The table for Triton's active target; a GPU without one uses the table of its nearest kin.

    Raises:
        RuntimeError: the GPU is older than sm_80, the first with bf16 tensor cores.
    """
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return _table_name(int(triton.runtime.driver.active.get_current_target().arch))


@functools.cache
def _table_name(capability: int) -> str:
    if capability < 80:
        raise RuntimeError(f"sm_{capability}: the kernels need an NVIDIA GPU of sm_80 (Ampere) or later")
    if capability == 80 or capability // 10 in (9, 10):
        return f"sm_{capability // 10 * 10}"
    return "sm_89"  # sm_86, sm_89 and sm_120 have about 100 KB of shared memory a block


# -- what ran -----------------------------------------------------------------------

Products = dict[str, dict[str, set[str]]]
"""Op -> form -> weights that were multiplied so, by their sizes "NxK". Forms are those of the tile tables: a kernel of
ours, or "blas", which is the library's (cuBLAS, cuBLASLt); or "torch", PyTorch's own way, as on a CPU.
"""

_noted: ContextVar[Products | None] = ContextVar("products that are noted", default=None)


@contextmanager
def noting(products: Products) -> Iterator[None]:
    """Inside the `with`, adds what every product with a weight was computed by. Not in code of torch.compile."""
    token = _noted.set(products)
    try:
        yield
    finally:
        _noted.reset(token)


def took(op: str, form: str, N: int, K: int) -> None:
    """Says by what a weight is multiplied now."""
    if not torch.compiler.is_compiling() and (products := _noted.get()) is not None:
        products.setdefault(op, {}).setdefault(form, set()).add(f"{N}x{K}")


# -- arguments --------------------------------------------------------------------


def check_float(like: Tensor, **tensors: Tensor) -> None:
    """Every tensor is of a float dtype we run and on the device of `like`."""
    for name, x in tensors.items():
        if x.dtype not in FLOAT_DTYPES:
            allowed = ", ".join(map(_short, FLOAT_DTYPES))
            raise ValueError(f"{name}: dtype {_short(x.dtype)}, expected {allowed}")
    check_device(like, **tensors)


def check_device(like: Tensor, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.device != like.device:
            raise ValueError(f"{name}: on {x.device}, the other tensors are on {like.device}")


def check_dtype(dtype: torch.dtype, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype != dtype:
            raise ValueError(f"{name}: dtype {_short(x.dtype)}, expected {_short(dtype)}")


def check_ndim(ndim: int, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.ndim != ndim:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {ndim} dimensions")


def check_shape(shape: tuple[int, ...], **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, expected {shape}")


def check_last_dim(**tensors: Tensor) -> None:
    """Last dimensions are contiguous, so rows load in wide words."""
    for name, x in tensors.items():
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name}: last dimension has stride {x.stride(-1)}, expected 1")


def check_contiguous(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not x.is_contiguous():
            raise ValueError(f"{name}: {_layout(x)}, expected contiguous")


def row_stride(name: str, x: Tensor) -> int:
    """Elements between the rows of x, all leading dimensions taken as one.

    Raises:
        ValueError: the leading dimensions do not collapse into one.
    """
    expected, stride = 0, x.shape[-1]
    for i in reversed(range(x.ndim - 1)):
        if x.shape[i] == 1:
            continue
        if not expected:
            stride = expected = x.stride(i)
        elif x.stride(i) != expected:
            raise ValueError(f"{name}: {_layout(x)}, expected rows evenly apart")
        expected *= x.shape[i]
    return stride


def _layout(x: Tensor) -> str:
    return f"strides {x.stride()} for shape {tuple(x.shape)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
