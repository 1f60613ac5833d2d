"""`AutoencoderKLWan`: clips and latents with a quarter of the frames, each coded without looking ahead.

Both published kinds: 16 channels at 1/8 of height and width (Wan2.1, Wan2.2-A14B), and 48 channels at 1/16, with
shortcuts around whole resolutions and pictures folded into 2 x 2 patches (Wan2.2-TI2V-5B). Names are those of
diffusers.

A clip of 4 k + 1 frames is k + 1 chunks: the first frame alone, then four frames for each latent one. A causal layer
needs two frames before its own, and the chunks hand these on as tensors, so that one function of fixed shapes decodes
all chunks but the first, and memory is that of a chunk, however long the clip.

Tiles have no seams: norms are of one position, convolutions see a few pixels around (`windows.py`), and only the middle
block's attention sees a whole picture. It works on latents, of which there are few, so it is run on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.models.autoencoders.bands import ONE_BAND, Bands, check_no_bands
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
    empty_clip,
    kept_apart,
    through,
)
from sgl_diffusion.models.autoencoders.windows import WHOLE, Padding, Window, tiles_of, trimmed
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
        self.reach = ResidualBlock.REACH * blocks

    def sees(self, out: Window) -> Window:
        return (out if self.downsampler is None else self.downsampler.sees(out)).grown(self.reach)

    def gives(self, given: Window) -> Window:
        given = given.shrunk(self.reach)
        return given if self.downsampler is None else self.downsampler.gives(given)

    def forward(self, x: Tensor, history: History, padding: Padding = WHOLE) -> Tensor:
        y, beyond = x, 0
        for block in self.resnets:
            y = block(y, history, padding)
        if self.downsampler is not None:
            y, beyond = self.downsampler(y, history, padding), 1
        return add_averaged(y, trimmed(x, padding, self.reach, self.reach + beyond), self.factors, self.shares)


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
        # what comes after the last halving
        self.at_latents = 1 if config.is_residual else config.num_res_blocks
        self.mid_block = MidBlock(widths[-1], attention)
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim)

    def forward(self, x: Tensor, history: History) -> Tensor:
        return self.middle(self.down(x, history), history)

    def down(self, x: Tensor, history: History, tile: Window | None = None) -> Tensor:
        """(B, D, 1, h, w), or a tile of it, of a whole chunk."""
        return through([self.conv_in, *self.down_blocks[: -self.at_latents]], x, history, tile)

    def middle(self, x: Tensor, history: History) -> Tensor:
        for block in self.down_blocks[-self.at_latents :]:
            x = block(x, history)
        return self.conv_out(self.mid_block(x, history, x.shape[3]), history, self.norm_out)


# -- decoder ------------------------------------------------------------------------


class UpBlock(nn.Module):
    """Residual blocks at one resolution, then the way to the next unless it is the last.

    Args:
        factors: by which time, height and width grow.
        shortcut: repeat the block's input onto its result; the way up then keeps the channels, instead of halving them.
    """

    def __init__(self, inner: int, outer: int, blocks: int, factors: Factors, bands: Bands, *, shortcut: bool) -> None:
        super().__init__()
        self.factors, self.grows, self.shortcut = factors, factors[1] == 2, shortcut
        self.reach = ResidualBlock.REACH * blocks
        self.resnets = nn.ModuleList(ResidualBlock(inner if i == 0 else outer, outer, bands) for i in range(blocks))
        if self.grows:
            up = Upsample(outer, outer if shortcut else outer // 2, bands, frames=factors[0] == 2)
            if shortcut:
                self.upsampler, self.shares = up, kept_apart(inner, outer, factors)
            else:
                self.upsamplers = nn.ModuleList([up])

    def sees(self, out: Window) -> Window:
        """Enough for one pixel beyond `out` at the higher resolution, whose convolution has zeros around."""
        return (out.grown(1).with_next().halved() if self.grows else out).grown(self.reach)

    def gives(self, given: Window) -> Window:
        """With a pixel around that is wrong where the picture goes on, if the block grows."""
        return given.shrunk(self.reach).scaled(2 if self.grows else 1)

    def forward(self, x: Tensor, history: History, padding: Padding = WHOLE) -> Tensor:
        y = x
        for block in self.resnets:
            y = block(y, history, padding)
        if not self.grows:
            return y
        if not self.shortcut:
            return self.upsamplers[0](y, history)
        x = trimmed(x, padding, self.reach, self.reach)
        return add_repeated(self.upsampler(y, history), x, self.factors, self.shares, is_first=history.is_first)


class Decoder(nn.Module):
    """A latent frame (B, C, 1, h, w) -> its chunk (B, 3, 1 or 4, H, W), folded; in between a band of rows a rank."""

    def __init__(self, config: WanVaeConfig, attention: AttentionFn, bands: Bands) -> None:
        super().__init__()
        self.bands = bands
        base = config.decoder_base_dim or config.base_dim
        widths = [base * multiple for multiple in (config.dim_mult[-1], *config.dim_mult[::-1])]
        self.conv_in = CausalConv3d(config.z_dim, widths[0], bands=bands)
        self.mid_block = MidBlock(widths[0], attention, bands)
        self.up_blocks = nn.ModuleList()
        for i, (inner, outer) in enumerate(zip(widths, widths[1:], strict=False)):
            is_last = i == len(config.dim_mult) - 1
            frames = not is_last and config.temperal_downsample[-1 - i]
            factors = (2 if frames else 1, 1 if is_last else 2, 1 if is_last else 2)
            if i > 0 and not config.is_residual:
                inner //= 2
            blocks = config.num_res_blocks + 1
            self.up_blocks.append(UpBlock(inner, outer, blocks, factors, bands, shortcut=config.is_residual))
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, bands=bands)

    def forward(self, z: Tensor, history: History) -> Tensor:
        return self.bands.whole(self.up(self.middle(z, history), history), z.shape[3])

    def middle(self, z: Tensor, history: History) -> Tensor:
        """(B, D, 1, h, w), or a band of its rows: what needs the whole latent frame."""
        return self.mid_block(self.conv_in(self.bands.cut(z), history), history, z.shape[3])

    def up(self, x: Tensor, history: History, tile: Window | None = None) -> Tensor:
        """The chunk, or a band or tile of it, of what the middle block made of the whole."""
        if tile is None:
            return self.conv_out(through(self.up_blocks, x, history, None), history, self.norm_out)
        seen = self.conv_out.sees(tile)
        x = through(self.up_blocks, x, history, seen)
        return self.conv_out(x, history, self.norm_out, seen.padding)


# -- autoencoder --------------------------------------------------------------------


class AutoencoderKLWan(nn.Module):
    """`AutoencoderKLWan`.

    Args:
        tiling: code in tiles, without seams: results are those of the whole, up to the rounding of convolutions that
            add up in another order. Activations are those of one tile, and of the middle blocks, which work on latents
            as a whole.
        slicing: code one clip of a batch at a time.
        tile_height, tile_width: pixels of a tile, at most, without those of its neighbours that it needs.
        with_encoder: build the encoder too.
        bands: decode on several ranks, in bands of rows without seams; not in tiles then. All ranks have, and get, the
            whole. Encoding is every rank's own.
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
        bands: Bands = ONE_BAND,
    ) -> None:
        super().__init__()
        self.config, self.tiling, self.slicing = config, tiling, slicing
        self.tile = (tile_height or TILE, tile_width or TILE)
        C = config.z_dim
        self.decoder = Decoder(config, attention, bands)
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
            ValueError: F is not 4 k + 1; or the sides, in tiles, not multiples of `downsampling`.
        """
        if x_BCFHW.shape[2] % FRAMES_PER_LATENT != 1:
            raise ValueError(f"{x_BCFHW.shape[2]} frames: expected 4 k + 1")
        clips = x_BCFHW.split(1) if self.slicing else (x_BCFHW,)
        moments = torch.cat([self._moments(clip) for clip in clips])
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def _moments(self, x: Tensor) -> Tensor:
        (frames, H, W), f = x.shape[2:], self.config.downsampling
        lengths = [1] + [FRAMES_PER_LATENT] * (frames // FRAMES_PER_LATENT)
        chunks, tiles = fold(x, self.config.patch).split(lengths, dim=2), self._tiles(H // f, W // f)
        if len(tiles) == 1:
            moments = _run_chunks(self.encoder, chunks)
        elif H % f or W % f:
            raise ValueError(f"{W}x{H} pixels in tiles: expected multiples of {f}")
        else:
            moments = _run_chunks(self.encoder.middle, self._small_chunks(chunks, tiles))
        return torch.cat([self.quant_conv(chunk) for chunk in moments], dim=2)

    def _small_chunks(self, chunks: Sequence[Tensor], tiles: Sequence[Window]) -> list[Tensor]:
        """What becomes of the chunks on the way to the encoder's middle block, (B, D, 1, h, w), tile by tile."""
        small: list[Tensor] = []
        for tile in tiles:
            for i, part in enumerate(_run_chunks(partial(self.encoder.down, tile=tile), chunks)):
                if i == len(small):
                    small.append(empty_clip(part, (*part.shape[:3], tile.rows.size, tile.columns.size)))
                tile.of(small[i]).copy_(part)
        return small

    # -- latents to pixels --

    def decode(self, z_BCThw: Tensor) -> Tensor:
        """Clips (B, 3, F, H, W) in [-1, 1], from latents that are not normalised.

        Tiles are done one after the other, each for the whole clip: what layers remember is that of one tile.
        """
        f, tiles = self.config.downsampling, self._decoding_tiles(*z_BCThw.shape[3:])
        clips = self._empty_pixels(z_BCThw, FRAMES_PER_LATENT * (z_BCThw.shape[2] - 1) + 1)
        parts = zip(clips.split(1), z_BCThw.split(1), strict=True) if self.slicing else [(clips, z_BCThw)]
        for clip, z in parts:
            if len(tiles) == 1:
                _fill(clip, self.decode_chunks(z))
                continue
            middles = list(_run_chunks(self._middle, z.split(1, dim=2)))
            for tile in tiles:
                _fill(tile.scaled(f).of(clip), _run_chunks(partial(self._pixels, tile=tile), middles))
        return clips

    def decode_chunks(self, z_BCThw: Tensor, execute: Execute | None = None) -> Iterator[Tensor]:
        """The chunks of `decode` in their order, (B, 3, 1 or 4, H, W), each computed when it is asked for.

        Chunks are done one after the other, each in all tiles: what layers remember of all tiles is held.

        Args:
            execute: runs the functions of a chunk, as captured graphs perhaps; the default holds less memory. Tiles,
                which differ in shape, are run as they stand.
        """
        tiles = self._decoding_tiles(*z_BCThw.shape[3:])
        if len(tiles) > 1:
            yield from self._chunks_of_tiles(z_BCThw, tiles)
        elif execute is None:
            yield from map(self._finished, _run_chunks(self._sample, z_BCThw.split(1, dim=2)))
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

    def _sample(self, z: Tensor, history: History) -> Tensor:
        """A folded chunk, not limited to [-1, 1]."""
        return self.decoder(self.post_quant_conv(z), history)

    def _chunks_of_tiles(self, z: Tensor, tiles: Sequence[Window]) -> Iterator[Tensor]:
        chunks = z.split(1, dim=2)
        histories = [History(is_last=len(chunks) == 1) for _ in tiles]
        for i, x in enumerate(_run_chunks(self._middle, chunks)):
            yield self._joined(x, tiles, histories)
            histories = [History(history.kept, is_last=i == len(chunks) - 2) for history in histories]

    def _joined(self, x_BD1hw: Tensor, tiles: Sequence[Window], histories: Sequence[History]) -> Tensor:
        """All tiles of the chunk that follows from the middle block's result."""
        chunk = self._empty_pixels(x_BD1hw, 1 if histories[0].is_first else FRAMES_PER_LATENT)
        for tile, history in zip(tiles, histories, strict=True):
            tile.scaled(self.config.downsampling).of(chunk).copy_(self._pixels(x_BD1hw, history, tile))
        return chunk

    def _middle(self, z: Tensor, history: History) -> Tensor:
        return self.decoder.middle(self.post_quant_conv(z), history)

    def _pixels(self, x_BD1hw: Tensor, history: History, tile: Window) -> Tensor:
        """Of a chunk, a tile, given in latents."""
        side = self.config.downsampling // self.config.patch
        return self._finished(self.decoder.up(x_BD1hw, history, tile.scaled(side)))

    def _empty_pixels(self, like_BCThw: Tensor, frames: int) -> Tensor:
        B, f, channels = len(like_BCThw), self.config.downsampling, self.config.out_channels // self.config.patch**2
        return empty_clip(like_BCThw, (B, channels, frames, *(f * side for side in like_BCThw.shape[3:])))

    def _tiles(self, h: int, w: int) -> list[Window]:
        """Of h x w latents; one if they are worked on as a whole."""
        whole = Window.whole(h, w)
        if not self.tiling:
            return [whole]
        rows, columns = (max(1, side // self.config.downsampling) for side in self.tile)
        return tiles_of(whole, rows, columns)

    def _decoding_tiles(self, h: int, w: int) -> list[Window]:
        tiles = self._tiles(h, w)
        if len(tiles) > 1:
            check_no_bands(self.decoder.bands)
        return tiles

    def _finished(self, sample: Tensor) -> Tensor:
        return unfold(sample.clamp_(-1.0, 1.0), self.config.patch)


def _run_chunks(run: Callable[[Tensor, History], Tensor], chunks: Sequence[Tensor]) -> Iterator[Tensor]:
    """`run` of the chunks of a clip, one after the other."""
    history = History(is_last=len(chunks) == 1)
    for i, chunk in enumerate(chunks):
        yield run(chunk, history)
        history = History(history.kept, is_last=i == len(chunks) - 2)


def _fill(clip: Tensor, chunks: Iterable[Tensor]) -> None:
    """Writes the chunks to the clip, one after the other."""
    start = 0
    for chunk in chunks:
        clip[:, :, start : start + chunk.shape[2]].copy_(chunk)
        start += chunk.shape[2]


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
