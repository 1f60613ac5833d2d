"""One picture on several ranks: each has a band of its rows, from the latents to the pixels, and all weights.

What a layer needs of other bands, it asks of `Bands`: a convolution of 3 x 3 one row of each neighbour, a group norm
the statistics of all, attention the positions of all. Every value is then the one that the whole picture has there.

So that a convolution's input is not copied once more, what comes before it, a norm say, writes to a tensor that has
room for a row above and one below (`with_rims`). The convolution itself pads columns alone (`conv3x3`). With one rank
there is no such room, and all of this is what it would be without bands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sgl_diffusion.kernels.layout import upsample_nearest

# B batch  C channels  H rows of the picture  h rows of a band  W columns  P ranks
Rims = Callable[[], tuple[Tensor | None, Tensor | None]]
"""Waits for the rows right above and right below a band, (..., 1, W) each: None beyond the picture."""

Write = Callable[[Tensor, Tensor], Any]
"""`write(x, out)`: what a convolution is given, of these rows of x."""


class Bands(Protocol):
    """How the rows of a picture are spread over ranks, in order."""

    @property
    def ranks(self) -> int: ...

    def cut(self, x: Tensor) -> Tensor:
        """This rank's rows of latents (..., H, W), of which all ranks have the whole.

        Raises:
            ValueError: fewer rows than ranks.
        """

    def whole(self, band: Tensor, rows: int) -> Tensor:
        """All rows (..., H, W) of every rank's (..., h, W), in order and in their memory format.

        Args:
            rows: of the latents that were `cut`. There may be more here, the same number for each of them.
        """

    def rims(self, band: Tensor) -> Rims | None:
        """Begins to tell the neighbours the first and the last row of (..., h, W), and to hear of theirs.

        With one rank None: zeros around the picture are the convolution's own.
        """

    def gathered(self, x: Tensor) -> Tensor:
        """(P, ...), of every rank's contiguous x (...), of one shape."""


class OneBand:
    """`Bands` of one rank: its band is the picture."""

    ranks = 1

    def cut(self, x: Tensor) -> Tensor:
        return x

    def whole(self, band: Tensor, rows: int) -> Tensor:
        return band

    def rims(self, band: Tensor) -> Rims | None:
        return None

    def gathered(self, x: Tensor) -> Tensor:
        return x[None]


ONE_BAND = OneBand()


def conv3x3(inner: int, outer: int, bands: Bands) -> nn.Conv2d:
    """A convolution with zeros around the picture, of what `with_rims`, `doubled` or a norm with rims gives."""
    return nn.Conv2d(inner, outer, 3, padding=(1 if bands.ranks == 1 else 0, 1))


def with_rims(x_BChW: Tensor, rims: Rims | None, write: Write | None = None) -> Tensor:
    """A band with a row of the neighbours, or of zeros, above and below: (B, C, h + 2, W). Of one rank, the band.

    Args:
        write: as it copies it where None. With one rank it is not asked for.
    """
    if rims is None:
        return x_BChW
    B, C, h, W = x_BChW.shape
    return filled(empty_as(x_BChW, (B, C, h + 2, W)), x_BChW, rims, write or copied)


def doubled(x_BChW: Tensor, bands: Bands) -> Tensor:
    """Twice the rows and columns, each value in the place of four, with rims: (B, C, 2 h + 2, 2 W).

    With one rank there are none. The neighbours' rows travel at the lower resolution.
    """
    rims = bands.rims(x_BChW)
    if rims is None:
        return upsample_nearest(x_BChW)
    B, C, h, W = x_BChW.shape
    return filled(empty_as(x_BChW, (B, C, 2 * h + 2, 2 * W)), x_BChW, rims, _repeat)


def filled(out: Tensor, x: Tensor, rims: Rims, write: Write) -> Tensor:
    """Writes a band between the first and the last row of `out`, and then to these what the neighbours sent meanwhile.

    Beyond the picture there are zeros, whatever is written.
    """
    write(x, out[..., 1:-1, :])
    for rim, row in zip(rims(), (out[..., :1, :], out[..., -1:, :]), strict=True):
        if rim is None:
            row.zero_()
        else:
            write(rim, row)
    return out


def copied(x: Tensor, out: Tensor) -> None:
    """`Write` what is there."""
    out.copy_(x)


def check_no_bands(bands: Bands) -> None:
    """Before tiles. Raises ValueError if there are bands."""
    if bands.ranks > 1:
        raise ValueError(f"tiles: not in bands of rows on {bands.ranks} ranks")


def empty_as(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Not filled, of so many pixels, in the memory format of another (B, C, ..., W)."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = like.stride(1) == 1 and not like.is_contiguous()
    memory_format = formats[like.ndim] if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _repeat(x: Tensor, out: Tensor) -> None:
    """In columns, and in rows as often as there is room."""
    times = out.shape[-2] // x.shape[-2]
    out.unflatten(-1, (-1, 2)).unflatten(-3, (-1, times)).copy_(x[..., :, None, :, None])
