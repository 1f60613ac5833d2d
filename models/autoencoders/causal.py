"""Parts of video autoencoders that never look ahead: a clip is worked on chunk by chunk, a few frames at a time.

Tensors are channels last in memory, so that frames are a batch of pictures without a copy, and convolutions find the
layout in which they are fastest. Parameter names are those of diffusers' `AutoencoderKLWan`.

Layers work on whole pictures, on tiles of them (`windows.py`): `sees` tells what a layer has to be given for a window
of its result, and `gives` the window that comes of what it is given; or on bands of their rows, of which other ranks
have the others (`bands.py`). What they remember of a band are its own rows and the neighbours', which are not told
again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.channel_norm import channel_norm
from sgl_diffusion.models.autoencoders.bands import ONE_BAND, Bands, conv3x3, copied, doubled, filled
from sgl_diffusion.models.autoencoders.windows import WHOLE, Padding, Window, trimmed
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import AttentionFn

# B batch  C channels  T frames  N = B * T pictures  H, W spatial, of a picture, a tile or a band  L = H * W
PAST = 2  # frames before its own that a causal convolution sees
NO_RIM: Padding = (0, 0, 0, 0)
SMALL_CONVOLUTION = 20480  # numbers without the last side, up to which PyTorch does not ask oneDNN (`use_mkldnn`)


class History:
    """What causal layers remember of the chunks so far, in the order in which they run.

    Layers `recall` the frames before the chunk and `keep` those the next one will need. A frame is let go as soon as it
    is recalled, so that old and new ones are not held side by side.

    Args:
        before: what the chunk before kept; None for the first chunk, a single frame with nothing before it.
        is_last: no chunk follows, so nothing is kept.
    """

    def __init__(self, before: Iterable[Tensor] | None = None, *, is_last: bool = False) -> None:
        self.is_first, self.is_last = before is None, is_last
        self._before = deque(before or ())
        self.kept: list[Tensor] = []

    def recall(self) -> Tensor:
        return self._before.popleft()

    def keep(self, frames: Tensor) -> None:
        if not self.is_last:
            self.kept.append(frames)


def through(layers: Iterable[Any], x: Tensor, history: History, tile: Window | None) -> Tensor:
    """What layers make of x (B, C, T, H, W) one after the other: all of it, or a tile of it.

    Backwards through the layers, it is known what each has to be given; forwards, no layer is given more.
    """
    if tile is None:
        for layer in layers:
            x = layer(x, history)
        return x
    windows, layers = [tile], list(layers)
    for layer in reversed(layers):
        windows.append(layer.sees(windows[-1]))
    at = Window.whole(*x.shape[-2:])
    for layer in layers:
        window = windows.pop()
        x = layer(window.cut(x, at), history, padding=window.padding)
        at = layer.gives(window)
    return tile.cut(x, at)


# -- memory -------------------------------------------------------------------------


def channels_last(y: Tensor) -> Tensor:
    """A convolution's result: as it is, on all devices that follow the layout of what they are given."""
    if y.is_meta:  # shapes alone are always contiguous
        B, C, *sides = y.shape
        # of small clips one by one, PyTorch's own convolution there follows no layout: what it makes is copied
        if launch.on_cpu(y) and y.ndim == 5 and B == 1 and y[..., 0].numel() <= SMALL_CONVOLUTION:
            y = torch.empty_like(y)
        return y.view(B, *sides, C).movedim(-1, 1)
    return y.contiguous(memory_format=torch.channels_last if y.ndim == 4 else torch.channels_last_3d)


def empty_clip(like: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, C, T, H, W), channels last, not filled."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def empty_frames(like: Tensor, frames: int, rim: Padding = NO_RIM) -> Tensor:
    """(B, C, frames, H, W), and so many pixels more at each side, channels last; not filled but for these: zeros."""
    B, C, _, H, W = like.shape
    above, below, left, right = rim
    made = empty_clip(like, (B, C, frames, above + H + below, left + W + right))
    if any(rim):
        for strip in (made[..., :above, :], made[..., above + H :, :], made[..., :left], made[..., left + W :]):
            if strip.numel():
                strip.zero_()
    return made


def as_pictures(x_BCTHW: Tensor) -> Tensor:
    """(N, C, H, W); a view of what is channels last."""
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def as_frames(x_NCHW: Tensor, batch: int) -> Tensor:
    """(B, C, T, H, W), a view."""
    return x_NCHW.unflatten(0, (batch, -1)).transpose(1, 2)


# -- layers -------------------------------------------------------------------------


class ChannelNorm(nn.Module):
    """RMSNorm over channels, with the SiLU that follows it in the same kernel where there is one."""

    def __init__(self, channels: int, *, silu: bool = True, ones: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * ones))
        self.silu = silu

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return channel_norm(x, self.gamma.flatten(), silu=self.silu, out=out)


