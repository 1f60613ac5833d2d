"""Wan 2.1 (Alibaba 2025, arXiv 2503.20314): a rectified-flow transformer over the tokens of a video.

Every block attends to the whole video, then to the text, which enters nowhere else. One timestep layer modulates all
blocks, each of which adds a learned table. Checkpoint layout and maths follow diffusers' `WanTransformer3DModel`.
Text to video only; Wan 2.2's A14B has two of these transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sgl_diffusion.kernels.embedding import patchify, timestep_embedding, unpatchify
from sgl_diffusion.kernels.gemm import gemm
from sgl_diffusion.kernels.modulation import modulation
from sgl_diffusion.kernels.norm import norm
from sgl_diffusion.kernels.qk_norm_rope import Stream, qk_norm_rope
from sgl_diffusion.kernels.residual import residual_norm
from sgl_diffusion.models.config import demand, read_config
from sgl_diffusion.models.family import AttentionFn, Condition, Defaults, Guidance, Predictor, Preset, Size
from sgl_diffusion.models.layers import Linear, Residual, RMSNormWeight, TimestepEmbedding, rotary_table

# B batch  T text tokens  L video tokens  H heads  K head dim  D = H * K width  P = K / 2 rotary pairs
# S steps  N blocks  C channels of the latent  F, Y, X its frames, rows and columns
TIMESTEPS = 1000  # the transformer sees sigma in thousandths
ROPE_THETA = 10_000.0
EPS = 1e-6
LATENT_CHANNELS = 16
PIXELS, FRAMES = 8, 4  # that one step of the latent covers in space and in time
PATCH = (1, 2, 2)
# kept in fp32 in a model of half precision, as diffusers does: names of modules or parameters
FP32 = frozenset({"time_embedder", "scale_shift_table", "norm2"})

TextHeads = tuple[Tensor, Tensor]
"""k_BTHK, normed, and v_BTHK: what a block's cross attention reads of the text."""


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
    out_channels: int = LATENT_CHANNELS
    patch_size: tuple[int, ...] = PATCH
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = EPS
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> WanConfig:
        """Refuses image-to-video models: by their image encoder's width, or the latent channels that hold an image."""
        config = read_config(
            cls,
            raw,
            ignored={
                "rope_max_seq_len": "how long diffusers makes its rotary tables; ours are as long as the video",
                "pos_embed_seq_len": "of the image encoder's tokens, of which there are none",
            },
        )
        demand(
            config,
            image_dim=None,
            added_kv_proj_dim=None,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            patch_size=PATCH,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=EPS,
        )
        return config

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def head_shape(self) -> tuple[int, int]:
        return self.num_attention_heads, self.attention_head_dim


# -- transformer ----------------------------------------------------------------


@dataclass(frozen=True)
class Rotary:
    """fp32 tables (L, P)."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Modulation:
    """fp32 vectors of one step, which all samples share."""

    block_N61D: Tensor  # shift, scale and gate of the self attention, then of the feed-forward
    out_21D: Tensor  # shift, scale


class PatchEmbedding(nn.Conv3d):
    """(B, C, F, Y, X) -> (B, L, D). A convolution without overlap is a linear layer over patches."""

    def __init__(self, width: int) -> None:
        super().__init__(LATENT_CHANNELS, width, kernel_size=PATCH, stride=PATCH)

    def forward(self, x_BCFYX: Tensor) -> Tensor:
        return gemm(patchify(x_BCFYX, PATCH), self.weight.flatten(1), self.bias)


class TextProjection(nn.Module):
    """`PixArtAlphaTextProjection`: two linear layers with a tanh GELU between them."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(channels, width), Linear(width, width)

    def forward(self, text_BTC: Tensor) -> Tensor:
        return cast(Tensor, self.linear_2(self.linear_1(text_BTC, gelu_from=0)))


