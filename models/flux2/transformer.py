"""`Flux2Transformer2DModel`: a rectified-flow transformer over the tokens of text, of a picture and of given pictures.

As in FLUX.1, double blocks keep separate weights for text and image and attend jointly, and single blocks run the
joined stream with attention and MLP in parallel. What is different: no layer has a bias, MLPs are SwiGLUs, and all
blocks of a kind share one modulation, so that a step needs 17 vectors. Checkpoint layout and maths follow diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sgl_diffusion.kernels.embedding import timestep_embedding
from sgl_diffusion.kernels.qk_norm_rope import Stream, qk_norm_rope
from sgl_diffusion.models.config import ConfigError, demand, read_config
from sgl_diffusion.models.family import ONE_RANK, AttentionFn, Split, inputs, outputs
from sgl_diffusion.models.layers import (
    ALL_FORMATS,
    Codes,
    JointAttention,
    Linear,
    Modulations,
    Residual,
    RMSNormWeight,
    Rotary,
    Rows,
    Sequenced,
    TimestepEmbedding,
    attend_at,
    code_place,
    rotary_table,
    swiglu,
    swiglu_at,
)

# B batch  T text tokens  I tokens that are drawn  J tokens of given pictures  L = T + I + J  R = B * L rows
# H heads  K head dim  D = H * K width  M width of the MLP  S steps
# G groups of rows with one modulation: the text's and the image's
EPS = 1e-6
AXES = 4  # a token's place: picture, row, column, and number in the text


@dataclass(frozen=True)
class Flux2Config:
    """`transformer/config.json`."""

    in_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    patch_size: int = 1
    out_channels: int | None = None
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: int = 2000
    eps: float = EPS
    guidance_embeds: bool = True

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Flux2Config:
        config = read_config(cls, raw)
        demand(config, patch_size=1, eps=EPS)
        if config.out_channels is not None:
            demand(config, out_channels=config.in_channels)
        if len(config.axes_dims_rope) != AXES or sum(config.axes_dims_rope) != config.attention_head_dim:
            wanted = f"{AXES} numbers whose sum is attention_head_dim={config.attention_head_dim}"
            raise ConfigError(f"config key axes_dims_rope={list(config.axes_dims_rope)}: expected {wanted}")
        return config

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)


# -- what is computed before the first step -----------------------------------------


@dataclass(frozen=True)
class Modulation:
    """Vectors of one step, which all samples and all blocks of a kind share."""

    double_62D: Tensor  # shift, scale and gate of the attention, then of the MLP; of text, then of image
    single_31D: Tensor  # shift, scale, gate
    out_21D: Tensor  # scale, shift


@dataclass(frozen=True)
class Request:
    """What a request fixes."""

    context_BTD: Tensor  # the embedded text; here and below, the tokens that are this rank's own
    given_BJD: Tensor | None  # embedded tokens of given pictures
    rows: Rows  # of text, and of image: what is drawn, then what is given
    rotary: Rotary


class TimeGuidanceEmbedding(nn.Module):
    """`Flux2TimestepGuidanceEmbeddings`: the vector every modulation is computed from."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.channels = config.timestep_guidance_channels
        self.timestep_embedder = TimestepEmbedding(self.channels, config.width, bias=False)
        if config.guidance_embeds:
            self.guidance_embedder = TimestepEmbedding(self.channels, config.width, bias=False)

    def forward(self, t_S: Tensor, guidance: Tensor | None) -> Tensor:
        """(S, D)."""
        embedding = self.timestep_embedder(self.sinusoid(t_S))
        if guidance is not None:
            embedding = embedding + self.guidance_embedder(self.sinusoid(guidance))
        return cast(Tensor, embedding)

    def sinusoid(self, t: Tensor) -> Tensor:
        return timestep_embedding(t, self.channels, flip_sin_to_cos=True, downscale_freq_shift=0.0).to(t.dtype)


# -- blocks -------------------------------------------------------------------------