class CausalConv3d(nn.Conv3d):
    """A convolution over 3 frames, the chunk's own and two before it; frames before the first are zeros."""

    def __init__(self, inner: int, outer: int, size: int = 3, bands: Bands = ONE_BAND) -> None:
        super().__init__(inner, outer, (1 + PAST, size, size), padding=(0, size // 2, size // 2))
        self.bands = bands

    def sees(self, out: Window) -> Window:
        return out.grown(self.kernel_size[-1] // 2)

    def gives(self, given: Window) -> Window:
        return given.shrunk(self.kernel_size[-1] // 2)

    def forward(  # type: ignore[override]
        self, x_BCTHW: Tensor, history: History, norm: ChannelNorm | None = None, padding: Padding = WHOLE
    ) -> Tensor:
        """Of x, normed first if asked: the norm writes behind the frames that precede x, so nothing is joined.

        Zeros around the whole are the convolution's own. It cannot give them to some sides alone, as a tile needs them:
        those are written to the same frames. So are rows of other bands, which travel meanwhile as they are and are
        normed where they arrive.
        """
        B, C, T, H, W = x_BCTHW.shape
        past = 1 if history.is_first else PAST
        is_point, is_whole = self.kernel_size[-1] == 1, padding == WHOLE
        rims, write = None if is_point else self.bands.rims(x_BCTHW), copied if norm is None else norm
        if rims is None:
            rim, pads = (NO_RIM, self.padding) if is_whole or is_point else (padding, (0, 0, 0))
            frames = empty_frames(x_BCTHW, past + T, rim)
            write(x_BCTHW, frames[:, :, past:, rim[0] : rim[0] + H, rim[2] : rim[2] + W])
        else:
            frames, pads = empty_clip(x_BCTHW, (B, C, past + T, 1 + H + 1, W)), (0, 0, 1)
            filled(frames[:, :, past:], x_BCTHW, rims, write)
        if history.is_first:
            frames[:, :, 0].zero_()
            history.keep(frames)
            # two of the three frames are zeros: what is left is a convolution of pictures
            picture = F.conv2d(frames[:, :, 1], self.weight[:, :, -1], self.bias, padding=pads[1:])
            return channels_last(picture).unsqueeze(2)
        frames[:, :, :past].copy_(history.recall())
        last = frames[:, :, -PAST:]
        # a view would keep all frames in memory; of a chunk of one frame that is but one more, and a copy less
        history.keep(last if T == 1 else last.clone(memory_format=torch.channels_last_3d))
        return channels_last(F.conv3d(frames, self.weight, self.bias, padding=pads))


class ResidualBlock(nn.Module):
    REACH = 2  # pixels that its two convolutions see beyond each side

    def __init__(self, inner: int, outer: int, bands: Bands = ONE_BAND) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(inner), CausalConv3d(inner, outer, bands=bands)
        self.norm2, self.conv2 = ChannelNorm(outer), CausalConv3d(outer, outer, bands=bands)
        self.conv_shortcut = nn.Conv3d(inner, outer, 1) if inner != outer else None

    def sees(self, out: Window) -> Window:
        return out.grown(self.REACH)

    def gives(self, given: Window) -> Window:
        return given.shrunk(self.REACH)

    def forward(self, x: Tensor, history: History, padding: Padding = WHOLE) -> Tensor:
        hidden = self.conv2(self.conv1(x, history, self.norm1, padding), history, self.norm2, padding)
        x = trimmed(x, padding, self.REACH, self.REACH)
        return hidden.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class PictureAttention(nn.Module):
    """One head over all positions of a frame; frames do not see each other."""

    def __init__(self, channels: int, attention: AttentionFn, bands: Bands) -> None:
        super().__init__()
        self.attention, self.bands = attention, bands
        self.norm = ChannelNorm(channels, silu=False, ones=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCTHW: Tensor, rows: int) -> Tensor:
        """Positions of all `rows` are keys: those of other bands come as features, half of what keys and values are."""
        B, C, _, H, W = x_BCTHW.shape
        x_NCHW = self.norm(as_pictures(x_BCTHW))
        x_NLC = x_NCHW.flatten(2).transpose(1, 2)
        # convolutions of single pixels are linear layers
        weight, bias = self.to_qkv.weight.flatten(1), self.to_qkv.bias
        if self.bands.ranks == 1:
            q, k, v = F.linear(x_NLC, weight, bias).unflatten(-1, (3, 1, C)).unbind(2)
        else:
            assert bias is not None
            seen_NLC = self.bands.whole(x_NCHW, rows).flatten(2).transpose(1, 2)
            q = F.linear(x_NLC, weight[:C], bias[:C]).unsqueeze(2)
            k, v = F.linear(seen_NLC, weight[C:], bias[C:]).unflatten(-1, (2, 1, C)).unbind(2)
        mixed = self.attention(q, k, v).flatten(2)
        mixed = F.linear(mixed, self.proj.weight.flatten(1), self.proj.bias)
        return as_frames(mixed.transpose(1, 2).unflatten(2, (H, W)), B).add_(x_BCTHW)


class MidBlock(nn.Module):
    def __init__(self, channels: int, attention: AttentionFn, bands: Bands = ONE_BAND) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, bands) for _ in range(2))
        self.attentions = nn.ModuleList([PictureAttention(channels, attention, bands)])

    def forward(self, x: Tensor, history: History, rows: int) -> Tensor:
        """Of x, all `rows` or a band of them."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, history), rows), history)


# -- changes of resolution ----------------------------------------------------------


class Upsample(nn.Module):
    """Twice the height and width, and with `frames` twice the frames, but for the first of a clip."""

    def __init__(self, inner: int, outer: int, bands: Bands = ONE_BAND, *, frames: bool) -> None:
        super().__init__()
        self.bands = bands
        self.resample = nn.ModuleList([nn.Identity(), conv3x3(inner, outer, bands)])
        self.time_conv = CausalConv3d(inner, 2 * inner, size=1) if frames else None

    def forward(self, x_BCTHW: Tensor, history: History) -> Tensor:
        pictures = as_pictures(x_BCTHW) if self.time_conv is None else self._doubled(x_BCTHW, history)
        return as_frames(channels_last(self.resample[1](doubled(pictures, self.bands))), len(x_BCTHW))

    def _doubled(self, x_BCTHW: Tensor, history: History) -> Tensor:
        """Pictures of two frames for each; the first frame of a clip stays alone, and the next does not see it."""
        assert self.time_conv is not None
        if history.is_first:
            history.keep(empty_frames(x_BCTHW, PAST).zero_())
            return as_pictures(x_BCTHW)
        pairs = self.time_conv(x_BCTHW, history).unflatten(1, (2, -1))  # B, 2, C, T, H, W
        return pairs.permute(0, 3, 1, 4, 5, 2).contiguous().flatten(0, 2).movedim(-1, 1)


class Downsample(nn.Module):
    """Half the height and width, and with `frames` half the frames, but for the first of a clip."""

    def __init__(self, channels: int, *, frames: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleList([nn.Identity(), nn.Conv2d(channels, channels, 3, stride=2)])
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if frames else None

    def sees(self, out: Window) -> Window:
        return out.scaled(2).with_next()

    def gives(self, given: Window) -> Window:
        return given.halved()

    def forward(self, x_BCTHW: Tensor, history: History, padding: Padding = WHOLE) -> Tensor:
        _, below, _, right = padding
        pictures = F.pad(as_pictures(x_BCTHW), (0, right, 0, below))
        x_BCTHW = as_frames(channels_last(self.resample[1](pictures)), len(x_BCTHW))
        if self.time_conv is None:
            return x_BCTHW
        before = None if history.is_first else history.recall()
        history.keep(x_BCTHW[:, :, -1:].clone(memory_format=torch.channels_last_3d))
        return x_BCTHW if before is None else channels_last(self.time_conv(torch.cat([before, x_BCTHW], dim=2)))


Factors = tuple[int, int, int]
"""By which time, height and width change."""


def kept_apart(wide: int, narrow: int, factors: Factors) -> Factors:
    """Of the factors those that channels tell apart, wide / narrow in all, and the others as 1.

    Channels tell time apart before height, and height before width.

    Raises:
        ConfigError: widths that do not come out even.
    """
    shares, rest = [], wide // narrow
    for factor in factors:
        shares.append(factor if rest % factor == 0 else 1)
        rest //= shares[-1]
    if wide % narrow or rest != 1:
        raise ConfigError(f"is_residual: a resolution of {wide} channels beside one of {narrow} has no shortcut")
    return shares[0], shares[1], shares[2]


def add_repeated(y: Tensor, x: Tensor, factors: Factors, shares: Factors, *, is_first: bool) -> Tensor:
    """y (B, O, T t, H h, W w) plus x (B, C, T, H, W) repeated to that size, in place (`DupUp3D` of diffusers).

    Where C > O, the C / O channels that stand for one are the values of its first frames, rows or columns. The first
    chunk has T frames, the last that each x would give.
    """
    t, h, w = factors
    repeated = x.unflatten(1, (-1, *shares)).permute(0, 1, 5, 2, 6, 3, 7, 4)  # B, O, T, 1 or t, H, 1 or h, W, 1 or w
    if is_first:
        repeated, t = repeated[:, :, :, -1:], 1
    y.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t)).add_(repeated)
    return y


def add_averaged(y: Tensor, x: Tensor, factors: Factors, shares: Factors) -> Tensor:
    """y (B, O, T / t, H / h, W / w) plus x (B, C, T, H, W) averaged to that size, in place (`AvgDown3D` of diffusers).

    Where O > C, frames, rows or columns that would be averaged become channels. Missing first frames are zeros.
    """
    t, h, w = factors
    missing = -x.shape[2] % t
    if missing:
        x = F.pad(x, (0, 0, 0, 0, missing, 0))
    cells = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))  # B, C, T/t, t, H/h, h, W/w, w
    averaged = [axis for axis, share, factor in zip((3, 5, 7), shares, factors, strict=True) if share < factor]
    if averaged:
        cells = cells.mean(averaged, keepdim=True)
    y.unflatten(1, (-1, *shares)).add_(cells.permute(0, 1, 3, 5, 7, 2, 4, 6))
    return y