class ConditionEmbedder(nn.Module):
    """What is computed from timesteps and text alone (`WanTimeTextImageEmbedding`)."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        D = config.width
        self.time_embedder = TimestepEmbedding(config.freq_dim, D)
        self.time_proj = nn.Linear(D, 6 * D)
        self.text_embedder = TextProjection(config.text_dim, D)


class SelfAttention(nn.Module):
    """Over all tokens of the video; q and k are normed across heads and turned by their place in space and time."""

    packed = {"to_qkv": {"to_q": 1, "to_k": 1, "to_v": 1}}

    def __init__(self, config: WanConfig, attention: AttentionFn) -> None:
        super().__init__()
        D, self.head_shape, self.attention = config.width, config.head_shape, attention
        self.to_qkv = Linear(D, 3 * D)
        self.norm_q, self.norm_k = RMSNormWeight(D), RMSNormWeight(D)
        self.to_out = nn.ModuleList([Linear(D, D)])

    def forward(self, x_BLD: Tensor, rotary: Rotary) -> Tensor:
        qkv_BL3HK = self.to_qkv(x_BLD).unflatten(-1, (3, *self.head_shape))
        q, k, v = qkv_BL3HK.unbind(2)
        stream = Stream(qkv_BL3HK, self.norm_q.weight, self.norm_k.weight)
        qk_norm_rope([stream], rotary.cos, rotary.sin, q, k, None, eps=EPS)
        return cast(Tensor, self.to_out[0](self.attention(q, k, v).flatten(2)))


class CrossAttention(nn.Module):
    """Over the tokens of the text, whose keys and values no step changes."""

    def __init__(self, config: WanConfig, attention: AttentionFn) -> None:
        super().__init__()
        D, self.head_shape, self.attention = config.width, config.head_shape, attention
        self.to_q, self.to_k, self.to_v = Linear(D, D), Linear(D, D), Linear(D, D)
        self.norm_q, self.norm_k = RMSNormWeight(D), RMSNormWeight(D)
        self.to_out = nn.ModuleList([Linear(D, D)])

    def heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, self.head_shape)

    def read(self, text_BTD: Tensor) -> TextHeads:
        k = norm(self.to_k(text_BTD), kind="rms", weight_D=self.norm_k.weight, eps=EPS)
        return self.heads(k), self.heads(self.to_v(text_BTD))

    def forward(self, x_BLD: Tensor, text: TextHeads) -> Tensor:
        q = norm(self.to_q(x_BLD), kind="rms", weight_D=self.norm_q.weight, eps=EPS)
        return cast(Tensor, self.to_out[0](self.attention(self.heads(q), *text).flatten(2)))


class FeedForward(nn.Module):
    """Two linear layers with a tanh GELU between them; names as `FeedForward.net` of diffusers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        up, down = Linear(width, hidden), Linear(hidden, width)
        self.net = nn.ModuleList([nn.ModuleDict({"proj": up}), nn.Identity(), down])

    def forward(self, x_BLD: Tensor) -> Tensor:
        up, down = cast(nn.ModuleDict, self.net[0]), self.net[2]
        return cast(Tensor, down(up["proj"](x_BLD, gelu_from=0)))


class LayerNormWeights(nn.Module):
    """Holds the weights of a LayerNorm that is computed inside a fused kernel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))


class Block(nn.Module):
    """Self attention and feed-forward, modulated and gated; between them, cross attention with a norm of its own."""

    def __init__(self, config: WanConfig, attention: AttentionFn) -> None:
        super().__init__()
        self.attn1, self.attn2 = SelfAttention(config, attention), CrossAttention(config, attention)
        self.norm2 = LayerNormWeights(config.width)
        self.ffn = FeedForward(config.width, config.ffn_dim)

    def forward(self, stream: Residual, text: TextHeads, vectors_61D: Tensor, rotary: Rotary) -> None:
        shift, scale, gate, shift2, scale2, gate2 = vectors_61D
        x, weights = stream.x, self.norm2  # each residual_norm adds to x in place, and returns the norm of the sum
        branch = self.attn1(stream.norm(scale, shift), rotary)
        normed = residual_norm(x, branch, gate, kind="layer", weight_D=weights.weight, bias_D=weights.bias, eps=EPS)
        branch = self.attn2(normed, text)
        normed = residual_norm(x, branch, kind="layer", scale=scale2, shift=shift2, eps=EPS)
        stream.add(self.ffn(normed), gate2)


class BlockTables(nn.Module):
    """The blocks' tables in one, so that all of them are added to the timestep's vectors at once."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(blocks, 6, width))


