"""Component configs and defaults of the published checkpoints, for dummy weights at true size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sgl_diffusion.models.family import SETTINGS, Defaults, Preset

DEV = Defaults(num_inference_steps=50, guidance_scale=4.0, height=1024, width=1024, max_sequence_length=512)
KLEIN = Defaults(num_inference_steps=4, guidance_scale=1.0, height=1024, width=1024, max_sequence_length=512)
KLEIN_BASE = DEV  # guided by a negative branch, with the same strength

_TRANSFORMER = {
    "_class_name": "Flux2Transformer2DModel",
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
    "eps": 1e-6,
    "guidance_embeds": True,
}
_4B = {
    **_TRANSFORMER,
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_9B = {
    **_TRANSFORMER,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
_VAE = {
    "_class_name": "AutoencoderKLFlux2",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "decoder_block_out_channels": None,
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 32,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "batch_norm_eps": 1e-4,
    "batch_norm_momentum": 0.1,
    "patch_size": [2, 2],
}
_MISTRAL_24B = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "image_token_index": 10,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "multimodal_projector_bias": False,
    "spatial_merge_size": 2,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000_000.0},
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "head_dim": 64,
        "num_channels": 3,
        "image_size": 1540,
        "patch_size": 14,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
_QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 36,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_QWEN3_8B = {**_QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}


def _klein(transformer: Mapping[str, Any], encoder: Mapping[str, Any], *, distilled: bool) -> Preset:
    components = {
        "transformer": transformer,
        "vae": _VAE,
        "text_encoder": encoder,
        "scheduler": _SCHEDULER,
        SETTINGS: {"is_distilled": distilled},
    }
    return Preset(components, KLEIN if distilled else KLEIN_BASE, "Flux2KleinPipeline")


DEV_PRESETS = {
    "black-forest-labs/FLUX.2-dev": Preset(
        {"transformer": _TRANSFORMER, "vae": _VAE, "text_encoder": _MISTRAL_24B, "scheduler": _SCHEDULER},
        DEV,
        "Flux2Pipeline",
    )
}
KLEIN_PRESETS = {
    "black-forest-labs/FLUX.2-klein-4B": _klein(_4B, _QWEN3_4B, distilled=True),
    "black-forest-labs/FLUX.2-klein-9B": _klein(_9B, _QWEN3_8B, distilled=True),
    "black-forest-labs/FLUX.2-klein-base-4B": _klein(_4B, _QWEN3_4B, distilled=False),
    "black-forest-labs/FLUX.2-klein-base-9B": _klein(_9B, _QWEN3_8B, distilled=False),
}
