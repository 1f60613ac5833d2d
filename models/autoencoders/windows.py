"""Tiles without seams: where a tile lies in its picture, at every resolution on its way through convolutions.

A convolution of 3 x 3 sees one pixel beyond each side. So a tile begins with more than its own pixels, and every
convolution takes one off each side; but beyond a side of the picture there are zeros, for the tile as for the whole,
and nothing is taken off. Every value is then the value that the whole picture has there. What is no longer needed is
cut off after every change of resolution, so that where pixels are many, a tile is only a few of them wider than itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

Padding = tuple[int, int, int, int]
"""Zeros that convolutions see above, below, left and right: 1 at a side of the picture, 0 where it goes on."""

WHOLE: Padding = (1, 1, 1, 1)


@dataclass(frozen=True)
class Span:
    """Rows, or columns, from `start` until before `stop`, of a picture that has `size` of them."""

    start: int
    stop: int
    size: int

    def grown(self, by: int) -> Span:
        """With so many more on both sides, as far as the picture goes."""
        return Span(max(0, self.start - by), min(self.size, self.stop + by), self.size)

    def shrunk(self, by: int) -> Span:
        """Without so many at both sides, but at a side of the picture with all."""
        start, stop = self.padding
        return Span(self.start + (0 if start else by), self.stop - (0 if stop else by), self.size)

    def scaled(self, by: int) -> Span:
        """At a resolution that is higher by this factor."""
        return Span(self.start * by, self.stop * by, self.size * by)

    def halved(self) -> Span:
        """At half the resolution, without a last one that is half of one there."""
        return Span(self.start // 2, self.stop // 2, self.size // 2)

    def with_next(self) -> Span:
        """With one more behind, as far as the picture goes."""
        return Span(self.start, min(self.size, self.stop + 1), self.size)

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros before and after."""
        return int(self.start == 0), int(self.stop == self.size)


@dataclass(frozen=True)
class Window:
    """A rectangle of a picture, at one resolution."""

    rows: Span
    columns: Span

    @classmethod
    def whole(cls, height: int, width: int) -> Window:
        return cls(Span(0, height, height), Span(0, width, width))

    @property
    def padding(self) -> Padding:
        return *self.rows.padding, *self.columns.padding

    def grown(self, by: int) -> Window:
        return Window(self.rows.grown(by), self.columns.grown(by))

    def shrunk(self, by: int) -> Window:
        return Window(self.rows.shrunk(by), self.columns.shrunk(by))

    def scaled(self, by: int) -> Window:
        return Window(self.rows.scaled(by), self.columns.scaled(by))

    def halved(self) -> Window:
        return Window(self.rows.halved(), self.columns.halved())

    def with_next(self) -> Window:
        return Window(self.rows.with_next(), self.columns.with_next())

    def of(self, x: Tensor, at: Window | None = None) -> Tensor:
        """This part of x (..., H, W), which is the whole picture or lies at `at`; a view."""
        top, left = (at.rows.start, at.columns.start) if at else (0, 0)
        rows = slice(self.rows.start - top, self.rows.stop - top)
        return x[..., rows, self.columns.start - left : self.columns.stop - left]

    def cut(self, x: Tensor, at: Window) -> Tensor:
        """This part of x (B, C, T, H, W), which lies at `at`: channels last, a copy unless it is all of x."""
        return x if self == at else self.of(x, at).contiguous(memory_format=torch.channels_last_3d)


def tiles_of(whole: Window, rows: int, columns: int) -> list[Window]:
    """Tiles of at most so many rows and columns, all about equal, that cover the whole once."""
    return [Window(r, c) for r, c in product(_parts(whole.rows, rows), _parts(whole.columns, columns))]


def _parts(span: Span, most: int) -> Iterator[Span]:
    count = -(-span.size // most)
    step = -(-span.size // count)
    for start in range(0, span.size, step):
        yield Span(start, min(start + step, span.size), span.size)


def trimmed(x: Tensor, padding: Padding, before: int, after: int) -> Tensor:
    """x (..., H, W) without so many rows and columns at those sides that are not the picture's: a view."""
    above, below, left, right = padding
    (H, W), rows = x.shape[-2:], 0 if above else before
    return x[..., rows : H - (0 if below else after), (0 if left else before) : W - (0 if right else after)]
