"""Component configs and defaults of the published checkpoints, for dummy weights at true size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_diffusion.models.autoencoders.wan import LATENTS_MEAN, LATENTS_STD
from sgl_diffusion.models.family import Defaults, Preset


def _defaults(steps: int) -> Defaults:
    """Guidance is what a negative prompt asks for."""
    return Defaults(
        num_inference_steps=steps,
        guidance_scale=None,
        height=1024,
        width=1024,
        max_sequence_length=512,
        true_cfg_scale=4.0,
    )


DRAWING, EDITING, EDITING_SEVERAL = _defaults(50), _defaults(50), _defaults(40)

# -- components -----------------------------------------------------------------------

_TRANSFORMER = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
_VAE = {
    "_class_name": "AutoencoderKLQwenImage",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": list(LATENTS_MEAN),
    "latents_std": list(LATENTS_STD),
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
_QWEN25_VL_7B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 28,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "hidden_act": "silu",
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 3136, "longest_edge": 12845056},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}

# -- checkpoints ----------------------------------------------------------------------


def _preset(pipeline_class: str, defaults: Defaults, *, looks: bool, **transformer: Any) -> Preset:
    processor: Mapping[str, Mapping[str, Any]] = {"processor": _PROCESSOR} if looks else {}
    return Preset(
        components={
            "transformer": {**_TRANSFORMER, **transformer},
            "vae": _VAE,
            "text_encoder": _QWEN25_VL_7B,
            **processor,
            "scheduler": _SCHEDULER,
        },
        defaults=defaults,
        pipeline_class=pipeline_class,
    )


DRAWING_PRESETS = {
    name: _preset("QwenImagePipeline", DRAWING, looks=False) for name in ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512")
}
EDITING_PRESETS = {
    "Qwen/Qwen-Image-Edit": _preset("QwenImageEditPipeline", EDITING, looks=True),
}
EDITING_SEVERAL_PRESETS = {
    "Qwen/Qwen-Image-Edit-2509": _preset("QwenImageEditPlusPipeline", EDITING_SEVERAL, looks=True),
    "Qwen/Qwen-Image-Edit-2511": _preset("QwenImageEditPlusPipeline", EDITING_SEVERAL, looks=True, zero_cond_t=True),
}
