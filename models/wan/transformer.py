"""`WanTransformer3DModel`: a rectified-flow transformer over the tokens of a video.

Every block attends to the whole video, then to the text and, where the model was made for it, to the picture that the
video begins with, neither of which enters anywhere else. One timestep layer modulates all blocks, each of which adds a
learned table. Checkpoint layout and maths follow diffusers.

A picture reaches the video itself in one of two ways, by the number of channels:

- more come in than go out (Wan2.1 I2V, Wan2.2 I2V-A14B): a condition, a mask and latents, stands beside the state in
  the channels of the patch embedding. What it adds to the tokens is computed once a request. In half precision that
  share is rounded once by itself, where diffusers rounds the sum alone.
- as many come in as go out (Wan2.2 TI2V-5B): it is the first frame, and the tokens of that frame are at timestep 0.
  A frame, not a token, has vectors of its own: they come in two groups.

Ranks that share weights (tensor parallelism) share those of the feed-forwards, more than half of a block's: q and k are
normed across all heads, so that every rank computes the attention whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgl_diffusion.kernels.embedding import patchify, timestep_embedding, unpatchify
from sgl_diffusion.kernels.gemm import gemm
from sgl_diffusion.kernels.modulation import modulation
from sgl_diffusion.kernels.norm import norm
from sgl_diffusion.kernels.qk_norm_rope import Stream, qk_norm_rope
from sgl_diffusion.kernels.residual import residual_norm
from sgl_diffusion.models.config import ConfigError, demand, read_config
from sgl_diffusion.models.family import ONE_RANK, AttentionFn, Split
from sgl_diffusion.models.layers import (
    Codes,
    FeedForward,
    Linear,
    Residual,
    RMSNormWeight,
    TimestepEmbedding,
    attended,
    codes_for,
    for_layers,
    rotary_table,
)
from sgl_diffusion.models.wan.original_names import ORIGINAL_NAMES

# B batch  T tokens of the text or the picture  L video tokens  R = B * L rows  H heads  K head dim  D = H * K width
# P = K / 2 rotary pairs  S steps  N blocks  G groups of rows with one modulation
# C channels of the latent  F, Y, X its frames, rows and columns  M = S * G timesteps
ROPE_THETA = 10_000.0
EPS = 1e-6
IMAGE_EPS = 1e-5  # of the norms around the picture's embedding
PATCH = (1, 2, 2)
MASKS = 4  # channels that tell of each frame of a latent one whether it is given
# kept in fp32 in a model of half precision, as diffusers does: names of modules or parameters
FP32 = frozenset({"time_embedder", "scale_shift_table", "norm1", "norm2"})

Heads = tuple[Tensor, Tensor]
"""k_BTHK, normed, and v_BTHK: what a block's cross attention reads of the text or the picture."""


@dataclass(frozen=True)
class WanConfig:
    """`transformer/config.json`."""

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    out_channels: int | None = 16
    patch_size: tuple[int, ...] = PATCH
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = EPS
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: int | None = None  # tokens of the pictures, which know their places where it is given

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> WanConfig:
        unused = {"rope_max_seq_len": "how long diffusers makes its rotary tables; ours are as long as the video"}
        config = read_config(cls, raw, ignored=unused)
        config = replace(config, out_channels=config.state_channels)
        demand(
            config,
            patch_size=PATCH,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=EPS,
            added_kv_proj_dim=None if config.image_dim is None else config.width,
        )
        if config.image_dim is None:
            demand(config, pos_embed_seq_len=None)
        if config.in_channels not in (known := (config.state_channels, 2 * config.state_channels + MASKS)):
            raise ConfigError(
                f"config key in_channels={config.in_channels!r} is not supported natively; only {known[0]} is, and "
                f"{known[1]} for a condition beside the state"
            )
        return config

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def head_shape(self) -> tuple[int, int]:
        return self.num_attention_heads, self.attention_head_dim

    @property
    def state_channels(self) -> int:
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def condition_channels(self) -> int:
        """That stand beside the state; 0 where a picture would be the first frame instead."""
        return self.in_channels - self.state_channels


# -- what is computed before the first step -----------------------------------------


