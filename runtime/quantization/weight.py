"""The weights of one linear layer as codes, and what makes numbers of them.

It is the one form that every scheme writes, every reader of a checkpoint fills and every layer computes with.

    kind        codes                         scale                                weight
    fp8         e4m3 (N, K)                   fp32 (N,)                            scale * code
    fp8_block   e4m3 (N, K)                   fp32 (N / 128, K / 128)              scale * code
    int8        int8 (N, K)                   fp32 (N,)                            scale * code
    w4          two of 4 bits a byte (N, K/2) any float, or e4m3 (N, groups)       scale * (code - 8)
                                              with an offset likewise              scale * code + offset
                                              with a table of 16 in fp32           scale * table[code]
    w8          int8 (N, K)                   any float (N, groups)                scale * code, + offset if given
    mxfp8       e4m3 (N, K)                   exponents, uint8 (N, K / 32)         2 ** (scale - 127) * code
    nvfp4       two e2m1 a byte (N, K/2)      e4m3 (N, K / 16), global fp32 (N,)   global_scale * scale * code

In a byte, the code of the even column has the lower four bits. fp8, fp8_block and int8 multiply codes of activations;
w4 and w8 are decoded while a kernel multiplies; mxfp8 and nvfp4 do either, by what the GPU has instructions for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from sgl_diffusion.kernels.grouped import dequantize
from sgl_diffusion.kernels.microscaling import dequantize_mx

Kind = Literal["fp8", "fp8_block", "int8", "w4", "w8", "mxfp8", "nvfp4"]
BLOCK = 128  # rows and columns of a block with one scale
COLUMNS_A_CODE = {"w4": 2, "nvfp4": 2}  # of the tensor of codes; 1 for all others


@dataclass(frozen=True)
class QuantizedWeight:
    """Weights (N, K) as codes. All tensors but those of the activations have the rows of the weight in their first
    dimension, or a divisor of their number.

    Attributes:
        offset, table, global_scale: as above, where the kind has them.
        input_scale: fp32 (1,), of activations, where it was calibrated; without it every row has one of its own.
        smooth_K: what activations are divided by before they meet these weights (SmoothQuant: Xiao et al. 2022, arXiv
            2211.10438).
        down_RK, up_NR: of a branch beside these weights, `x down^T up^T`, over activations as they are (SVDQuant: Li et
            al. 2024, arXiv 2411.05007).
        weight_only: of kinds that multiply codes: activations stay as they are, and those of the weight are decoded.
    """

    kind: Kind
    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    table: Tensor | None = None
    global_scale: Tensor | None = None
    input_scale: Tensor | None = None
    smooth_K: Tensor | None = None
    down_RK: Tensor | None = None
    up_NR: Tensor | None = None
    weight_only: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns * COLUMNS_A_CODE.get(self.kind, 1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those there are, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: t for name, t in named.items() if isinstance(t, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """With every tensor changed."""
        changed: dict[str, Any] = {name: change(t) for name, t in self.tensors.items()}
        return replace(self, **changed)

    def rows(self, start: int, stop: int) -> Self:
        """Some rows of the weight: views.

        Raises:
            ValueError: they cut a block.
        """
        N, cut = self.shape[0], dict[str, Any]()
        for name in OF_ROWS:
            if (t := getattr(self, name)) is None:
                continue
            each = N // len(t)
            if start % each or stop % each:
                raise ValueError(f"rows {start} to {stop}: {name} has one for every {each} rows")
            cut[name] = t[start // each : stop // each]
        return replace(self, **cut)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(N, K): what activations that nothing was done to are multiplied by."""
        match self.kind:
            case "fp8" | "int8":
                weight = self.codes.float() * self.scale[:, None]
            case "fp8_block":
                wide = self.scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
                weight = self.codes.float() * wide[: self.shape[0], : self.shape[1]]
            case "w4" | "w8":
                weight = dequantize(
                    self.codes, self.scale, offset_NG=self.offset, table=self.table, dtype=torch.float32
                )
            case "mxfp8" | "nvfp4":
                weight = dequantize_mx(self.codes, self.scale, self.kind, self.global_scale, torch.float32)
        if self.smooth_K is not None:
            weight = weight / self.smooth_K.float()
        if self.down_RK is not None and self.up_NR is not None:
            weight = weight + self.up_NR.float() @ self.down_RK.float()
        return weight.to(dtype)


OF_ROWS = ("codes", "scale", "offset", "global_scale", "up_NR")


def side_by_side(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One weight with the rows of all, over the same inputs; None where one product cannot compute them.

    Activation scales of parts become their largest.
    """
    first = parts[0]
    alike = all(
        (part.kind, part.weight_only) == (first.kind, first.weight_only)
        and part.tensors.keys() == first.tensors.keys()
        and all(
            part.tensors[n].dtype == t.dtype and part.tensors[n].shape[1:] == t.shape[1:]
            for n, t in first.tensors.items()
        )
        for part in parts
    )
    if not alike or first.smooth_K is not None or first.down_RK is not None:
        return None if len(parts) > 1 else first
    if first.kind == "fp8_block" and any(part.shape[0] % BLOCK for part in parts[:-1]):
        return None
    joined: dict[str, Any] = {n: torch.cat([part.tensors[n] for part in parts]) for n in first.tensors if n in OF_ROWS}
    if first.input_scale is not None:
        joined["input_scale"] = torch.stack([part.tensors["input_scale"] for part in parts]).amax(0)
    return replace(first, **joined)