class WanTransformer(nn.Module):
    """`WanTransformer3DModel`."""

    def __init__(self, config: WanConfig, attention: AttentionFn) -> None:
        super().__init__()
        D, N, self.config = config.width, config.num_layers, config
        self.patch_embedding = PatchEmbedding(D)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(N))
        self.packed = {"block_tables": {f"blocks.{i}": 1 for i in range(N)}}
        self.block_tables = BlockTables(N, D)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, D))
        self.proj_out = Linear(D, LATENT_CHANNELS * math.prod(PATCH))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WanTransformer:
        """Behind `to` and `to_empty`: a cast moves the parameters of `FP32` to the device and no more."""
        kept = {id(p) for name, p in self.named_parameters() if FP32 & set(name.split("."))}

        def apply(t: Tensor) -> Tensor:
            y = fn(t)
            return t.to(y.device) if id(t) in kept and y.dtype != t.dtype else y

        return super()._apply(apply, recurse)

    def rotary(self, grid: tuple[int, ...], device: torch.device) -> Rotary:
        """Three axes; frames turn what rows and columns, a third of the pairs each, leave of a head."""
        K = self.config.attention_head_dim
        side = K // 6 * 2
        places_L3 = torch.cartesian_prod(*map(torch.arange, grid))
        axes = [
            [table[places_L3[:, axis]] for table in rotary_table(torch.arange(grid[axis]), width, ROPE_THETA)]
            for axis, width in enumerate((K - 2 * side, side, side))
        ]
        cos, sin = (torch.cat(tables, dim=-1).to(device) for tables in zip(*axes, strict=True))
        return Rotary(cos, sin)

    def modulate(self, t_S: Tensor) -> list[Modulation]:
        """The vectors of every step; t_S in thousandths.

        The timestep's embedding is computed in fp32 and rounded to the model's dtype; the tables are added in fp32.
        """
        c = self.condition_embedder
        sinusoid = timestep_embedding(t_S, self.config.freq_dim, flip_sin_to_cos=True, downscale_freq_shift=0.0)
        time_SD = c.time_embedder(sinusoid).to(c.time_proj.weight.dtype)
        time_S6D = modulation(time_SD, c.time_proj.weight, c.time_proj.bias).unflatten(-1, (6, -1))
        block_SN6D = self.block_tables.scale_shift_table + time_S6D.float()[:, None]
        out_S2D = self.scale_shift_table + time_SD.float()[:, None]
        return [Modulation(*step) for step in zip(block_SN6D[..., None, :], out_S2D[:, :, None], strict=True)]

    def read(self, text_BTC: Tensor) -> list[TextHeads]:
        """What every block reads of the text."""
        text_BTD = self.condition_embedder.text_embedder(text_BTC)
        return [cast(Block, block).attn2.read(text_BTD) for block in self.blocks]

    def forward(self, x_BCFYX: Tensor, modulation: Modulation, text: Sequence[TextHeads], rotary: Rotary) -> Tensor:
        """Velocity, in the shape of the state."""
        stream = Residual(self.patch_embedding(x_BCFYX.to(self.proj_out.weight.dtype)))
        for block, text_heads, vectors_61D in zip(self.blocks, text, modulation.block_N61D, strict=True):
            block(stream, text_heads, vectors_61D, rotary)
        shift, scale = modulation.out_21D
        # a patch leaves with its channels fastest, and came in with them slowest
        return unpatchify(self.proj_out(stream.norm(scale, shift)), _grid(x_BCFYX.shape), PATCH, channel_fastest=True)


def _grid(latent_shape: Sequence[int]) -> tuple[int, ...]:
    """Patches along frames, rows and columns."""
    return tuple(n // p for n, p in zip(latent_shape[2:], PATCH, strict=True))


# -- family -----------------------------------------------------------------------


class Wan:
    """`WanPipeline`, as far as the denoiser goes."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.transformer: WanTransformer = parts["transformer"]

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
        return WanTransformer(WanConfig.read(config), attention)

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        return DEFAULTS

    @classmethod
    def example(cls, configs: Mapping[str, Mapping[str, Any]]) -> Condition:
        shape = (1, cls.defaults(configs).max_sequence_length, configs["transformer"]["text_dim"])
        return Condition({"encoder_hidden_states": torch.zeros(shape, dtype=torch.bfloat16)})

    @classmethod
    def diffusers_inputs(
        cls, configs: Mapping[str, Mapping[str, Any]], condition: Condition, size: Size
    ) -> Mapping[str, Any]:
        return {
            **condition.tensors,
            "hidden_states": torch.zeros(_latent_shape(size), dtype=torch.bfloat16),
            "timestep": torch.zeros(1, dtype=torch.int64),
        }

    def noise(self, size: Size, generators: Sequence[torch.Generator]) -> Tensor:
        """fp32 in a model of any dtype, as in diffusers."""
        x = torch.cat([torch.randn(_latent_shape(size), generator=g, dtype=torch.float32) for g in generators])
        return x.to(self.transformer.proj_out.weight.device)

    def predictor(self, condition: Condition, size: Size, guidance: Guidance, sigmas: Sequence[float]) -> Predictor:
        model, text = self.transformer, condition.tensors["encoder_hidden_states"]
        dtype, device = model.proj_out.weight.dtype, text.device
        text_heads = model.read(text.to(dtype))
        rotary = model.rotary(_grid(_latent_shape(size)), device)
        modulations = model.modulate((torch.tensor(sigmas[:-1]) * TIMESTEPS).to(device))
        return Predictor(model, (text_heads, rotary), modulations)


def _latent_shape(size: Size) -> tuple[int, ...]:
    """(1, C, F, Y, X). The first frame has a latent frame to itself."""
    frames = (size.frames - 1) // FRAMES + 1
    return 1, LATENT_CHANNELS, frames, size.height // PIXELS, size.width // PIXELS


# -- presets: published configs, for dummy weights at true size -------------------

DEFAULTS = Defaults(
    num_inference_steps=50, guidance_scale=5.0, height=480, width=832, max_sequence_length=512, frames=81
)


def _preset(*, heads: int, hidden: int, blocks: int) -> Preset:
    transformer = {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": 128,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "ffn_dim": hidden,
        "freq_dim": 256,
        "image_dim": None,
        "in_channels": 16,
        "num_attention_heads": heads,
        "num_layers": blocks,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    }
    return Preset(components={"transformer": transformer}, defaults=DEFAULTS)


PRESETS = {
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _preset(heads=40, hidden=13824, blocks=40),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _preset(heads=12, hidden=8960, blocks=30),
}
