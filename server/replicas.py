"""Engines of one model, each with a queue-worker of its own, seen as one. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.checked import Checked
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parallel.layout import read_layout
from sgl_diffusion.server.engine_process import EngineProcess, EngineState
from sgl_diffusion.server.verdicts import Verdicts

BEST_FIRST: Sequence[EngineState] = ("ready", "starting", "restarting", "failed")
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


class Replicas:
    """How they are: as the best of them, which requests can go to.

    Args:
        verdicts_last: what an engine has said of a request holds for those that are like it.
    """

    def __init__(self, engines: Sequence[EngineProcess], *, verdicts_last: bool) -> None:
        self._engines, self._verdicts_last = engines, verdicts_last
        self._verdicts, self._deaths_before = Verdicts(), 0

    async def check(self, sampling: Mapping[str, Any]) -> Checked:
        """What a request comes to.

        Raises:
            UserError: it cannot be honoured.
            EngineAway: there is nobody to ask.
        """
        engine = self.best
        if not self._verdicts_last or engine.status.state != "ready":
            return await engine.check(sampling)
        if self.restarts != self._deaths_before:
            self._verdicts.forget()
            self._deaths_before = self.restarts
        if (known := self._verdicts.find(sampling)) is not None:
            return known
        checked = await engine.check(sampling)
        self._verdicts.keep(sampling, checked)
        return checked

    @property
    def best(self) -> EngineProcess:
        return min(self._engines, key=lambda engine: BEST_FIRST.index(engine.status.state))

    @property
    def state(self) -> EngineState:
        return self.best.status.state

    @property
    def error(self) -> str | None:
        return self.best.status.error

    @property
    def card(self) -> Mapping[str, Any] | None:
        """Of the model, once any has loaded it."""
        return next((engine.status.card for engine in self._engines if engine.status.card is not None), None)

    @property
    def pid(self) -> int | None:
        return self.best.status.pid

    @property
    def restarts(self) -> int:
        """Of all, since the server started."""
        return sum(engine.status.restarts for engine in self._engines)


def of_a_replica(args: ServerArgs) -> ServerArgs:
    """The arguments of one of `dp_size` engines. Raises UserError for degrees that do not fit together."""
    layout = read_layout(args)
    if layout.dp == 1:
        return args
    if args.nnodes > 1:
        raise UserError(
            f"dp_size={layout.dp}: replicas are on one host, and nnodes={args.nnodes}; "
            "servers on several may share a --database-url"
        )
    ranks = layout.ranks // layout.dp
    replica = args.model_copy(update={"dp_size": None, "num_gpus": ranks if ranks > 1 else None})
    read_layout(replica)  # what had an effect on all may have none on one
    return replica


def environments(args: ServerArgs, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Of every engine's process: of several, each sees GPUs of its own, in order."""
    layout = read_layout(args)
    if layout.dp == 1:
        return [dict(environment)]
    ranks = layout.ranks // layout.dp
    gpus = (
        environment.get(VISIBLE_GPUS, "").split(",") if environment.get(VISIBLE_GPUS) else map(str, range(layout.ranks))
    )
    shares = list(gpus)
    return [{**environment, VISIBLE_GPUS: ",".join(shares[i * ranks : (i + 1) * ranks])} for i in range(layout.dp)]
