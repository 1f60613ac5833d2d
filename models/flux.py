"""FLUX.1 (Black Forest Labs 2024): a rectified-flow transformer over text and image tokens.

Double blocks keep separate weights for the two streams and attend jointly; single blocks run the joined stream with
attention and MLP in parallel. Checkpoint layout and maths follow diffusers' `FluxPipeline` / `FluxTransformer2DModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgl_diffusion.kernels.gate_residual import gate_residual
from sgl_diffusion.kernels.gelu import gelu_tanh
from sgl_diffusion.kernels.norm_modulate import norm_modulate
from sgl_diffusion.kernels.qk_norm_rope import qk_norm_rope
from sgl_diffusion.models.config import demand, read_config
from sgl_diffusion.models.family import (
    AttentionFn,
    Condition,
    Defaults,
    Guidance,
    Predict,
    Preset,
    Size,
)
from sgl_diffusion.models.layers import RMSNormWeight, TimestepEmbedding, rotary_table, sinusoid
from sgl_diffusion.models.text import clip_pooled, t5_hidden
from sgl_diffusion.models.vae_kl import AutoencoderKL, VaeConfig

# B batch  T text tokens  I image tokens  L = T + I  H heads  K head dim  D = H * K width  P = K / 2 rotary pairs
MLP_RATIO = 4
TIMESTEPS = 1000  # the transformer sees sigma in thousandths
ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class FluxConfig:
    """`transformer/config.json`."""

    in_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool
    patch_size: int = 1
    out_channels: int | None = None
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


# -- transformer ----------------------------------------------------------------


@dataclass(frozen=True)
class Rotary:
    """fp32 tables (L, P) for the joint sequence, text first."""

    cos: Tensor
    sin: Tensor

    def part(self, rows: slice) -> tuple[Tensor, Tensor]:
        return self.cos[rows], self.sin[rows]


class JointQKV:
    """Q, K and V of the joint sequence (B, L, H, K): each stream writes its own rows, so nothing is concatenated."""

    def __init__(self, like: Tensor, length: int, heads: int, head_dim: int) -> None:
        shape = (3, like.shape[0], length, heads, head_dim)
        self.q, self.k, self.v = torch.empty(shape, dtype=like.dtype, device=like.device)

    def write(self, rows: slice, qkv: Tensor, q_norm: RMSNormWeight, k_norm: RMSNormWeight, rotary: Rotary) -> None:
        """Normalises, rotates and places a stream's packed projection (B, rows, 3 * D)."""
        B, n = qkv.shape[:2]
        cos, sin = rotary.part(rows)
        qk_norm_rope(
            qkv.view(B, n, 3, *self.q.shape[2:]), q_norm.weight, k_norm.weight, cos, sin,
            self.q[:, rows], self.k[:, rows], self.v[:, rows],
        )  # fmt: skip


class Modulation(nn.Module):
    """`AdaLayerNormZero`: SiLU and a linear layer give (shift, scale, gate) sets of width D."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, parts * width)
        self.parts = parts

    def forward(self, embedding_BD: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(embedding_BD)).chunk(self.parts, dim=-1)


class FeedForward(nn.Module):
    """D -> 4 D -> D with a tanh GELU; names as `FeedForward.net` of diffusers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        up, down = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)
        self.net = nn.ModuleList([nn.ModuleDict({"proj": up}), nn.Identity(), down])

    def forward(self, x: Tensor) -> Tensor:
        up, down = cast(nn.ModuleDict, self.net[0]), self.net[2]
        hidden = up["proj"](x)
        return down(gelu_tanh(hidden, out=hidden))


class DoubleAttention(nn.Module):
    """Weights of the joint attention of a double block (`FluxAttention` with added projections)."""

    packed = {
        "to_qkv": {"to_q": 1, "to_k": 1, "to_v": 1},
        "add_qkv_proj": {"add_q_proj": 1, "add_k_proj": 1, "add_v_proj": 1},
    }

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        D, K = config.width, config.attention_head_dim
        self.to_qkv, self.add_qkv_proj = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D)
        self.norm_q, self.norm_k = RMSNormWeight(K), RMSNormWeight(K)
        self.norm_added_q, self.norm_added_k = RMSNormWeight(K), RMSNormWeight(K)
        self.to_out = nn.ModuleList([nn.Linear(D, D)])
        self.to_add_out = nn.Linear(D, D)