@dataclass(frozen=True)
class Rotary:
    """fp32 tables (L, P)."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Modulation:
    """fp32 vectors of one step, which all samples share; G = 2 where the first frame has vectors of its own."""

    block_N6GD: Tensor  # shift, scale and gate of the self attention, then of the feed-forward
    out_2GD: Tensor  # shift, scale


@dataclass(frozen=True)
class Beside:
    """What a condition in the channels of the patch embedding comes to."""

    weight_DK: Tensor  # columns of the embedding's weight that read the state
    tokens_BLD: Tensor  # what the other columns read of the condition, and the bias


@dataclass(frozen=True)
class Request:
    """What a request fixes."""

    heads: list[list[Heads]]  # of the text and perhaps the picture, for every block
    tokens: int  # of the video
    rotary: Rotary  # here and below, of the tokens that are this rank's own
    beside: Beside | None
    first_BC1YX: Tensor | None  # the first frame, where it is given
    group_R: Tensor | None  # of every row, where the first frame has vectors of its own


def hold_first_frame(x_BCFYX: Tensor, first_BC1YX: Tensor) -> Tensor:
    """The video with a given first frame: `(1 - mask) * condition + mask * x` of diffusers' pipeline."""
    return torch.cat([first_BC1YX.to(x_BCFYX.dtype), x_BCFYX[:, :, 1:]], dim=2)


class PatchEmbedding(nn.Conv3d):
    """(B, C, F, Y, X) -> (B, L, D). A convolution without overlap is a linear layer over patches."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config.in_channels, config.width, kernel_size=PATCH, stride=PATCH)
        self.state_columns = config.state_channels * math.prod(PATCH)

    def put_beside(self, condition_BCFYX: Tensor, own: slice) -> Beside:
        """Of the tokens that are this rank's own."""
        state_DK, condition_DK = (w.contiguous() for w in self.weight.flatten(1).tensor_split([self.state_columns], 1))
        patches_BLK = patchify(condition_BCFYX.contiguous(), PATCH)[:, own].contiguous()
        return Beside(state_DK, gemm(patches_BLK, condition_DK, self.bias))

    def forward(self, x_BCFYX: Tensor, beside: Beside | None, own: slice) -> Tensor:  # type: ignore[override]
        patches_BLK = patchify(x_BCFYX, PATCH)[:, own].contiguous()
        if beside is None:
            return gemm(patches_BLK, self.weight.flatten(1), self.bias)
        return gemm(patches_BLK, beside.weight_DK, residual=beside.tokens_BLD)


class TextProjection(nn.Module):
    """`PixArtAlphaTextProjection`: two linear layers with a tanh GELU between them."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(channels, width), Linear(width, width)

    def forward(self, text_BTC: Tensor) -> Tensor:
        return cast(Tensor, self.linear_2(self.linear_1(text_BTC, gelu_from=0)))


class LayerNormWeights(nn.Module):
    """Holds the weights of a LayerNorm that is computed inside a fused kernel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))


class ImageProjection(nn.Module):
    """`WanImageEmbedding`: two linear layers with an exact GELU between them, and a LayerNorm on either side."""

    def __init__(self, config: WanConfig, channels: int) -> None:
        super().__init__()
        places = config.pos_embed_seq_len
        self.pos_embed = nn.Parameter(torch.zeros(1, places, channels)) if places else None
        self.norm1, self.norm2 = LayerNormWeights(channels), LayerNormWeights(config.width)
        up, down = Linear(channels, channels), Linear(channels, config.width)
        layers = nn.ModuleList([nn.ModuleDict({"proj": up}), nn.Identity(), down])  # named as `FeedForward`'s
        self.ff = nn.ModuleDict({"net": layers})

    def forward(self, image_BTC: Tensor) -> Tensor:
        first, _, down = cast(nn.ModuleList, self.ff["net"])
        x = image_BTC if self.pos_embed is None else image_BTC + self.pos_embed
        x = F.gelu(cast(nn.ModuleDict, first)["proj"](self.normed(x, self.norm1)))
        return self.normed(down(x), self.norm2)

    def normed(self, x: Tensor, by: LayerNormWeights) -> Tensor:
        return cast(Tensor, norm(x, kind="layer", weight_D=by.weight, bias_D=by.bias, eps=IMAGE_EPS))


