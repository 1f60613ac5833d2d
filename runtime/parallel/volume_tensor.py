"""Bytes that tensor parallelism sends, by formula. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable


def all_reduced(tokens: int, widths: Iterable[int], itemsize: int, ranks: int) -> int:
    """Bytes a rank sends for one pass of some tokens through layers whose inputs are spread over ranks.

    Every such layer ends in one all-reduce of its outputs: a ring sends 2 (P - 1) / P of them.

    Args:
        tokens: rows of all samples that this rank computes.
        widths: outputs of each layer that a token goes through.
    """
    return sum(2 * (ranks - 1) * tokens * width * itemsize // ranks for width in widths)
