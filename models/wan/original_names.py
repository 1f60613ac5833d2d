"""Wan's names in its authors' checkpoints, which ComfyUI's files have as well."""

from __future__ import annotations

from sgl_diffusion.models.family import OriginalNames

_ATTENTION = {
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj", "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}  # fmt: skip

ORIGINAL_NAMES = OriginalNames(
    {
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        **{f"blocks.{{}}.self_attn.{theirs}": f"blocks.{{}}.attn1.{ours}" for theirs, ours in _ATTENTION.items()},
        **{f"blocks.{{}}.cross_attn.{theirs}": f"blocks.{{}}.attn2.{ours}" for theirs, ours in _ATTENTION.items()},
        **{f"blocks.{{}}.self_attn.norm_{x}": f"blocks.{{}}.attn1.norm_{x}" for x in "qk"},
        **{f"blocks.{{}}.cross_attn.norm_{x}": f"blocks.{{}}.attn2.norm_{x}" for x in "qk"},
        "blocks.{}.norm3": "blocks.{}.norm2",
        "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
        "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
        "blocks.{}.modulation": "blocks.{}.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "head.head": "proj_out",
    }
)
