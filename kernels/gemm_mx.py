"""out = x weight^T + bias with weights in MXFP8 or NVFP4, and the epilogues of `gemm.py`.

    activations in 16 or 32 bits   weights are decoded in the kernel, exactly in bf16, and multiplied in x's dtype
    activations as codes too       tensor cores multiply codes and apply their scales: "tcgen05.mma" of sm_100

Shapes: weight codes and scales as in `microscaling.py`, (N, K) and (N, K / 32), or (N, K / 2) and (N, K / 16);
x (..., K), or codes and scales likewise -> out (..., N). Global scales of NVFP4 multiply the sums, in fp32.
Why: weights take half or a quarter of the memory on every GPU, and a product a half or a quarter of the time of one in
bf16 where the tensor cores know the formats; elsewhere there is no such instruction, and none is imitated.
"""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.gemm import check_epilogue, eager_gemm, with_epilogue
from sgl_diffusion.kernels.gemm_forms import fit_descriptors
from sgl_diffusion.kernels.gemm_mx_forms import launch_decoding, launch_scaled
from sgl_diffusion.kernels.microscaling import (
    BLOCK,
    CODE_DTYPES,
    CODES_PER_BYTE,
    SCALE_DTYPES,
    MxFormat,
    check_global_scale,
    check_mx_format,
    dequantize_mx,
    quantize_mx_reference,
)
from sgl_diffusion.kernels.op import TOLERANCE, Inputs, Op, inside, noise, poisoned

# M rows  N output columns  K input columns
# columns from `gelu_from` on are the tail, those before it the head

# -- launching --------------------------------------------------------------------


def native_microscaling() -> bool:
    """Whether Triton's active GPU multiplies microscaled codes by themselves: sm_100 and its kin. Triton's interpreter
    stands for such a GPU.

    Raises:
        RuntimeError: no GPU, or one before sm_80.
    """
    return launch.architecture() in ("sm_100", "interpreter")


