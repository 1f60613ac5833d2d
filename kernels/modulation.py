"""y = silu(e) weight^T + bias: what scales, shifts and gates the blocks, for all timesteps of a request at once.

Shapes: e_MK, weight_NK, bias_N -> y_MN. M is timesteps x batch, N every vector of every block one after another.
Why: these layers hold up to a third of a model's weights and depend on the timestep alone. Step by step they are read
once a step, at the speed of memory; for all steps together they are read once a request.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import TOLERANCE, Inputs, Op, inside, noise, poisoned

# M timesteps x batch  N modulation vectors x width  K width of the timestep embedding

# rows of e a program multiplies its weights with: what a tensor core takes at least, and what registers hold
MIN_BLOCK_M, MAX_BLOCK_M = 16, 64
# fp32 as three tf32 products on tensor cores
FP32_PRODUCT = "tf32x3"


@triton.jit
def _skinny_gemm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, M, N, K,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """y^T = weight x^T. The weights are the left factor: it has the rows that a tensor core wants, x has few."""
    # programs with the same weights are next to each other: the second finds them in L2
    blocks_m = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // blocks_m * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows past the end read others and are not stored: no masks in the loop
    weight_ptrs = weight_ptr + (n % N).to(tl.int64)[:, None] * K + k[None, :]
    x_ptrs = x_ptr + (m % M)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first_k in range(0, K, BLOCK_K):
        if EVEN_K:
            weight, x = tl.load(weight_ptrs), tl.load(x_ptrs)
        else:
            live = k < K - first_k
            weight = tl.load(weight_ptrs, mask=live[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=live[:, None], other=0.0)
        acc = tl.dot(weight, x, acc, input_precision=PRECISION, out_dtype=tl.float32)
        weight_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


def modulation(
    e_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, impl: launch.Impl = "auto"
) -> Tensor:
    """Every modulation vector of every row of e: a new contiguous (M, N) in the dtype of the weight.

    Args:
        e_MK: timestep embeddings, any float dtype, any row stride.
        weight_NK: contiguous, any number of elements. bias_N: of its dtype, contiguous.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    launch.check_float(e_MK, e_MK=e_MK, weight_NK=weight_NK)
    launch.check_ndim(2, e_MK=e_MK, weight_NK=weight_NK)
    M, K = e_MK.shape
    N = weight_NK.shape[0]
    launch.check_shape((N, K), weight_NK=weight_NK)
    launch.check_contiguous(weight_NK=weight_NK)
    launch.check_last_dim(e_MK=e_MK)
    if bias_N is not None:
        launch.check_float(e_MK, bias_N=bias_N)
        launch.check_shape((N,), bias_N=bias_N)
        launch.check_dtype(weight_NK.dtype, bias_N=bias_N)
        launch.check_contiguous(bias_N=bias_N)
    if not launch.runs_triton(impl, e_MK):
        return modulation_reference(e_MK, weight_NK, bias_N)
    # a pass of its own over few values: inside, every program would need the exponentials of all of them again,
    # about one for each weight it reads
    x_MK = F.silu(e_MK).to(weight_NK.dtype).contiguous()
    y_MN = weight_NK.new_empty(M, N)
    block_m = min(max(triton.next_power_of_2(M), MIN_BLOCK_M), MAX_BLOCK_M)
    tile = launch.tile("modulation", rows=block_m, itemsize=weight_NK.element_size())
    with launch.on_device(e_MK):
        _skinny_gemm_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, tile["BLOCK_N"]),)](
            x_MK, weight_NK, bias_N, y_MN, M, N, K,
            EVEN_K=K % tile["BLOCK_K"] == 0, PRECISION=FP32_PRODUCT, BLOCK_M=block_m,
            enable_fp_fusion=True, **tile,
        )  # fmt: skip
    return y_MN


def modulation_reference(e_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """PyTorch's product sums in fp32 for half precision too."""
    return F.linear(F.silu(e_MK).to(weight_NK.dtype), weight_NK, bias_N)


def eager_modulation(e_MK: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
    """As diffusers runs it, step by step; collected here, to be compared."""
    return torch.cat([F.linear(F.silu(e_1K), weight_NK, bias_N) for e_1K in e_MK.split(1)])


def _inputs(device: str, dtype: torch.dtype, M: int, K: int, N: int) -> Inputs:
    return {
        "e_MK": inside(poisoned((M, K + 16), dtype, device), noise((M, K), dtype, device), slice(16, K + 16)),
        "weight_NK": noise((N, K), dtype, device, 1) * K**-0.5,
        "bias_N": noise((N,), dtype, device, 2),
    }


def _bytes(i: Inputs) -> int:
    weight_NK, bias_N = i["weight_NK"], i.get("bias_N")
    written = len(i["e_MK"]) * weight_NK.shape[0] * weight_NK.element_size()
    return int(weight_NK.nbytes + (0 if bias_N is None else bias_N.nbytes) + written)


OP = Op(
    name="modulation",
    formula="silu(e) weight^T + bias, for all timesteps at once",
    replaces="silu, linear, in every block of every step",
    launch=modulation,
    reference=modulation_reference,
    eager=eager_modulation,
    inputs=_inputs,
    tiny=(
        {"M": 1, "K": 16, "N": 32},
        {"M": 5, "K": 40, "N": 70},
        {"M": 67, "K": 33, "N": 35},
    ),
    production=(
        {"M": 4, "K": 3072, "N": 38 * 3 * 3072},
        {"M": 28, "K": 3072, "N": 344 * 3072},
        {"M": 50, "K": 3072, "N": 10 * 12 * 3072},
        {"M": 100, "K": 5120, "N": 6 * 5120},
    ),
    cpu=({"M": 8, "K": 1024, "N": 12288},),
    bytes=_bytes,
    # sums of thousands of products; silu(e) is rounded to the dtype of the weights before them
    tolerance={**TOLERANCE, torch.float32: 2e-6},
)
