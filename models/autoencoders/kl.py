"""AutoencoderKL (Rombach et al. 2022) as diffusers lays it out: ResNet blocks, one attention block, 8x per side.

Parameter names are those of diffusers' `AutoencoderKL`. The decoder is always there, the encoder only on request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgl_diffusion.kernels.group_norm import group_norm
from sgl_diffusion.kernels.layout import upsample_nearest
from sgl_diffusion.models.autoencoders.tiles import tiled
from sgl_diffusion.models.config import demand, read_config
from sgl_diffusion.models.family import AttentionFn

# B batch  C channels  H, W spatial
NORM_EPS = 1e-6


@dataclass(frozen=True)
class VaeConfig:
    """`vae/config.json`."""

    in_channels: int
    out_channels: int
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    latent_channels: int
    sample_size: int
    scaling_factor: float
    layers_per_block: int = 1
    norm_num_groups: int = 32
    act_fn: str = "silu"
    shift_factor: float | None = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> VaeConfig:
        config = read_config(cls, raw, ignored={"force_upcast": "a hint for fp16; --vae-precision decides"})
        n = len(config.block_out_channels)
        demand(
            config,
            act_fn="silu",
            down_block_types=("DownEncoderBlock2D",) * n,
            up_block_types=("UpDecoderBlock2D",) * n,
            latents_mean=None,
            latents_std=None,
        )
        return config

    @property
    def downsampling(self) -> int:
        """Pixels per latent and side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Of the decoder's stages, in the order of the encoder's."""
        return self.block_out_channels


class GroupNorm(nn.Module):
    """Weights of a group norm, with the SiLU that follows it in the same kernel where there is one."""

    def __init__(self, groups: int, channels: int, *, silu: bool) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.groups, self.silu = groups, silu

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return group_norm(x_BCHW, self.weight, self.bias, self.groups, NORM_EPS, silu=self.silu)


class ResnetBlock(nn.Module):
    def __init__(self, inner: int, outer: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, inner, silu=True)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = GroupNorm(groups, outer, silu=True)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class SpatialAttention(nn.Module):
    """One head over all positions (`Attention` with a group norm and a residual)."""

    def __init__(self, channels: int, groups: int, attention: AttentionFn) -> None:
        super().__init__()
        self.attention = attention
        self.group_norm = GroupNorm(groups, channels, silu=False)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        tokens = self.group_norm(x_BCHW).view(B, C, H * W).transpose(1, 2)
        q, k, v = (f(tokens).view(B, H * W, 1, C) for f in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out[0](self.attention(q, k, v).view(B, H * W, C))
        return x_BCHW + mixed.transpose(1, 2).reshape(B, C, H, W)


class MidBlock(nn.Module):
    def __init__(self, C: int, config: VaeConfig, attention: AttentionFn) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList(ResnetBlock(C, C, groups) for _ in range(2))
        with_attention = config.mid_block_add_attention
        self.attentions = nn.ModuleList([SpatialAttention(C, groups, attention)] if with_attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Resample(nn.Module):
    """A 3x3 convolution after nearest doubling (`up`) or with stride 2 after padding right and below."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(upsample_nearest(x))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Stage(nn.Module):
    """ResNet blocks at one resolution, then a change of resolution unless it is the last stage."""

    def __init__(self, inner: int, outer: int, blocks: int, groups: int, *, up: bool, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(inner if i == 0 else outer, outer, groups) for i in range(blocks))
        self.resample = "upsamplers" if up else "downsamplers"
        if not last:
            setattr(self, self.resample, nn.ModuleList([Resample(outer, up=up)]))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return x if self.last else getattr(self, self.resample)[0](x)


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) -> moments (B, 2 C, H/f, W/f)."""

    def __init__(self, config: VaeConfig, attention: AttentionFn) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                w,
                config.layers_per_block,
                groups,
                up=False,
                last=i == len(widths) - 1,
            )
            for i, w in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], config, attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1], silu=True)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    """Latents (B, C, h, w) -> pictures (B, 3, f h, f w)."""

    def __init__(self, config: VaeConfig, attention: AttentionFn) -> None:
        super().__init__()
        widths, groups = config.decoder_widths[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], config, attention)
        self.up_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                w,
                config.layers_per_block + 1,
                groups,
                up=True,
                last=i == len(widths) - 1,
            )
            for i, w in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], silu=True)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class AutoencoderKL(nn.Module):
    """`AutoencoderKL`.

    Args:
        tiling: work in overlapping, blended tiles: memory stays that of one tile; seams are near, not exact. Exact
            ones are dear: a group norm averages over the whole picture, so that each of thirty would have to wait for
            all tiles, and to hold their activations or to compute anew what came before.
        slicing: decode one picture of a batch at a time.
        tile_height, tile_width: pixels of a tile; the checkpoint's `sample_size` where None.
        with_encoder: build the encoder too.
    """

    def __init__(
        self,
        config: VaeConfig,
        attention: AttentionFn,
        *,
        tiling: bool = False,
        slicing: bool = False,
        tile_height: int | None = None,
        tile_width: int | None = None,
        with_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.tiling, self.slicing = config, tiling, slicing
        self.tile = (tile_height or config.sample_size, tile_width or config.sample_size)
        C = config.latent_channels
        self.decoder = Decoder(config, attention)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(C, C, 1)
        if with_encoder:
            self.encoder = Encoder(config, attention)
            if config.use_quant_conv:
                self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1)

    def unused_weights(self) -> tuple[str, ...]:
        """Prefixes of checkpoint names that this instance leaves out on purpose."""
        return () if hasattr(self, "encoder") else ("encoder.", "quant_conv.")

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.conv_in.weight.dtype

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent (B, C, H/f, W/f) of pictures in [-1, 1]; in tiles, as `decode`."""
        rows, columns = self.tile
        if self.tiling and (x_BCHW.shape[2] > rows or x_BCHW.shape[3] > columns):
            moments = tiled(self._moments, x_BCHW, rows, columns)
        else:
            moments = self._moments(x_BCHW)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def _moments(self, x: Tensor) -> Tensor:
        moments: Tensor = self.encoder(x)
        return self.quant_conv(moments) if self.config.use_quant_conv else moments

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about [-1, 1], from unscaled latents."""
        if self.slicing and len(z_BCHW) > 1:
            return torch.cat([self._decode(z) for z in z_BCHW.split(1)])
        return self._decode(z_BCHW)

    def _decode(self, z: Tensor) -> Tensor:
        f = self.config.downsampling
        rows, columns = self.tile[0] // f, self.tile[1] // f
        if self.tiling and (z.shape[2] > rows or z.shape[3] > columns):
            return tiled(self._decode_whole, z, rows, columns)
        return self._decode_whole(z)

    def _decode_whole(self, z: Tensor) -> Tensor:
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z)


@dataclass(frozen=True)
class Decode:
    """A pure function of latents, equal for one autoencoder and way to decode: it can be captured."""

    vae: Any  # an autoencoder of pictures
    tiling: bool
    slicing: bool

    def __call__(self, z_BCHW: Tensor) -> tuple[Tensor]:
        return (self.vae.decode(z_BCHW),)
