"""Qwen-Image (Alibaba 2025, arXiv 2508.02324): a rectified-flow transformer over text and image tokens.

All blocks are double: text and image keep separate weights and attend jointly. The timestep alone modulates them; the
text comes from a language model, token by token. Checkpoint layout and maths follow diffusers'
`QwenImageTransformer2DModel`. Text to image only: editing models see the pictures they edit as further image tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.kernels.embedding import patchify, timestep_embedding
from sgl_diffusion.kernels.norm import norm
from sgl_diffusion.models.config import demand, read_config
from sgl_diffusion.models.family import AttentionFn, Condition, Defaults, Guidance, Predictor, Preset, Size
from sgl_diffusion.models.layers import (
    FeedForward,
    JointAttention,
    Linear,
    Modulations,
    Residual,
    RMSNormWeight,
    Rotary,
    Rows,
    TimestepEmbedding,
    rotary_table,
)

# B batch  T text tokens  I image tokens  L = T + I  R = B * L rows  D width  P rotary pairs of a head
# S steps  N blocks  C channels of a token  Y, X rows and columns of image tokens
MLP_RATIO = 4
TIMESTEPS = 1000  # the sinusoid sees sigma in thousandths
ROPE_THETA = 10_000.0
SINUSOID_CHANNELS = 256
EPS = 1e-6  # of the norm of the text
PIXELS = 8  # that one step of the latent covers
PATCH = 2


@dataclass(frozen=True)
class QwenImageConfig:
    """`transformer/config.json`."""

    in_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    patch_size: int = PATCH
    out_channels: int | None = 16
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    zero_cond_t: bool = False
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> QwenImageConfig:
        """Refuses editing models that give the pictures they edit a timestep of their own, and layered models."""
        config = read_config(cls, raw)
        demand(
            config,
            patch_size=PATCH,
            # a velocity has the shape of the state
            out_channels=config.in_channels // PATCH**2,
            guidance_embeds=False,
            zero_cond_t=False,
            use_additional_t_cond=False,
            use_layer3d_rope=False,
        )
        return config

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


# -- transformer ----------------------------------------------------------------


@dataclass(frozen=True)
class Modulation:
    """Vectors of one step, which all samples share; those of the blocks for text, then for image."""

    block_N62D: Tensor  # shift, scale and gate of the attention, then of the feed-forward
    out_21D: Tensor  # scale, shift


class Block(nn.Module):
    """Text and image with weights of their own; every pass that treats rows alike runs over both at once."""

    def __init__(self, config: QwenImageConfig, attention: AttentionFn) -> None:
        super().__init__()
        D = config.width
        self.attn = JointAttention(D, config.attention_head_dim, attention)
        self.img_mlp, self.txt_mlp = FeedForward(D, MLP_RATIO * D), FeedForward(D, MLP_RATIO * D)

    def forward(self, stream: Residual, rows: Rows, vectors_62D: Tensor, rotary: Rotary) -> None:
        shift, scale, gate, shift2, scale2, gate2 = vectors_62D
        stream.add(self.attn(stream.norm(scale, shift, rows.group_R), rows, rotary), gate)
        normed_RD = stream.norm(scale2, shift2, rows.group_R)
        stream.add(rows.apply(self.txt_mlp, self.img_mlp, normed_RD), gate2)


class TimeEmbedding(nn.Module):
    """`QwenTimestepProjEmbeddings`: the vector every modulation is computed from."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(SINUSOID_CHANNELS, width)

    def forward(self, t_S: Tensor) -> Tensor:
        """(S, D), from timesteps of 0 to 1 in the model's dtype."""
        sinusoid = timestep_embedding(
            t_S, SINUSOID_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0.0, scale=TIMESTEPS
        )
        embedding_SD: Tensor = self.timestep_embedder(sinusoid.to(t_S.dtype))
        return embedding_SD


