"""What `Engine.generate` yields while it works. The caller owns progress bars, cancelling and previews. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sgl_diffusion.runtime.output import Output
    from sgl_diffusion.runtime.report import Report

Pixels = NDArray[np.uint8]
"""A picture (H, W, 3) or frames (F, H, W, 3) of a clip."""


@dataclass(frozen=True)
class StageStarted:
    name: str


@dataclass(frozen=True)
class StageFinished:
    name: str


@dataclass(frozen=True)
class StepDone:
    """One denoising step of `total` is issued; `step` counts from 1."""

    step: int
    total: int


@dataclass(frozen=True)
class Drawn:
    """Of every result of the request, in order: the picture, or the next frames of the clip."""

    pixels: Sequence[Pixels]


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
