"""What a request comes to, as a process without torch can hold it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Checked:
    """What a request comes to. Of a diffusers pipeline, what the request leaves open is not known: None.

    Attributes:
        fps: None for pictures.
        count: results.
        work: a measure of the cost, in tokens and steps, or in pixels; comparable within one model.
        batch_key: requests with the same one can be drawn as one request; None: by itself only. It may become None when
            batches are found to gain nothing.
        for_any_prompt: the rest holds for all requests that differ from this one in prompts and seeds alone.
    """

    height: int | None
    width: int | None
    num_frames: int | None
    fps: int | None
    steps: int | None
    count: int
    work: float
    batch_key: str | None
    for_any_prompt: bool