class FeedForward(nn.Module):
    """Two linear layers with a SwiGLU between them (`Flux2FeedForward`); the first gives both of its factors."""

    tensor_parallel = {"linear_in": outputs(1, 1), "linear_out": inputs()}

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_in = Linear(width, 2 * hidden, bias=False)
        self.linear_out = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor | Codes, out: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.linear_out(swiglu(self.linear_in, x, self.linear_out), out=out))


class DoubleBlock(nn.Module):
    """Text and image with weights of their own; every pass that treats rows alike runs over both at once."""

    def __init__(self, config: Flux2Config, attention: AttentionFn, split: Split) -> None:
        super().__init__()
        D, M = config.width, config.mlp_width
        self.attn = JointAttention(D, config.attention_head_dim, attention, bias=False, split=split)
        self.ff, self.ff_context = FeedForward(D, M), FeedForward(D, M)

    def forward(self, stream: Residual, rows: Rows, vectors_62D: Tensor, rotary: Rotary) -> None:
        shift, scale, gate, shift2, scale2, gate2 = vectors_62D
        normed_RD = stream.norm(scale, shift, rows.group_R, into=self.attn.first)
        stream.add(self.attn(normed_RD, rows, rotary), gate)
        normed_RD = stream.norm(scale2, shift2, rows.group_R, into=(self.ff_context.linear_in, self.ff.linear_in))
        stream.add(rows.apply(self.ff_context, self.ff, normed_RD), gate2)


class ParallelAttention(nn.Module):
    """Attention and MLP of a single block: one GEMM in, and one out over [attention, MLP] written side by side."""

    def __init__(self, config: Flux2Config, attention: AttentionFn, split: Split) -> None:
        super().__init__()
        D, K, M = config.width, config.attention_head_dim, config.mlp_width
        self.head_dim, self.attention, self.split = K, attention, split
        self.tensor_parallel = {"to_qkv_mlp_proj": outputs(D, D, D, M, M), "to_out": inputs(D, M)}
        self.to_qkv_mlp_proj = Linear(D, 3 * D + 2 * M, bias=False)
        self.norm_q, self.norm_k = RMSNormWeight(K), RMSNormWeight(K)
        self.to_out = Linear(D + M, D, bias=False)

    def forward(self, x_BLD: Tensor | Codes, rows: Rows, rotary: Rotary) -> Tensor:
        B, L, _ = x_BLD.shape
        both = self.to_out.in_features  # D + M, of which ranks may share each
        D = self.to_qkv_mlp_proj.out_features - 2 * both  # of the heads that are here
        mixed: Any = code_place(self.to_out, x_BLD, D, both - D, writes=ALL_FORMATS)
        mixed = x_BLD.new_empty(B, L, both) if mixed is None else mixed
        seen, mlp = mixed.split((D, both - D), dim=-1)
        qkv = swiglu_at(mlp, self.to_qkv_mlp_proj, x_BLD, 3 * D).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = qkv.unbind(2)
        stream = Stream(qkv, self.norm_q.weight, self.norm_k.weight)
        qk_norm_rope([stream], rotary.cos, rotary.sin, q, k, None, eps=EPS)
        attend_at(seen, self.split, self.attention, q, k, v, rows.streams, rows.replicated)
        return cast(Tensor, self.to_out(mixed))


class SingleBlock(nn.Module):
    """One norm before attention and MLP, one gate after both."""

    def __init__(self, config: Flux2Config, attention: AttentionFn, split: Split) -> None:
        super().__init__()
        self.attn = ParallelAttention(config, attention, split)

    def forward(self, stream: Residual, vectors_31D: Tensor, rows: Rows, rotary: Rotary) -> None:
        shift, scale, gate = vectors_31D
        normed_BLD = stream.norm(scale, shift, into=(self.attn.to_qkv_mlp_proj,))
        stream.add(self.attn(normed_BLD, rows, rotary), gate)


