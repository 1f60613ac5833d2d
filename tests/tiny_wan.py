"""Tiny random checkpoints of every Wan variant, built with diffusers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import transformers
from tiny_checkpoints import T5_WIDTH, Tokens, randomise, t5_encoder, tokens

VISION_WIDTH = 32
HEADS, HEAD_DIM = 2, 32


def transformer(component: str, **config: Any) -> Any:
    shape = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "ffn_dim": 128, "num_layers": 2}
    model = diffusers.WanTransformer3DModel(
        **{**shape, "text_dim": T5_WIDTH, "qk_norm": "rms_norm_across_heads", **config}
    )
    return randomise(model, component)


def vae_z16() -> Any:
    return randomise(diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1), "vae")


def vae_z48() -> Any:
    """That of Wan 2.2's TI2V-5B: residual, and over patches of 2 x 2 pixels. The statistics are a formula's."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, decoder_base_dim=8, z_dim=48, num_res_blocks=1, is_residual=True, in_channels=12, out_channels=12,
        patch_size=2, scale_factor_spatial=16, latents_mean=[(i % 7 - 3) / 10 for i in range(48)],
        latents_std=[0.5 + i % 5 / 10 for i in range(48)],
    )  # fmt: skip
    return randomise(vae, "vae")


def schedule(flow_shift: float = 3.0) -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    )


def vision_encoder() -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=VISION_WIDTH, intermediate_size=64, projection_dim=16, num_hidden_layers=3, num_attention_heads=2,
        image_size=32, patch_size=8, hidden_act="gelu",
    )  # fmt: skip
    return randomise(transformers.CLIPVisionModelWithProjection(config), "image_encoder")


def picture_processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def _texts(token: Tokens) -> dict[str, Any]:
    return {"tokenizer": token.t5, "text_encoder": t5_encoder(token.t5, "text_encoder", multilingual=True)}


def build_wan(path: Path) -> Path:
    """Wan 2.1, text to video."""
    diffusers.WanPipeline(
        **_texts(tokens(path.parent / "tokenizers")),
        vae=vae_z16(),
        scheduler=schedule(),
        transformer=transformer("transformer"),
    ).save_pretrained(path)
    return path


def build_wan_dmd(path: Path) -> Path:
    """As FastVideo's distilled models say that they are: by the name of a pipeline that diffusers does not have."""
    build_wan(path)
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "WanDMDPipeline"}))
    return path


def build_wan_i2v(path: Path, *, two_pictures: bool = False) -> Path:
    """Wan 2.1, picture to video, through an image encoder; or from the first picture to the last."""
    tokens_of_a_picture = (32 // 8) ** 2 + 1
    places = {"pos_embed_seq_len": 2 * tokens_of_a_picture} if two_pictures else {}
    added = {"image_dim": VISION_WIDTH, "added_kv_proj_dim": HEADS * HEAD_DIM}
    diffusers.WanImageToVideoPipeline(
        **_texts(tokens(path.parent / "tokenizers")),
        vae=vae_z16(),
        scheduler=schedule(),
        image_processor=picture_processor(),
        image_encoder=vision_encoder(),
        transformer=transformer("transformer", in_channels=36, **added, **places),
    ).save_pretrained(path)
    return path


def build_wan_flf2v(path: Path) -> Path:
    return build_wan_i2v(path, two_pictures=True)


def build_wan22(path: Path) -> Path:
    """Wan 2.2 T2V-A14B: one transformer for much noise, one for little."""
    diffusers.WanPipeline(
        **_texts(tokens(path.parent / "tokenizers")),
        vae=vae_z16(),
        scheduler=schedule(),
        transformer=transformer("transformer"),
        transformer_2=transformer("transformer_2"),
        boundary_ratio=0.875,
    ).save_pretrained(path)
    return path


def build_wan22_i2v(path: Path) -> Path:
    """Wan 2.2 I2V-A14B: no image encoder."""
    diffusers.WanImageToVideoPipeline(
        **_texts(tokens(path.parent / "tokenizers")),
        vae=vae_z16(),
        scheduler=schedule(),
        transformer=transformer("transformer", in_channels=36),
        transformer_2=transformer("transformer_2", in_channels=36),
        boundary_ratio=0.9,
    ).save_pretrained(path)
    return path


def build_wan22_ti2v(path: Path) -> Path:
    """Wan 2.2 TI2V-5B: a picture may stand in for the first frame."""
    diffusers.WanPipeline(
        **_texts(tokens(path.parent / "tokenizers")),
        vae=vae_z48(),
        scheduler=schedule(5.0),
        transformer=transformer("transformer", in_channels=48, out_channels=48),
        expand_timesteps=True,
    ).save_pretrained(path)
    return path