class ConditionEmbedder(nn.Module):
    """What is computed from timesteps, text and picture alone (`WanTimeTextImageEmbedding`)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        D = config.width
        self.time_embedder = TimestepEmbedding(config.freq_dim, D)
        self.time_proj = nn.Linear(D, 6 * D)
        self.text_embedder = TextProjection(config.text_dim, D)
        self.image_embedder = None if config.image_dim is None else ImageProjection(config, config.image_dim)


# -- blocks -------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Over all tokens of the video; q and k are normed across heads and turned by their place in space and time."""

    packed = {"to_qkv": {"to_q": 1, "to_k": 1, "to_v": 1}}

    def __init__(self, config: WanConfig, attention: AttentionFn, split: Split) -> None:
        super().__init__()
        D, self.head_shape, self.attention, self.split = config.width, config.head_shape, attention, split
        self.to_qkv = Linear(D, 3 * D)
        self.norm_q, self.norm_k = RMSNormWeight(D), RMSNormWeight(D)
        self.to_out = nn.ModuleList([Linear(D, D)])

    def forward(self, x_BLD: Tensor | Codes, tokens: int, rotary: Rotary) -> Tensor:
        """`tokens` there are on all ranks."""
        qkv_BL3HK = self.to_qkv(x_BLD).unflatten(-1, (3, *self.head_shape))
        q, k, v = qkv_BL3HK.unbind(2)
        stream = Stream(qkv_BL3HK, self.norm_q.weight, self.norm_k.weight)
        qk_norm_rope([stream], rotary.cos, rotary.sin, q, k, None, eps=EPS)
        return cast(Tensor, self.to_out[0](attended([self.to_out[0]], self.split, self.attention, q, k, v, [tokens])))


class CrossAttention(nn.Module):
    """Over the tokens of the text and, apart from them, of the picture; no step changes their keys and values.

    Every rank has all of these keys, whichever tokens of the video are its own.
    """

    def __init__(self, config: WanConfig, attention: AttentionFn) -> None:
        super().__init__()
        D, self.head_shape, self.attention = config.width, config.head_shape, attention
        self.to_q, self.to_k, self.to_v = Linear(D, D), Linear(D, D), Linear(D, D)
        self.norm_q, self.norm_k = RMSNormWeight(D), RMSNormWeight(D)
        if config.image_dim is not None:
            self.add_k_proj, self.add_v_proj, self.norm_added_k = Linear(D, D), Linear(D, D), RMSNormWeight(D)
        self.to_out = nn.ModuleList([Linear(D, D)])

    def read(self, text_BTD: Tensor, image_BTD: Tensor | None) -> list[Heads]:
        heads = [self.heads(text_BTD, self.to_k, self.to_v, self.norm_k)]
        if image_BTD is not None:
            heads.append(self.heads(image_BTD, self.add_k_proj, self.add_v_proj, self.norm_added_k))
        return heads

    def heads(self, x_BTD: Tensor, to_k: Linear, to_v: Linear, norm_k: RMSNormWeight) -> Heads:
        k = norm(to_k(x_BTD), kind="rms", weight_D=norm_k.weight, eps=EPS)
        return k.unflatten(-1, self.head_shape), to_v(x_BTD).unflatten(-1, self.head_shape)

    def forward(self, x_BLD: Tensor | Codes, heads: Sequence[Heads]) -> Tensor:
        q = norm(self.to_q(x_BLD), kind="rms", weight_D=self.norm_q.weight, eps=EPS).unflatten(-1, self.head_shape)
        if len(heads) == 1:
            (keys, values), into = heads[0], [self.to_out[0]]
            return cast(Tensor, into[0](attended(into, ONE_RANK, self.attention, q, keys, values, ())))
        text, *image = (self.attention(q, *kv) for kv in heads)
        for seen in image:
            text += seen
        return cast(Tensor, self.to_out[0](text.flatten(2)))


