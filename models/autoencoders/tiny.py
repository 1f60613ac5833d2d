"""`AutoencoderTiny` of diffusers (TAESD, Bohan 2023): a small autoencoder for the latents of a large one.

Convolutions and ReLUs alone: a decode takes a small part of the large one's time, and loses some detail. Nothing is
random about its latents, which are in the space that the denoiser draws in, unless the config has a factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.kernels.layout import upsample_nearest
from sgl_diffusion.models.autoencoders.bands import ONE_BAND, Bands, check_no_bands, with_rims
from sgl_diffusion.models.autoencoders.tiles import tiled
from sgl_diffusion.models.config import ConfigError, demand, read_config
from sgl_diffusion.models.family import AttentionFn

# B batch  C channels  H, W spatial
TILE = 512  # pixels per side, where nobody says
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU}


@dataclass(frozen=True)
class TinyConfig:
    """`vae/config.json`."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> TinyConfig:
        unused = {
            "block_out_channels": "the decoder's widths again",
            "force_upcast": "a hint for fp16; --vae-precision decides",
            "latent_magnitude": "for latents that are kept in bytes",
            "latent_shift": "for latents that are kept in bytes",
        }
        config = read_config(cls, raw, ignored=unused)
        demand(config, upsample_fn="nearest", upsampling_scaling_factor=2)
        if config.act_fn not in ACTIVATIONS:
            raise ConfigError(f"config key act_fn={config.act_fn!r}: expected one of {', '.join(ACTIVATIONS)}")
        for side in ("encoder", "decoder"):
            key, blocks = f"{side}_block_out_channels", getattr(config, f"num_{side}_blocks")
            widths = getattr(config, key)
            # diffusers' layers take and give the same width between stages
            if len(set(widths)) != 1 or len(widths) != len(blocks):
                raise ConfigError(f"config key {key}={list(widths)}: expected {len(blocks)} equal widths, one a stage")
        if (encoder := len(config.num_encoder_blocks)) != (decoder := len(config.num_decoder_blocks)):
            raise ConfigError(
                f"config key num_encoder_blocks: {encoder} stages; expected {decoder}, as the decoder has"
            )
        return config

    @property
    def downsampling(self) -> int:
        """Pixels per latent and side."""
        return int(2 ** (len(self.num_decoder_blocks) - 1))


class Conv3x3(nn.Conv2d):
    """A convolution of a picture, or of a band of its rows."""

    def __init__(self, inner: int, outer: int, bands: Bands, *, bias: bool = True) -> None:
        super().__init__(inner, outer, 3, padding=(1 if bands.ranks == 1 else 0, 1), bias=bias)
        self.bands = bands

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(with_rims(x, self.bands.rims(x)))


class Block(nn.Module):
    """`AutoencoderTinyBlock`: three convolutions beside the way past them."""

    def __init__(self, channels: int, act_fn: str, bands: Bands) -> None:
        super().__init__()
        convs = [Conv3x3(channels, channels, bands) for _ in range(3)]
        act = ACTIVATIONS[act_fn]
        self.conv = nn.Sequential(convs[0], act(), convs[1], act(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + x).relu_()


class Upsample(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return upsample_nearest(x)


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] -> latents (B, C, H/f, W/f)."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        width, layers = config.encoder_block_out_channels[0], list[nn.Module]()
        for i, blocks in enumerate(config.num_encoder_blocks):
            if i == 0:
                layers.append(nn.Conv2d(config.in_channels, width, 3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            layers += [Block(width, config.act_fn, ONE_BAND) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers((x + 1) / 2)
        return y


class Decoder(nn.Module):
    """Latents (B, C, h, w) -> pictures (B, 3, f h, f w) in about [-1, 1]."""

    def __init__(self, config: TinyConfig, bands: Bands) -> None:
        super().__init__()
        self.bands = bands
        width, stages = config.decoder_block_out_channels[0], config.num_decoder_blocks
        layers: list[nn.Module] = [Conv3x3(config.latent_channels, width, bands), ACTIVATIONS[config.act_fn]()]
        for blocks in stages[:-1]:
            layers += [Block(width, config.act_fn, bands) for _ in range(blocks)]
            layers += [Upsample(), Conv3x3(width, width, bands, bias=False)]
        layers += [Block(width, config.act_fn, bands) for _ in range(stages[-1])]
        self.layers = nn.Sequential(*layers, Conv3x3(width, config.out_channels, bands))

    def forward(self, z: Tensor) -> Tensor:
        y: Tensor = self.layers(torch.tanh(self.bands.cut(z) / 3) * 3)
        return self.bands.whole(y * 2 - 1, z.shape[2])


class AutoencoderTiny(nn.Module):
    """`AutoencoderTiny`.

    Args:
        attention: not used; there is none.
        tiling, slicing, tile_height, tile_width, with_encoder, bands: as of `AutoencoderKL`; tiles are of 512 pixels
            where nobody says.
    """

    def __init__(
        self,
        config: TinyConfig,
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
        self.tile = (tile_height or TILE, tile_width or TILE)
        self.decoder = Decoder(config, bands)
        if with_encoder:
            self.encoder = Encoder(config)

    def unused_weights(self) -> tuple[str, ...]:
        """Prefixes of checkpoint names that this instance leaves out on purpose."""
        return () if hasattr(self, "encoder") else ("encoder.",)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor]:
        """The latent (B, C, H/f, W/f) of pictures in [-1, 1]."""
        return (self._run(self.encoder, x_BCHW, self.tile),)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about [-1, 1]."""
        f = self.config.downsampling
        tile = self.tile[0] // f, self.tile[1] // f
        if self.slicing and len(z_BCHW) > 1:
            return torch.cat([self._run(self.decoder, z, tile) for z in z_BCHW.split(1)])
        return self._run(self.decoder, z_BCHW, tile)

    def _run(self, model: nn.Module, x: Tensor, tile: Sequence[int]) -> Tensor:
        if self.tiling and (x.shape[2] > tile[0] or x.shape[3] > tile[1]):
            if model is self.decoder:
                check_no_bands(self.decoder.bands)
            return tiled(model, x, *tile)
        y: Tensor = model(x)
        return y
