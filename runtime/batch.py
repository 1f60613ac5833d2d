"""Results drawn together come out as each does alone.

A product of matrices may add up in another order when it has more rows: a library chooses its algorithm by the shape.
Whether results change each other's bits is therefore measured, once for a shape, on the data itself. Where they do,
each is computed by itself, within the same captured step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from sgl_diffusion.models.family import Condition, Execute, Family, Guidance, Predictor, Size, Tensors, eager

TOGETHER = "together"


class Neighbours:
    """Remembers at which shapes results that are computed together keep the bits they have alone.

    An order of additions is an algorithm's, whatever the numbers: where all of a batch's values agree once, they do so
    again.

    Args:
        all_agree: by stage, asks the ranks that compute it together whether all of them found so.
        steps_apart: why results of a step are never computed together; empty if they may be.

    Attributes:
        took: how batches were computed since it was cleared, by stage.
    """

    def __init__(self, all_agree: Mapping[str, Callable[[bool], bool]] | None = None, steps_apart: str = "") -> None:
        self._all_agree, self._steps_apart = all_agree or {}, steps_apart
        self._agree: dict[tuple[Hashable, ...], bool] = {}
        self.took: dict[str, str] = {}

    def predictor(
        self,
        family: Family,
        x: Tensor,
        conditions: Sequence[Condition],
        size: Size,
        guidance: Guidance,
        timesteps: Sequence[float],
        denoiser: str,
    ) -> Predictor:
        """`family.predictor` for a batch x, exact; a condition for every result."""
        settings = size, guidance, timesteps, denoiser
        if why := self._steps_apart or ("" if _alike(conditions) else "prompts are not equally long"):
            self._note("denoising", f"one by one: {why}" if len(x) > 1 else TOGETHER)
            return _apart(family, conditions, *settings)

        def together() -> Predictor:
            return family.predictor(Condition.batch(conditions), *settings)

        def alone() -> Predictor:
            return _apart(family, conditions, *settings)

        shape = denoiser, size, len(x), *conditions[0].shapes
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
            agree = whole.is_meta or torch.equal(whole, parts)  # shapes alone have no bits to differ
            self._agree[key] = self._all_agree.get(stage, bool)(agree)
        self._note(stage, TOGETHER if self._agree[key] else "one by one: together, bits differ")
        return self._agree[key]

    def _note(self, stage: str, how: str) -> None:
        """Of several branches or denoisers, one that is not together is told."""
        if self.took.get(stage, TOGETHER) == TOGETHER:
            self.took[stage] = how

    def keep_apart(self, size: Size) -> bool:
        """Whether batches of this size were found to gain nothing: each result is computed by itself."""
        return any(not agree and key[0] == "denoising" and key[2] == size for key, agree in self._agree.items())


def encode(
    family: Family,
    prompts: Sequence[str],
    negative: str | None,
    outputs_per_prompt: int,
    text_length: int,
    pictures: Sequence[Image] = (),
    execute: Execute = eager,
) -> list[list[Condition]]:
    """What every result is told, in the positive branch and in the negative if there is one; prompt by prompt.

    Raises:
        PromptTooLong: as `Family.encode`.
    """
    each = [family.encode(prompt, text_length, pictures, execute) for prompt in prompts]
    branches = [[condition for condition in each for _ in range(outputs_per_prompt)]]
    if negative is not None:
        branches.append([family.encode(negative, text_length, pictures, execute)] * len(branches[0]))
    return branches


def predictor_of(
    family: Family,
    conditions: Sequence[Condition],
    size: Size,
    guidance: Guidance,
    timesteps: Sequence[float],
    denoiser: str,
) -> Predictor:
    """`family.predictor` of a batch, where conditions are alike; else result by result."""
    if _alike(conditions):
        return family.predictor(Condition.batch(conditions), size, guidance, timesteps, denoiser)
    return _apart(family, conditions, size, guidance, timesteps, denoiser)


def finished(family: Family, x: Tensor, conditions: Sequence[Condition]) -> Tensor:
    """`family.finished` of a batch x."""
    each = zip(torch.split(x, 1), conditions, strict=True)
    return torch.cat([family.finished(x_1, condition) for x_1, condition in each])


def _alike(conditions: Sequence[Condition]) -> bool:
    return all(condition.shapes == conditions[0].shapes for condition in conditions)


def _apart(
    family: Family,
    conditions: Sequence[Condition],
    size: Size,
    guidance: Guidance,
    timesteps: Sequence[float],
    denoiser: str,
) -> Predictor:
    return apart([family.predictor(condition, size, guidance, timesteps, denoiser) for condition in conditions])


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
