"""What a reader of a quantised checkpoint finds: layers as codes and everything else as it is, by diffusers' names.

Nothing is read before it is asked for, so that shapes are known, and memory is planned, from headers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sgl_diffusion.runtime.quantization.weight import QuantizedWeight


class InFile(Protocol):
    """A tensor in a file, such as `reading.Stored`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def mapped(self) -> Tensor:
        """Its values: a view of the mapped file, or what a reader makes of one."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor in a file, for layers that one file keeps in one and diffusers apart."""

    whole: InFile
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stop - self.start, *self.whole.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def mapped(self) -> Tensor:
        return self.whole.mapped()[self.start : self.stop]


@dataclass(frozen=True)
class StoredLayer:
    """The quantised weights of a linear layer.

    Attributes:
        tensors: in the file, by the names of `convert`'s arguments.
        convert: makes the weight of them, with operations that tensors of shapes alone ("meta") go through as well.
        rows: of the weight; None for all.
    """

    tensors: Mapping[str, InFile]
    convert: Callable[..., QuantizedWeight]
    rows: tuple[int, int] | None = None

    def shapes(self) -> QuantizedWeight:
        """Without memory."""
        with torch.device("meta"):
            return self._weight({name: torch.empty(t.shape, dtype=t.dtype) for name, t in self.tensors.items()})

    def read(self) -> QuantizedWeight:
        """On the host; views of mapped files where the layout is theirs."""
        return self._weight({name: t.mapped() for name, t in self.tensors.items()})

    def _weight(self, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        weight = self.convert(**tensors)
        return weight if self.rows is None else weight.rows(*self.rows)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A component's weights.

    Attributes:
        format: which, and with what codes, for the report: "GGUF (Q4_K, Q6_K)".
        layers: by the names of linear layers in diffusers' checkpoints ("blocks.0.attn1.to_q"), or of what our model
            packs them in ("blocks.0.attn1.to_qkv") where a file does so as well.
        tensors: all others, biases of these layers among them, by their whole names.
        facts: what `--nunchaku-config` may demand: precision and rank.
    """

    format: str
    layers: Mapping[str, StoredLayer]
    tensors: Mapping[str, InFile]
    facts: Mapping[str, str | int] = field(default_factory=dict)
