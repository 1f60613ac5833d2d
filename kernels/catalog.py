"""The only list of operations. Tests, AOT checks, benchmarks, docs and accounting read it; a run does not."""

from __future__ import annotations

from collections.abc import Mapping

from sgl_diffusion.kernels import (
    activation,
    attention,
    channel_norm,
    collective,
    embedding,
    gemm,
    group_norm,
    group_norm_parts,
    layout,
    linear_combination,
    modulation,
    norm,
    qk_norm_rope,
    quantize,
    residual,
    rope,
    sampler,
)
from sgl_diffusion.kernels.op import Op

OPS: Mapping[str, Op] = {
    op.name: op
    for op in (
        norm.OP,
        residual.RESIDUAL_NORM,
        residual.GATE_RESIDUAL,
        quantize.OP,
        qk_norm_rope.OP,
        rope.OP,
        attention.OP,
        gemm.OP,
        activation.OP,
        modulation.OP,
        embedding.TIMESTEP_EMBEDDING,
        embedding.PATCHIFY,
        embedding.UNPATCHIFY,
        sampler.OP,
        linear_combination.OP,
        group_norm.OP,
        group_norm_parts.MOMENTS_OP,
        group_norm_parts.PARTS_OP,
        channel_norm.OP,
        layout.UPSAMPLE_NEAREST,
        layout.CAUSAL_PAD,
        collective.SPLIT_OP,
        collective.JOIN_OP,
        collective.MERGE_OP,
    )
}


def markdown_table() -> str:
    """The table of `docs/kernels.md`."""
    rows = [f"| `{op.name}` | {op.formula} | {op.replaces} |" for op in OPS.values()]
    return "\n".join(["| operation | computes | instead of |", "| --- | --- | --- |", *rows])
