"""Component configs and defaults of the published checkpoints, for dummy weights at true size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sgl_diffusion.models.autoencoders.wan import LATENTS_MEAN, LATENTS_STD
from sgl_diffusion.models.family import SETTINGS, Defaults, Preset

# -- components -----------------------------------------------------------------------

_TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}
_1_3B = {**_TRANSFORMER, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_5B = {
    **_TRANSFORMER,
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
    "in_channels": 48,
    "out_channels": 48,
}
_14B = _TRANSFORMER
_14B_BESIDE = {**_14B, "in_channels": 36}
_14B_IMAGE = {**_14B_BESIDE, "image_dim": 1280, "added_kv_proj_dim": 5120}
_14B_IMAGES = {**_14B_IMAGE, "pos_embed_seq_len": 2 * 257}

_VAE = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "latents_mean": list(LATENTS_MEAN),
    "latents_std": list(LATENTS_STD),
}
_VAE_48 = {
    **_VAE,
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": [
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ],
    "latents_std": [
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ],
}  # fmt: skip
_UMT5_XXL = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_CLIP_H = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "model_type": "clip_vision_model",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
_CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
}
_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "solver_order": 2,
    "prediction_type": "flow_prediction",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "predict_x0": True,
    "solver_type": "bh2",
    "lower_order_final": True,
    "disable_corrector": [],
    "solver_p": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": True,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "final_sigmas_type": "zero",
    "rescale_betas_zero_snr": False,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}

# -- checkpoints ----------------------------------------------------------------------


def _defaults(
    height: int,
    width: int,
    *,
    steps: int = 50,
    guidance: float = 5.0,
    guidance_2: float | None = None,
    frames: int = 81,
    fps: int = 16,
) -> Defaults:
    return Defaults(
        num_inference_steps=steps,
        guidance_scale=guidance,
        guidance_scale_2=guidance_2,
        height=height,
        width=width,
        max_sequence_length=512,
        num_frames=frames,
        fps=fps,
    )


WAN21_480P, WAN21_720P = _defaults(480, 832), _defaults(720, 1280)


def _preset(
    *transformers: Mapping[str, Any],
    defaults: Defaults,
    flow_shift: float = 3.0,
    vae: Mapping[str, Any] = _VAE,
    boundary_ratio: float | None = None,
    expand_timesteps: bool = False,
) -> Preset:
    """Those with channels for a condition begin with a picture: `WanImageToVideoPipeline`."""
    first = transformers[0]
    looks: dict[str, Mapping[str, Any]] = (
        {"image_encoder": _CLIP_H, "image_processor": _CLIP_PROCESSOR} if first["image_dim"] else {}
    )
    return Preset(
        components={
            **dict(zip(("transformer", "transformer_2"), transformers, strict=False)),
            "vae": vae,
            "text_encoder": _UMT5_XXL,
            **looks,
            "scheduler": {**_SCHEDULER, "flow_shift": flow_shift},
            SETTINGS: {"boundary_ratio": boundary_ratio, "expand_timesteps": expand_timesteps},
        },
        defaults=defaults,
        pipeline_class="WanImageToVideoPipeline" if first["in_channels"] == 36 else "WanPipeline",
    )


PRESETS = {
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _preset(_14B, defaults=WAN21_720P),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _preset(_1_3B, defaults=WAN21_480P),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": _preset(_14B_IMAGE, defaults=WAN21_480P),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": _preset(_14B_IMAGE, defaults=WAN21_720P, flow_shift=5.0),
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": _preset(_14B_IMAGES, defaults=WAN21_720P, flow_shift=16.0),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _preset(
        _14B, _14B, defaults=_defaults(720, 1280, steps=40, guidance=4.0, guidance_2=3.0), boundary_ratio=0.875
    ),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _preset(
        _14B_BESIDE,
        _14B_BESIDE,
        defaults=_defaults(720, 1280, steps=40, guidance=3.5, guidance_2=3.5),
        boundary_ratio=0.9,
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _preset(
        _5B, defaults=_defaults(704, 1280, frames=121, fps=24), flow_shift=5.0, vae=_VAE_48, expand_timesteps=True
    ),
}
DISTILLED = {
    "FastVideo/FastWan2.1-T2V-1.3B-Diffusers": replace(
        _preset(_1_3B, defaults=_defaults(448, 832, steps=3, guidance=1.0, frames=61), flow_shift=8.0),
        pipeline_class="WanDMDPipeline",
    ),
}