class Flux2Transformer(nn.Module):
    """`Flux2Transformer2DModel`."""

    before_first_step = ("context_embedder", "time_guidance_embed", "modulation")

    def __init__(self, config: Flux2Config, attention: AttentionFn, split: Split = ONE_RANK) -> None:
        super().__init__()
        D, self.config, self.split = config.width, config, split
        self.time_guidance_embed = TimeGuidanceEmbedding(config)
        self.context_embedder = Linear(config.joint_attention_dim, D, bias=False)
        self.x_embedder = Linear(config.in_channels, D, bias=False)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config, attention, split) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(config, attention, split) for _ in range(config.num_single_layers)
        )
        layers = {
            "double_stream_modulation_txt.linear": 6,
            "double_stream_modulation_img.linear": 6,
            "single_stream_modulation.linear": 3,
            "norm_out.linear": 2,
        }
        self.modulation = Modulations(D, layers, bias=False)
        self.packed = self.modulation.packed_as("modulation")
        self.proj_out = Linear(D, config.in_channels, bias=False)

    def prepare(self, text_BTC: Tensor, drawn_I4: Tensor, given_BJC: Tensor | None, given_J4: Tensor | None) -> Request:
        """Everything that the prompt and given pictures decide.

        Args:
            text_BTC: (B, T, joint_attention_dim), of the text encoder.
            drawn_I4: places of the tokens that are drawn, see `AXES`.
            given_BJC, given_J4: tokens of given pictures and their places; None without.
        """
        dtype, device, (B, T) = self.proj_out.weight.dtype, text_BTC.device, text_BTC.shape[:2]
        text_T4 = torch.zeros(T, AXES, dtype=drawn_I4.dtype)
        text_T4[:, 3] = torch.arange(T)
        places_L4, given_BJD, streams = torch.cat([text_T4, drawn_I4]).to(device), None, [T, len(drawn_I4)]
        if given_J4 is not None:
            places_L4 = torch.cat([places_L4, given_J4])
            streams.append(len(given_J4))
        sequence = Sequenced.over(self.split, *streams)
        if given_BJC is not None:
            given_BJD = self.x_embedder(given_BJC[:, sequence.own[2]].to(dtype))
        context_BTD = self.context_embedder(text_BTC[:, sequence.own[0]].to(dtype))
        rows, rotary = Rows.of(B, sequence, 1, device), self.rotary(sequence.here(places_L4))
        return Request(context_BTD, given_BJD, rows, rotary)

    def rotary(self, places_L4: Tensor) -> Rotary:
        axes = zip(places_L4.unbind(1), self.config.axes_dims_rope, strict=True)
        tables = [rotary_table(places_L, width, self.config.rope_theta) for places_L, width in axes]
        cos, sin = (torch.cat(table, dim=-1) for table in zip(*tables, strict=True))
        return Rotary(cos, sin)

    def modulate(self, t_S: Tensor, guidance: Tensor | None) -> list[Modulation]:
        """The vectors of every step.

        Args:
            t_S, guidance: in thousandths and in the model's dtype; guidance of one element, or None.
        """
        vectors_SVD = self.modulation(self.time_guidance_embed(t_S, guidance))
        text_S6D, image_S6D, single_S3D, out_S2D = vectors_SVD.split([6, 6, 3, 2], dim=1)
        double_S62D = torch.stack([text_S6D, image_S6D], dim=2)
        return [
            Modulation(*step) for step in zip(double_S62D, single_S3D[:, :, None], out_S2D[:, :, None], strict=True)
        ]

    def forward(self, x_BIC: Tensor, modulation: Modulation, request: Request) -> Tensor:
        """Velocity (B, I, C) of what is drawn."""
        rows, rotary, tokens, own = request.rows, request.rotary, x_BIC.shape[1], self.split.own(x_BIC.shape[1])
        image_BID = self.x_embedder(x_BIC[:, own])
        if request.given_BJD is not None:
            image_BID = torch.cat([image_BID, request.given_BJD], dim=1)
        stream = Residual(torch.cat([request.context_BTD.flatten(0, 1), image_BID.flatten(0, 1)]))
        for block in self.transformer_blocks:
            block(stream, rows, modulation.double_62D, rotary)
        stream = Residual(rows.join(stream.total(rows.group_R)))
        for block in self.single_transformer_blocks:
            block(stream, modulation.single_31D, rows, rotary)
        scale, shift = modulation.out_21D
        drawn = stream.after(rows.text, own.stop - own.start)
        return self.split.whole(self.proj_out(drawn.norm(scale, shift)), tokens)