class QwenImageTransformer(nn.Module):
    """`QwenImageTransformer2DModel`."""

    before_first_step = ("txt_in", "time_text_embed", "modulation")

    def __init__(self, config: QwenImageConfig, attention: AttentionFn) -> None:
        super().__init__()
        D, N, self.config = config.width, config.num_layers, config
        self.time_text_embed = TimeEmbedding(D)
        self.txt_norm = RMSNormWeight(config.joint_attention_dim)
        self.txt_in = Linear(config.joint_attention_dim, D)
        self.img_in = Linear(config.in_channels, D)
        self.transformer_blocks = nn.ModuleList(Block(config, attention) for _ in range(N))
        parts: dict[str, int] = {}
        for i in range(N):
            parts |= {f"transformer_blocks.{i}.txt_mod.1": 6, f"transformer_blocks.{i}.img_mod.1": 6}
        parts |= {"norm_out.linear": 2}
        self.modulation = Modulations(D, parts)
        self.packed = self.modulation.packed_as("modulation")
        self.proj_out = Linear(D, config.in_channels)

    def rotary(self, text_tokens: int, rows: int, columns: int, device: torch.device) -> Rotary:
        """Three axes: image tokens stand at (0, row, column) with (0, 0, 0) in the middle of the picture.

        Text tokens stand on the diagonal, (i, i, i), and begin where the longer side ends: image tokens keep their
        places whatever the size of the picture, and no text token shares one.
        """
        image = torch.zeros(rows, columns, 3)
        image[..., 1] = (torch.arange(rows) - (rows + 1) // 2)[:, None]
        image[..., 2] = (torch.arange(columns) - (columns + 1) // 2)[None]
        text = (torch.arange(text_tokens) + max(rows // 2, columns // 2))[:, None].expand(-1, 3)
        places_L3 = torch.cat([text, image.flatten(0, 1)])
        axes = [rotary_table(places_L3[:, i], width, ROPE_THETA) for i, width in enumerate(self.config.axes_dims_rope)]
        cos, sin = (torch.cat(tables, dim=-1).to(device) for tables in zip(*axes, strict=True))
        return Rotary(cos, sin)

    def modulate(self, t_S: Tensor) -> list[Modulation]:
        """The vectors of every step; t_S as for `TimeEmbedding`."""
        vectors_SVD = self.modulation(self.time_text_embed(t_S))
        blocks, out_S2D = vectors_SVD.split([12 * self.config.num_layers, 2], dim=1)
        block_SN62D = blocks.unflatten(1, (-1, 2, 6)).transpose(2, 3)
        return [Modulation(*step) for step in zip(block_SN62D, out_S2D[:, :, None], strict=True)]

    def read(self, text_BTC: Tensor) -> Tensor:
        """The embedded text, (B, T, D)."""
        normed_BTC = norm(text_BTC, kind="rms", weight_D=self.txt_norm.weight, eps=EPS)
        context_BTD: Tensor = self.txt_in(normed_BTC)
        return context_BTD

    def forward(self, x_BIC: Tensor, modulation: Modulation, context_BTD: Tensor, rows: Rows, rotary: Rotary) -> Tensor:
        """Velocity, in the shape of the state, from the state and the embedded text."""
        x_RD = context_BTD.new_empty(len(rows.group_R), context_BTD.shape[-1])
        text, image = rows.split(x_RD)
        text.copy_(context_BTD)  # blocks add to it in place
        stream = Residual(x_RD)
        self.img_in(x_BIC, out=image)
        for block, vectors_62D in zip(self.transformer_blocks, modulation.block_N62D, strict=True):
            block(stream, rows, vectors_62D, rotary)
        scale, shift = modulation.out_21D
        velocity_BIC: Tensor = self.proj_out(rows.image_of(stream).norm(scale, shift))
        return velocity_BIC


# -- family -----------------------------------------------------------------------


class QwenImage:
    """`QwenImagePipeline`, as far as the denoiser goes; latents are packed 2x2 into tokens."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.transformer: QwenImageTransformer = parts["transformer"]

    @classmethod
    def components(cls) -> Mapping[str, str]:
        return {"transformer": "denoiser"}

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
        return QwenImageTransformer(QwenImageConfig.read(config), attention)

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        return DEFAULTS

    @classmethod
    def examples(cls, configs: Mapping[str, Mapping[str, Any]]) -> Sequence[Condition]:
        """A prompt is as long as it is, not padded to a fixed length."""
        shape = (1, EXAMPLE_TOKENS, configs["transformer"]["joint_attention_dim"])
        return [Condition({"encoder_hidden_states": torch.zeros(shape, dtype=torch.bfloat16)})]

    @classmethod
    def diffusers_inputs(
        cls, configs: Mapping[str, Mapping[str, Any]], condition: Condition, size: Size
    ) -> Mapping[str, Any]:
        rows, columns = _grid(size)
        shape = (1, rows * columns, configs["transformer"]["in_channels"])
        return {
            **condition.tensors,
            "hidden_states": torch.zeros(shape, dtype=torch.bfloat16),
            "timestep": torch.zeros(1, dtype=torch.bfloat16),
            "img_shapes": [[(1, rows, columns)]],
        }

    def noise(self, size: Size, generators: Sequence[torch.Generator]) -> Tensor:
        weight, (rows, columns) = self.transformer.proj_out.weight, _grid(size)
        shape = (1, self.transformer.config.in_channels // PATCH**2, PATCH * rows, PATCH * columns)
        z = torch.cat([torch.randn(shape, generator=g, dtype=weight.dtype) for g in generators])
        return patchify(z, (PATCH, PATCH)).to(weight.device)

    def predictor(
        self,
        condition: Condition,
        size: Size,
        guidance: Guidance,
        timesteps: Sequence[float],
        denoiser: str = "transformer",
    ) -> Predictor:
        """Every token of the condition is a token of a prompt: there is no mask for the end of a shorter one."""
        model, text = self.transformer, condition.tensors["encoder_hidden_states"]
        dtype, device = model.proj_out.weight.dtype, text.device
        rows, columns = _grid(size)
        B, T = text.shape[:2]
        rotary = model.rotary(T, rows, columns, device)
        # the timestep is the same for all samples, so each stream has one vector of a kind
        token_rows = Rows.of(B, T, rows * columns, 1, device)
        # the roundings of diffusers, step by step: thousandths in the model's dtype, and down again
        t_S = torch.tensor(timesteps).to(dtype) / TIMESTEPS
        return Predictor(model, (model.read(text.to(dtype)), token_rows, rotary), model.modulate(t_S.to(device)))


def _grid(size: Size) -> tuple[int, int]:
    """Rows and columns of image tokens."""
    return size.height // (PIXELS * PATCH), size.width // (PIXELS * PATCH)


# -- presets: published configs, for dummy weights at true size -------------------

EXAMPLE_TOKENS = 128
DEFAULTS = Defaults(num_inference_steps=50, guidance_scale=None, height=1024, width=1024, max_sequence_length=512)

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

PRESETS = {"Qwen/Qwen-Image": Preset({"transformer": _TRANSFORMER}, DEFAULTS, "QwenImagePipeline")}
