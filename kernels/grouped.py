"""A weight as codes and a scale for some columns of a row: what it holds, what fits, and the numbers it stands for.

    weight = scale * code + offset, or scale * table[code]; 4-bit codes without either stand for -8 to 7

Shapes: codes of 4 bits (N, K / 2), the even column in the low half of a byte, or of 8 (N, K); scale_NG.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgl_diffusion.kernels import launch

# N output columns  K input columns  G groups of columns that share a scale

GROUPS = (16, 32, 64, 128)  # columns of one, unless it is a whole row
DECODED_AT_ONCE = 1 << 20  # weights that are held in float64


class Grouped(NamedTuple):
    """A quantised weight: uint8 codes (N, K / 2) of 4 bits, or int8 codes (N, K), and what makes numbers of them."""

    codes: Tensor
    scale_NG: Tensor
    offset_NG: Tensor | None
    table: Tensor | None
    smooth_K: Tensor | None

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def signed(self) -> bool:
        """Codes stand for numbers around zero: of 4 bits, for -8 to 7."""
        return self.offset_NG is None and self.table is None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scale_NG.shape[1]


def check_grouped(like: Tensor, weight: Grouped) -> None:
    """That the parts fit each other and are on the device of `like`.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    codes, scale_NG, offset_NG, table, smooth_K = weight
    N, K = weight.shape
    if codes.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"codes: dtype {codes.dtype}, expected torch.uint8 or torch.int8")
    if codes.device != like.device:
        raise ValueError(f"codes: on {codes.device}, the other tensors are on {like.device}")
    launch.check_contiguous(codes=codes, scale_NG=scale_NG)
    if scale_NG.dtype != torch.float8_e4m3fn:
        launch.check_float(like, scale_NG=scale_NG)
    elif scale_NG.device != like.device:
        raise ValueError(f"scale_NG: on {scale_NG.device}, the other tensors are on {like.device}")
    G = scale_NG.shape[1]
    if scale_NG.shape[0] != N or G != 1 and K not in [G * columns for columns in GROUPS]:
        groups = ", ".join(map(str, GROUPS))
        raise ValueError(
            f"scale_NG: shape {tuple(scale_NG.shape)}, expected ({N}, G) with groups of {groups} or all {K} columns"
        )
    if offset_NG is not None:
        if table is not None:
            raise ValueError("offset_NG: expected none beside table")
        launch.check_float(like, offset_NG=offset_NG)
        launch.check_shape((N, G), offset_NG=offset_NG)
        launch.check_contiguous(offset_NG=offset_NG)
    if table is not None:
        launch.check_float(like, table=table)
        launch.check_dtype(torch.float32, table=table)
        launch.check_shape((16,), table=table)
        launch.check_contiguous(table=table)
    if smooth_K is not None:
        launch.check_float(like, smooth_K=smooth_K)
        launch.check_shape((K,), smooth_K=smooth_K)
        launch.check_contiguous(smooth_K=smooth_K)


def decode(weight: Grouped, out_NK: Tensor) -> None:
    """The weights over smooth, computed in float64 and rounded to the dtype of `out_NK`."""
    N, K = weight.shape
    step = max(DECODED_AT_ONCE // K, 1)
    for first in range(0, N, step):
        rows = slice(first, first + step)
        code = weight.codes[rows]
        if weight.bits == 4:
            code = torch.stack([code & 15, code >> 4], dim=-1)
        value = code.double() if weight.table is None else weight.table.double()[code.int()]
        if weight.bits == 4 and weight.signed:
            value -= 8
        value = value.view(-1, weight.scale_NG.shape[1], weight.group) * weight.scale_NG[rows, :, None].double()
        if weight.offset_NG is not None:
            value += weight.offset_NG[rows, :, None]
        value = value.view(-1, K)
        out_NK[rows] = value if weight.smooth_K is None else value / weight.smooth_K


def dequantize(
    codes: Tensor, scale_NG: Tensor, *, offset_NG: Tensor | None = None, table: Tensor | None = None,
    smooth_K: Tensor | None = None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The weights (N, K) that uint8 codes of 4 bits or int8 codes stand for; over smooth if that is given.

    Computed in float64, then rounded to `dtype`.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
    """
    launch.check_ndim(2, codes=codes, scale_NG=scale_NG)
    weight = Grouped(codes, scale_NG, offset_NG, table, smooth_K)
    check_grouped(codes, weight)
    out_NK = torch.empty(weight.shape, dtype=dtype, device=codes.device)
    decode(weight, out_NK)
    return out_NK
