"""`ZImageTransformer2DModel`: a rectified-flow transformer over one stream of image and text tokens.

Each kind of token first goes through a few blocks of its own, the noise and the context refiner; then all blocks see
both, with the same weights. Sequences of either kind are filled up to a multiple of 32 with a learned token, which is
seen like any other. Norms stand on both sides of a branch ("sandwich"), and gates go through tanh. The timestep
modulates every block but the context refiner's, so that what the text comes to is computed once a request.

Checkpoint layout and maths follow diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sgl_diffusion.kernels.embedding import patchify, timestep_embedding, unpatchify
from sgl_diffusion.kernels.modulation import modulation
from sgl_diffusion.kernels.norm import norm
from sgl_diffusion.kernels.qk_norm_rope import Stream, qk_norm_rope
from sgl_diffusion.kernels.residual import gate_residual, residual_norm
from sgl_diffusion.models.config import ConfigError, demand, read_config
from sgl_diffusion.models.family import ONE_RANK, AttentionFn, Split, inputs, outputs
from sgl_diffusion.models.layers import (
    Codes,
    Linear,
    RMSNormWeight,
    Rotary,
    Sequenced,
    attended,
    codes_for,
    for_layers,
    rotary_table,
    swiglu,
)

# B batch  T text tokens  I image tokens  L both, filled up  D width  H heads  K head dim  P = K / 2 rotary pairs
# S steps  N modulated blocks  C channels of a token or the latent  Y, X the latent's rows and columns
PATCH = 2
MULTIPLE = 32  # of the length of a sequence
TIME_CHANNELS = 256  # of the timestep's sinusoid, and at most of its embedding
TIME_HIDDEN = 1024
QK_EPS = 1e-5
OUT_EPS = 1e-6  # of the last norm


@dataclass(frozen=True)
class ZImageConfig:
    """`transformer/config.json`."""

    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    n_kv_heads: int
    cap_feat_dim: int
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1024, 512, 512)  # places along each axis
    all_patch_size: tuple[int, ...] = (PATCH,)
    all_f_patch_size: tuple[int, ...] = (1,)
    norm_eps: float = 1e-5
    qk_norm: bool = True
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    siglip_feat_dim: int | None = None
    nheads: int | None = None  # converted checkpoints say it again

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> ZImageConfig:
        """Refuses models that look at pictures (`siglip_feat_dim`), and other patches."""
        config = read_config(cls, raw)
        demand(
            config,
            all_patch_size=(PATCH,),
            all_f_patch_size=(1,),
            qk_norm=True,
            n_kv_heads=config.n_heads,
            siglip_feat_dim=None,
        )
        if config.nheads is not None:
            demand(config, nheads=config.n_heads)
        if len(config.axes_dims) != 3 or sum(config.axes_dims) * config.n_heads != config.dim:
            raise ConfigError(f"config key axes_dims={config.axes_dims!r}: expected three, dim / n_heads in all")
        if len(config.axes_lens) != 3:
            raise ConfigError(f"config key axes_lens={config.axes_lens!r}: expected three")
        return config

    @property
    def head_shape(self) -> tuple[int, int]:
        return self.n_heads, self.dim // self.n_heads

    @property
    def time_width(self) -> int:
        return min(self.dim, TIME_CHANNELS)

    @property
    def hidden(self) -> int:
        """Width of a feed-forward's hidden layer."""
        return int(self.dim / 3 * 8)

    @property
    def longest_text(self) -> int:
        """Tokens of a text: it has the places from 1 on along the first axis, and the image the next."""
        return (self.axes_lens[0] - 2) // MULTIPLE * MULTIPLE


