"""The only list of operations. Tests, AOT checks, benchmarks and docs read it; the runtime never does."""

from __future__ import annotations

from collections.abc import Mapping

from sgl_diffusion.kernels import (
    attention,
    euler_step,
    gate_residual,
    gelu,
    group_norm,
    norm_modulate,
    qk_norm_rope,
)
from sgl_diffusion.kernels.op import Op

OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        norm_modulate.OP,
        gate_residual.OP,
        qk_norm_rope.OP,
        gelu.OP,
        attention.OP,
        group_norm.OP,
        euler_step.OP,
    )
}


def markdown_table() -> str:
    """The table of `docs/kernels.md`."""
    rows = [f"| `{op.name}` | {op.formula} | {op.replaces} |" for op in OPS.values()]
    return "\n".join(["| operation | computes | instead of |", "| --- | --- | --- |", *rows])