class Block(nn.Module):
    """Self attention and feed-forward, modulated and gated; between them, cross attention with a norm of its own."""

    entries = ("read",)

    def __init__(self, config: WanConfig, attention: AttentionFn, split: Split) -> None:
        super().__init__()
        self.attn1, self.attn2 = SelfAttention(config, attention, split), CrossAttention(config, attention)
        self.norm2 = LayerNormWeights(config.width)
        self.ffn = FeedForward(config.width, config.ffn_dim)

    def read(self, text_BTD: Tensor, image_BTD: Tensor | None) -> list[Heads]:
        """What the cross attention reads, which no step changes."""
        return self.attn2.read(text_BTD, image_BTD)

    def forward(self, stream: Residual, heads: Sequence[Heads], vectors_6GD: Tensor, request: Request) -> None:
        group_R = request.group_R
        shift, scale, gate, shift2, scale2, gate2 = vectors_6GD
        x, weight, bias = stream.x, self.norm2.weight, self.norm2.bias
        normed = stream.norm(scale, shift, group_R, into=(self.attn1.to_qkv,))
        branch, how = self.attn1(normed, request.tokens, request.rotary), {"weight_D": weight, "bias_D": bias}
        normed = self._add_and_norm(x, branch, group_R, self.attn2.to_q, gate=gate, **how)
        branch = self.attn2(normed, heads)
        normed = self._add_and_norm(x, branch, group_R, self.ffn.up, scale=scale2, shift=shift2)
        stream.add(self.ffn(normed), gate2)

    def _add_and_norm(self, x: Tensor, branch: Tensor, group_R: Tensor | None, into: nn.Module, **how: Any) -> Any:
        """The norm, as the layer that follows reads it, of a sum that stays in x."""
        normed = residual_norm(x, branch, kind="layer", group=group_R, eps=EPS, **codes_for(into), **how)
        return for_layers(normed, x.dtype)


