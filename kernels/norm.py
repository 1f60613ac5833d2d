"""Norms of a residual stream, with all that stands before and after them in a transformer block; in fp32.

    n = norm(x) * weight + bias, norm(x) = (x - mean) / sqrt(var + eps), or x / sqrt(mean(x^2) + eps)
    y = n * (1 + scale) + shift, or its 8-bit codes and the scales of its rows

Shapes: x (R, D) or (B, L, D), weight and bias (D,), scale and shift (G, D), one for each group of rows -> y like x.
Why: these passes are all memory traffic; fused, x is read once and y written once. The kernel also adds a gated branch
to x first, which `residual` asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned
from sgl_diffusion.kernels.quantize import (
    DTYPES,
    Format,
    check_format,
    check_scale,
    constants,
    eager_quantize_rows,
    new_scales,
    quantize_row,
    quantize_rows_reference,
    require_fp8,
    some_scale,
)

# B batch  L tokens  R = B * L rows  D width  G groups of rows
# Rows fall into groups of R / G neighbours (G = B: one vector a sample, G = R: one a token), or `group` names each
# row's group: text and image tokens in one buffer, clean and noisy frames of a video.

Kind = Literal["layer", "rms"]
MAX_RUNS = 64  # runs of rows of one group the reference goes through one by one


# -- kernel -----------------------------------------------------------------------


@triton.jit
def _rms_norm(x, D, eps):
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)


@triton.jit
def _layer_norm(x, live, D, eps):
    centred = tl.where(live, x - tl.sum(x, axis=0) / D, 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)


@triton.jit
def _norm_kernel(
    x_ptr, x_stride_b, x_stride_l, branch_ptr, branch_stride_b, branch_stride_l, sum_ptr, sum_stride_b, sum_stride_l,
    gate_ptr, gate_stride, sandwich_ptr, weight_ptr, bias_ptr, scale_ptr, scale_stride, shift_ptr, shift_stride,
    group_ptr, rows_per_group, y_ptr, row_scale_ptr,
    L, D, eps,
    KIND: tl.constexpr, TANH_GATE: tl.constexpr, KNOWN_SCALE: tl.constexpr, LARGEST: tl.constexpr,
    INTEGER: tl.constexpr, SCALE_BLOCK: tl.constexpr, SATURATE: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """A row a program. Pointers of what is not asked for are None."""
    l = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    row = b * L + l
    d = tl.arange(0, BLOCK_D)
    live = d < D
    group = (row // rows_per_group if group_ptr is None else tl.load(group_ptr + row)).to(tl.int64)
    x = tl.load(x_ptr + b * x_stride_b + l * x_stride_l + d, mask=live, other=0.0).to(tl.float32)

    if branch_ptr is not None:
        branch = tl.load(branch_ptr + b * branch_stride_b + l * branch_stride_l + d, mask=live, other=0.0)
        branch = branch.to(tl.float32)
        if sandwich_ptr is not None:
            branch = _rms_norm(branch, D, eps) * tl.load(sandwich_ptr + d, mask=live, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + group * gate_stride + d, mask=live, other=0.0).to(tl.float32)
            if TANH_GATE:
                gate = 2.0 / (1.0 + tl.math.exp2(gate * -2.8853900817779268)) - 1.0
            branch = branch * gate
        x += branch
        if SATURATE:
            x = tl.clamp(x, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        # the norm sees the sum as it is stored, as the next reader of the stream does
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + b * sum_stride_b + l * sum_stride_l + d, rounded, mask=live)
        x = rounded.to(tl.float32)

    if KIND != "":
        y = _rms_norm(x, D, eps) if KIND == "rms" else _layer_norm(x, live, D, eps)
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + d, mask=live, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + d, mask=live, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            y *= 1.0 + tl.load(scale_ptr + group * scale_stride + d, mask=live, other=0.0).to(tl.float32)
        if shift_ptr is not None:
            y += tl.load(shift_ptr + group * shift_stride + d, mask=live, other=0.0).to(tl.float32)
        if row_scale_ptr is not None:
            y = quantize_row(y, row_scale_ptr, row, D, KNOWN_SCALE, LARGEST, INTEGER, SCALE_BLOCK)
        tl.store(y_ptr + row * D + d, y.to(y_ptr.dtype.element_ty), mask=live)


# -- launchers --------------------------------------------------------------------


def norm(
    x: Tensor, *, kind: Kind, weight_D: Tensor | None = None, bias_D: Tensor | None = None,
    scale: Tensor | None = None, shift: Tensor | None = None, group: Tensor | None = None,
    eps: float = 1e-6, quantize: Format | None = None, code_scale: Tensor | None = None, impl: launch.Impl = "auto",
) -> Any:  # fmt: skip
    """LayerNorm or RMSNorm, modulated: a new contiguous tensor in the dtype of x, or (codes, fp32 scales).

    Args:
        x: (R, D) or (B, L, D), any strides but a contiguous last dimension.
        weight_D, bias_D, scale, shift: any float dtype. scale and shift may be chunks of a wide projection.
        group: int32 (R,), the group of every row; without it rows are divided evenly.
        quantize: "fp8" or "fp8_block" (sm_89 and later), or "int8", as `quantize_rows` would after it.
        code_scale: fp32 (1,), the one scale of "fp8" or "int8".
    Raises:
        ValueError: a shape, dtype, device, stride or name that does not fit.
    Source: `AdaLayerNormZero`, `FP32LayerNorm` and `RMSNorm` of diffusers.
    """
    vectors = {"scale": scale, "shift": shift}
    check(x, kind, vectors, {"weight_D": weight_D, "bias_D": bias_D}, group, quantize, code_scale)
    if not launch.runs_triton(impl, x):
        return norm_reference(
            x, kind=kind, weight_D=weight_D, bias_D=bias_D, scale=scale, shift=shift, group=group, eps=eps,
            quantize=quantize, code_scale=code_scale,
        )  # fmt: skip
    return launch_norm(
        "norm", x, None, None, {"weight": weight_D, "bias": bias_D}, vectors, group, eps, kind=kind, quantize=quantize,
        code_scale=code_scale,
    )  # fmt: skip


def launch_norm(
    op: str, x: Tensor, branch: Tensor | None, total: Tensor | None, weights: dict[str, Tensor | None],
    vectors: dict[str, Tensor | None], group: Tensor | None, eps: float,
    *, kind: str = "", tanh_gate: bool = False, quantize: Format | None = None, code_scale: Tensor | None = None,
) -> Any:  # fmt: skip
    require_fp8(quantize)
    (B, L), D = (1, len(x)) if x.ndim == 2 else x.shape[:2], x.shape[-1]
    y, row_scale = None, code_scale
    if kind:
        y = torch.empty(x.shape, dtype=DTYPES[quantize] if quantize else x.dtype, device=x.device)
    if quantize and code_scale is None:
        row_scale = new_scales(x, x.shape[-1], quantize)
    gate, scale, shift = (vectors.get(name) for name in ("gate", "scale", "shift"))
    groups = groups_of({name: v for name, v in vectors.items() if v is not None})
    # one group of all samples is the same vectors for each: as many rows as a sample has, whatever the batch
    rows_per_group = L if groups == 1 else B * L // groups
    with launch.on_device(x):
        _norm_kernel[(L, B)](
            x, *_strides(x), branch, *_strides(branch), total, *_strides(total),
            gate, _row_stride(gate), *(weights.get(name) for name in ("sandwich", "weight", "bias")),
            scale, _row_stride(scale), shift, _row_stride(shift), group, rows_per_group, y, row_scale,
            L, D, eps,
            KIND=kind, TANH_GATE=tanh_gate, **constants(quantize, code_scale),
            SATURATE=x.dtype == torch.float16, BLOCK_D=triton.next_power_of_2(D), enable_fp_fusion=True,
            **launch.tile(op, width=D),
        )  # fmt: skip
    return y if row_scale is None else (y, row_scale)


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Of samples and of rows."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1)) if x.ndim == 3 else (0, x.stride(0))


def groups_of(vectors: dict[str, Tensor]) -> int:
    """Of rows with one modulation, by the first of the vectors; all rows are one group where there are none."""
    return len(next(iter(vectors.values()))) if vectors else 1


def _row_stride(vectors_GD: Tensor | None) -> int:
    return 0 if vectors_GD is None or len(vectors_GD) == 1 else vectors_GD.stride(0)


def check(
    x: Tensor, kind: str, vectors: dict[str, Tensor | None], weights: dict[str, Tensor | None],
    group: Tensor | None, quantize: Format | None, code_scale: Tensor | None = None,
) -> None:  # fmt: skip
    if kind not in ("layer", "rms"):
        raise ValueError(f"kind={kind!r}: expected layer or rms")
    check_format(quantize)
    launch.check_float(x, x=x)
    if x.ndim not in (2, 3):
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (R, D) or (B, L, D)")
    R, D = x[..., 0].numel(), x.shape[-1]
    if code_scale is not None and quantize == "fp8_block":
        raise ValueError("code_scale: expected none beside quantize='fp8_block', whose blocks have their own")
    check_scale(x, D, code_scale, quantize)
    given = {name: w for name, w in weights.items() if w is not None}
    launch.check_float(x, **given)
    launch.check_shape((D,), **given)
    launch.check_contiguous(**given)
    given = {name: v for name, v in vectors.items() if v is not None}
    launch.check_float(x, **given)
    launch.check_last_dim(x=x, **given)
    G = groups_of(given)
    launch.check_shape((G, D), **given)
    if G == 0 or (group is None and R % G):
        raise ValueError(f"{next(iter(given))}: {G} groups, expected a divisor of the {R} rows of x")
    if group is None:
        return
    launch.check_shape((R,), group=group)
    launch.check_dtype(torch.int32, group=group)
    launch.check_contiguous(group=group)
    if group.device != x.device:
        raise ValueError(f"group: on {group.device}, the other tensors are on {x.device}")


# -- in PyTorch -------------------------------------------------------------------


def norm_reference(
    x: Tensor, *, kind: Kind, weight_D: Tensor | None = None, bias_D: Tensor | None = None,
    scale: Tensor | None = None, shift: Tensor | None = None, group: Tensor | None = None,
    eps: float = 1e-6, quantize: Format | None = None, code_scale: Tensor | None = None,
) -> Any:  # fmt: skip
    """Run by run of rows that share their vectors, whose affine norm is one pass in PyTorch."""
    rows, parts = rows_of(x), []
    # on the CPU, half-precision rows take fp32 weights as they are, and round once
    rows = rows if launch.on_cpu(x) and quantize is None else launch.widen(rows)
    for run, g in runs(len(rows), group, scale, shift):
        weight, bias = (None if w is None else launch.widen(w) for w in (weight_D, bias_D))
        if scale is not None:
            gain = 1 + launch.widen(scale[g])
            weight, bias = gain if weight is None else weight * gain, None if bias is None else bias * gain
        if shift is not None:
            bias = launch.widen(shift[g]) if bias is None else bias + launch.widen(shift[g])
        parts.append(_affine_norm(rows[run], kind, weight, bias, eps))
    y = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)
    return quantize_rows_reference(y, quantize, scale=code_scale) if quantize else y.to(x.dtype)


def _affine_norm(x_RD: Tensor, kind: Kind, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """weight and bias are (D,), or (R, D) where every row has its own."""
    shape, ours = x_RD.shape[-1:], all(w is None or w.ndim == 1 for w in (weight, bias))
    if kind == "layer" and ours:
        if bias is not None and weight is None:
            weight = torch.ones_like(bias)
        return F.layer_norm(x_RD, shape, weight, bias, eps)
    x_RD = launch.widen(x_RD)
    y = F.layer_norm(x_RD, shape, eps=eps) if kind == "layer" else rms_normed(x_RD, eps)
    y = y if weight is None else y.mul_(weight)
    return y if bias is None else y.add_(bias)


def rms_normed(x_RD: Tensor, eps: float) -> Tensor:
    mean_square = torch.linalg.vector_norm(x_RD, dim=-1, keepdim=True).square_().div_(x_RD.shape[-1])
    return x_RD * mean_square.add_(eps).rsqrt_()


def rows_of(x: Tensor) -> Tensor:
    """(R, D); a copy where samples are not evenly apart."""
    return x.reshape(-1, x.shape[-1])


def runs(R: int, group: Tensor | None, *vectors_GD: Tensor | None) -> Iterator[tuple[slice, Any]]:
    """Neighbouring rows and the index of their group; all rows and the indices of their groups where those are many."""
    given = [v for v in vectors_GD if v is not None]
    if not given:  # groups differ in nothing
        yield slice(None), 0
        return
    G = len(given[0])
    if group is None:
        groups, counts = list(range(G)), [R // G] * G
    else:
        values, lengths = torch.unique_consecutive(group, return_counts=True)
        groups, counts = values.tolist(), lengths.tolist()
    if len(groups) > MAX_RUNS:
        each = torch.arange(G, device=given[0].device).repeat_interleave(R // G) if group is None else group
        yield slice(None), each
        return
    start = 0
    for g, count in zip(groups, counts, strict=True):
        yield slice(start, start + count), g
        start += count


def eager_norm(
    x: Tensor, kind: Kind, weight_D: Tensor | None, bias_D: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    group: Tensor | None, quantize: Format | None, code_scale: Tensor | None,
) -> Any:  # fmt: skip
    """As diffusers runs it."""
    if kind == "layer":
        y = F.layer_norm(x, x.shape[-1:], weight_D, bias_D, 1e-6)
    else:
        y = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        y = y if weight_D is None else y.to(weight_D.dtype) * weight_D
        y = y if bias_D is None else y + bias_D
    if scale is not None:
        y = y * (1 + eager_vectors(scale, x, group))
    if shift is not None:
        y = y + eager_vectors(shift, x, group)
    return eager_quantize_rows(y, quantize, code_scale) if quantize else y.to(x.dtype)


def eager_vectors(vectors_GD: Tensor, x: Tensor, group: Tensor | None) -> Tensor:
    """A vector for every row, to broadcast."""
    if group is not None:
        return vectors_GD[group.long()].view(x.shape)
    return vectors_GD[:, None] if len(vectors_GD) == len(x) else vectors_GD.view(x.shape)


# -- cases ------------------------------------------------------------------------


def modulated_inputs(
    device: str, dtype: torch.dtype, B: int, L: int, D: int, groups: str, names: tuple[str, ...], wide: bool = False
) -> Inputs:
    """Vectors as chunks of wider projections. `groups`: one for each sample or token, or two that rows select."""
    G = {"none": 0, "sample": B, "token": B * L, "selected": 2 * B}[groups]
    vectors = {}
    for i, name in enumerate(names):
        projection = poisoned((G, (i + 2) * D), torch.float32 if wide else dtype, device)
        vectors[name] = inside(projection, noise((G, D), projection.dtype, device, i), slice(i * D, (i + 1) * D))
    group = None
    if groups == "selected":  # the first third of the tokens of a sample stands in its first group
        second = torch.arange(B * L, device=device) % L >= L // 3
        group = (torch.arange(B * L, device=device) // L * 2 + second).int()
    return {"group": group, **{name: vectors[name] if G else None for name in names}}


def strided(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Rows away from zero, inside longer samples of NaN."""
    B, L, D = shape
    longer = poisoned((B, L + 2, D), dtype, device)
    return inside(longer, noise(shape, dtype, device, seed) + 2, slice(1, L + 1), slice(None))


