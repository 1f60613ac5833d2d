"""Results drawn together come out as each does alone.

A product of matrices may add up in another order when it has more rows: a library chooses its algorithm by the shape.
Whether results change each other's bits is therefore measured, once for a shape, on the data itself. Where they do,
each is computed by itself, within the same captured step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.models.family import Condition, Execute, Family, Guidance, Predictor, Size, Tensors, eager


class Neighbours:
    """Remembers at which shapes results that are computed together keep the bits they have alone.

    An order of additions is an algorithm's, whatever the numbers: where all of a batch's values agree once, they do so
    again.

    Attributes:
        took: how batches were computed since it was cleared, by stage.
    """

    def __init__(self) -> None:
        self._agree: dict[tuple[Hashable, ...], bool] = {}
        self.took: dict[str, str] = {}

    def predictor(
        self,
        family: Family,
        x: Tensor,
        condition: Condition,
        size: Size,
        guidance: Guidance,
        timesteps: Sequence[float],
        denoiser: str,
    ) -> Predictor:
        """`family.predictor` for a batch x, exact."""

        def together() -> Predictor:
            return family.predictor(condition, size, guidance, timesteps, denoiser)

        def alone() -> Predictor:
            each = [condition.of(i) for i in range(len(x))]
            return apart([family.predictor(of_1, size, guidance, timesteps, denoiser) for of_1 in each])

        shape = denoiser, size, *(t.shape for t in condition.tensors.values())
        if len(x) == 1 or self._measured("denoising", shape, lambda: together()(x, 0), lambda: alone()(x, 0)):
            return together()
        return alone()

    def decode(self, family: Family, x: Tensor, size: Size, execute: Execute, *, tiling: bool) -> Iterator[Tensor]:
        """`family.decode` of a batch x, exact."""

        def alone(execute: Execute) -> Iterator[Tensor]:
            each = [family.decode(x_1, size, execute) for x_1 in torch.split(x, 1)]
            return (torch.cat(chunks) for chunks in zip(*each, strict=True))

        if len(x) == 1 or self._measured(
            "decoding", (size, len(x), tiling), lambda: next(family.decode(x, size)), lambda: next(alone(eager))
        ):
            yield from family.decode(x, size, execute)
        else:
            yield from alone(execute)

    def _measured(
        self, stage: str, shape: tuple[Hashable, ...], together: Callable[[], Tensor], alone: Callable[[], Tensor]
    ) -> bool:
        """Whether both give the same bits; computed when the shape is new."""
        key = stage, *shape
        if key not in self._agree:
            whole, parts = together(), alone()
            self._agree[key] = whole.is_meta or torch.equal(whole, parts)  # shapes alone have no bits to differ
        self.took[stage] = "together" if self._agree[key] else "one by one: together, bits differ"
        return self._agree[key]

    def keep_apart(self, size: Size) -> bool:
        """Whether batches of this size were found to gain nothing: each result is computed by itself."""
        return any(not agree and key[0] == "denoising" and key[2] == size for key, agree in self._agree.items())


def encode(
    family: Family,
    prompts: Sequence[str],
    negative: str | None,
    outputs_per_prompt: int,
    text_length: int,
    execute: Execute = eager,
) -> list[Condition]:
    """What every result of the positive branch is told, and of the negative one if there is one; prompt by prompt.

    Raises:
        PromptTooLong: as `Family.encode`.
    """
    each = [family.encode([prompt], text_length, execute) for prompt in prompts]
    conditions = [Condition.batch(each).repeat(outputs_per_prompt)]
    if negative is not None:
        conditions.append(family.encode([negative], text_length, execute).repeat(len(prompts) * outputs_per_prompt))
    return conditions


@dataclass(frozen=True)
class Apart:
    """Calls a denoiser for every result of a batch by itself. What it is given is by result, too."""

    call: Callable[..., Tensor]

    def __call__(self, x: Tensor, step: tuple[Tensors, ...], *requests: tuple[Tensors, ...]) -> Tensor:
        given = zip(torch.split(x, 1), step, requests, strict=True)
        return torch.cat([self.call(x_1, step_1, *request_1) for x_1, step_1, request_1 in given])


def apart(predictors: Sequence[Predictor]) -> Predictor:
    """Of a batch, from those of its results, which share their `call`."""
    steps: list[Any] = list(zip(*(p.steps for p in predictors), strict=True))
    return Predictor(Apart(predictors[0].call), tuple(p.request for p in predictors), steps)
