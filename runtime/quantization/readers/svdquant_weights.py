"""Tensors of nunchaku's checkpoints -> weights, whatever the order they are kept in.

Most are in the order in which the lanes of a warp load fragments for tensor-core instructions (`NunchakuWeightPacker`
of deepcompressor), modulation layers in that of AWQ's kernels (`pack_w4` there).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.runtime.quantization.weight import OF_ROWS, QuantizedWeight

# N outputs  K inputs  G groups of columns with one scale  R rank  V vectors of a modulation layer  D width
TILE_N, TILE_K = 128, 64
AWQ_GROUP = 64
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

# added in int4 to what a GELU gives, never below -0.17, so that codes of activations need no sign
SHIFT = 0.171875


def weight(
    qweight: Tensor,
    wscales: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    wtscale: Tensor | None = None,
    wcscales: Tensor | None = None,
) -> QuantizedWeight:
    """Weights (N, K): int4, or with scales in e4m3 fp4.

    The branch sees activations as they are: it was divided by the smoothing factors when it was packed.

    Args:
        wtscale, wcscales: further scales of fp4, one for all and one for every output.
    """
    codes = in_rows(qweight)
    rest: dict[str, Any] = {"smooth_K": vector(smooth_factor), "down_RK": down(proj_down), "up_NR": up(proj_up)}
    if wscales.dtype != torch.float8_e4m3fn:  # codes are in two's complement
        return QuantizedWeight("w4", codes ^ 0x88, scales(wscales), **rest)
    scale = micro_scales(wscales).float()
    if wtscale is not None:
        scale = scale * wtscale.float().view(())
    if wcscales is not None:
        scale = scale * vector(wcscales).float()[:, None]
    return QuantizedWeight("w4", codes, scale, table=torch.tensor(E2M1), **rest)


def halves_swapped(**tensors: Tensor) -> QuantizedWeight:
    """The second half of the rows first."""
    whole = weight(**tensors)
    half = whole.shape[0] // 2
    rows: dict[str, Any] = {
        name: torch.cat([t[half:], t[:half]]) for name, t in whole.tensors.items() if name in OF_ROWS
    }
    return replace(whole, **rows)


def above(**tensors: Tensor) -> QuantizedWeight:
    """Two layers over the same input, divided by the same factors: the outputs of both."""
    first, second = _two(tensors)
    rows: dict[str, Any] = {
        name: torch.cat([getattr(first, name), getattr(second, name)]) for name in ("codes", "scale", "down_RK")
    }
    rows["up_NR"] = torch.block_diag(first.up_NR, second.up_NR)  # type: ignore[no-untyped-call]
    return replace(first, **rows)


def beside(**tensors: Tensor) -> QuantizedWeight:
    """Two layers whose outputs are added: over the inputs of both."""
    first, second = _two(tensors)
    columns: dict[str, Any] = {
        name: torch.cat([getattr(first, name), getattr(second, name)], -1)
        for name in ("codes", "scale", "smooth_K", "up_NR")
    }
    columns["down_RK"] = torch.block_diag(first.down_RK, second.down_RK)  # type: ignore[no-untyped-call]
    return replace(first, **columns)


def _two(tensors: Mapping[str, Tensor]) -> list[QuantizedWeight]:
    """Of those whose names begin with 0_, and with 1_."""
    return [weight(**{n[2:]: t for n, t in tensors.items() if n.startswith(f"{i}_")}) for i in range(2)]


def unshifted(bias: Tensor, **tensors: Tensor) -> Tensor:
    """The bias, in fp32, for activations to which nothing was added. The branch sees such in nunchaku as well."""
    codes = replace(weight(**tensors), down_RK=None, up_NR=None).dequantized(torch.float32)
    return (vector(bias) + SHIFT * codes.sum(1, dtype=torch.float64)).float()


def added(first: Tensor, second: Tensor) -> Tensor:
    """Two biases, in fp32: they are rounded where they are loaded."""
    return first.float() + second.float()


def modulation_weight(qweight: Tensor, wscales: Tensor, wzeros: Tensor, vectors: int) -> Tensor:
    """(V * D, K) of a layer of AWQ's, whose rows are those of every vector in turn."""
    weight_NK = awq_weight(qweight, wscales, wzeros)
    return weight_NK.view(-1, vectors, weight_NK.shape[1]).transpose(0, 1).flatten(0, 1)


