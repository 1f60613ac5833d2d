"""out = x / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 x^3), in fp32 (Hendrycks & Gimpel 2016).

Shapes: x_MD -> out_MD, where M stands for any leading dimensions.
Why: reads and writes slices of wider buffers, so that a block's [attention, MLP] is never
concatenated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned

# M rows  D width


@triton.jit
def _gelu_tanh_kernel(
    x_ptr, out_ptr, x_stride_m, out_stride_m, M, D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    live = (m < M) & (d < D)
    x = tl.load(x_ptr + m * x_stride_m + d, mask=live, other=0.0).to(tl.float32)
    # (1 + tanh(u)) / 2 = 1 / (1 + 2^(-2 u log2(e))); the factor below is -2 sqrt(2 / pi) log2(e)
    exponent = -2.302208198144325 * (x + 0.044715 * x * x * x)
    out = x / (1.0 + tl.math.exp2(exponent))
    tl.store(out_ptr + m * out_stride_m + d, out.to(out_ptr.dtype.element_ty), mask=live)


def gelu_tanh(x_MD: Tensor, out: Tensor | None = None, *, impl: launch.Impl = "auto") -> Tensor:
    """GELU by its tanh approximation. Returns `out`, or a new contiguous tensor.

    Args:
        x_MD: (..., D) with a contiguous last dimension and rows evenly apart.
        out: same shape and dtype; may be a slice of a wider buffer, or x itself.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    if out is None:
        out = x_MD.new_empty(x_MD.shape)
    launch.check_float(x_MD, x_MD=x_MD, out=out)
    launch.check_shape(tuple(x_MD.shape), out=out)
    launch.check_dtype(x_MD.dtype, out=out)
    launch.check_last_dim(x_MD=x_MD, out=out)
    x_stride, out_stride = launch.row_stride("x_MD", x_MD), launch.row_stride("out", out)
    if not launch.runs_triton(impl, x_MD):
        return gelu_tanh_reference(x_MD, out)
    D = x_MD.shape[-1]
    M = x_MD.numel() // D
    tiles = launch.tile("gelu_tanh")
    with launch.on_device(x_MD):
        _gelu_tanh_kernel[(triton.cdiv(M, tiles["BLOCK_M"]), triton.cdiv(D, tiles["BLOCK_D"]))](
            x_MD, out, x_stride, out_stride, M, D, enable_fp_fusion=True, **tiles
        )
    return out


def gelu_tanh_reference(x_MD: Tensor, out: Tensor) -> Tensor:
    """PyTorch's own GELU, which computes in fp32 inside for half precision."""
    return torch.ops.aten.gelu.out(x_MD, approximate="tanh", out=out)


def eager_gelu_tanh(x_MD: Tensor, out: Tensor) -> Tensor:
    """As diffusers runs it."""
    return out.copy_(F.gelu(x_MD, approximate="tanh"))


def _inputs(device: str, dtype: torch.dtype, B: int, L: int, D: int) -> Inputs:
    # four standard deviations: both tails as well as the bend around zero
    x_BLD = noise((B, L, D), dtype, device) * 4
    return {
        "x_MD": inside(poisoned((B, L, 2 * D), dtype, device), x_BLD, slice(D, 2 * D)),
        "out": poisoned((B, L, 2 * D), dtype, device)[..., D:],
    }


OP = Op(
    name="gelu_tanh",
    formula="x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))",
    replaces="gelu, cat",
    launch=gelu_tanh,
    reference=gelu_tanh_reference,
    eager=eager_gelu_tanh,
    inputs=_inputs,
    tiny=(
        {"B": 1, "L": 1, "D": 64},
        {"B": 2, "L": 5, "D": 96},
        {"B": 2, "L": 9, "D": 33},
    ),
    production=(
        {"B": 1, "L": 4096, "D": 12288},
        {"B": 2, "L": 8192, "D": 13824},
    ),
    cpu=({"B": 1, "L": 1024, "D": 3072},),
    bytes=lambda i: 2 * i["x_MD"].nbytes,
)
