"""Pictures and clips decoded by all ranks: each has some rows, and neighbours exchange the rows between them.

n rows of latents on P ranks: rank i has n // P, and one more if i < n % P. What travels is what the layers ask for:
a row each way for a convolution of 3 x 3, three numbers a group for a group norm, features of the other bands for the
attention at the resolution of latents, and at last the pixels. `decode_traffic` counts it for ranks that are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.kernels.launch import rehearsing
from sgl_diffusion.models.autoencoders.bands import Bands, Rims, empty_as
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parallel.group import Group, Traffic
from sgl_diffusion.runtime.parallel.volume import share_size


class RankBands:
    """`Bands` of the ranks of a group, in their order."""

    def __init__(self, group: Group) -> None:
        self.group, self.ranks = group, group.size

    def cut(self, x: Tensor) -> Tensor:
        bounds, own = self._bounds(x.shape[-2]), self.group.rank
        return x[..., bounds[own] : bounds[own + 1], :]

    def whole(self, band: Tensor, rows: int) -> Tensor:
        """Bands differ in size, so every rank sends its own to each: what a gather would send, without padding."""
        bounds, own = self._bounds(rows), self.group.rank
        scale = band.shape[-2] // (bounds[own + 1] - bounds[own])
        made = empty_as(band, (*band.shape[:-2], scale * rows, band.shape[-1]))
        places = [made[..., scale * a : scale * b, :] for a, b in zip(bounds, bounds[1:], strict=False)]
        message, others = band.contiguous(), [rank for rank in range(self.ranks) if rank != own]
        received = {rank: band.new_empty(places[rank].shape) for rank in others}
        under_way = self.group.exchange([(rank, message) for rank in others], list(received.items()))
        places[own].copy_(band)
        under_way.wait()
        for rank, other in received.items():
            places[rank].copy_(other)
        return made

    def rims(self, band: Tensor) -> Rims | None:
        if self.ranks == 1:
            return None
        own, sent = self.group.rank, []
        above, below = own > 0, own < self.ranks - 1
        if above:
            sent.append((own - 1, band[..., :1, :].contiguous()))
        if below:
            sent.append((own + 1, band[..., -1:, :].contiguous()))
        received = [(rank, torch.empty_like(row)) for rank, row in sent]
        under_way = self.group.exchange(sent, received)

        def arrived() -> tuple[Tensor | None, Tensor | None]:
            under_way.wait()
            return received[0][1] if above else None, received[-1][1] if below else None

        return arrived

    def gathered(self, x: Tensor) -> Tensor:
        return self.group.all_gather(x)

    def _bounds(self, rows: int) -> list[int]:
        """Where the bands begin, and where the last one ends."""
        check_rows(rows, self.ranks)
        shares = (share_size(rows, self.ranks, rank) for rank in range(self.ranks))
        return list(accumulate(shares, initial=0))


def check_rows(rows: int, ranks: int) -> None:
    """Whether there is a row of latents for each rank. Raises UserError."""
    if rows < ranks:
        raise UserError(f"vae_sp=true: {rows} rows of latents for {ranks} ranks; expected one a rank at least")


def check_tiling(tiling: bool, ranks: int) -> None:
    """Bands take the place of tiles, which would each wait for all ranks. Raises UserError."""
    if tiling and ranks > 1:
        raise UserError("vae_sp=true: not with vae_tiling")


def decode_traffic(
    build: Callable[[Bands], nn.Module], latents: Sequence[int], dtype: torch.dtype, ranks: int, device_type: str
) -> list[Mapping[str, Traffic]]:
    """What each rank sends in one decode, by collective: counted on shapes alone, as the decode runs.

    Args:
        build: an autoencoder of shapes alone, for given bands.
        latents: the shape that its `decode` takes.
        device_type: "cuda" or "cpu".
    Raises:
        UserError: fewer rows than ranks.
    """
    groups = [Group("world", ranks, rank) for rank in range(ranks)]
    for group in groups:
        with ExitStack() as on, torch.inference_mode():
            on.enter_context(torch.device("meta"))
            on.enter_context(rehearsing(device_type))
            autoencoder: Any = build(RankBands(group)).to(dtype)
            autoencoder.decode(torch.empty(tuple(latents), dtype=dtype))
    return [group.traffic for group in groups]