def modulation_bias(bias: Tensor, vectors: int) -> Tensor:
    """(V * D,); 1 has been added to those of scales, the second vector and the second to last."""
    bias_VD = bias.view(-1, vectors).T.clone()
    bias_VD[sorted({1, vectors - 2})] -= 1
    return bias_VD.flatten()


# -- orders -----------------------------------------------------------------------


def in_rows(packed: Tensor) -> Tensor:
    """Codes, of int8 (N, K / 2): uint8 of the same shape, the even column in the lower four bits.

    A tile of 128 x 64 is 8 fragments of 16 rows. Of each, a lane has four words of 8 columns: in two rows, and in both
    halves of the columns.
    """
    (N, pairs), flat = packed.shape, packed.view(torch.uint8)
    words = flat.view(N // TILE_N, 2 * pairs // TILE_K, 8, 8, 4, 2, 2, 4)  # n k fragment row lane lower right pair
    return words.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(N, pairs)


def scales(packed: Tensor) -> Tensor:
    """(N, G), of (G, N) in 16 bits: a lane has two rows side by side and the two that are 8 below."""
    G, N = packed.shape
    lanes = packed.view(N // TILE_N, G, 8, 4, 2, 2)  # n G fragment lane lower right
    return lanes.permute(0, 2, 4, 3, 5, 1).reshape(N, G)


def vector(packed: Tensor) -> Tensor:
    """Of a bias, or smoothing factors: as scales of one group."""
    return scales(packed[None]).flatten()


def micro_scales(packed: Tensor) -> Tensor:
    """(N, G), of (G, N) in e4m3: a lane has those of four groups, in four rows that are 32 apart."""
    G, N = packed.shape
    lanes = packed.view(torch.uint8).view(N // TILE_N, G // 4, 8, 4, 4, 4)  # n k row eighth quarter group
    return lanes.permute(0, 4, 3, 2, 1, 5).reshape(N, G).view(packed.dtype)


def up(packed: Tensor) -> Tensor:
    """(N, R), in 16 bits: a lane has two columns side by side of two rows and both halves of a fragment of 16 x 16."""
    N, R = packed.shape
    lanes = packed.view(N // 16, R // 16, 8, 4, 2, 2, 2)  # fragment, fragment, row lane lower half pair
    return lanes.permute(0, 4, 2, 1, 5, 3, 6).reshape(N, R)


def down(packed: Tensor) -> Tensor:
    """(R, K), of (K, R): as `up`, but fragments have R in their rows."""
    K, R = packed.shape
    lanes = packed.view(K // 16, R // 16, 8, 4, 2, 2, 2)
    return lanes.permute(1, 4, 2, 0, 5, 3, 6).reshape(R, K)


def awq_weight(qweight: Tensor, wscales: Tensor, wzeros: Tensor) -> Tensor:
    """(N, K) in the dtype of its scales.

    Args:
        qweight: int32 (N / 4, K / 2): 64 columns of four rows one after the other; 16 bits are codes 8 columns apart.
        wscales, wzeros: (G, N), at least for groups of 64; weights are scale * code + zero.
    """
    N, K = 4 * qweight.shape[0], 2 * qweight.shape[1]
    pairs = qweight.view(torch.uint8).view(N // 4, K // 64, 4, 2, 8, 2)  # rows k row half column pair
    fours = torch.stack([pairs & 15, pairs >> 4], -1).permute(0, 2, 1, 3, 5, 6, 4)
    groups = fours.reshape(N, K // AWQ_GROUP, AWQ_GROUP).float()
    scale, zero = (t[: K // AWQ_GROUP].T[..., None].float() for t in (wscales, wzeros))
    return (groups * scale + zero).view(N, K).to(wscales.dtype)
