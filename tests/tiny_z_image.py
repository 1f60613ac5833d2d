"""Tiny random Z-Image checkpoints, built with diffusers' own classes and laid out as the published ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import transformers
from tiny_checkpoints import byte_level_tokenizer, edit_weights, kl_vae, randomise

TEXT_WIDTH = 40


def transformer(*, heads: int = 2, head_dim: int = 32, layers: int = 2, refiners: int = 1, **config: Any) -> Any:
    model = diffusers.ZImageTransformer2DModel(
        dim=heads * head_dim, n_heads=heads, n_kv_heads=heads, n_layers=layers, n_refiner_layers=refiners,
        cap_feat_dim=TEXT_WIDTH, axes_dims=[head_dim - 2 * (head_dim // 8 * 3), *[head_dim // 8 * 3] * 2],
        axes_lens=[1536, 512, 512], **config,
    )  # fmt: skip
    return randomise(model, "transformer")


def text_encoder(tokenizer: Any) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer) // 8 * 8 + 8, hidden_size=TEXT_WIDTH, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    return randomise(transformers.Qwen3Model(config), "text_encoder")


def build_z_image(path: Path, *, shift: float = 6.0, **shape: Any) -> Path:
    tokenizer = byte_level_tokenizer()
    # as Qwen3's: what marks that no thoughts are wanted
    tokenizer.chat_template += "{%- if enable_thinking is false %}{{- '<think></think>' }}{%- endif %}"
    diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=kl_vae("vae"),
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer(**shape),
    ).save_pretrained(path)

    def as_in_a_language_model(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[f"model.{name}"] = tensors.pop(name)

    edit_weights(path, "text_encoder", as_in_a_language_model)
    return path


def build_z_image_turbo(path: Path) -> Path:
    return build_z_image(path, shift=3.0)