def _inputs(
    device: str, dtype: torch.dtype, B: int, L: int, D: int, kind: Kind, groups: str = "none",
    affine: bool = False, shifted: bool = True, quantize: Format | None = None, known: bool = False, wide: bool = False,
) -> Inputs:  # fmt: skip
    names = ("scale", "shift") if shifted else ("scale",)
    return {
        "x": strided((B, L, D), dtype, device, 10),
        "kind": kind,
        "weight_D": noise((D,), dtype, device, 11) if affine else None,
        "bias_D": noise((D,), dtype, device, 12) if affine and shifted else None,
        **{"shift": None, **modulated_inputs(device, dtype, B, L, D, groups, names, wide)},
        "quantize": quantize,
        "code_scale": some_scale(device, quantize) if known else None,
    }


def _bytes(i: Inputs) -> int:
    vectors = [i[name] for name in ("weight_D", "bias_D", "scale", "shift") if i[name] is not None]
    out = i["x"].numel() if i["quantize"] else i["x"].nbytes
    return i["x"].nbytes + out + sum(v.nbytes for v in vectors)


OP = Op(
    name="norm",
    formula="LayerNorm or RMSNorm(x) * weight + bias, then * (1 + scale) + shift, in the dtype of x or in 8 bits",
    replaces="layer_norm, add, mul, add; of an RMSNorm: float, pow, mean, add, rsqrt, mul, mul; quantise: 7 more",
    launch=norm,
    reference=norm_reference,
    eager=eager_norm,
    inputs=_inputs,
    tiny=(
        {"B": 1, "L": 1, "D": 64, "kind": "layer", "groups": "sample"},
        {"B": 2, "L": 5, "D": 96, "kind": "rms", "groups": "token", "affine": True, "wide": True},
        {"B": 2, "L": 4, "D": 33, "kind": "layer", "groups": "selected", "affine": True},
        {"B": 1, "L": 3, "D": 40, "kind": "rms", "affine": True, "shifted": False},
        {"B": 2, "L": 2, "D": 48, "kind": "layer", "groups": "sample", "quantize": "int8"},
        {"B": 1, "L": 3, "D": 48, "kind": "rms", "groups": "sample", "quantize": "fp8"},
        {"B": 1, "L": 2, "D": 200, "kind": "layer", "groups": "sample", "quantize": "fp8_block"},
        {"B": 1, "L": 3, "D": 48, "kind": "rms", "groups": "sample", "quantize": "fp8", "known": True},
        {"B": 2, "L": 2, "D": 48, "kind": "layer", "groups": "sample", "quantize": "int8", "known": True},
    ),
    production=(
        {"B": 1, "L": 512, "D": 1024, "kind": "layer", "groups": "sample"},
        {"B": 1, "L": 4608, "D": 3072, "kind": "layer", "groups": "sample"},
        {"B": 1, "L": 4608, "D": 3072, "kind": "layer", "groups": "selected"},
        {"B": 1, "L": 32760, "D": 5120, "kind": "layer", "affine": True},
        {"B": 1, "L": 4224, "D": 3840, "kind": "rms", "groups": "sample", "affine": True, "shifted": False},
        {"B": 1, "L": 4608, "D": 3072, "kind": "layer", "groups": "sample", "quantize": "fp8"},
        {"B": 1, "L": 4608, "D": 3072, "kind": "layer", "groups": "sample", "quantize": "fp8", "known": True},
        {"B": 1, "L": 32760, "D": 5120, "kind": "layer", "groups": "selected", "quantize": "int8"},
        {"B": 1, "L": 4608, "D": 3072, "kind": "layer", "groups": "sample", "quantize": "fp8_block"},
    ),
    cpu=(
        {"B": 1, "L": 1024, "D": 768, "kind": "layer", "groups": "sample"},
        {"B": 2, "L": 512, "D": 768, "kind": "layer", "groups": "selected"},
        {"B": 1, "L": 1024, "D": 768, "kind": "rms", "affine": True, "shifted": False},
    ),
    bytes=_bytes,
)
