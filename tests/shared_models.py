"""Tiny denoisers and encoders with numbers of heads that four ranks can share, built with diffusers' own classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import tiny_flux2
import tiny_qwen
import tiny_wan
import tiny_z_image
import transformers
from sharing import BLOCKS
from tiny_checkpoints import randomise


def flux() -> Any:
    model = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=BLOCKS, num_single_layers=BLOCKS, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=48, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(4, 14, 14),
    )  # fmt: skip
    return randomise(model, "transformer")


def clip() -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return randomise(transformers.CLIPTextModel(config), "text_encoder")


def t5(*, multilingual: bool = False) -> Any:
    config = {
        "vocab_size": 64, "d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }  # fmt: skip
    if multilingual:
        return randomise(transformers.UMT5EncoderModel(transformers.UMT5Config(**config)), "text_encoder")
    return randomise(transformers.T5EncoderModel(transformers.T5Config(**config)), "text_encoder")


LANGUAGE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip


def qwen3() -> Any:
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LANGUAGE, head_dim=16, tie_word_embeddings=True))
    return randomise(model, "text_encoder")


def qwen_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 68, "num_heads": 2, "out_hidden_size": 64,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    ids = {f"{name}_token_id": 60 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**LANGUAGE, "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=False, **ids
    )
    return randomise(transformers.Qwen2_5_VLForConditionalGeneration(config), "text_encoder")


def mistral() -> Any:
    vision = {
        "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 16, "image_size": 56,
    }  # fmt: skip
    text = {"model_type": "mistral", **LANGUAGE, "head_dim": 16, "sliding_window": None}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=8)
    return randomise(transformers.Mistral3ForConditionalGeneration(config), "text_encoder")


BUILD: Mapping[str, Callable[[], Any]] = {
    "flux": flux,
    "flux2": partial(tiny_flux2.transformer, 48, guidance=False, num_attention_heads=4),
    "qwen": partial(tiny_qwen.transformer, num_attention_heads=4),
    "wan": partial(tiny_wan.transformer, "transformer"),
    "z_image": partial(tiny_z_image.transformer, heads=12),
    "clip": clip,
    "t5": t5,
    "umt5": partial(t5, multilingual=True),
    "qwen3": qwen3,
    "qwen_vl": qwen_vl,
    "mistral": mistral,
}


def build_all(root: Path, *names: str) -> Path:
    """Every one in a folder of its own, or some."""
    for name in names or BUILD:
        BUILD[name]().save_pretrained(root / name)
    return root