def filled_up(tokens: int) -> int:
    """The length of a sequence with its padding."""
    return -(-tokens // MULTIPLE) * MULTIPLE


@dataclass(frozen=True)
class Tokens:
    """Those that attend to each other.

    Attributes:
        streams: how many there are on all ranks, filled up: of the image, of the text, or of both.
        rotary: of those that are here.
    """

    streams: tuple[int, ...]
    rotary: Rotary


# -- blocks -------------------------------------------------------------------------


class Sandwich:
    """A residual stream (B, L, D), and a branch that is added where the next norm reads it: one pass instead of four.

    A branch goes through an RMSNorm of its own and is multiplied by tanh of its gate, if it has one.
    """

    def __init__(self, x_BLD: Tensor, eps: float) -> None:
        self.x, self.eps = x_BLD, eps
        self.branch: Tensor | None = None
        self.how: dict[str, Any] = {}

    def add(self, branch_BLD: Tensor, weight_D: Tensor, gate_1D: Tensor | None) -> None:
        """x + tanh(gate) * RMSNorm(branch), from the next norm on."""
        assert self.branch is None, "the last branch has not been added yet"
        self.branch = branch_BLD
        self.how = {"sandwich_weight_D": weight_D, "gate": gate_1D, "tanh_gate": gate_1D is not None, "eps": self.eps}

    def norm(self, weight_D: Tensor, scale_1D: Tensor | None, into: nn.Module) -> Any:
        """RMSNorm(x) * weight * (1 + scale), as the layer that follows reads it."""
        how: dict[str, Any] = {"kind": "rms", "weight_D": weight_D, "scale": scale_1D, **codes_for(into)}
        if self.branch is None:
            return for_layers(norm(self.x, **how, eps=self.eps), self.x.dtype)
        branch, self.branch = self.branch, None
        return for_layers(residual_norm(self.x, branch, **how, **self.how), self.x.dtype)

    def total(self, tokens: int | None = None) -> Tensor:
        """The stream with all its branches; of the first tokens, or all."""
        x, branch = self.x[:, :tokens], self.branch
        return x if branch is None else gate_residual(x, branch[:, :tokens], out=x, **self.how)


class Attention(nn.Module):
    """Over all tokens of a stream."""

    packed = {"to_qkv": {"to_q": 1, "to_k": 1, "to_v": 1}}
    tensor_parallel = {"to_qkv": outputs(1, 1, 1), "to_out.0": inputs()}

    def __init__(self, config: ZImageConfig, attention: AttentionFn, split: Split) -> None:
        super().__init__()
        D, self.head_dim, self.attention, self.split = config.dim, config.head_shape[1], attention, split
        self.to_qkv = Linear(D, 3 * D, bias=False)
        self.norm_q, self.norm_k = (RMSNormWeight(self.head_dim) for _ in range(2))
        self.to_out = nn.ModuleDict({"0": Linear(D, D, bias=False)})

    def forward(self, x_BLD: Tensor | Codes, tokens: Tokens) -> Tensor:
        rotary = tokens.rotary
        qkv_BL3HK = self.to_qkv(x_BLD).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = qkv_BL3HK.unbind(2)
        stream = Stream(qkv_BL3HK, self.norm_q.weight, self.norm_k.weight)
        qk_norm_rope([stream], rotary.cos, rotary.sin, q, k, None, eps=QK_EPS)
        to_out = self.to_out["0"]
        return cast(Tensor, to_out(attended([to_out], self.split, self.attention, q, k, v, tokens.streams)))


class FeedForward(nn.Module):
    """w2(silu(w1(x)) * w3(x))."""

    packed = {"w13": {"w1": 1, "w3": 1}}
    tensor_parallel = {"w13": outputs(1, 1), "w2": inputs()}

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.w13 = Linear(config.dim, 2 * config.hidden, bias=False)
        self.w2 = Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor | Codes) -> Tensor:
        return cast(Tensor, self.w2(swiglu(self.w13, x, self.w2)))


class Block(nn.Module):
    """Attention, then a feed-forward, each between two norms. Modulated, a block has two scales and two gates."""

    def __init__(self, config: ZImageConfig, attention: AttentionFn, split: Split) -> None:
        super().__init__()
        D = config.dim
        self.attention, self.feed_forward = Attention(config, attention, split), FeedForward(config)
        self.attention_norm1, self.attention_norm2, self.ffn_norm1 = (RMSNormWeight(D) for _ in range(3))

    def forward(
        self, stream: Sandwich, last_norm_D: Tensor, vectors_41D: Sequence[Tensor | None], tokens: Tokens
    ) -> None:
        """`last_norm_D`, the second weight of the feed-forward, is read where the next block begins."""
        scale, gate, scale2, gate2 = vectors_41D
        normed_BLD = stream.norm(self.attention_norm1.weight, scale, self.attention.to_qkv)
        stream.add(self.attention(normed_BLD, tokens), self.attention_norm2.weight, gate)
        normed_BLD = stream.norm(self.ffn_norm1.weight, scale2, self.feed_forward.w13)
        stream.add(self.feed_forward(normed_BLD), last_norm_D, gate2)


UNMODULATED = (None,) * 4


class LastNorms(nn.Module):
    """The last norm weights of all blocks, in one: a block at work reads that of the block before, whose other weights
    may have left the device.
    """

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(blocks * width))


# -- around the blocks --------------------------------------------------------------


class TimeEmbedding(nn.Module):
    """`TimestepEmbedder`: a sinusoid, cosines first, and two linear layers."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_CHANNELS, TIME_HIDDEN), nn.SiLU(), nn.Linear(TIME_HIDDEN, config.time_width)
        )

    def forward(self, t_S: Tensor) -> Tensor:
        """(S, time_width) in the model's dtype."""
        sinusoid = timestep_embedding(t_S, TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0.0)
        return cast(Tensor, self.mlp(sinusoid.to(cast(nn.Linear, self.mlp[0]).weight.dtype)))


