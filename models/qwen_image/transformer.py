"""Qwen-Image (Alibaba 2025, arXiv 2508.02324): a rectified-flow transformer over text and image tokens.

All blocks are double: text and image keep separate weights and attend jointly. The timestep alone modulates them; the
text comes from a language model, token by token. Editing models see the pictures they edit as further image tokens,
of which nothing is drawn. Checkpoint layout and maths follow diffusers' `QwenImageTransformer2DModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.kernels.embedding import timestep_embedding
from sgl_diffusion.kernels.norm import norm
from sgl_diffusion.models.config import demand, read_config
from sgl_diffusion.models.family import ONE_RANK, AttentionFn, Split
from sgl_diffusion.models.layers import (
    FeedForward,
    JointAttention,
    Linear,
    Modulations,
    Residual,
    RMSNormWeight,
    Rotary,
    Rows,
    Sequenced,
    TimestepEmbedding,
    rotary_table,
)

# B batch  T text tokens  I image tokens, drawn and given  L = T + I  R = B * L rows  D width  P rotary pairs of a head
# S steps  N blocks  C channels of a token  G groups of rows with one modulation: text, drawn, given if they differ
MLP_RATIO = 4
TIMESTEPS = 1000  # the sinusoid sees sigma in thousandths
ROPE_THETA = 10_000.0
SINUSOID_CHANNELS = 256
EPS = 1e-6  # of the norm of the text
PATCH = 2  # latents per side that a token covers

Grid = tuple[int, int]  # rows and columns of image tokens


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
    zero_cond_t: bool = False  # given pictures have no noise at any timestep
    use_additional_t_cond: bool = False
    use_layer3d_rope: bool = False

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> QwenImageConfig:
        """Refuses guidance that is fed to the model, which diffusers cannot run either, and layered models."""
        config = read_config(cls, raw)
        demand(
            config,
            patch_size=PATCH,
            # a velocity has the shape of the state
            out_channels=config.in_channels // PATCH**2,
            guidance_embeds=False,
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
    """Vectors of one step, which all samples share; those of the blocks for every group of rows."""

    block_N6GD: Tensor  # shift, scale and gate of the attention, then of the feed-forward
    out_21D: Tensor  # scale, shift


class Block(nn.Module):
    """Text and image with weights of their own; every pass that treats rows alike runs over both at once."""

    def __init__(self, config: QwenImageConfig, attention: AttentionFn, split: Split) -> None:
        super().__init__()
        D = config.width
        self.attn = JointAttention(D, config.attention_head_dim, attention, split=split)
        self.img_mlp, self.txt_mlp = FeedForward(D, MLP_RATIO * D), FeedForward(D, MLP_RATIO * D)

    def forward(self, stream: Residual, rows: Rows, vectors_6GD: Tensor, rotary: Rotary) -> None:
        shift, scale, gate, shift2, scale2, gate2 = vectors_6GD
        normed_RD = stream.norm(scale, shift, rows.group_R, into=self.attn.first)
        stream.add(self.attn(normed_RD, rows, rotary), gate)
        normed_RD = stream.norm(scale2, shift2, rows.group_R, into=(self.txt_mlp.up, self.img_mlp.up))
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

    def __init__(self, config: QwenImageConfig, attention: AttentionFn, split: Split = ONE_RANK) -> None:
        super().__init__()
        D, N, self.config, self.split = config.width, config.num_layers, config, split
        self.time_text_embed = TimeEmbedding(D)
        self.txt_norm = RMSNormWeight(config.joint_attention_dim)
        self.txt_in = Linear(config.joint_attention_dim, D)
        self.img_in = Linear(config.in_channels, D)
        self.transformer_blocks = nn.ModuleList(Block(config, attention, split) for _ in range(N))
        parts: dict[str, int] = {}
        for i in range(N):
            parts |= {f"transformer_blocks.{i}.txt_mod.1": 6, f"transformer_blocks.{i}.img_mod.1": 6}
        parts |= {"norm_out.linear": 2}
        self.modulation = Modulations(D, parts)
        self.packed = self.modulation.packed_as("modulation")
        self.proj_out = Linear(D, config.in_channels)

    def rotary(self, sequence: Sequenced, grids: Sequence[Grid], device: torch.device) -> Rotary:
        """Three axes: image tokens stand at (picture, row, column) with (0, 0) in the middle of each picture.

        Text tokens stand on the diagonal, (i, i, i), and begin where the longest side ends: image tokens keep their
        places whatever the size of the picture, and no text token shares one.

        Args:
            grids: of the picture that is drawn, then of those that are given.
        """
        images = []
        for picture, (rows, columns) in enumerate(grids):
            image = torch.full((rows, columns, 3), float(picture))
            image[..., 1] = (torch.arange(rows) - (rows + 1) // 2)[:, None]
            image[..., 2] = (torch.arange(columns) - (columns + 1) // 2)[None]
            images.append(image.flatten(0, 1))
        first = max(side // 2 for grid in grids for side in grid)
        text = (torch.arange(sequence.streams[0]) + first)[:, None].expand(-1, 3)
        places_L3 = sequence.here(torch.cat([text, *images]))
        axes = [rotary_table(places_L3[:, i], width, ROPE_THETA) for i, width in enumerate(self.config.axes_dims_rope)]
        cos, sin = (torch.cat(tables, dim=-1).to(device) for tables in zip(*axes, strict=True))
        return Rotary(cos, sin)

    def rows(self, batch: int, sequence: Sequenced, device: torch.device) -> Rows:
        """Where the tokens of a text, of what is drawn and of what is given stand, and which vectors they have."""
        rows = Rows.of(batch, sequence, 1, device)
        text, drawn, *others = sequence.counts
        given = sum(others)
        if len(sequence.streams) < 3 or not self.config.zero_cond_t:
            return rows
        image = torch.tensor([1] * drawn + [2] * given, dtype=torch.int32).repeat(batch)
        return replace(rows, group_R=torch.cat([image.new_zeros(batch * text), image]).to(device))

    def modulate(self, t_S: Tensor, *, given: bool) -> list[Modulation]:
        """The vectors of every step.

        Args:
            t_S: as for `TimeEmbedding`.
            given: there are pictures beside the one that is drawn.
        """
        apart = given and self.config.zero_cond_t
        t = torch.cat([t_S, torch.zeros_like(t_S[:1])]) if apart else t_S
        vectors_SVD = self.modulation(self.time_text_embed(t))
        blocks, out_S2D = vectors_SVD.split([12 * self.config.num_layers, 2], dim=1)
        block_SN6GD = blocks.unflatten(1, (-1, 2, 6)).transpose(2, 3)
        if apart:
            clean = block_SN6GD[-1:, :, :, 1:].expand(len(t_S), -1, -1, -1, -1)
            block_SN6GD = torch.cat([block_SN6GD[:-1], clean], dim=3)
        return [Modulation(*step) for step in zip(block_SN6GD, out_S2D[: len(t_S), :, None], strict=True)]

    def read(self, text_BTC: Tensor) -> Tensor:
        """The embedded text, (B, T, D)."""
        normed_BTC = norm(text_BTC, kind="rms", weight_D=self.txt_norm.weight, eps=EPS)
        context_BTD: Tensor = self.txt_in(normed_BTC)
        return context_BTD

    def forward(
        self,
        x: Tensor,
        modulation: Modulation,
        context_BTD: Tensor,
        given: Tensor | None,
        rows: Rows,
        rotary: Rotary,
    ) -> Tensor:
        """Velocity, in the shape of the state.

        Args:
            x: the state, (B, drawn tokens, C).
            context_BTD: the embedded text.
            given: (B, given tokens, C), of the pictures beside it. Of both, only what is computed here.
        """
        tokens = x.shape[1]
        x = x[:, self.split.own(tokens)]
        x_RD = context_BTD.new_empty(len(rows.group_R), context_BTD.shape[-1])
        text, image = rows.split(x_RD)
        text.copy_(context_BTD)  # blocks add to it in place
        self.img_in(x if given is None else torch.cat([x, given], dim=1), out=image)
        stream = Residual(x_RD)
        for block, vectors_6GD in zip(self.transformer_blocks, modulation.block_N6GD, strict=True):
            block(stream, rows, vectors_6GD, rotary)
        scale, shift = modulation.out_21D
        velocity: Tensor = self.proj_out(rows.image_of(stream, x.shape[1]).norm(scale, shift))
        return self.split.whole(velocity, tokens)
