"""What `gemm_fp8` and `gemm_int8` share: the Triton kernels, what fits each, and how codes become numbers.

"pointer" and "tma" are those of `gemm_forms.py` for 8-bit codes: the sum of the products of codes is scaled once, in
the epilogue, or, where blocks of 128 columns have scales of their own, block by block. The pointer kernel also
multiplies numbers of 16 or 32 bits with fp8 weights, which it decodes: on every GPU, for the sake of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.gemm import check_epilogue
from sgl_diffusion.kernels.gemm_forms import (
    FP32_PRODUCT,
    as_rows,
    finish,
    finish_tma,
    fit_descriptors,
    processors,
    row_stride,
    tile_at,
)
from sgl_diffusion.kernels.microscaling import E4M3_BIAS, e4m3_over_bias
from sgl_diffusion.kernels.op import Inputs, inside, noise, poisoned
from sgl_diffusion.kernels.quantize import SCALE_BLOCK

# M rows  N output columns  K input columns

# elsewhere tensor cores keep 13 or 14 bits of a sum of fp8 products, which shows after a hundred or so of them
# (DeepSeek-V3, arXiv 2412.19437, section 3.3.2; SageAttention2, arXiv 2411.10958): sums of more are made outside
PRECISE_FP8 = ("sm_100",)
LIBRARY_ALIGNMENT = 16  # columns of 8-bit operands and their product, as cuBLASLt wants them


@triton.jit
def _add_product(acc, x, weight, scale, PROMOTE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x weight, or acc + scale * x weight where blocks have scales: a number for every row, or one."""
    if weight.dtype != x.dtype:
        weight = e4m3_over_bias(weight).to(x.dtype)
    if scale is not None:
        return acc + tl.dot(x, weight, input_precision=PRECISION, out_dtype=tl.float32) * scale
    elif PROMOTE:
        # tensor cores sum the products of one step; without a bound the compiler gives them `acc` as well
        return acc + tl.dot(x, weight, max_num_imprecise_acc=x.shape[1], out_dtype=tl.float32)
    else:
        return tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _block_scale(x_scale_ptr, weight_scale_ptr, row, first_n, first_k, K, SCALE_BLOCK: tl.constexpr):
    """Scale of the products of a tile and a step that are within one block: of each row, or one if x has none."""
    blocks = tl.cdiv(K, SCALE_BLOCK)
    scale = tl.load(weight_scale_ptr + first_n // SCALE_BLOCK * blocks + first_k // SCALE_BLOCK)
    if x_scale_ptr is None:
        return scale * E4M3_BIAS
    else:
        return scale * tl.load(x_scale_ptr + row * blocks + first_k // SCALE_BLOCK)[:, None]


@triton.jit
def _scaled(acc, x_scale_ptr, x_scale_stride, weight_scale_ptr, m, n, M, N):
    """Numbers from sums of products of codes, whose rows and columns have scales."""
    scale = tl.load(weight_scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if x_scale_ptr is None:
        return acc * (scale * E4M3_BIAS)
    else:
        return acc.to(tl.float32) * scale * tl.load(x_scale_ptr + m * x_scale_stride, mask=m < M, other=0.0)[:, None]


@triton.jit
def _gemm_8bit_pointer_kernel(
    x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr, x_stride_m,
    x_scale_stride, gate_stride_g, residual_stride_m, out_stride_m, tail_stride_m, M, N, K, gelu_from, rows_per_gate,
    SUM: tl.constexpr, PROMOTE: tl.constexpr, SCALE_BLOCK: tl.constexpr, GELU: tl.constexpr, ONE_GATE: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """One tile a program."""
    tl.static_assert(SCALE_BLOCK % BLOCK_N == 0 and SCALE_BLOCK % BLOCK_K == 0, "a block of scales holds whole tiles")
    first_m, first_n = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows and columns past the end read others and are not stored: no masks in the loop
    x_ptrs = x_ptr + (m % M).to(tl.int64)[:, None] * x_stride_m + k[None, :]
    weight_ptrs = weight_ptr + (n % N).to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for first_k in range(0, K, BLOCK_K):
        if EVEN_K:
            x, weight = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            live = k < K - first_k
            x = tl.load(x_ptrs, mask=live[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=live[:, None], other=0.0)
        scale = None
        if SCALE_BLOCK:
            scale = _block_scale(x_scale_ptr, weight_scale_ptr, m % M, first_n, first_k, K, SCALE_BLOCK)
        acc = _add_product(acc, x, weight, scale, PROMOTE, PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if not SCALE_BLOCK:
        acc = _scaled(acc, x_scale_ptr, x_scale_stride, weight_scale_ptr, m, n, M, N)
    finish(
        acc, m, n, bias_ptr, gate_ptr, residual_ptr, out_ptr, tail_ptr, gate_stride_g, residual_stride_m,
        out_stride_m, tail_stride_m, M, N, gelu_from, rows_per_gate, GELU, ONE_GATE,
    )


@triton.jit
def _gemm_8bit_tma_kernel(
    x, x_scale_ptr, weight, weight_scale_ptr, bias_ptr, gate_ptr, residual, out, tail, x_scale_stride, gate_stride_g,
    M, N, K, gelu_from, rows_per_gate,
    SUM: tl.constexpr, PROMOTE: tl.constexpr, SCALE_BLOCK: tl.constexpr, GELU: tl.constexpr, ONE_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):
    """Every program takes many tiles, and loads of the next tile start under the epilogue of the last."""
    tl.static_assert(SCALE_BLOCK % BLOCK_N == 0 and SCALE_BLOCK % BLOCK_K == 0, "a block of scales holds whole tiles")
    HALF_N: tl.constexpr = BLOCK_N // 2
    tl.assume(K > 0)  # or Triton 3.6 waits after every wgmma: it sees a loop that may not run
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_m, first_n = tile_at(number, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        m = first_m + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        for first_k in range(0, K, BLOCK_K):
            scale = None
            if SCALE_BLOCK:
                scale = _block_scale(x_scale_ptr, weight_scale_ptr, m % M, first_n, first_k, K, SCALE_BLOCK)
            acc = _add_product(acc, x.load([first_m, first_k]), weight.load([first_n, first_k]).T, scale, PROMOTE, None)
        # in halves: a whole tile's epilogue holds accumulator and result in registers at once
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF_N)), (0, 2, 1)))
        n = first_n + tl.arange(0, HALF_N)
        if not SCALE_BLOCK:
            left = _scaled(left, x_scale_ptr, x_scale_stride, weight_scale_ptr, m, n, M, N)
        finish_tma(
            left, first_m, first_n, bias_ptr, gate_ptr, residual, out, tail, M, N, gelu_from, gate_stride_g,
            rows_per_gate, GELU, ONE_GATE, BLOCK_M, HALF_N,
        )
        if not SCALE_BLOCK:
            right = _scaled(right, x_scale_ptr, x_scale_stride, weight_scale_ptr, m, n + HALF_N, M, N)
        finish_tma(
            right, first_m, first_n + HALF_N, bias_ptr, gate_ptr, residual, out, tail, M, N, gelu_from, gate_stride_g,
            rows_per_gate, GELU, ONE_GATE, BLOCK_M, HALF_N,
        )


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
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, gelu_from: int | None, tail: Tensor | None,
    gate: Tensor | None, residual: Tensor | None, out: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`out`, or a new tensor for the columns that do not go to the tail, once the epilogue is checked.

    Raises:
        ValueError: as `gemm` does; a dtype that results do not have.
    """
    if dtype not in launch.FLOAT_DTYPES:
        raise ValueError(f"{dtype=}: expected float32, bfloat16, float16")
    N = len(weight_NK)
    check_epilogue(x_MK, N, dtype if out is None else out.dtype, bias_N, gelu_from, tail, gate, residual, out)
    columns = N if tail is None else N - tail.shape[-1]
    return torch.empty((*x_MK.shape[:-1], columns), dtype=dtype, device=x_MK.device) if out is None else out


def launch_form(
    op: str, x_MK: Tensor, x_scale: Tensor | None, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor | None,
    gelu_from: int | None, tail: Tensor | None, gate: Tensor | None, residual: Tensor | None, out: Tensor,
) -> bool:  # fmt: skip
    """Runs the kernel that the tile table has for `op` at this size. False where that is the library's."""
    N, K = weight_NK.shape
    bulk = all(size % LIBRARY_ALIGNMENT == 0 for size in (N, K)) and fit_descriptors(
        x_MK, weight_NK, residual, out, tail
    )
    tile = launch.tile(
        op, m=x_MK.numel() // K, n=N, k=K, itemsize=max(x_MK.element_size(), out.element_size()),
        gelu=int(gelu_from is not None), gated=int(residual is not None),
        blocked=int(weight_scale.ndim == 2), decoded=int(x_scale is None), bulk=int(bulk),
    )  # fmt: skip
    form = tile.pop("form")
    if form == "blas" or (form == "tma" and (x_scale is None or not bulk)):
        return False
    launch_kernel: Callable[..., None] = {"pointer": _launch_pointer, "tma": _launch_tma}[form]
    with launch.on_device(x_MK):
        launch_kernel(
            x_MK, x_scale, weight_NK, weight_scale, bias_N, gelu_from, tail, gate, residual, out, tile,
            GELU=gelu_from is not None, ONE_GATE=gate is None or len(gate) == 1,
            SUM=tl.int32 if x_MK.dtype == torch.int8 else tl.float32,
            PROMOTE=x_MK.dtype == torch.float8_e4m3fn and launch.architecture() not in PRECISE_FP8,
            SCALE_BLOCK=SCALE_BLOCK if weight_scale.ndim == 2 else 0,
        )  # fmt: skip
    return True


def _launch_pointer(
    x_MK: Tensor, x_scale: Tensor | None, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor | None,
    gelu_from: int | None, tail: Tensor | None, gate: Tensor | None, residual: Tensor | None, out: Tensor,
    tile: launch.Tile, **constants: Any,
) -> None:  # fmt: skip
    N, K = weight_NK.shape
    M = x_MK.numel() // K
    grid = (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)
    # fp8 weights that are decoded are read as bytes: as numbers, Triton has them from sm_89 on only
    weight_NK = weight_NK.view(torch.uint8) if x_scale is None else weight_NK
    _gemm_8bit_pointer_kernel[grid](
        x_MK, x_scale, weight_NK, weight_scale, bias_N, gate, residual, out, tail,
        row_stride(x_MK), _scale_stride(x_scale), *map(row_stride, (gate, residual, out, tail)),
        M, N, K, gelu_from or 0, M // (1 if gate is None else len(gate)),
        EVEN_K=K % tile["BLOCK_K"] == 0, PRECISION=FP32_PRODUCT, enable_fp_fusion=True, **constants, **tile,
    )  # fmt: skip


def _launch_tma(
    x_MK: Tensor, x_scale: Tensor, weight_NK: Tensor, weight_scale: Tensor, bias_N: Tensor | None,
    gelu_from: int | None, tail: Tensor | None, gate: Tensor | None, residual: Tensor | None, out: Tensor,
    tile: launch.Tile, **constants: Any,
) -> None:  # fmt: skip
    block_m, block_n, block_k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]

    def descriptor(t: Tensor | None, columns: int, rows: int = block_m) -> TensorDescriptor | None:
        if t is None:
            return None
        return TensorDescriptor(t, list(as_rows(t).shape), [row_stride(t), 1], [rows, columns])

    N, K = weight_NK.shape
    M = x_MK.numel() // K
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    _gemm_8bit_tma_kernel[(min(tiles, processors(x_MK.device)),)](
        descriptor(x_MK, block_k), x_scale, descriptor(weight_NK, block_k, block_n), weight_scale, bias_N, gate,
        *(descriptor(t, block_n // 2) for t in (residual, out, tail)),
        _scale_stride(x_scale), row_stride(gate), M, N, K, gelu_from or 0, M // (1 if gate is None else len(gate)),
        enable_fp_fusion=True, **constants, **tile,
    )  # fmt: skip


def _scale_stride(x_scale: Tensor | None) -> int:
    """From a row's scale to the next row's; none where all have one."""
    return 0 if x_scale is None or x_scale.shape == (1,) else 1


# -- in PyTorch -------------------------------------------------------------------


def scale_sums(sums: Tensor, x_scale: Tensor | None, weight_scale: Tensor, bias_N: Tensor | None) -> Tensor:
    """Numbers from sums (..., N) of products of codes, whose rows and columns have scales: in place."""
    sums.mul_(weight_scale)
    if x_scale is not None:
        sums.mul_(x_scale if x_scale.shape == (1,) else x_scale[..., None])
    return sums if bias_N is None else sums.add_(bias_N)


def eager_epilogue(
    y: Tensor, gelu_from: int | None, tail: Tensor | None, gate: Tensor | None, residual: Tensor | None, out: Tensor
) -> object:
    """As diffusers runs it after a product, with copies that stand for their shares of `cat`."""
    if tail is not None:
        tail.copy_(F.gelu(y[..., gelu_from:], approximate="tanh"))
        return out.copy_(y[..., :gelu_from]), tail
    if gelu_from is not None:
        y = torch.cat([y[..., :gelu_from], F.gelu(y[..., gelu_from:], approximate="tanh")], dim=-1)
    if gate is not None and residual is not None:
        y = residual + gate.unsqueeze(1) * y
    return out.copy_(y)


# -- cases ------------------------------------------------------------------------


def epilogue_inputs(
    device: str, dtype: torch.dtype, B: int, L: int, N: int, gelu_from: int | None, tail: bool, gated: bool
) -> Inputs:
    """Results go into slices of one wider buffer."""
    buffer = poisoned((B, L, 2 * N + 16), dtype, device)
    gates = poisoned((B, 3 * N), dtype, device)
    head = N if not tail or gelu_from is None else gelu_from
    return {
        "bias_N": noise((N,), dtype, device, 2),
        "gelu_from": gelu_from,
        "tail": buffer[..., N + 16 : 2 * N + 16 - head] if tail else None,
        "gate": inside(gates, noise((B, N), dtype, device, 3), slice(N, 2 * N)) if gated else None,
        "residual": noise((B, L, N), dtype, device, 4) if gated else None,
        "out": buffer[..., :head],
    }


def moved_bytes(i: Inputs) -> int:
    """Everything once: operands with their scales, what the epilogue reads, and results."""
    given = sum(x.nbytes for x in i.values() if isinstance(x, Tensor))
    if i["out"] is not None:
        return given
    K, tail = i["x_MK"].shape[-1], 0 if i["tail"] is None else i["tail"].shape[-1]
    return given + i["x_MK"].numel() // K * (len(i["weight_NK"]) - tail) * i["dtype"].itemsize
