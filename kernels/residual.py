"""x' = x + gate * branch, alone or with the norm that comes next; in fp32.

    branch may go through RMSNorm(branch) * weight first ("sandwich norm"), and a gate through tanh
    y = norm(x'), as of `norm`, which sees x' as it is stored

Shapes: x and branch (R, D) or (B, L, D), gate (G, D), one for each group of rows -> x' and y like x.
Why: it closes every sub-block of a transformer, and a norm opens the next. Fused, x and the branch are read once and
x' and y written once, where eager PyTorch moves almost three times as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.norm import (
    Kind,
    check,
    eager_norm,
    eager_vectors,
    launch_norm,
    modulated_inputs,
    norm_reference,
    rms_normed,
    rows_of,
    runs,
    strided,
)  # fmt: skip
from sgl_diffusion.kernels.op import Inputs, Op, noise
from sgl_diffusion.kernels.quantize import Format, some_scale

# B batch  L tokens  R = B * L rows  D width  G groups of rows, as of `norm`
FP16_MAX = 65504.0


def residual_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None = None, *, kind: Kind,
    weight_D: Tensor | None = None, bias_D: Tensor | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None, group: Tensor | None = None, tanh_gate: bool = False,
    sandwich_weight_D: Tensor | None = None, eps: float = 1e-6, quantize: Format | None = None,
    code_scale: Tensor | None = None, impl: launch.Impl = "auto",
) -> Any:  # fmt: skip
    """Adds a branch to x in place, rounds, and norms the sum; arguments and result as of `norm`.

    Args:
        branch: shape and dtype of x, any strides but a contiguous last dimension.
        gate: like scale; without it the branch is added as it is. tanh_gate: takes its tanh first.
        sandwich_weight_D: the branch goes through an RMSNorm with this weight first.
    Raises:
        ValueError: as `norm`.
    An fp16 sum saturates instead of overflowing, as in diffusers.
    """
    vectors = {"gate": gate, "scale": scale, "shift": shift}
    weights = {"weight_D": weight_D, "bias_D": bias_D, "sandwich_weight_D": sandwich_weight_D}
    check(x, kind, vectors, weights, group, quantize, code_scale)
    _check_like(x, branch=branch)
    if not launch.runs_triton(impl, x):
        return residual_norm_reference(
            x, branch, gate, kind=kind, weight_D=weight_D, bias_D=bias_D, scale=scale, shift=shift, group=group,
            tanh_gate=tanh_gate, sandwich_weight_D=sandwich_weight_D, eps=eps, quantize=quantize,
            code_scale=code_scale,
        )  # fmt: skip
    weights = {"weight": weight_D, "bias": bias_D, "sandwich": sandwich_weight_D}
    return launch_norm(
        "residual_norm", x, branch, x, weights, vectors, group, eps, kind=kind, tanh_gate=tanh_gate, quantize=quantize,
        code_scale=code_scale,
    )  # fmt: skip


def gate_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None, *, group: Tensor | None = None, tanh_gate: bool = False,
    sandwich_weight_D: Tensor | None = None, eps: float = 1e-6, out: Tensor | None = None,
    impl: launch.Impl = "auto",
) -> Tensor:  # fmt: skip
    """The sum alone, as of `residual_norm`. Returns `out`, which may be x, or a new contiguous tensor."""
    check(x, "layer", {"gate": gate}, {"sandwich_weight_D": sandwich_weight_D}, group, None)
    _check_like(x, branch=branch, **({} if out is None else {"out": out}))
    out = x.new_empty(x.shape) if out is None else out
    if not launch.runs_triton(impl, x):
        return gate_residual_reference(
            x, branch, gate, group=group, tanh_gate=tanh_gate, sandwich_weight_D=sandwich_weight_D, eps=eps, out=out
        )
    weights = {"sandwich": sandwich_weight_D}
    launch_norm("gate_residual", x, branch, out, weights, {"gate": gate}, group, eps, tanh_gate=tanh_gate)
    return out


def _check_like(x: Tensor, **tensors: Tensor) -> None:
    launch.check_float(x, **tensors)
    launch.check_shape(tuple(x.shape), **tensors)
    launch.check_dtype(x.dtype, **tensors)
    launch.check_last_dim(**tensors)


# -- in PyTorch -------------------------------------------------------------------


def residual_norm_reference(
    x: Tensor, branch: Tensor, gate: Tensor | None = None, *, group: Tensor | None = None, tanh_gate: bool = False,
    sandwich_weight_D: Tensor | None = None, eps: float = 1e-6, **norm_arguments: Any,
) -> Any:  # fmt: skip
    gate_residual_reference(
        x, branch, gate, group=group, tanh_gate=tanh_gate, sandwich_weight_D=sandwich_weight_D, eps=eps, out=x
    )
    return norm_reference(x, group=group, eps=eps, **norm_arguments)


def gate_residual_reference(
    x: Tensor, branch: Tensor, gate: Tensor | None, *, group: Tensor | None = None, tanh_gate: bool = False,
    sandwich_weight_D: Tensor | None = None, eps: float = 1e-6, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    added = launch.widen(branch)
    if sandwich_weight_D is not None:
        added = rms_normed(added, eps).mul_(launch.widen(sandwich_weight_D))
    if gate is not None:
        # the products go where the sum will, unless x is there
        spare = out if out.dtype == added.dtype and out.data_ptr() != x.data_ptr() else None
        added = _gated(added, launch.widen(gate).tanh() if tanh_gate else launch.widen(gate), group, spare)
    if x.dtype in launch.HALF_DTYPES:
        total = added + x
        return out.copy_(total.clamp_(-FP16_MAX, FP16_MAX) if x.dtype == torch.float16 else total)
    return torch.add(x, added, out=out)


def _gated(branch: Tensor, gate_GD: Tensor, group: Tensor | None, spare: Tensor | None) -> Tensor:
    """A vector a sample broadcasts; other groups go run by run."""
    if group is None and len(gate_GD) == (len(branch) if branch.ndim == 3 else 1):
        return torch.mul(branch, gate_GD[:, None] if branch.ndim == 3 else gate_GD, out=spare)
    rows = rows_of(branch)
    gated = torch.empty_like(rows)
    for run, g in runs(len(rows), group, gate_GD):
        torch.mul(rows[run], gate_GD[g], out=gated[run])
    return gated.view(branch.shape)


def eager_residual_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, group: Tensor | None, tanh_gate: bool,
    sandwich_weight_D: Tensor | None, **norm_arguments: Any,
) -> Any:  # fmt: skip
    """As diffusers runs it, but for the sum, which goes to x."""
    eager_gate_residual(x, branch, gate, group, tanh_gate, sandwich_weight_D, out=x)
    return eager_norm(x, group=group, **norm_arguments)


def eager_gate_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None, group: Tensor | None, tanh_gate: bool,
    sandwich_weight_D: Tensor | None, out: Tensor,
) -> Tensor:  # fmt: skip
    """As diffusers runs it."""
    if sandwich_weight_D is not None:
        normed = branch * torch.rsqrt(branch.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        branch = normed.to(branch.dtype) * sandwich_weight_D
    if gate is not None:
        branch = eager_vectors(gate.tanh() if tanh_gate else gate, x, group) * branch
    return torch.add(x, branch, out=out) if branch.dtype == x.dtype else out.copy_(x + branch)


# -- cases ------------------------------------------------------------------------


def _branch_inputs(
    device: str, dtype: torch.dtype, B: int, L: int, D: int, groups: str, names: tuple[str, ...],
    tanh_gate: bool, sandwich: bool,
) -> Inputs:  # fmt: skip
    x, branch = strided((B, L, D), dtype, device, 20), strided((B, L, D), dtype, device, 21)
    vectors = modulated_inputs(device, dtype, B, L, D, groups, names)
    for coarse in (x, branch, vectors["gate"]):
        # halves: their sums of products are exact in half precision, where the norm would see another rounded sum
        # than a formula in float64
        if coarse is not None and device != "meta":
            coarse.mul_(2).round_().div_(2)
    sandwich_weight = noise((D,), dtype, device, 22) if sandwich else None
    return {"x": x, "branch": branch, "tanh_gate": tanh_gate, "sandwich_weight_D": sandwich_weight, **vectors}


def _residual_norm_inputs(
    device: str, dtype: torch.dtype, B: int, L: int, D: int, kind: Kind, groups: str = "none", affine: bool = False,
    tanh_gate: bool = False, sandwich: bool = False, quantize: Format | None = None, known: bool = False,
) -> Inputs:  # fmt: skip
    names = ("gate", "scale", "shift")
    return {
        **_branch_inputs(device, dtype, B, L, D, groups, names, tanh_gate, sandwich),
        "kind": kind,
        "weight_D": noise((D,), dtype, device, 23) if affine else None,
        "bias_D": noise((D,), dtype, device, 24) if affine and kind == "layer" else None,
        "quantize": quantize,
        "code_scale": some_scale(device, quantize) if known else None,
    }


def _gate_residual_inputs(
    device: str, dtype: torch.dtype, B: int, L: int, D: int, groups: str = "none",
    tanh_gate: bool = False, sandwich: bool = False,
) -> Inputs:  # fmt: skip
    inputs = _branch_inputs(device, dtype, B, L, D, groups, ("gate",), tanh_gate, sandwich)
    return {**inputs, "out": strided((B, L, D), dtype, device, 25)}


def _bytes(i: Inputs) -> int:
    vectors = [i[name] for name in ("gate", "scale", "shift") if i.get(name) is not None]
    y = 0 if "kind" not in i else i["x"].numel() if i["quantize"] else i["x"].nbytes
    return 3 * i["x"].nbytes + y + sum(v.nbytes for v in vectors)


RESIDUAL_NORM = Op(
    name="residual_norm",
    formula="x = x + gate * branch, then norm(x); gate or tanh(gate), branch or RMSNorm(branch) * weight",
    replaces="mul, add, then what norm replaces",
    launch=residual_norm,
    reference=residual_norm_reference,
    eager=eager_residual_norm,
    inputs=_residual_norm_inputs,
    tiny=(
        {"B": 1, "L": 1, "D": 64, "kind": "layer", "groups": "sample"},
        {"B": 2, "L": 4, "D": 33, "kind": "layer", "groups": "selected", "affine": True},
        {"B": 2, "L": 3, "D": 96, "kind": "rms", "groups": "token", "tanh_gate": True, "sandwich": True},
        {"B": 1, "L": 3, "D": 40, "kind": "layer", "affine": True},
        {"B": 1, "L": 3, "D": 48, "kind": "layer", "groups": "sample", "quantize": "int8"},
        {"B": 1, "L": 2, "D": 136, "kind": "rms", "groups": "sample", "quantize": "fp8_block"},
        {"B": 1, "L": 3, "D": 48, "kind": "layer", "groups": "sample", "quantize": "fp8", "known": True},
    ),
    production=(
        {"B": 1, "L": 512, "D": 1024, "kind": "layer", "groups": "sample"},
        {"B": 1, "L": 4608, "D": 3072, "kind": "layer", "groups": "sample"},
        {"B": 1, "L": 4608, "D": 3072, "kind": "layer", "groups": "selected"},
        {"B": 1, "L": 32760, "D": 5120, "kind": "layer", "groups": "sample"},
        {"B": 1, "L": 32760, "D": 5120, "kind": "layer", "affine": True},
        {"B": 1, "L": 4224, "D": 3840, "kind": "rms", "groups": "sample", "tanh_gate": True, "sandwich": True},
        {"B": 1, "L": 4608, "D": 3072, "kind": "layer", "groups": "sample", "quantize": "fp8"},
        {"B": 1, "L": 4608, "D": 3072, "kind": "layer", "groups": "sample", "quantize": "fp8", "known": True},
    ),
    cpu=(
        {"B": 1, "L": 1024, "D": 768, "kind": "layer", "groups": "sample"},
        {"B": 2, "L": 512, "D": 768, "kind": "layer", "groups": "selected"},
    ),
    written=("x",),
    bytes=_bytes,
)
GATE_RESIDUAL = Op(
    name="gate_residual",
    formula="x + gate * branch; gate or tanh(gate), branch or RMSNorm(branch) * weight",
    replaces="mul, add; of a sandwich norm: float, pow, mean, add, rsqrt, mul, mul",
    launch=gate_residual,
    reference=gate_residual_reference,
    eager=eager_gate_residual,
    inputs=_gate_residual_inputs,
    tiny=(
        {"B": 1, "L": 1, "D": 64, "groups": "sample"},
        {"B": 2, "L": 4, "D": 33, "groups": "selected"},
        {"B": 2, "L": 3, "D": 96, "groups": "token", "tanh_gate": True, "sandwich": True},
    ),
    production=(
        {"B": 1, "L": 512, "D": 1024, "groups": "sample"},
        {"B": 1, "L": 4608, "D": 3072, "groups": "selected"},
        {"B": 1, "L": 32760, "D": 5120, "groups": "sample"},
    ),
    cpu=(
        {"B": 1, "L": 1024, "D": 768, "groups": "sample"},
        {"B": 2, "L": 512, "D": 768, "groups": "selected"},
    ),
    bytes=_bytes,
)
