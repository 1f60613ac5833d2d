"""The only list of operations. Tests, AOT checks, benchmarks, docs and accounting read it; a run does not."""

from __future__ import annotations

from collections.abc import Mapping

from sgl_diffusion.kernels import (
    activation,
    attention,
    attention_8bit,
    channel_norm,
    collective,
    embedding,
    gemm,
    gemm_fp8,
    gemm_int8,
    gemm_mx,
    gemm_w4,
    group_norm,
    group_norm_parts,
    layout,
    linear_combination,
    low_rank,
    microscaling,
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
        attention_8bit.INT8_OP,
        attention_8bit.FP8_OP,
        gemm.OP,
        gemm_fp8.OP,
        gemm_int8.OP,
        microscaling.OP,
        gemm_mx.OP,
        gemm_w4.W4,
        gemm_w4.W8,
        low_rank.OP,
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
