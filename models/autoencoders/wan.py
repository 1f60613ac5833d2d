"""`AutoencoderKLWan`: clips and latents with a quarter of the frames, each coded without looking ahead.

Both published kinds: 16 channels at 1/8 of height and width (Wan2.1, Wan2.2-A14B), and 48 channels at 1/16, with
shortcuts around whole resolutions and pictures folded into 2 x 2 patches (Wan2.2-TI2V-5B). Names are those of
diffusers.

A clip of 4 k + 1 frames is k + 1 chunks: the first frame alone, then four frames for each latent one. A causal layer
needs two frames before its own, and the chunks hand these on as tensors, so that one function of fixed shapes decodes
all chunks but the first, and memory is that of a chunk, however long the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.models.autoencoders.causal import (
    CausalConv3d,
    ChannelNorm,
    Downsample,
    Factors,
    History,
    MidBlock,
    ResidualBlock,
    Upsample,
    add_averaged,
    add_repeated,
    kept_apart,
)
from sgl_diffusion.models.autoencoders.tiles import tiled
from sgl_diffusion.models.config import ConfigError, demand, read_config
from sgl_diffusion.models.family import AttentionFn, Execute

# B batch  C channels  T latent frames  F = 4 (T - 1) + 1 frames  H, W pixels  h, w latents
FRAMES_PER_LATENT = 4
TILE = 256  # pixels of a side, where nothing else is asked for
# of Wan2.1 and Wan2.2-A14B
LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
)  # fmt: skip


@dataclass(frozen=True)
class WanVaeConfig:
    """`vae/config.json`."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = LATENTS_MEAN
    latents_std: tuple[float, ...] = LATENTS_STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = FRAMES_PER_LATENT
    scale_factor_spatial: int = 8

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> WanVaeConfig:
        config = read_config(cls, raw, ignored={"dropout": "for training"})
        halvings = len(config.dim_mult) - 1
        if len(config.temperal_downsample) != halvings or sum(config.temperal_downsample) != 2:
            expected = f"{halvings} values, 2 of them true"
            raise ConfigError(f"config key temperal_downsample={config.temperal_downsample!r}: expected {expected}")
        for name in ("latents_mean", "latents_std"):
            if len(values := getattr(config, name)) != config.z_dim:
                raise ConfigError(f"config key {name}: {len(values)} values, expected z_dim={config.z_dim}")
        demand(
            config,
            attn_scales=(),
            scale_factor_temporal=FRAMES_PER_LATENT,
            scale_factor_spatial=2**halvings * config.patch,
        )
        return config

    @property
    def downsampling(self) -> int:
        """Pixels per latent and side."""
        return self.scale_factor_spatial

    @property
    def patch(self) -> int:
        """Pixels per side that are folded into channels."""
        return self.patch_size or 1


# -- encoder ------------------------------------------------------------------------


class DownBlock(nn.Module):
    """Residual blocks at one resolution and the way to the next, with a shortcut around them all."""

    def __init__(self, inner: int, outer: int, blocks: int, factors: Factors) -> None:
        super().__init__()
        self.factors, self.shares = factors, kept_apart(outer, inner, factors)
        self.resnets = nn.ModuleList(ResidualBlock(inner if i == 0 else outer, outer) for i in range(blocks))
        self.downsampler = Downsample(outer, frames=factors[0] == 2) if factors[1] == 2 else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        y = x
        for block in self.resnets:
            y = block(y, history)
        if self.downsampler is not None:
            y = self.downsampler(y, history)
        return add_averaged(y, x, self.factors, self.shares)


class Encoder(nn.Module):
    """A chunk (B, 3, 1 or 4, H, W), folded -> moments (B, 2 C, 1, h, w)."""

    def __init__(self, config: WanVaeConfig, attention: AttentionFn) -> None:
        super().__init__()
        widths = [config.base_dim * multiple for multiple in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList()
        for i, (inner, outer) in enumerate(zip(widths, widths[1:], strict=False)):
            is_last = i == len(config.dim_mult) - 1
            frames = not is_last and config.temperal_downsample[i]
            if config.is_residual:
                factors = (2 if frames else 1, 1 if is_last else 2, 1 if is_last else 2)
                self.down_blocks.append(DownBlock(inner, outer, config.num_res_blocks, factors))
                continue
            for j in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(inner if j == 0 else outer, outer))
            if not is_last:
                self.down_blocks.append(Downsample(outer, frames=frames))
        self.mid_block = MidBlock(widths[-1], attention)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = self.conv_in(x, history)
        for block in self.down_blocks:
            x = block(x, history)
        return self.conv_out(self.mid_block(x, history), history, self.norm_out)


# -- decoder ------------------------------------------------------------------------


