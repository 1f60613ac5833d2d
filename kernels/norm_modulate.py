"""y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale) + shift over the width, in fp32.

Shapes: x_BLD, scale_BD, shift_BD -> y_BLD.
Why: opens every sub-block of an adaptive-LayerNorm transformer (Peebles & Xie 2023); one read and
one write of x instead of three of each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned

# B batch  L tokens  D width


@triton.jit
def _norm_modulate_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr,
    x_stride_b, x_stride_l, scale_stride_b, shift_stride_b,
    L, D, eps,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    live = d < D
    x_row = x_ptr + b * x_stride_b + row.to(tl.int64) * x_stride_l
    x = tl.load(x_row + d, mask=live, other=0.0).to(tl.float32)
    centred = tl.where(live, x - tl.sum(x, axis=0) / D, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
    scale = tl.load(scale_ptr + b * scale_stride_b + d, mask=live, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * shift_stride_b + d, mask=live, other=0.0).to(tl.float32)
    y = centred * rstd * (1.0 + scale) + shift
    tl.store(y_ptr + (b * L + row) * D + d, y.to(y_ptr.dtype.element_ty), mask=live)


def norm_modulate(
    x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float = 1e-6,
    *, impl: launch.Impl = "auto",
) -> Tensor:  # fmt: skip
    """LayerNorm without weights, then a scale and shift per sample: new, contiguous, in the dtype of x.

    Args:
        x_BLD: any batch and row stride, contiguous last dimension.
        scale_BD, shift_BD: one float dtype; may be chunks of one wide projection.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    Source: `AdaLayerNormZero` of diffusers.
    """
    launch.check_float(x_BLD, x_BLD=x_BLD, scale_BD=scale_BD, shift_BD=shift_BD)
    launch.check_ndim(3, x_BLD=x_BLD)
    B, L, D = x_BLD.shape
    launch.check_shape((B, D), scale_BD=scale_BD, shift_BD=shift_BD)
    launch.check_dtype(scale_BD.dtype, shift_BD=shift_BD)
    launch.check_last_dim(x_BLD=x_BLD, scale_BD=scale_BD, shift_BD=shift_BD)
    if not launch.runs_triton(impl, x_BLD):
        return norm_modulate_reference(x_BLD, scale_BD, shift_BD, eps)
    y_BLD = x_BLD.new_empty(B, L, D)
    with launch.on_device(x_BLD):
        _norm_modulate_kernel[(L, B)](
            x_BLD, scale_BD, shift_BD, y_BLD,
            *x_BLD.stride()[:2], scale_BD.stride(0), shift_BD.stride(0),
            L, D, eps,
            BLOCK_D=triton.next_power_of_2(D), enable_fp_fusion=True,
            **launch.tile("norm_modulate", width=D),
        )  # fmt: skip
    return y_BLD


def norm_modulate_reference(
    x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float = 1e-6
) -> Tensor:
    """A sample's scale and shift are the weight and bias of PyTorch's one-pass LayerNorm."""
    weight_BD, bias_BD = 1 + launch.widen(scale_BD), launch.widen(shift_BD)
    # on the CPU half-precision rows take fp32 weights as they are; on a GPU the dtypes must agree
    mixed = x_BLD.device.type == "cpu" and weight_BD.dtype == torch.float32
    x = x_BLD if mixed else x_BLD.to(torch.promote_types(weight_BD.dtype, x_BLD.dtype))
    rows = [
        F.layer_norm(x_LD, x_LD.shape[-1:], weight_D, bias_D, eps)
        for x_LD, weight_D, bias_D in zip(x, weight_BD, bias_BD, strict=True)
    ]
    return (rows[0][None] if len(rows) == 1 else torch.stack(rows)).to(x_BLD.dtype)


def eager_norm_modulate(x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor) -> Tensor:
    """As diffusers runs it."""
    return F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=1e-6) * (1 + scale_BD[:, None]) + shift_BD[:, None]


def _inputs(device: str, dtype: torch.dtype, B: int, L: int, D: int) -> Inputs:
    wide, narrow = poisoned((B, 6 * D), dtype, device), poisoned((B, 2 * D), dtype, device)
    longer = poisoned((B, L + 2, D), dtype, device)
    return {
        "x_BLD": inside(longer, noise((B, L, D), dtype, device), slice(1, L + 1), slice(None)),
        "scale_BD": inside(wide, noise((B, D), dtype, device, 1), slice(D, 2 * D)),
        "shift_BD": inside(narrow, noise((B, D), dtype, device, 2), slice(0, D)),
    }


OP = Op(
    name="norm_modulate",
    formula="LayerNorm(x) * (1 + scale) + shift",
    replaces="layer_norm, add, mul, add",
    launch=norm_modulate,
    reference=norm_modulate_reference,
    eager=eager_norm_modulate,
    inputs=_inputs,
    tiny=(
        {"B": 1, "L": 1, "D": 64},
        {"B": 2, "L": 5, "D": 96},
        {"B": 2, "L": 3, "D": 33},
    ),
    production=(
        {"B": 1, "L": 512, "D": 1024},
        {"B": 1, "L": 4608, "D": 3072},
        {"B": 1, "L": 8192, "D": 5120},
    ),
    cpu=({"B": 1, "L": 1024, "D": 768},),
    bytes=lambda i: 2 * i["x_BLD"].nbytes + i["scale_BD"].nbytes + i["shift_BD"].nbytes,
)
