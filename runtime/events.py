"""What `Engine.generate` yields while it works. The caller owns progress bars, cancelling and previews. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from sgl_diffusion.runtime.output import Output
    from sgl_diffusion.runtime.report import Report
    from sgl_diffusion.runtime.snapshots import Snapshot

Pixels = NDArray[np.uint8]
"""A picture (H, W, 3) or frames (F, H, W, 3) of a clip."""


@dataclass(frozen=True)
class StageStarted:
    name: str


@dataclass(frozen=True)
class StageFinished:
    name: str


class Drawing(Protocol):
    """A request between two steps, to be looked at before the next event is taken. Nothing is done unless asked for."""

    def preview(self) -> list[Pixels]:
        """Of every result, the picture (H, W, 3) as it would be if the noise that is left were taken away at once; of
        a clip, its first frame.

        Raises:
            RunFailure: it is not a picture.
        """

    def snapshot(self) -> Snapshot:
        """What the request can go on from, in another process."""


@dataclass(frozen=True)
class StepDone:
    """One denoising step of `total` is issued; `step` counts from 1. The diffusers backend has no drawing to show."""

    step: int
    total: int
    drawing: Drawing | None = None


@dataclass(frozen=True)
class Drawn:
    """Of every result of the request, in order: the picture, or the next frames of the clip.

    `latents` are what all of it is decoded from; the diffusers backend does not tell.
    """

    pixels: Sequence[Pixels]
    latents: Tensor | None = None


@dataclass(frozen=True)
class Result:
    """Pictures or clips of a request, the files they were saved to, and the receipt."""

    outputs: Sequence[Output]
    paths: Sequence[Path]
    report: Report


@dataclass(frozen=True)
class Finished:
    result: Result


Event = StageStarted | StageFinished | StepDone | Drawn | Finished
