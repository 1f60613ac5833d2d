"""What `gemm_fp8` and `gemm_int8` share: checks, launches of `gemm_8bit_forms.py`, and what codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.activation import activation
from sgl_diffusion.kernels.gemm import (
    check_columns,
    check_epilogue,
    eager_swiglu,
    out_columns,
    results_width,
    with_epilogue,
    with_swiglu,
)
from sgl_diffusion.kernels.gemm_8bit_forms import gemm_8bit_pointer_kernel, gemm_8bit_tma_kernel
from sgl_diffusion.kernels.gemm_forms import (
    FP32_PRODUCT,
    as_rows,
    fit_descriptors,
    pairs_of,
    processors,
    row_stride,
    tiles_across,
)
from sgl_diffusion.kernels.op import Inputs, inside, noise, poisoned
from sgl_diffusion.kernels.quantize import (
    DTYPES,
    LARGEST,
    SCALE_BLOCK,
    Format,
    check_scale,
    code_format,
    eager_quantize_rows,
    quantize_rows_reference,
    some_scale,
)

# M rows  N output columns  K input columns

# elsewhere tensor cores keep 13 or 14 bits of a sum of fp8 products, which shows after a hundred or so of them
# (DeepSeek-V3, arXiv 2412.19437, section 3.3.2; SageAttention2, arXiv 2411.10958): sums of more are made outside
PRECISE_FP8 = ("sm_100",)
LIBRARY_ALIGNMENT = 16  # columns of 8-bit operands and their product, as cuBLASLt wants them


# -- launching --------------------------------------------------------------------


def check_operands(
    x_MK: Tensor, x_scale: Tensor | None, weight_NK: Tensor, weight_scale: Tensor, codes: torch.dtype
) -> None:
    """Of a product of `codes`; without scales x is numbers. Scales of blocks are checked by who takes them.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    launch.check_ndim(2, weight_NK=weight_NK)
    launch.check_dtype(codes, weight_NK=weight_NK)
    launch.check_device(x_MK, weight_NK=weight_NK)
    launch.check_contiguous(weight_NK=weight_NK)
    N, K = weight_NK.shape
    launch.check_shape((*x_MK.shape[:-1], K), x_MK=x_MK)
    launch.check_last_dim(x_MK=x_MK)
    launch.row_stride("x_MK", x_MK)
    if x_scale is None:
        launch.check_float(x_MK, x_MK=x_MK)
    else:
        launch.check_dtype(codes, x_MK=x_MK)
    scales = {"weight_scale": weight_scale} | ({} if x_scale is None else {"x_scale": x_scale})
    launch.check_float(x_MK, **scales)
    launch.check_dtype(torch.float32, **scales)
    launch.check_contiguous(**scales)
    if weight_scale.ndim == 1:
        launch.check_shape((N,), weight_scale=weight_scale)
        if x_scale is not None and x_scale.shape != (1,):
            launch.check_shape(tuple(x_MK.shape[:-1]), x_scale=x_scale)