class DoubleBlock(nn.Module):
    def __init__(self, config: FluxConfig, attention: AttentionFn) -> None:
        super().__init__()
        D = config.width
        self.heads, self.head_dim, self.attention = (
            config.num_attention_heads,
            config.attention_head_dim,
            attention,
        )
        self.norm1, self.norm1_context = Modulation(D, 6), Modulation(D, 6)
        self.attn = DoubleAttention(config)
        self.ff, self.ff_context = FeedForward(D), FeedForward(D)

    def forward(
        self, image_BID: Tensor, text_BTD: Tensor, embedding_BD: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        i_shift, i_scale, i_gate, i_shift2, i_scale2, i_gate2 = self.norm1(embedding_BD)
        t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = self.norm1_context(embedding_BD)
        T, L = text_BTD.shape[1], text_BTD.shape[1] + image_BID.shape[1]
        text_rows, image_rows = slice(0, T), slice(T, L)

        a = self.attn
        joint = JointQKV(image_BID, L, self.heads, self.head_dim)
        joint.write(
            text_rows,
            a.add_qkv_proj(norm_modulate(text_BTD, t_scale, t_shift)),
            a.norm_added_q,
            a.norm_added_k,
            rotary,
        )
        joint.write(
            image_rows,
            a.to_qkv(norm_modulate(image_BID, i_scale, i_shift)),
            a.norm_q,
            a.norm_k,
            rotary,
        )
        mixed_BLD = self.attention(joint.q, joint.k, joint.v).flatten(2)

        image_BID = gate_residual(image_BID, a.to_out[0](mixed_BLD[:, image_rows]), i_gate)
        text_BTD = gate_residual(text_BTD, a.to_add_out(mixed_BLD[:, text_rows]), t_gate)
        image_BID = gate_residual(image_BID, self.ff(norm_modulate(image_BID, i_scale2, i_shift2)), i_gate2)
        text_BTD = gate_residual(text_BTD, self.ff_context(norm_modulate(text_BTD, t_scale2, t_shift2)), t_gate2)
        return image_BID, _clip_half(text_BTD)


class SingleAttention(nn.Module):
    """Weights of a single block's attention, with the MLP's first layer in the same GEMM."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.to_qkv_mlp = nn.Linear(width, (3 + MLP_RATIO) * width)
        self.norm_q, self.norm_k = RMSNormWeight(head_dim), RMSNormWeight(head_dim)


class SingleBlock(nn.Module):
    """One GEMM in (Q, K, V and MLP), one GEMM out over [attention, GELU(MLP)] written side by side."""

    packed = {"attn.to_qkv_mlp": {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": MLP_RATIO}}

    def __init__(self, config: FluxConfig, attention: AttentionFn) -> None:
        super().__init__()
        D, K = config.width, config.attention_head_dim
        self.heads, self.head_dim, self.attention = config.num_attention_heads, K, attention
        self.norm = Modulation(D, 3)
        self.attn = SingleAttention(D, K)
        self.proj_out = nn.Linear((1 + MLP_RATIO) * D, D)

    def forward(self, joint_BLD: Tensor, embedding_BD: Tensor, rotary: Rotary) -> Tensor:
        shift, scale, gate = self.norm(embedding_BD)
        B, L, D = joint_BLD.shape
        projected = self.attn.to_qkv_mlp(norm_modulate(joint_BLD, scale, shift))
        qkv, mlp = projected[..., : 3 * D], projected[..., 3 * D :]

        joint = JointQKV(joint_BLD, L, self.heads, self.head_dim)
        joint.write(slice(0, L), qkv, self.attn.norm_q, self.attn.norm_k, rotary)
        mixed = joint_BLD.new_empty(B, L, (1 + MLP_RATIO) * D)
        self.attention(joint.q, joint.k, joint.v, out=mixed[..., :D].view(B, L, self.heads, self.head_dim))
        gelu_tanh(mlp, out=mixed[..., D:])
        return _clip_half(gate_residual(joint_BLD, self.proj_out(mixed), gate))


def _clip_half(x: Tensor) -> Tensor:
    """fp16 activations saturate instead of overflowing, as in diffusers."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


class TimeTextEmbedding(nn.Module):
    """`CombinedTimestep(Guidance)TextProjEmbeddings`: the vector every modulation is computed from."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        D = config.width
        self.timestep_embedder = TimestepEmbedding(256, D)
        if config.guidance_embeds:
            self.guidance_embedder = TimestepEmbedding(256, D)
        self.text_embedder = TimestepEmbedding(config.pooled_projection_dim, D)

    def forward(self, t_B: Tensor, guidance_B: Tensor | None, pooled_BC: Tensor) -> Tensor:
        embedding = self.timestep_embedder(sinusoid(t_B).to(pooled_BC.dtype))
        if guidance_B is not None:
            embedding = embedding + self.guidance_embedder(sinusoid(guidance_B).to(pooled_BC.dtype))
        return embedding + self.text_embedder(pooled_BC)


class FluxTransformer(nn.Module):
    """`FluxTransformer2DModel`."""

    def __init__(self, config: FluxConfig, attention: AttentionFn) -> None:
        super().__init__()
        demand(config, patch_size=1)
        D, self.config = config.width, config
        self.time_text_embed = TimeTextEmbedding(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, D)
        self.x_embedder = nn.Linear(config.in_channels, D)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config, attention) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(config, attention) for _ in range(config.num_single_layers)
        )
        self.norm_out = Modulation(D, 2)
        self.proj_out = nn.Linear(D, config.out_channels or config.in_channels)

    def rotary(self, text_tokens: int, rows: int, columns: int, device: torch.device) -> Rotary:
        """Three axes: text tokens stand at (0, 0, 0), image tokens at (0, row, column)."""
        grid = torch.zeros(rows, columns, 3)
        grid[..., 1] = torch.arange(rows)[:, None]
        grid[..., 2] = torch.arange(columns)[None]
        ids = torch.cat([torch.zeros(text_tokens, 3), grid.reshape(-1, 3)])
        tables = [rotary_table(ids[:, i], width, ROPE_THETA) for i, width in enumerate(self.config.axes_dims_rope)]
        cos, sin = (torch.cat(t, dim=-1).to(device) for t in zip(*tables, strict=True))
        return Rotary(cos, sin)

    def forward(
        self,
        x_BIC: Tensor,
        t_B: Tensor,
        guidance_B: Tensor | None,
        text_BTC: Tensor,
        pooled_BC: Tensor,
        rotary: Rotary,
    ) -> Tensor:
        """Velocity (B, I, C) at time t and embedded guidance, both in thousandths and in the dtype of x."""
        image = self.x_embedder(x_BIC)
        text = self.context_embedder(text_BTC)
        embedding = self.time_text_embed(t_B, guidance_B, pooled_BC)
        for block in self.transformer_blocks:
            image, text = block(image, text, embedding, rotary)
        T = text.shape[1]
        joint = torch.cat([text, image], dim=1)
        for block in self.single_transformer_blocks:
            joint = block(joint, embedding, rotary)
        scale, shift = self.norm_out(embedding)
        return self.proj_out(norm_modulate(joint[:, T:], scale, shift))


# -- pipeline -------------------------------------------------------------------


class Flux1:
    """`FluxPipeline`: CLIP gives the pooled vector, T5 the token sequence; latents are packed 2x2 into tokens."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = parts
        self.transformer: FluxTransformer = parts["transformer"]
        self.vae: AutoencoderKL = parts["vae"]
        self.patch = 2 * self.vae.config.downsampling  # pixels a token covers per side

    @classmethod
    def components(cls) -> Mapping[str, str]:
        return {
            "transformer": "denoiser",
            "vae": "vae",
            "text_encoder": "text_encoder",
            "text_encoder_2": "text_encoder",
            "tokenizer": "tokenizer",
            "tokenizer_2": "tokenizer",
            "scheduler": "scheduler",
        }

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        return PRESETS

    @classmethod
    def build(
        cls,
        component: str,
        config: Mapping[str, Any],
        attention: AttentionFn,
        options: Mapping[str, Any],
    ) -> nn.Module:
        if component == "transformer":
            return FluxTransformer(read_config(FluxConfig, config), attention)
        return AutoencoderKL(VaeConfig.read(config), attention, **options)

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        return DEV_DEFAULTS if configs["transformer"].get("guidance_embeds") else SCHNELL_DEFAULTS

    def check(self, size: Size, guidance: Guidance, max_sequence_length: int) -> None:
        for name, pixels in (("height", size.height), ("width", size.width)):
            if pixels % self.patch:
                down, up = (
                    pixels // self.patch * self.patch,
                    (pixels // self.patch + 1) * self.patch,
                )
                nearest = f"{down} or {up}" if down else str(up)
                raise ValueError(f"{name}={pixels}: must be a multiple of {self.patch}; nearest: {nearest}")
        if max_sequence_length > 512:
            raise ValueError(f"max_sequence_length={max_sequence_length}: at most 512")
        if not self.transformer.config.guidance_embeds and guidance.embedded not in (
            None,
            0.0,
            1.0,
        ):
            raise ValueError(
                f"guidance_scale={guidance.embedded}: this checkpoint has no guidance embedding; "
                "leave it out, or use negative_prompt with true_cfg_scale"
            )

    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> Condition:
        p = self.parts
        return Condition(
            {
                "pooled_projections": clip_pooled(p["tokenizer"], p["text_encoder"], prompts),
                "encoder_hidden_states": t5_hidden(p["tokenizer_2"], p["text_encoder_2"], prompts, max_sequence_length),
            }
        )

    def image_tokens(self, size: Size) -> int:
        return (size.height // self.patch) * (size.width // self.patch)

    def noise(self, size: Size, generators: Sequence[torch.Generator]) -> Tensor:
        weight = self.transformer.x_embedder.weight
        f = self.vae.config.downsampling
        shape = (1, self.transformer.config.in_channels // 4, size.height // f, size.width // f)
        z = torch.cat([torch.randn(shape, generator=g, dtype=weight.dtype) for g in generators])
        return _pack(z).to(weight.device)

    def predictor(self, condition: Condition, size: Size, guidance: Guidance) -> Predict:
        text, pooled = (
            condition.tensors["encoder_hidden_states"],
            condition.tensors["pooled_projections"],
        )
        dtype, device = self.transformer.x_embedder.weight.dtype, text.device
        text, pooled = text.to(dtype), pooled.to(dtype)
        rows, columns = size.height // self.patch, size.width // self.patch
        rotary = self.transformer.rotary(text.shape[1], rows, columns, device)
        guidance_B = None
        if self.transformer.config.guidance_embeds:
            assert guidance.embedded is not None, "checkpoints with a guidance embedding have a default strength"
            strength = torch.full((len(text),), guidance.embedded, dtype=torch.float32)
            guidance_B = (strength.to(dtype) * TIMESTEPS).to(device)

        def predict(x: Tensor, sigma: float) -> Tensor:
            # the roundings of diffusers, step by step: thousandths in the model's dtype, down and up again
            t = torch.full((len(x),), sigma * TIMESTEPS, dtype=torch.float32).to(dtype)
            t_B = (t / TIMESTEPS * TIMESTEPS).to(device)
            return self.transformer(x, t_B, guidance_B, text, pooled, rotary)

        return predict

    def decode(self, x: Tensor, size: Size) -> Tensor:
        z = _unpack(x, size.height // self.patch, size.width // self.patch)
        config = self.vae.config
        z = z / config.scaling_factor + (config.shift_factor or 0.0)
        return self.vae.decode(z.to(self.vae.decoder.conv_in.weight.dtype))


def _pack(z_BCHW: Tensor) -> Tensor:
    """2x2 neighbours of the latent become one token; channels are the slowest index inside it."""
    B, C, H, W = z_BCHW.shape
    return z_BCHW.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, C * 4)


def _unpack(x_BIC: Tensor, rows: int, columns: int) -> Tensor:
    B, _, C = x_BIC.shape
    tiles = x_BIC.view(B, rows, columns, C // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(B, C // 4, 2 * rows, 2 * columns)


# -- presets: published configs, for dummy weights at true size -------------------

DEV_DEFAULTS = Defaults(num_inference_steps=50, guidance_scale=3.5, height=1024, width=1024, max_sequence_length=512)
SCHNELL_DEFAULTS = Defaults(
    num_inference_steps=4, guidance_scale=None, height=1024, width=1024, max_sequence_length=256
)

_TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}
_VAE = {
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
_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": True,
}
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def _preset(*, guided: bool) -> Preset:
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guided else {"shift": 1.0, "use_dynamic_shifting": False}
    return Preset(
        components={
            "transformer": {**_TRANSFORMER, "guidance_embeds": guided},
            "vae": _VAE,
            "text_encoder": _CLIP_L,
            "text_encoder_2": _T5_XXL,
            "scheduler": {**_SCHEDULER, **shift},
        },
        defaults=DEV_DEFAULTS if guided else SCHNELL_DEFAULTS,
    )


PRESETS = {
    "black-forest-labs/FLUX.1-dev": _preset(guided=True),
    "black-forest-labs/FLUX.1-schnell": _preset(guided=False),
}