class UpBlock(nn.Module):
    """Residual blocks at one resolution, then the way to the next unless it is the last.

    Args:
        factors: by which time, height and width grow.
        shortcut: repeat the block's input onto its result; the way up then keeps the channels, instead of halving them.
    """

    def __init__(self, inner: int, outer: int, blocks: int, factors: Factors, *, shortcut: bool) -> None:
        super().__init__()
        self.factors, self.grows, self.shortcut = factors, factors[1] == 2, shortcut
        self.resnets = nn.ModuleList(ResidualBlock(inner if i == 0 else outer, outer) for i in range(blocks))
        if self.grows:
            up = Upsample(outer, outer if shortcut else outer // 2, frames=factors[0] == 2)
            if shortcut:
                self.upsampler, self.shares = up, kept_apart(inner, outer, factors)
            else:
                self.upsamplers = nn.ModuleList([up])

    def forward(self, x: Tensor, history: History) -> Tensor:
        y = x
        for block in self.resnets:
            y = block(y, history)
        if not self.grows:
            return y
        if not self.shortcut:
            return self.upsamplers[0](y, history)
        return add_repeated(self.upsampler(y, history), x, self.factors, self.shares, is_first=history.is_first)


class Decoder(nn.Module):
    """A latent frame (B, C, 1, h, w) -> its chunk (B, 3, 1 or 4, H, W), folded."""

    def __init__(self, config: WanVaeConfig, attention: AttentionFn) -> None:
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        widths = [base * multiple for multiple in (config.dim_mult[-1], *config.dim_mult[::-1])]
        self.conv_in = CausalConv3d(config.z_dim, widths[0])
        self.mid_block = MidBlock(widths[0], attention)
        self.up_blocks = nn.ModuleList()
        for i, (inner, outer) in enumerate(zip(widths, widths[1:], strict=False)):
            is_last = i == len(config.dim_mult) - 1
            frames = not is_last and config.temperal_downsample[-1 - i]
            factors = (2 if frames else 1, 1 if is_last else 2, 1 if is_last else 2)
            if i > 0 and not config.is_residual:
                inner //= 2
            blocks = config.num_res_blocks + 1
            self.up_blocks.append(UpBlock(inner, outer, blocks, factors, shortcut=config.is_residual))
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, z: Tensor, history: History) -> Tensor:
        x = self.mid_block(self.conv_in(z, history), history)
        for block in self.up_blocks:
            x = block(x, history)
        return self.conv_out(x, history, self.norm_out)


# -- autoencoder --------------------------------------------------------------------