class TextEmbedding(nn.ModuleDict):
    """A norm and a linear layer, named by their places."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__({"0": RMSNormWeight(config.cap_feat_dim), "1": Linear(config.cap_feat_dim, config.dim)})
        self.eps = config.norm_eps

    def forward(self, text_BTC: Tensor) -> Tensor:
        weight_C = cast(RMSNormWeight, self["0"]).weight
        return cast(Tensor, self["1"](norm(text_BTC, kind="rms", weight_D=weight_C, eps=self.eps)))


class FinalLayer(nn.Module):
    """A LayerNorm without weights, scaled, and a linear layer."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.linear = Linear(config.dim, PATCH**2 * config.in_channels)
        self.adaLN_modulation = nn.ModuleDict({"1": nn.Linear(config.time_width, config.dim)})

    def modulate(self, time_SE: Tensor) -> Tensor:
        """The scale at every step, (S, D)."""
        layer = cast(nn.Linear, self.adaLN_modulation["1"])
        return modulation(time_SE, layer.weight, layer.bias)

    def forward(self, x_BID: Tensor, scale_1D: Tensor) -> Tensor:
        return cast(Tensor, self.linear(norm(x_BID, kind="layer", scale=scale_1D, eps=OUT_EPS)))


@dataclass(frozen=True)
class Modulation:
    """Vectors of one step, which all samples share."""

    block_N41D: Tensor  # scale and gate of the attention, then of the feed-forward
    out_1D: Tensor  # scale


@dataclass(frozen=True)
class Request:
    """What a request fixes."""

    behind_BND: Tensor  # what stands behind the image tokens that are here: padding, and refined text with its own
    tokens: Tokens  # of the image, then of the text
    image: Tokens


