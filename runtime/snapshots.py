"""The state between two denoising steps, on disk: what an interrupted request goes on from, to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sgl_diffusion.runtime.denoise import State
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.latents import save_tensors
from sgl_diffusion.runtime.output import METADATA_KEY, request_digest
from sgl_diffusion.runtime.request import Request
from sgl_diffusion.runtime.schedulers import Schedule


@dataclass(frozen=True)
class Snapshot:
    """Of the results of a request, on the host.

    Attributes:
        step: how many are done.
        x: the state after them, results first.
        history: earlier predictions that a solver of higher order goes by, the latest first.
        digests: of what was asked for, by result: it only goes on as the same request.
    """

    step: int
    x: Tensor
    history: tuple[Tensor, ...]
    digests: tuple[str, ...]

    def part(self, results: slice) -> Snapshot:
        """That of some results of a batch."""
        return Snapshot(self.step, self.x[results], tuple(h[results] for h in self.history), self.digests[results])

    def state(self, request: Request, like: Tensor, schedule: Schedule) -> State:
        """Where the request goes on, on the device of a state like its first.

        Raises:
            UserError: another request left it, or another version of this program.
        """
        if self.digests != digests(request):
            raise UserError("resume: the snapshot is of another request")
        kept = self.x, *self.history
        found, expected = [tuple(x.shape) for x in kept], [tuple(like.shape)] * (1 + schedule.remembered)
        if found != expected or not 0 < self.step < schedule.steps:
            raise UserError(f"resume: the snapshot holds {found} after step {self.step}; expected {expected}")
        x, *history = (states.to(like.device) for states in kept)
        return State(x, tuple(history), self.step)


def digests(request: Request) -> tuple[str, ...]:
    return tuple(request_digest(request, i) for i in range(request.count))


def save_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Raises RunFailure if the disk does not take the file."""
    states: Sequence[Tensor] = (snapshot.x, *snapshot.history)
    note = json.dumps({"step": snapshot.step, "digests": snapshot.digests})
    save_tensors({str(i): x for i, x in enumerate(states)}, note, path)


def read_snapshot(path: Path) -> Snapshot:
    """Raises UserError if the file is missing, broken or not of our making."""
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {})[METADATA_KEY])
            x, *history = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
            return Snapshot(int(note["step"]), x, tuple(history), tuple(note["digests"]))
    except (OSError, SafetensorError) as e:
        raise UserError(f"resume={path}: cannot be read: {e}") from e
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"resume={path}: holds no snapshot") from e