class AutoencoderKLWan(nn.Module):
    """`AutoencoderKLWan`.

    Args:
        tiling: code in overlapping tiles, which are blended: activations are those of one tile. The results are those
            of diffusers' tiles, and near those of the whole. Exact are pixels of one tile alone whose convolutions do
            not reach beyond its edge, up to what the middle block's attention mixes in: it sees a whole frame, here
            a tile's. At true size a decoder's reach is 18 latents, so that seams in a tile of 32 are not exact.
        slicing: code one clip of a batch at a time.
        tile_height, tile_width: pixels of a tile.
        with_encoder: build the encoder too.
    """

    def __init__(
        self,
        config: WanVaeConfig,
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
        self.tile = (tile_height or TILE, tile_width or TILE)
        C = config.z_dim
        self.decoder = Decoder(config, attention)
        self.post_quant_conv = nn.Conv3d(C, C, 1)
        if with_encoder:
            self.encoder = Encoder(config, attention)
            self.quant_conv = nn.Conv3d(2 * C, 2 * C, 1)

    def unused_weights(self) -> tuple[str, ...]:
        """Prefixes of checkpoint names that this instance leaves out on purpose."""
        return () if hasattr(self, "encoder") else ("encoder.", "quant_conv.")

    def normalise(self, latents: Tensor) -> Tensor:
        """What a denoiser works on, of latents (B, C, T, h, w): mean 0 and deviation 1 by channel."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, x: Tensor) -> Tensor:
        """Latents (B, C, T, h, w), of what a denoiser works on."""
        mean, std = self._statistics(x)
        return x * std + mean

    def _statistics(self, like: Tensor) -> Iterable[Tensor]:
        vectors = (self.config.latents_mean, self.config.latents_std)
        return (torch.tensor(v, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1) for v in vectors)

    # -- pixels to latents --

    def encode(self, x_BCFHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents (B, C, T, h, w) of clips (B, 3, F, H, W) in [-1, 1]; of pictures, F = 1.

        Raises:
            ValueError: F is not 4 k + 1.
        """
        if x_BCFHW.shape[2] % FRAMES_PER_LATENT != 1:
            raise ValueError(f"{x_BCFHW.shape[2]} frames: expected 4 k + 1")
        clips = x_BCFHW.split(1) if self.slicing else (x_BCFHW,)
        moments = torch.cat([self._moments(clip) for clip in clips])
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def _moments(self, x: Tensor) -> Tensor:
        folded = fold(x, self.config.patch)
        # diffusers measures the clip before it is folded, and its tiles after that
        if self.tiling and (x.shape[3] > self.tile[0] or x.shape[4] > self.tile[1]):
            return tiled(self._encode_tile, folded, *self.tile)
        return self._encode_tile(folded)

    def _encode_tile(self, x: Tensor) -> Tensor:
        frames = x.shape[2]
        moments = _run_chunks(self.encoder, [1] + [FRAMES_PER_LATENT] * (frames // FRAMES_PER_LATENT), x)
        return torch.cat([self.quant_conv(chunk) for chunk in moments], dim=2)

    # -- latents to pixels --

    def decode(self, z_BCThw: Tensor) -> Tensor:
        """Clips (B, 3, F, H, W) in [-1, 1], from latents that are not normalised."""
        B, _, T, h, w = z_BCThw.shape
        f, frames = self.config.downsampling, FRAMES_PER_LATENT * (T - 1) + 1
        channels = self.config.out_channels // self.config.patch**2
        clips = torch.empty(
            (B, channels, frames, f * h, f * w),
            dtype=z_BCThw.dtype,
            device=z_BCThw.device,
            memory_format=torch.channels_last_3d,
        )
        parts = zip(clips.split(1), z_BCThw.split(1), strict=True) if self.slicing else [(clips, z_BCThw)]
        for clip, z in parts:
            _fill(clip, self.decode_chunks(z))
        return clips

    def decode_chunks(self, z_BCThw: Tensor, execute: Execute | None = None) -> Iterator[Tensor]:
        """The chunks of `decode` in their order, (B, 3, 1 or 4, H, W), each computed when it is asked for.

        Tiles are decoded one by one for the whole clip, so with tiling nothing comes before all is done.

        Args:
            execute: runs the functions of a chunk, as captured graphs perhaps; the default holds less memory.
        """
        if self._is_tiled(z_BCThw):
            clip = self._finished(tiled(self._decode_tile, z_BCThw, *self._latent_tile()))
            yield from clip.split([1] + [FRAMES_PER_LATENT] * (z_BCThw.shape[2] - 1), dim=2)
        elif execute is None:
            yield from map(self._finished, self._samples(z_BCThw))
        else:
            first, *rest = z_BCThw.split(1, dim=2)
            pixels, *past = execute(self.first_chunk, first)
            yield pixels
            for z in rest:
                pixels, *past = execute(self.next_chunk, z, tuple(past))
                yield pixels

    def first_chunk(self, z_BC1hw: Tensor) -> tuple[Tensor, ...]:
        """The first frame (B, 3, 1, H, W), and what the next chunk needs of it."""
        return self._chunk(z_BC1hw, History())

    def next_chunk(self, z_BC1hw: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Four frames (B, 3, 4, H, W), and what the next chunk needs; `past` is what the chunk before left.

        A pure function: all clips of a size take the same shapes from the second latent frame on.
        """
        return self._chunk(z_BC1hw, History(past))

    def _chunk(self, z: Tensor, history: History) -> tuple[Tensor, ...]:
        return (self._finished(self._sample(z, history)), *history.kept)

    def _is_tiled(self, z: Tensor) -> bool:
        rows, columns = self._latent_tile()
        return self.tiling and (z.shape[3] > rows or z.shape[4] > columns)

    def _latent_tile(self) -> tuple[int, int]:
        return self.tile[0] // self.config.downsampling, self.tile[1] // self.config.downsampling

    def _decode_tile(self, z: Tensor) -> Tensor:
        B, _, T, h, w = z.shape
        f, frames = self.config.downsampling // self.config.patch, FRAMES_PER_LATENT * (T - 1) + 1
        return _fill(z.new_empty(B, self.config.out_channels, frames, f * h, f * w), self._samples(z))

    def _samples(self, z: Tensor) -> Iterator[Tensor]:
        """Folded chunks, not limited to [-1, 1]."""
        return _run_chunks(self._sample, [1] * z.shape[2], z)

    def _sample(self, z: Tensor, history: History) -> Tensor:
        return self.decoder(self.post_quant_conv(z), history)

    def _finished(self, sample: Tensor) -> Tensor:
        return unfold(sample.clamp_(-1.0, 1.0), self.config.patch)


def _run_chunks(run: Callable[[Tensor, History], Tensor], lengths: Sequence[int], x: Tensor) -> Iterator[Tensor]:
    """`run` of chunks of so many frames of x, one after the other."""
    history = History()
    for chunk in x.split(lengths, dim=2):
        yield run(chunk, history)
        history = History(history.kept)


def _fill(clip: Tensor, chunks: Iterable[Tensor]) -> Tensor:
    """The clip, with the chunks written to it one after the other."""
    start = 0
    for chunk in chunks:
        clip[:, :, start : start + chunk.shape[2]].copy_(chunk)
        start += chunk.shape[2]
    return clip


def fold(x_BCFHW: Tensor, patch: int) -> Tensor:
    """(B, C p p, F, H / p, W / p): the pixels of a patch become channels, columns before rows."""
    x = x_BCFHW.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # B, C, F, h, p of rows, w, p of columns
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unfold(x: Tensor, patch: int) -> Tensor:
    """(B, C, F, H, W), channels last, of what `fold` made."""
    if patch == 1:
        return x
    x = x.unflatten(1, (-1, patch, patch))  # B, C, p of columns, p of rows, F, h, w
    return x.permute(0, 4, 5, 3, 6, 2, 1).flatten(4, 5).flatten(2, 3).movedim(-1, 1)