@overload
def gemm_mx(
    x_MK: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias_N: Tensor | None = None,
    *, format: MxFormat, weight_global_scale: Tensor | None = None,
    x_scales: Tensor | None = None, x_global_scale: Tensor | None = None,
    gelu_from: int | None = None, tail: None = None, gate: Tensor | None = None, residual: Tensor | None = None,
    out: Tensor | None = None, dtype: torch.dtype | None = None, impl: launch.Impl = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def gemm_mx(
    x_MK: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias_N: Tensor | None = None,
    *, format: MxFormat, weight_global_scale: Tensor | None = None,
    x_scales: Tensor | None = None, x_global_scale: Tensor | None = None,
    gelu_from: int, tail: Tensor, gate: None = None, residual: None = None,
    out: Tensor | None = None, dtype: torch.dtype | None = None, impl: launch.Impl = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def gemm_mx(
    x_MK: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias_N: Tensor | None = None,
    *, format: MxFormat, weight_global_scale: Tensor | None = None,
    x_scales: Tensor | None = None, x_global_scale: Tensor | None = None,
    gelu_from: int | None = None, tail: Tensor | None = None, gate: Tensor | None = None,
    residual: Tensor | None = None, out: Tensor | None = None, dtype: torch.dtype | None = None,
    impl: launch.Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """A linear layer of microscaled weights and its epilogue. Returns `out`, or a new tensor; with a tail, (out, tail).

    Args:
        x_MK: (..., K) in a float dtype; or codes, with `x_scales`. Contiguous last dimension, rows evenly apart.
        weight_codes, weight_scales: contiguous, as `quantize_mx` makes them; a range of rows is fine. Codes are finite.
        weight_global_scale: of nvfp4, fp32: (1,), or (N,) where projections with scales of their own are one weight.
        x_scales, x_global_scale: those of x's codes, both as `quantize_mx` makes them; the global one (1,) or (...,).
        gelu_from, tail, gate, residual, out: as in `gemm`; in the dtype of the result.
        dtype: of the result where x is codes and there is no `out`; None is bf16. Else the result has that of x.
    Raises:
        ValueError: a shape, dtype, device, stride or format that does not fit.
        launch.Unsupported: codes times codes where the GPU has no such instruction; `native_microscaling` tells.
    """
    dtype = _check(x_MK, weight_codes, weight_scales, format, weight_global_scale, x_scales, x_global_scale, out, dtype)
    N = len(weight_codes)
    check_epilogue(x_MK, N, dtype, bias_N, gelu_from, tail, gate, residual, out)
    if out is None:
        out = x_MK.new_empty((*x_MK.shape[:-1], N if tail is None else N - tail.shape[-1]), dtype=dtype)
    form = "torch"
    if launch.runs_triton(impl, x_MK):
        form = "pointer" if x_scales is None else "dot_scaled"
    launch.took("gemm_mx", form, N, weight_scales.shape[1] * BLOCK[format])
    if form == "torch":
        return gemm_mx_reference(
            x_MK, weight_codes, weight_scales, bias_N, format=format, weight_global_scale=weight_global_scale,
            x_scales=x_scales, x_global_scale=x_global_scale,
            gelu_from=gelu_from, tail=tail, gate=gate, residual=residual, out=out,
        )  # fmt: skip
    M = x_MK.numel() // x_MK.shape[-1]
    tile = launch.tile("gemm_mx", m=M, itemsize=out.element_size(), scaled=int(x_scales is not None))
    weight = (weight_codes, weight_scales, weight_global_scale)
    with launch.on_device(x_MK):
        if x_scales is None:
            launch_decoding(x_MK, *weight, bias_N, gelu_from, tail, gate, residual, out, format, tile)
        else:
            _require_native(x_MK, weight_codes)
            x = (x_MK, x_scales, x_global_scale)
            launch_scaled(*x, *weight, bias_N, gelu_from, tail, gate, residual, out, format, tile)
    return out if tail is None else (out, tail)


def _check(
    x_MK: Tensor, weight_codes: Tensor, weight_scales: Tensor, format: MxFormat, weight_global_scale: Tensor | None,
    x_scales: Tensor | None, x_global_scale: Tensor | None, out: Tensor | None, dtype: torch.dtype | None,
) -> torch.dtype:  # fmt: skip
    """All but the epilogue. Returns the dtype of the result."""
    check_mx_format(format)
    launch.check_ndim(2, weight_codes=weight_codes)
    N, packed = weight_codes.shape
    K, rows = packed * CODES_PER_BYTE[format], tuple(x_MK.shape[:-1])
    if K % BLOCK[format]:
        raise ValueError(f"weight_codes: of {K} columns, expected a multiple of {BLOCK[format]} for {format}")
    codes, scales = {"weight_codes": weight_codes}, {"weight_scales": weight_scales}
    launch.check_shape((N, K // BLOCK[format]), **scales)
    launch.check_contiguous(**codes, **scales)
    if x_scales is None:
        launch.check_float(x_MK, x_MK=x_MK)
        launch.check_shape((*rows, K), x_MK=x_MK)
        if x_global_scale is not None:
            raise ValueError("x_global_scale: expected x_scales beside it")
        if dtype not in (None, x_MK.dtype):
            raise ValueError(f"dtype={dtype}: expected {x_MK.dtype}, that of x_MK")
        dtype = x_MK.dtype
    else:
        launch.check_shape((*rows, packed), x_MK=x_MK)
        launch.check_shape((*rows, K // BLOCK[format]), x_scales=x_scales)
        launch.check_last_dim(x_scales=x_scales)
        launch.row_stride("x_scales", x_scales)
        codes["x_MK"], scales["x_scales"] = x_MK, x_scales
        dtype = dtype or (torch.bfloat16 if out is None else out.dtype)
        if dtype not in launch.FLOAT_DTYPES:
            raise ValueError(f"dtype={dtype}: expected {', '.join(map(str, launch.FLOAT_DTYPES))}")
    launch.check_last_dim(x_MK=x_MK)
    launch.row_stride("x_MK", x_MK)
    launch.check_dtype(CODE_DTYPES[format], **codes)
    launch.check_dtype(SCALE_DTYPES[format], **scales)
    launch.check_device(x_MK, **codes, **scales)
    for name, scale, each in (
        ("weight_global_scale", weight_global_scale, (N,)), ("x_global_scale", x_global_scale, rows)
    ):  # fmt: skip
        if scale is not None:
            check_global_scale(x_MK, format, **{name: scale})
            if tuple(scale.shape) not in ((1,), each):
                raise ValueError(f"{name}: shape {tuple(scale.shape)}, expected (1,) or {each}")
    return dtype


def _require_native(x_MK: Tensor, weight_codes: Tensor) -> None:
    if not native_microscaling():
        raise launch.Unsupported("x_scales: products of two microscaled operands need a GPU of sm_100")
    if not fit_descriptors(x_MK, weight_codes):
        raise ValueError("x_MK, weight_codes: rows do not start at multiples of 16 bytes; use x without x_scales")


def gemm_mx_reference(
    x_MK: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias_N: Tensor | None = None,
    *, format: MxFormat, weight_global_scale: Tensor | None = None,
    x_scales: Tensor | None = None, x_global_scale: Tensor | None = None,
    gelu_from: int | None = None, tail: Tensor | None = None, gate: Tensor | None = None,
    residual: Tensor | None = None, out: Tensor,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Products of what the codes stand for, in fp32, or in float64 if `out` is."""
    wide = torch.promote_types(out.dtype, torch.float32)
    x = x_MK.to(wide) if x_scales is None else dequantize_mx(x_MK, x_scales, format, x_global_scale, wide)
    weight_NK = dequantize_mx(weight_codes, weight_scales, format, weight_global_scale, wide)

    def product(columns: slice, out: Tensor | None) -> Tensor:
        y = F.linear(x, weight_NK[columns], None if bias_N is None else bias_N[columns].to(wide))
        return y if out is None else out.copy_(y)

    return with_epilogue(product, gelu_from, tail, gate, residual, out)


def eager_gemm_mx(
    x_MK: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias_N: Tensor, *, format: MxFormat,
    weight_global_scale: Tensor | None, x_scales: Tensor | None, x_global_scale: Tensor | None,
    gelu_from: int | None, tail: Tensor | None, gate: Tensor | None, residual: Tensor | None, out: Tensor,
) -> object:  # fmt: skip
    """Without a kernel for it: weights, and activations that are codes, become numbers first."""
    weight_NK = dequantize_mx(weight_codes, weight_scales, format, weight_global_scale, out.dtype)
    x = x_MK if x_scales is None else dequantize_mx(x_MK, x_scales, format, x_global_scale, out.dtype)
    return eager_gemm(x, weight_NK, bias_N, gelu_from, tail, gate, residual, out)


def _inputs(
    device: str, dtype: torch.dtype, B: int, L: int, K: int, N: int, format: MxFormat, scaled: bool = False,
    gelu_from: int | None = None, tail: bool = False, gated: bool = False,
) -> Inputs:  # fmt: skip
    x_BLK = noise((B, L, K), dtype, device)
    weight_NK = noise((N, K), dtype, device, 1) * K**-0.5
    codes, scales, *global_scale = quantize_mx_reference(weight_NK, format)
    x, x_scales, *x_global_scale = quantize_mx_reference(x_BLK, format) if scaled else (x_BLK, None)
    # K columns of codes before those that are multiplied: half a row further in bytes of two codes
    wider = torch.empty((B, L, 2 * x.shape[-1]), dtype=x.dtype, device=device)
    wider = wider.view(torch.uint8).fill_(0x7F).view(x.dtype) if scaled else wider.fill_(torch.nan)
    buffer = poisoned((B, L, 2 * N), dtype, device)
    gates = poisoned((B, 3 * N), dtype, device)
    head = N if not tail else gelu_from
    return {
        "x_MK": inside(wider, x, slice(x.shape[-1], None)),
        "weight_codes": codes,
        "weight_scales": scales,
        "bias_N": noise((N,), dtype, device, 2),
        "format": format,
        "weight_global_scale": global_scale[0] if global_scale else None,
        "x_scales": x_scales,
        "x_global_scale": x_global_scale[0] if x_global_scale else None,
        "gelu_from": gelu_from,
        "tail": buffer[..., N + (gelu_from or 0) :] if tail else None,
        "gate": inside(gates, noise((B, N), dtype, device, 3), slice(N, 2 * N)) if gated else None,
        "residual": noise((B, L, N), dtype, device, 4) if gated else None,
        "out": buffer[..., :head],
    }


def _rows(i: Inputs) -> int:
    return i["x_MK"].numel() // i["x_MK"].shape[-1]


def _bytes(i: Inputs) -> int:
    weight = i["weight_codes"].nbytes + i["weight_scales"].nbytes
    dtype = i["out"].dtype if i["out"] is not None else i["dtype"] or i["x_MK"].dtype
    results = _rows(i) * len(i["weight_codes"]) * (1 if i["residual"] is None else 2) * dtype.itemsize
    return weight + results + i["x_MK"].nbytes + (0 if i["x_scales"] is None else i["x_scales"].nbytes)


OP = Op(
    name="gemm_mx",
    formula="`gemm` with a weight in MXFP8 or NVFP4, decoded as it is read, or times x in the same format",
    replaces="unpack, cast, mul of each operand; linear, gelu, cat, mul, add",
    launch=gemm_mx,
    reference=gemm_mx_reference,
    eager=eager_gemm_mx,
    inputs=_inputs,
    tiny=(
        {"B": 1, "L": 17, "K": 96, "N": 21, "format": "mxfp8", "scaled": True, "gelu_from": 5, "tail": True},
        {"B": 2, "L": 9, "K": 96, "N": 37, "format": "nvfp4", "scaled": True, "gated": True},
        {"B": 1, "L": 1, "K": 32, "N": 16, "format": "mxfp8"},
        {"B": 1, "L": 33, "K": 48, "N": 21, "format": "nvfp4", "gelu_from": 0},
        {"B": 2, "L": 9, "K": 96, "N": 48, "format": "mxfp8", "gelu_from": 20, "tail": True},
        {"B": 2, "L": 9, "K": 64, "N": 37, "format": "nvfp4", "gated": True},
    ),
    production=(
        {"B": 1, "L": 4096, "K": 3072, "N": 12288, "format": "mxfp8", "gelu_from": 0},
        {"B": 1, "L": 4608, "K": 3072, "N": 21504, "format": "nvfp4", "gelu_from": 9216, "tail": True},
        {"B": 1, "L": 512, "K": 12288, "N": 3072, "format": "nvfp4", "gated": True},
        {"B": 1, "L": 4608, "K": 3072, "N": 21504, "format": "mxfp8", "scaled": True, "gelu_from": 9216, "tail": True},
        {"B": 1, "L": 4096, "K": 12288, "N": 3072, "format": "nvfp4", "scaled": True, "gated": True},
    ),
    cpu=({"B": 1, "L": 256, "K": 512, "N": 2048, "format": "mxfp8", "gelu_from": 0},),
    bytes=_bytes,
    flops=lambda i: 2 * _rows(i) * i["weight_scales"].numel() * BLOCK[i["format"]],
    # sums of thousands of products; the reference rounds one before its GELU
    tolerance={**TOLERANCE, torch.float32: 2e-6},
)
