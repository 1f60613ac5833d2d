"""out = x + gate * y, in fp32.

Shapes: x_BLD, y_BLD, gate_BD -> out_BLD.
Why: closes every sub-block of an adaptive-LayerNorm transformer; gate * y is never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned

# B batch  L tokens  D width


@triton.jit
def _gate_residual_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr,
    x_stride_b, x_stride_l, y_stride_b, y_stride_l, gate_stride_b,
    L, D,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # rows in the slow axis of the tile: the gate is read once for all of them
    row = (tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)[:, None]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    b = tl.program_id(2).to(tl.int64)
    live = (row < L) & (d < D)
    gate = tl.load(gate_ptr + b * gate_stride_b + d, mask=d < D, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * x_stride_b + row * x_stride_l + d, mask=live, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + b * y_stride_b + row * y_stride_l + d, mask=live, other=0.0).to(tl.float32)
    out = (x + gate * y).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (b * L + row) * D + d, out, mask=live)


def gate_residual(
    x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, *, impl: launch.Impl = "auto"
) -> Tensor:
    """The residual stream after a gated branch: a new contiguous tensor in the dtype of x.

    Args:
        x_BLD, y_BLD: one dtype, any batch and row strides, contiguous last dimension.
        gate_BD: any float dtype; may be a chunk of one wide projection.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    launch.check_float(x_BLD, x_BLD=x_BLD, y_BLD=y_BLD, gate_BD=gate_BD)
    launch.check_ndim(3, x_BLD=x_BLD)
    B, L, D = x_BLD.shape
    launch.check_shape((B, L, D), y_BLD=y_BLD)
    launch.check_shape((B, D), gate_BD=gate_BD)
    launch.check_dtype(x_BLD.dtype, y_BLD=y_BLD)
    launch.check_last_dim(x_BLD=x_BLD, y_BLD=y_BLD, gate_BD=gate_BD)
    if not launch.runs_triton(impl, x_BLD):
        return gate_residual_reference(x_BLD, y_BLD, gate_BD)
    out_BLD = x_BLD.new_empty(B, L, D)
    tiles = launch.tile("gate_residual")
    grid = (triton.cdiv(L, tiles["BLOCK_L"]), triton.cdiv(D, tiles["BLOCK_D"]), B)
    with launch.on_device(x_BLD):
        _gate_residual_kernel[grid](
            x_BLD, y_BLD, gate_BD, out_BLD,
            *x_BLD.stride()[:2], *y_BLD.stride()[:2], gate_BD.stride(0),
            L, D,
            enable_fp_fusion=True, **tiles,
        )  # fmt: skip
    return out_BLD


def gate_residual_reference(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    # on the CPU `addcmul` with a broadcast factor leaves the vectorised path and takes three times as long
    gated = torch.mul(launch.widen(y_BLD), launch.widen(gate_BD)[:, None])
    return gated.add_(x_BLD).to(x_BLD.dtype)


def eager_gate_residual(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """As diffusers runs it."""
    return x_BLD + gate_BD.unsqueeze(1) * y_BLD


def _inputs(device: str, dtype: torch.dtype, B: int, L: int, D: int) -> Inputs:
    longer, wider = poisoned((B, L + 2, D), dtype, device), poisoned((B, L, 2 * D), dtype, device)
    gates = poisoned((B, 3 * D), dtype, device)
    return {
        "x_BLD": inside(longer, noise((B, L, D), dtype, device), slice(1, L + 1), slice(None)),
        "y_BLD": inside(wider, noise((B, L, D), dtype, device, 1), slice(D, 2 * D)),
        "gate_BD": inside(gates, noise((B, D), dtype, device, 2), slice(D, 2 * D)),
    }


OP = Op(
    name="gate_residual",
    formula="x + gate * y",
    replaces="mul, add",
    launch=gate_residual,
    reference=gate_residual_reference,
    eager=eager_gate_residual,
    inputs=_inputs,
    tiny=(
        {"B": 1, "L": 1, "D": 64},
        {"B": 2, "L": 5, "D": 96},
        {"B": 2, "L": 9, "D": 33},
    ),
    production=(
        {"B": 1, "L": 4608, "D": 3072},
        {"B": 2, "L": 8192, "D": 5120},
    ),
    cpu=({"B": 1, "L": 1024, "D": 768},),
    bytes=lambda i: 3 * i["x_BLD"].nbytes + i["gate_BD"].nbytes,
)