class ZImageTransformer(nn.Module):
    """Its velocity has the opposite sign of the published model's, which predicts the way to the picture."""

    def __init__(self, config: ZImageConfig, attention: AttentionFn, split: Split = ONE_RANK) -> None:
        super().__init__()
        D, self.config, self.split = config.dim, config, split
        names = {
            "context_refiner": config.n_refiner_layers,
            "noise_refiner": config.n_refiner_layers,
            "layers": config.n_layers,
        }
        blocks = [f"{name}.{i}" for name, count in names.items() for i in range(count)]
        modulated = blocks[config.n_refiner_layers :]
        self.packed = {
            "last_norms": {f"{block}.ffn_norm2": 1 for block in blocks},
            "modulation": {f"{block}.adaLN_modulation.0": 1 for block in modulated},
        }
        texts = (f"context_refiner.{i}" for i in range(config.n_refiner_layers))
        self.before_first_step = ("cap_embedder", *texts, "t_embedder", "modulation")

        self.cap_embedder = TextEmbedding(config)
        self.context_refiner, self.noise_refiner, self.layers = (
            nn.ModuleList(Block(config, attention, split) for _ in range(count)) for count in names.values()
        )
        self.last_norms = LastNorms(len(blocks), D)
        self.t_embedder = TimeEmbedding(config)
        self.modulation = Linear(config.time_width, len(modulated) * 4 * D)
        self.x_pad_token, self.cap_pad_token = (nn.Parameter(torch.zeros(1, D)) for _ in range(2))
        # for one size of patches; the names have room for others
        self.all_x_embedder = nn.ModuleDict({"2-1": Linear(PATCH**2 * config.in_channels, D)})
        self.all_final_layer = nn.ModuleDict({"2-1": FinalLayer(config)})

    # -- before the first step --

    def prepare(self, text_BTC: Tensor, rows: int, columns: int) -> Request:
        """Of texts of one length, and a picture of so many rows and columns of tokens."""
        B, image, text = len(text_BTC), filled_up(rows * columns), filled_up(text_BTC.shape[1])
        streams = (image, text)
        own_image, own_text = own = tuple(map(self.split.own, streams))
        rotary = self.rotary(Sequenced(streams, 0, own), rows, columns, text_BTC.device)
        count = own_image.stop - own_image.start
        parts = [Rotary(rotary.cos[part], rotary.sin[part]) for part in (slice(count), slice(count, None))]
        of_text, of_image = Tokens((text,), parts[1]), Tokens((image,), parts[0])
        padding = count - self.drawn(own_image, rows * columns)
        read_BTD = self.read(text_BTC, own_text, of_text)
        behind_BND = torch.cat([self.x_pad_token.expand(B, padding, -1), read_BTD], dim=1)
        return Request(behind_BND, Tokens(streams, rotary), of_image)

    def drawn(self, own: slice, tokens: int) -> int:
        """How many of this rank's image tokens are of the picture, which has so many; the others are padding."""
        return max(0, min(own.stop, tokens) - own.start)

    def read(self, text_BTC: Tensor, own: slice, tokens: Tokens) -> Tensor:
        """The refined text, (B, T, D), of which this rank computes its own tokens."""
        B, T = text_BTC.shape[:2]
        padding_BTD = self.cap_pad_token.expand(B, tokens.streams[0] - T, -1)
        text_BTD = torch.cat([self.cap_embedder(text_BTC), padding_BTD], dim=1)
        stream = Sandwich(text_BTD[:, own].contiguous(), self.config.norm_eps)
        for block, last_norm_D in zip(self.context_refiner, self.last_norms_of(0), strict=False):
            block(stream, last_norm_D, UNMODULATED, tokens)
        return stream.total()

    def last_norms_of(self, first: int) -> Tensor:
        """Those of the blocks from one on, in the order of their names in `packed`."""
        return self.last_norms.weight.view(-1, self.config.dim)[first:]

    def rotary(self, sequence: Sequenced, rows: int, columns: int, device: torch.device) -> Rotary:
        """Three axes, of the image and then of the text.

        Text tokens, padding included, stand at (1, 0, 0), (2, 0, 0) and so on; image tokens at (n, row, column), n
        being the next; their padding at (0, 0, 0).
        """
        image, text_tokens = sequence.streams
        image_L3 = torch.zeros(image, 3)
        grid_YX3 = image_L3[: rows * columns].view(rows, columns, 3)
        grid_YX3[..., 0] = text_tokens + 1
        grid_YX3[..., 1], grid_YX3[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None]
        text_L3 = torch.zeros(text_tokens, 3)
        text_L3[:, 0] = torch.arange(text_tokens) + 1
        places_L3, c = sequence.here(torch.cat([image_L3, text_L3])), self.config
        axes = [rotary_table(places_L3[:, i], width, c.rope_theta) for i, width in enumerate(c.axes_dims)]
        cos, sin = (torch.cat(tables, dim=-1).to(device) for tables in zip(*axes, strict=True))
        return Rotary(cos, sin)

    def modulate(self, t_S: Tensor) -> list[Modulation]:
        """The vectors of every step, from fp32 timesteps of 0, all noise, to 1."""
        time_SE = self.t_embedder(t_S * self.config.t_scale)
        block_SN41D = self.modulation(time_SE).unflatten(-1, (-1, 4, 1, self.config.dim))
        out_SD = cast(FinalLayer, self.all_final_layer["2-1"]).modulate(time_SE)
        return [Modulation(*step) for step in zip(block_SN41D, out_SD[:, None], strict=True)]

    # -- at every step --

    def forward(self, x_BCYX: Tensor, modulation: Modulation, request: Request) -> Tensor:
        """Velocity, in the shape of the state."""
        eps, behind_BND = self.config.norm_eps, request.behind_BND
        patches_BIC = patchify(x_BCYX.to(behind_BND.dtype), (PATCH, PATCH), channel_fastest=True)
        (B, I), n = patches_BIC.shape[:2], self.config.n_refiner_layers
        filled = request.image.streams[0]
        own = self.split.own(filled)
        drawn, count = self.drawn(own, I), own.stop - own.start
        x_BLD = behind_BND.new_empty(B, drawn + behind_BND.shape[1], behind_BND.shape[2])
        x_BLD[:, drawn:] = behind_BND  # blocks add to it in place
        if drawn:
            for patches_IC, x_ID in zip(patches_BIC[:, own.start : own.start + drawn], x_BLD[:, :drawn], strict=True):
                self.all_x_embedder["2-1"](patches_IC, out=x_ID)

        blocks = list(zip(self.last_norms_of(n), modulation.block_N41D, strict=True))
        image = Sandwich(x_BLD[:, :count], eps)
        for block, (last_norm_D, vectors_41D) in zip(self.noise_refiner, blocks[:n], strict=True):
            block(image, last_norm_D, vectors_41D, request.image)
        image.total()
        stream = Sandwich(x_BLD, eps)
        for block, (last_norm_D, vectors_41D) in zip(self.layers, blocks[n:], strict=True):
            block(stream, last_norm_D, vectors_41D, request.tokens)

        tokens_BIC = self.split.whole(self.all_final_layer["2-1"](stream.total(count), modulation.out_1D), filled)
        grid = x_BCYX.shape[2] // PATCH, x_BCYX.shape[3] // PATCH
        return unpatchify(tokens_BIC[:, :I].contiguous(), grid, (PATCH, PATCH), channel_fastest=True).neg_()
