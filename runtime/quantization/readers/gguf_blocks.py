"""Blocks of GGUF's quantised types -> codes, scales and offsets (layouts: `ggml-common.h` of llama.cpp).

    type     a block          here              bytes a weight, there and here
    Q8_0     32 columns       w8, groups of 32  1.06  1.06
    Q6_K     256, in 16 x 16  w8, groups of 16  0.82  1.25
    Q5_K     256, in 8 x 32   w8, groups of 32  0.69  1.25
    Q5_0     32               w8, groups of 32  0.69  1.06
    Q5_1     32               w8, groups of 32  0.75  1.13
    Q4_K     256, in 8 x 32   w4, groups of 32  0.56  0.75
    Q4_0     32               w4, groups of 32  0.56  0.56
    Q4_1     32               w4, groups of 32  0.63  0.63
    IQ4_NL   32, by a table   w4, groups of 32  0.56  0.56
    IQ4_XS   256, in 8 x 32   w4, groups of 32  0.53  0.63
    Q3_K     256, in 16 x 16  w4, groups of 16  0.43  0.75
    Q2_K     256, in 16 x 16  w4, groups of 16  0.33  1.00

Scales and offsets are those of llama.cpp, bit by bit. Types of 256 columns have an fp16 number for the block and one of
4 to 8 bits for a group: their product has up to 19 bits, and is often below what fp16 holds in full (6e-5), hence fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sgl_diffusion.runtime.quantization.weight import QuantizedWeight

# N rows  n blocks of a row  G groups of a block  C columns of a group
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def decode(rows: Tensor, type: str) -> QuantizedWeight:
    """Rows as they are in the file (uint8), of one of the types in `BLOCKS`."""
    size, layout = BLOCKS[type]
    return layout(torch.unflatten(rows, -1, (-1, size)))


def q8_0(blocks: Tensor) -> QuantizedWeight:
    scale, q = torch.split(blocks, [2, 32], -1)
    return _w8(q.view(torch.int8), _fp16(scale))


def q6_k(blocks: Tensor) -> QuantizedWeight:
    low, high, scales, d = torch.split(blocks, [128, 64, 16, 2], -1)
    low = torch.unflatten(_planes(torch.unflatten(low, -1, (2, 64)), 4), -1, (2, 32)).flatten(-3, -2)
    codes = low | _planes(torch.unflatten(high, -1, (2, 32)), 2) << 4
    return _w8(codes.to(torch.int8) - 32, _fp16(d).float() * scales.view(torch.int8))


def q5_k(blocks: Tensor) -> QuantizedWeight:
    d, least, scales, high, low = torch.split(blocks, [2, 2, 12, 32, 128], -1)
    codes = _planes(torch.unflatten(low, -1, (4, 32)), 4).flatten(-3, -2) | _planes(high, 1) << 4
    return _w8(codes.to(torch.int8), *_scale_and_offset(d, least, *_six_bit(scales)))


def q5_0(blocks: Tensor) -> QuantizedWeight:
    scale, high, low = torch.split(blocks, [2, 4, 16], -1)
    return _w8(_five_bit(high, low) - 16, _fp16(scale))


def q5_1(blocks: Tensor) -> QuantizedWeight:
    scale, offset, high, low = torch.split(blocks, [2, 2, 4, 16], -1)
    return _w8(_five_bit(high, low), _fp16(scale), _fp16(offset))


def q4_k(blocks: Tensor) -> QuantizedWeight:
    d, least, scales, q = torch.split(blocks, [2, 2, 12, 128], -1)
    codes = _planes(torch.unflatten(q, -1, (4, 32)), 4)
    return _w4(codes, *_scale_and_offset(d, least, *_six_bit(scales)))


def q4_0(blocks: Tensor) -> QuantizedWeight:
    scale, q = torch.split(blocks, [2, 16], -1)
    return _w4(_planes(q, 4), _fp16(scale))


def q4_1(blocks: Tensor) -> QuantizedWeight:
    scale, offset, q = torch.split(blocks, [2, 2, 16], -1)
    return _w4(_planes(q, 4), _fp16(scale), _fp16(offset))


def iq4_nl(blocks: Tensor) -> QuantizedWeight:
    scale, q = torch.split(blocks, [2, 16], -1)
    return _w4(_planes(q, 4), _fp16(scale), table=torch.tensor(IQ4_VALUES, dtype=torch.float32))


def iq4_xs(blocks: Tensor) -> QuantizedWeight:
    d, high, low, q = torch.split(blocks, [2, 2, 4, 128], -1)
    # 8 x 4 and 8 x 2 bits, the first group in the lowest
    scales = _planes(low[..., None], 4).flatten(-3) | _planes(high[..., None], 2).flatten(-3) << 4
    scale = _fp16(d).float() * (scales.to(torch.int8) - 32)
    codes = _planes(torch.unflatten(q, -1, (8, 16)), 4)
    return _w4(codes, scale, table=torch.tensor(IQ4_VALUES, dtype=torch.float32))


def q3_k(blocks: Tensor) -> QuantizedWeight:
    high, low, scales, d = torch.split(blocks, [32, 64, 12, 2], -1)
    # 16 scales: the lower four bits of eight, of the other eight, then the upper two bits of four at a time
    lower = _planes(scales[..., :8], 4).flatten(-2)
    upper = _planes(scales[..., 8:], 2).flatten(-2)
    scale = _fp16(d).float() * ((lower | upper << 4).to(torch.int8) - 32)
    # values are -4 to 3, which codes 4 to 11 stand for
    codes = (_planes(torch.unflatten(low, -1, (2, 32)), 2).flatten(-3, -2) | _planes(high, 1) << 2) + 4
    return _w4(codes, scale)


def q2_k(blocks: Tensor) -> QuantizedWeight:
    scales, q, d, least = torch.split(blocks, [16, 64, 2, 2], -1)
    codes = _planes(torch.unflatten(q, -1, (2, 32)), 2)
    return _w4(codes, *_scale_and_offset(d, least, scales & 15, scales >> 4))


# bytes of a block, and what makes weights of blocks (N, n, bytes)
BLOCKS: dict[str, tuple[int, Callable[[Tensor], QuantizedWeight]]] = {
    "Q8_0": (34, q8_0),
    "Q6_K": (210, q6_k),
    "Q5_K": (176, q5_k),
    "Q5_0": (22, q5_0),
    "Q5_1": (24, q5_1),
    "Q4_K": (144, q4_k),
    "Q4_0": (18, q4_0),
    "Q4_1": (20, q4_1),
    "IQ4_NL": (18, iq4_nl),
    "IQ4_XS": (136, iq4_xs),
    "Q3_K": (110, q3_k),
    "Q2_K": (84, q2_k),
}


def _w8(codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> QuantizedWeight:
    return QuantizedWeight("w8", codes.flatten(1), scale.flatten(1), None if offset is None else offset.flatten(1))


def _w4(codes: Tensor, scale: Tensor, offset: Tensor | None = None, table: Tensor | None = None) -> QuantizedWeight:
    codes = codes.flatten(1)
    pairs = codes[:, ::2] | codes[:, 1::2] << 4
    return QuantizedWeight("w4", pairs, scale.flatten(1), None if offset is None else offset.flatten(1), table)


def _planes(packed: Tensor, bits: int) -> Tensor:
    """(..., 8 / bits, C) numbers, of bytes (..., C) that have those of the first plane in their lowest bits."""
    return torch.stack([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], -2)


def _fp16(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16)


def _five_bit(high: Tensor, low: Tensor) -> Tensor:
    """int8 (N, n, 32): the fifth bits are those of a number of four bytes, the first column's the lowest."""
    return (_planes(low, 4).flatten(-2) | _planes(high[..., None], 1).flatten(-3) << 4).to(torch.int8)


def _six_bit(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight offsets of 6 bits, each (N, n, 8).

    The first four of each have a byte of their own, whose upper two bits are those of the other four; these have their
    lower four bits side by side in the last four bytes.
    """
    scale, offset, rest = torch.split(packed, [4, 4, 4], -1)
    return (
        torch.cat([scale & 63, rest & 15 | scale >> 6 << 4], -1),
        torch.cat([offset & 63, rest >> 4 | offset >> 6 << 4], -1),
    )


def _scale_and_offset(d: Tensor, least: Tensor, scales: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (N, n, G), of numbers for a block and small integers for its groups."""
    return _fp16(d).float() * scales, -(_fp16(least).float() * offsets)