class BlockTables(nn.Module):
    """The blocks' tables in one, so that all of them are added to the timestep's vectors at once."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(blocks, 6, width))


class WanTransformer(nn.Module):
    """`WanTransformer3DModel`."""

    original_names = ORIGINAL_NAMES

    def __init__(self, config: WanConfig, attention: AttentionFn, split: Split = ONE_RANK) -> None:
        super().__init__()
        D, N, self.config, self.split = config.width, config.num_layers, config, split
        self.patch_embedding = PatchEmbedding(config)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config, attention, split) for _ in range(N))
        self.packed = {"block_tables": {f"blocks.{i}": 1 for i in range(N)}}
        self.block_tables = BlockTables(N, D)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, D))
        self.proj_out = Linear(D, config.state_channels * math.prod(PATCH))

    def unused_weights(self) -> tuple[str, ...]:
        """Prefixes of checkpoint names: some image-to-video models keep the norm of a q that nothing computes."""
        return tuple(f"blocks.{i}.attn2.norm_added_q." for i in range(self.config.num_layers))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WanTransformer:
        """Behind `to` and `to_empty`: a cast moves the parameters of `FP32` to the device and no more."""
        kept = {id(p) for name, p in self.named_parameters() if FP32 & set(name.split("."))}

        def apply(t: Tensor) -> Tensor:
            y = fn(t)
            return t.to(y.device) if id(t) in kept and y.dtype != t.dtype else y

        return super()._apply(apply, recurse)

    def prepare(
        self, text_BTC: Tensor, image_BTC: Tensor | None, latents: Tensor | None, latent_shape: Sequence[int]
    ) -> Request:
        """Everything that the prompt and the picture decide.

        Args:
            text_BTC: (B, T, text_dim), padded with zeros.
            image_BTC: (B, T, image_dim) from the image encoder, for a model with an image_dim alone; of two pictures,
                one after the other, where pos_embed_seq_len is given.
            latents: (B, condition_channels, F, Y, X), a mask and latents, if there are such channels; else None, or
                (B, C, 1, Y, X), the latents of the first frame. Dimensions of 1 are as good as full ones.
            latent_shape: (C, F, Y, X) of the state.
        """
        grid, dtype, (B, device) = _grid(latent_shape), self.proj_out.weight.dtype, (len(text_BTC), text_BTC.device)
        tokens = math.prod(grid)
        own, beside, first, group_R = self.split.own(tokens), None, None, None
        if self.config.condition_channels:
            assert latents is not None, "a model with channels for a condition has one"
            latents = latents.to(dtype).expand(B, -1, *latent_shape[1:])
            beside = self.patch_embedding.put_beside(latents, own)
        elif latents is not None:
            first = latents.expand(B, -1, 1, *latent_shape[2:]).contiguous()
            of_a_frame = torch.tensor([0] + [1] * (grid[0] - 1), dtype=torch.int32)
            group_R = of_a_frame.repeat_interleave(grid[1] * grid[2])[own].repeat(B).to(device)
        image = None if image_BTC is None else image_BTC.to(dtype)
        heads, rotary = self.read(text_BTC.to(dtype), image), self.rotary(grid, own, device)
        return Request(heads, tokens, rotary, beside, first, group_R)

    def read(self, text_BTC: Tensor, image_BTC: Tensor | None) -> list[list[Heads]]:
        """What every block reads of the text and of the picture."""
        c = self.condition_embedder
        text_BTD = c.text_embedder(text_BTC)
        image_BTD = None
        if c.image_embedder is not None:
            assert image_BTC is not None, "a model with an image embedder has a picture to embed"
            image_BTD = c.image_embedder(image_BTC)
        return [cast(Block, block).read(text_BTD, image_BTD) for block in self.blocks]

    def rotary(self, grid: tuple[int, ...], own: slice, device: torch.device) -> Rotary:
        """Of a run of tokens. Three axes: frames turn what rows and columns, a third of the pairs each, leave."""
        K = self.config.attention_head_dim
        side = K // 6 * 2
        places_L3 = torch.cartesian_prod(*map(torch.arange, grid))[own]
        axes = [
            [table[places_L3[:, axis]] for table in rotary_table(torch.arange(grid[axis]), width, ROPE_THETA)]
            for axis, width in enumerate((K - 2 * side, side, side))
        ]
        cos, sin = (torch.cat(tables, dim=-1).to(device) for tables in zip(*axes, strict=True))
        return Rotary(cos, sin)

    def modulate(self, t_SG: Tensor) -> list[Modulation]:
        """The vectors of every step, from timesteps in thousandths for every group of rows.

        The timestep's embedding is computed in fp32 and rounded to the model's dtype; the tables are added in fp32.
        """
        c = self.condition_embedder
        sinusoid = timestep_embedding(
            t_SG.flatten(), self.config.freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        time_MD = c.time_embedder(sinusoid).to(c.time_proj.weight.dtype)
        time_M6D = modulation(time_MD, c.time_proj.weight, c.time_proj.bias).unflatten(-1, (6, -1)).float()
        block_S6GD, out_SGD = (y.unflatten(0, t_SG.shape) for y in (time_M6D, time_MD.float()))
        block_SN6GD = self.block_tables.scale_shift_table[..., None, :] + block_S6GD.transpose(1, 2)[:, None]
        out_S2GD = self.scale_shift_table[..., None, :] + out_SGD[:, None]
        return [Modulation(*step) for step in zip(block_SN6GD, out_S2GD, strict=True)]

    def forward(self, x_BCFYX: Tensor, modulation: Modulation, request: Request) -> Tensor:
        """Velocity, in the shape of the state."""
        grid, own = _grid(x_BCFYX.shape[1:]), self.split.own(request.tokens)
        if request.first_BC1YX is not None:
            x_BCFYX = hold_first_frame(x_BCFYX, request.first_BC1YX)
        stream = Residual(self.patch_embedding(x_BCFYX.to(self.proj_out.weight.dtype), request.beside, own))
        for block, heads, vectors_6GD in zip(self.blocks, request.heads, modulation.block_N6GD, strict=True):
            block(stream, heads, vectors_6GD, request)
        shift, scale = modulation.out_2GD
        # a patch leaves with its channels fastest, and came in with them slowest
        patches_BLC = self.split.whole(self.proj_out(stream.norm(scale, shift, request.group_R)), request.tokens)
        return unpatchify(patches_BLC, grid, PATCH, channel_fastest=True)


def _grid(latent_shape: Sequence[int]) -> tuple[int, ...]:
    """Patches along frames, rows and columns, of latents (C, F, Y, X)."""
    return tuple(n // p for n, p in zip(latent_shape[1:], PATCH, strict=True))
