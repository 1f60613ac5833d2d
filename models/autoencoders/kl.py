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
from sgl_diffusion.kernels.group_norm_parts import group_moments, group_norm_parts
from sgl_diffusion.models.autoencoders.bands import ONE_BAND, Bands, check_no_bands, conv3x3, doubled, with_rims
from sgl_diffusion.models.autoencoders.tiles import tiled
from sgl_diffusion.models.config import demand, read_config
from sgl_diffusion.models.family import AttentionFn

# B batch  C channels  H, W spatial, of the picture or of a band of its rows
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
    """Weights of a group norm, with the SiLU that follows it in the same kernel where there is one.

    Args:
        rims: a convolution of 3 x 3 follows, which is given rows of other bands too.
    """

    def __init__(self, groups: int, channels: int, bands: Bands, *, silu: bool, rims: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.groups, self.bands, self.silu, self.rims = groups, bands, silu, rims

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.bands.ranks == 1:
            return group_norm(x_BCHW, self.weight, self.bias, self.groups, NORM_EPS, silu=self.silu)
        # rows travel as they are while the moments are taken, and are normed where they arrive
        rims = self.bands.rims(x_BCHW) if self.rims else None
        moments = self.bands.gathered(group_moments(x_BCHW, self.groups))

        def write(x: Tensor, out: Tensor | None = None) -> Tensor:
            return group_norm_parts(x, moments, self.weight, self.bias, self.groups, NORM_EPS, silu=self.silu, out=out)

        return write(x_BCHW) if rims is None else with_rims(x_BCHW, rims, write)


class ResnetBlock(nn.Module):
    def __init__(self, inner: int, outer: int, groups: int, bands: Bands) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, inner, bands, silu=True)
        self.conv1 = conv3x3(inner, outer, bands)
        self.norm2 = GroupNorm(groups, outer, bands, silu=True)
        self.conv2 = conv3x3(outer, outer, bands)
        self.conv_shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class SpatialAttention(nn.Module):
    """One head over all positions (`Attention` with a group norm and a residual)."""

    def __init__(self, channels: int, groups: int, attention: AttentionFn, bands: Bands) -> None:
        super().__init__()
        self.attention, self.bands = attention, bands
        self.group_norm = GroupNorm(groups, channels, bands, silu=False, rims=False)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x_BCHW: Tensor, rows: int) -> Tensor:
        """Positions of all `rows` are keys: those of other bands come as features, half of what keys and values are."""
        B, C, H, W = x_BCHW.shape
        normed = self.group_norm(x_BCHW)
        tokens, seen = (x.flatten(2).transpose(1, 2) for x in (normed, self.bands.whole(normed, rows)))
        q, k, v = (f(x).view(B, -1, 1, C) for f, x in ((self.to_q, tokens), (self.to_k, seen), (self.to_v, seen)))
        mixed = self.to_out[0](self.attention(q, k, v).view(B, H * W, C))
        return x_BCHW + mixed.transpose(1, 2).reshape(B, C, H, W)


class MidBlock(nn.Module):
    def __init__(self, C: int, config: VaeConfig, attention: AttentionFn, bands: Bands) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList(ResnetBlock(C, C, groups, bands) for _ in range(2))
        with_attention = config.mid_block_add_attention
        self.attentions = nn.ModuleList([SpatialAttention(C, groups, attention, bands)] if with_attention else [])

    def forward(self, x: Tensor, rows: int) -> Tensor:
        """Of x, all `rows` or a band of them."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x, rows)
        return self.resnets[1](x)


class Resample(nn.Module):
    """A 3x3 convolution after nearest doubling (`up`) or with stride 2 after padding right and below."""

    def __init__(self, channels: int, bands: Bands, *, up: bool) -> None:
        super().__init__()
        self.up, self.bands = up, bands
        self.conv = conv3x3(channels, channels, bands) if up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(doubled(x, self.bands))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Stage(nn.Module):
    """ResNet blocks at one resolution, then a change of resolution unless it is the last stage."""

    def __init__(self, inner: int, outer: int, blocks: int, groups: int, bands: Bands, *, up: bool, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(inner if i == 0 else outer, outer, groups, bands) for i in range(blocks)
        )
        self.resample = "upsamplers" if up else "downsamplers"
        if not last:
            setattr(self, self.resample, nn.ModuleList([Resample(outer, bands, up=up)]))
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
                ONE_BAND,
                up=False,
                last=i == len(widths) - 1,
            )
            for i, w in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], config, attention, ONE_BAND)
        self.conv_norm_out = GroupNorm(groups, widths[-1], ONE_BAND, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x, x.shape[2])))


class Decoder(nn.Module):
    """Latents (B, C, h, w) -> pictures (B, 3, f h, f w), with a band of rows on every rank in between."""

    def __init__(self, config: VaeConfig, attention: AttentionFn, bands: Bands) -> None:
        super().__init__()
        widths, groups, self.bands = config.decoder_widths[::-1], config.norm_num_groups, bands
        self.conv_in = conv3x3(config.latent_channels, widths[0], bands)
        self.mid_block = MidBlock(widths[0], config, attention, bands)
        self.up_blocks = nn.ModuleList(
            Stage(
                widths[max(i - 1, 0)],
                w,
                config.layers_per_block + 1,
                groups,
                bands,
                up=True,
                last=i == len(widths) - 1,
            )
            for i, w in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], bands, silu=True)
        self.conv_out = conv3x3(widths[-1], config.out_channels, bands)

    def forward(self, z: Tensor) -> Tensor:
        rows, z = z.shape[2], self.bands.cut(z)
        x = self.mid_block(self.conv_in(with_rims(z, self.bands.rims(z))), rows)
        for block in self.up_blocks:
            x = block(x)
        return self.bands.whole(self.conv_out(self.conv_norm_out(x)), rows)


class AutoencoderKL(nn.Module):
    """`AutoencoderKL`.

    Args:
        tiling: work in overlapping, blended tiles: memory stays that of one tile; seams are near, not exact. Exact
            ones are dear: a group norm averages over the whole picture, so that each of thirty would have to wait for
            all tiles, and to hold their activations or to compute anew what came before.
        slicing: decode one picture of a batch at a time.
        tile_height, tile_width: pixels of a tile; the checkpoint's `sample_size` where None.
        with_encoder: build the encoder too.
        bands: decode on several ranks, in bands of rows without seams; not in tiles then. All ranks have, and get, the
            whole. Encoding is every rank's own.
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
        bands: Bands = ONE_BAND,
    ) -> None:
        super().__init__()
        self.config, self.tiling, self.slicing = config, tiling, slicing
        self.tile = (tile_height or config.sample_size, tile_width or config.sample_size)
        C = config.latent_channels
        self.decoder = Decoder(config, attention, bands)
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
            check_no_bands(self.decoder.bands)
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
