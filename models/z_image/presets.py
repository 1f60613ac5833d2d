"""Component configs and defaults of the published checkpoints, for dummy weights at true size."""

from __future__ import annotations

from sgl_diffusion.models.family import Defaults, Preset

MANY_STEPS = Defaults(num_inference_steps=50, guidance_scale=5.0, height=1024, width=1024, max_sequence_length=512)
FEW_STEPS = Defaults(num_inference_steps=8, guidance_scale=0.0, height=1024, width=1024, max_sequence_length=512)

_TRANSFORMER = {
    "_class_name": "ZImageTransformer2DModel",
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
_VAE = {  # FLUX.1's
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_QWEN3_4B = {
    "architectures": ["Qwen3Model"],
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
    "attention_dropout": 0.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def _preset(shift: float, defaults: Defaults) -> Preset:
    return Preset(
        components={
            "transformer": _TRANSFORMER,
            "vae": _VAE,
            "text_encoder": _QWEN3_4B,
            "scheduler": {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": 1000,
                "shift": shift,
                "use_dynamic_shifting": False,
            },
        },
        defaults=defaults,
        pipeline_class="ZImagePipeline",
    )


PRESETS = {
    "Tongyi-MAI/Z-Image": _preset(6.0, MANY_STEPS),
    "Tongyi-MAI/Z-Image-Turbo": _preset(3.0, FEW_STEPS),
}