def result(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, gelu_from: int | None, swiglu_from: int | None,
    tail: Tensor | None, gate: Tensor | None, residual: Tensor | None, out: Tensor | None, code_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`out`, or a new tensor for the columns that do not go to the tail, once the epilogue is checked.

    Raises:
        ValueError: as `gemm` does; a dtype that results do not have; codes that the last result cannot be.
    """
    if dtype not in launch.FLOAT_DTYPES:
        raise ValueError(f"{dtype=}: expected float32, bfloat16, float16")
    N = len(weight_NK)
    if code_scale is None:
        numbers = dtype if out is None else out.dtype
        check_epilogue(x_MK, N, numbers, bias_N, gelu_from, tail, gate, residual, out, swiglu_from)
    elif residual is not None:
        raise ValueError("residual: expected none beside code_scale")
    else:
        _check_coded(x_MK, weight_NK, bias_N, gelu_from, swiglu_from, tail, out, code_scale, dtype)
    columns = out_columns(N, gelu_from, swiglu_from, tail)
    return torch.empty((*x_MK.shape[:-1], columns), dtype=dtype, device=x_MK.device) if out is None else out


def _check_coded(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, gelu_from: int | None, swiglu_from: int | None,
    tail: Tensor | None, out: Tensor | None, code_scale: Tensor, dtype: torch.dtype,
) -> None:  # fmt: skip
    """An epilogue whose last result is codes; the other, if there is one, is numbers."""
    N, numbers = len(weight_NK), None if tail is None else out
    check_columns(N, gelu_from, swiglu_from, tail)
    if tail is None:  # nothing that a bias would share its dtype with
        dtype = dtype if bias_N is None else bias_N.dtype
    elif numbers is not None:
        dtype = numbers.dtype
    check_epilogue(x_MK, N, dtype, bias_N, None, None, None, None, None)
    first = 0 if tail is None else out_columns(N, gelu_from, swiglu_from, tail)
    if code_scale.ndim > 1 and swiglu_from is None and first % SCALE_BLOCK:
        raise ValueError(f"gelu_from={first}: expected a multiple of {SCALE_BLOCK}, where a block of codes begins")
    if numbers is not None:
        check_epilogue(x_MK, first, numbers.dtype, None, None, None, None, None, numbers)
    name, codes = ("out", out) if tail is None else ("tail", tail)
    if codes is None:
        raise ValueError("out: expected a place for codes beside code_scale")
    columns = results_width(N, swiglu_from) - first
    launch.check_device(x_MK, **{name: codes})
    launch.check_dtype(weight_NK.dtype, **{name: codes})
    launch.check_shape((*x_MK.shape[:-1], columns), **{name: codes})
    launch.check_last_dim(**{name: codes})
    launch.row_stride(name, codes)
    check_scale(x_MK, columns, code_scale, code_format(codes, code_scale))


def launch_form(
    op: str, x_MK: Tensor, x_scale: Tensor | None, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor | None,
    gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None, gate: Tensor | None,
    residual: Tensor | None, out: Tensor, code_scale: Tensor | None,
) -> bool:  # fmt: skip
    """Runs the kernel that the tile table has for `op` at this size. False where that is the library's, or has no such
    SwiGLU.
    """
    N, K = weight_NK.shape
    in_blocks = weight_scale.ndim == 2
    bulk = all(size % LIBRARY_ALIGNMENT == 0 for size in (N, K)) and fit_descriptors(
        x_MK, weight_NK, residual, out, tail
    )
    tile = launch.tile(
        op, m=x_MK.numel() // K, n=N, k=K, itemsize=max(x_MK.element_size(), out.element_size()),
        gelu=int(gelu_from is not None), swiglu=int(swiglu_from is not None), gated=int(residual is not None),
        blocked=int(in_blocks), decoded=int(x_scale is None), bulk=int(bulk),
        coded=int(code_scale is not None and code_scale.ndim > 1),
    )  # fmt: skip
    form = tile.pop("form")
    if form == "blas" or (form == "tma" and (x_scale is None or not bulk)):
        return False
    if in_blocks and swiglu_from is not None and (swiglu_from % SCALE_BLOCK or (N - swiglu_from) // 2 % SCALE_BLOCK):
        return False  # a tile's half has scales of two blocks
    launch.took(op, form, N, K)
    launch_kernel: Callable[..., None] = {"pointer": _launch_pointer, "tma": _launch_tma}[form]
    codes = None if code_scale is None else code_format(out if tail is None else tail, code_scale)
    with launch.on_device(x_MK):
        launch_kernel(
            x_MK, x_scale, weight_NK, weight_scale, bias_N, gelu_from, swiglu_from, tail, gate, residual, out,
            code_scale, tile,
            GELU=gelu_from is not None, SWIGLU=swiglu_from is not None, ONE_GATE=gate is None or len(gate) == 1,
            SUM=tl.int32 if x_MK.dtype == torch.int8 else tl.float32,
            PROMOTE=x_MK.dtype == torch.float8_e4m3fn and launch.architecture() not in PRECISE_FP8,
            SCALE_BLOCK=SCALE_BLOCK if in_blocks else 0,
            CODE_BLOCK=SCALE_BLOCK if codes == "fp8_block" else 0,
            LARGEST=LARGEST[codes] if codes else 0.0,
            INTEGER=codes == "int8",
        )  # fmt: skip
    return True


def _launch_pointer(
    x_MK: Tensor, x_scale: Tensor | None, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor | None,
    gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None, gate: Tensor | None,
    residual: Tensor | None, out: Tensor, code_scale: Tensor | None, tile: launch.Tile, **constants: Any,
) -> None:  # fmt: skip
    N, K = weight_NK.shape
    M = x_MK.numel() // K
    grid = (triton.cdiv(M, tile["BLOCK_M"]) * tiles_across(N, swiglu_from, tile["BLOCK_N"]),)
    # fp8 weights that are decoded are read as bytes: as numbers, Triton has them from sm_89 on only
    weight_NK = weight_NK.view(torch.uint8) if x_scale is None else weight_NK
    gemm_8bit_pointer_kernel[grid](
        x_MK, x_scale, weight_NK, weight_scale, bias_N, gate, residual, out, tail, code_scale,
        row_stride(x_MK), _scale_stride(x_scale), *map(row_stride, (gate, residual, out, tail, code_scale)),
        M, N, K, gelu_from or swiglu_from or 0, M // (1 if gate is None else len(gate)),
        EVEN_K=K % tile["BLOCK_K"] == 0, PRECISION=FP32_PRODUCT, enable_fp_fusion=True, **constants, **tile,
    )  # fmt: skip


def _launch_tma(
    x_MK: Tensor, x_scale: Tensor, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor | None,
    gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None, gate: Tensor | None,
    residual: Tensor | None, out: Tensor, code_scale: Tensor | None, tile: launch.Tile, **constants: Any,
) -> None:  # fmt: skip
    block_m, block_n, block_k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]

    def descriptor(t: Tensor | None, columns: int, rows: int = block_m) -> TensorDescriptor | None:
        if t is None:
            return None
        return TensorDescriptor(t, list(as_rows(t).shape), [row_stride(t), 1], [rows, columns])

    N, K = weight_NK.shape
    M = x_MK.numel() // K
    tiles = triton.cdiv(M, block_m) * tiles_across(N, swiglu_from, block_n)
    stored = block_n if constants["CODE_BLOCK"] and swiglu_from is None else block_n // 2  # columns at once
    gemm_8bit_tma_kernel[(min(tiles, processors(x_MK.device)),)](
        descriptor(x_MK, block_k), x_scale,
        descriptor(weight_NK, block_k, block_n), pairs_of(weight_NK, swiglu_from, tile), weight_scale, bias_N, gate,
        *(descriptor(t, stored) for t in (residual, out, tail)), code_scale,
        _scale_stride(x_scale), row_stride(gate), row_stride(code_scale),
        M, N, K, gelu_from or swiglu_from or 0, M // (1 if gate is None else len(gate)),
        enable_fp_fusion=True, **constants, **tile,
    )  # fmt: skip


def _scale_stride(x_scale: Tensor | None) -> int:
    """From a row's scale to the next row's; none where all have one."""
    return 0 if x_scale is None or x_scale.shape == (1,) else 1


# -- in PyTorch -------------------------------------------------------------------


def with_coded_epilogue(
    product: Callable[[slice, Tensor | None], Tensor], gelu_from: int | None, tail: Tensor | None, out: Tensor,
    code_scale: Tensor, swiglu_from: int | None,
) -> Any:  # fmt: skip
    """`with_epilogue` whose last result is codes."""
    codes = out if tail is None else tail
    numbers = torch.empty(codes.shape, dtype=code_scale.dtype, device=codes.device)
    done = with_epilogue(
        product, gelu_from, None if tail is None else numbers, None, None, numbers if tail is None else out,
        swiglu_from,
    )  # fmt: skip
    quantize_rows_reference(numbers, code_format(codes, code_scale), scale=code_scale, out=codes)
    return out if tail is None else (done[0], tail)


def scale_sums(sums: Tensor, x_scale: Tensor | None, weight_scale: Tensor, bias_N: Tensor | None) -> Tensor:
    """Numbers from sums (..., N) of products of codes, whose rows and columns have scales: in place."""
    sums.mul_(weight_scale)
    if x_scale is not None:
        sums.mul_(x_scale if x_scale.shape == (1,) else x_scale[..., None])
    return sums if bias_N is None else sums.add_(bias_N)


def swiglu_pass(
    product: Callable[..., Tensor], bias_N: Tensor | None, swiglu_from: int, tail: Tensor | None, out: Tensor | None,
    code_scale: Tensor | None, dtype: torch.dtype, impl: launch.Impl,
) -> Any:  # fmt: skip
    """A product by a kernel that has no such epilogue, then `with_swiglu`, whose last result may be codes."""
    numbers = [t.dtype for t in (bias_N, out) if t is not None and t.dtype in launch.FLOAT_DTYPES]
    how: dict[str, Any] = {"impl": impl}
    if code_scale is not None and (codes := out if tail is None else tail) is not None:
        how |= {"quantize": code_format(codes, code_scale), "code_scale": code_scale}
    y = product(dtype=numbers[0] if numbers else dtype, impl=impl)
    return with_swiglu(y, partial(activation, **how), swiglu_from, tail, out)


def eager_epilogue(
    y: Tensor, gelu_from: int | None, swiglu_from: int | None, tail: Tensor | None, gate: Tensor | None,
    residual: Tensor | None, out: Tensor, code_scale: Tensor | None,
) -> object:  # fmt: skip
    """As diffusers runs it after a product, with copies that stand for their shares of `cat`."""
    first = gelu_from if swiglu_from is None else swiglu_from
    head, last = y[..., :first], y[..., first:]
    if swiglu_from is not None:
        last = eager_swiglu(last)
    elif gelu_from is not None:
        last = F.gelu(last, approximate="tanh")
    if tail is None and first is not None:
        y = torch.cat([head, last], dim=-1)
    if code_scale is not None:
        codes, coded = (out, y) if tail is None else (tail, last)
        eager_quantize_rows(coded, code_format(codes, code_scale), code_scale, codes)
        return codes if tail is None else (out.copy_(head), codes)
    if tail is not None:
        tail.copy_(last)
        return out.copy_(head), tail
    if gate is not None and residual is not None:
        y = residual + gate.unsqueeze(1) * y
    return out.copy_(y)


# -- cases ------------------------------------------------------------------------


def epilogue_inputs(
    device: str, dtype: torch.dtype, B: int, L: int, N: int, gelu_from: int | None, swiglu_from: int | None, tail: bool,
    gated: bool, coded: Format | None = None,
) -> Inputs:  # fmt: skip
    """Results go into slices of one wider buffer, codes into those of another, with one scale or those of blocks."""
    buffer = poisoned((B, L, 2 * N + 16), dtype, device)
    gates = poisoned((B, 3 * N), dtype, device)
    width = results_width(N, swiglu_from)
    head = (gelu_from or swiglu_from or 0) if tail else width
    places: dict[str, Tensor | None] = {
        "tail": buffer[..., N + 16 : N + 16 + width - head] if tail else None,
        "out": buffer[..., :head],
        "code_scale": None,
    }
    if coded:
        columns = width - head if tail else width
        blocks = -(-columns // SCALE_BLOCK)
        places["tail" if tail else "out"] = torch.empty(
            (B, L, N + columns + 16), dtype=DTYPES[coded], device=device
        )[..., 16 : 16 + columns]
        places["code_scale"] = some_scale(device, coded, 1)
        if coded == "fp8_block":
            places["code_scale"] = poisoned((B, L, 2 * blocks), torch.float32, device)[..., blocks:]
    return {
        "bias_N": noise((N,), dtype, device, 2),
        "gelu_from": gelu_from,
        "swiglu_from": swiglu_from,
        "gate": inside(gates, noise((B, N), dtype, device, 3), slice(N, 2 * N)) if gated else None,
        "residual": noise((B, L, N), dtype, device, 4) if gated else None,
        **places,
    }


def moved_bytes(i: Inputs) -> int:
    """Everything once: operands with their scales, what the epilogue reads, and results."""
    given = sum(x.nbytes for x in i.values() if isinstance(x, Tensor))
    if i["out"] is not None:
        return given
    K, tail = i["x_MK"].shape[-1], 0 if i["tail"] is None else i["tail"].shape[-1]
    width = results_width(len(i["weight_NK"]), i["swiglu_from"])
    return given + i["x_MK"].numel() // K * (width - tail) * i["dtype"].itemsize
