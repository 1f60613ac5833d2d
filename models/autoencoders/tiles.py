"""Pictures in overlapping tiles: memory is that of one tile, and what overlaps is blended.

For autoencoders whose norms average over the picture, of which a tile sees a part. Others need no blending, see
`windows.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 0.25  # share of a tile that is blended with its neighbour


def tiled(run: Callable[[Tensor], Tensor], x: Tensor, rows: int, columns: int) -> Tensor:
    """`run` of tiles of x (..., H, W), joined; each is blended into the one above and the one to its left.

    Args:
        run: enlarges or shrinks all sides by one factor.
        rows, columns: of a tile of x.
    Source: `tiled_decode` of diffusers' autoencoders.
    """
    step = int(rows * (1 - OVERLAP)), int(columns * (1 - OVERLAP))
    whole: Tensor | None = None
    above: list[Tensor] = []
    for top in range(0, x.shape[-2], step[0]):
        row: list[Tensor] = []
        for j, left in enumerate(range(0, x.shape[-1], step[1])):
            source = x[..., top : top + rows, left : left + columns]
            tile = run(source)

            def scaled(length: int, result: int = tile.shape[-1], given: int = source.shape[-1]) -> int:
                return length * result // given

            if whole is None:
                whole = tile.new_empty(*tile.shape[:-2], scaled(x.shape[-2]), scaled(x.shape[-1]))
            if above:
                _fade_in(tile, above[j], scaled(rows - step[0]), dim=-2)
            if row:
                _fade_in(tile, row[-1], scaled(columns - step[1]), dim=-1)
            row.append(tile)
            place = whole[..., scaled(top) : scaled(top + step[0]), scaled(left) : scaled(left + step[1])]
            place.copy_(tile[..., : place.shape[-2], : place.shape[-1]])
        above = row
    assert whole is not None
    return whole


def _fade_in(tile: Tensor, before: Tensor, extent: int, dim: int) -> None:
    """Fades the first rows or columns of `tile` in from the last ones of `before`, in place."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    shape = [1] * tile.ndim
    shape[dim] = extent
    ramp = (torch.arange(extent, device=tile.device, dtype=tile.dtype) / extent).view(shape)
    head, tail = tile.narrow(dim, 0, extent), before.narrow(dim, before.shape[dim] - extent, extent)
    head.copy_(tail * (1 - ramp) + head * ramp)
