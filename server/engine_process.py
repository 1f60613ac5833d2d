"""The engine process, seen from the API process: started, listened to, and started again when it dies. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from sgl_diffusion.runtime.checked import Checked
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.server.messages import (
    Answer,
    Broken,
    Check,
    CheckPassed,
    CheckRefused,
    Draw,
    Finished,
    JobMessage,
    Keep,
    Load,
    LoadFailed,
    Order,
    Ready,
    read_answer,
)

log = logging.getLogger("sgl_diffusion")

FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 30.0
LONGEST_LINE_BYTES = 1 << 28  # a preview of the largest picture fits well into it
ENDS_WITHIN_S = 5.0  # of its line being closed


@dataclass
class EngineStatus:
    """How the engine is.

    Attributes:
        card: of the model, once it was loaded.
        error: why it is not ready, if that is a failure.
        restarts: since the server started.
        pid: of its process, while there is one.
    """

    state: Literal["starting", "ready", "restarting", "failed"] = "starting"
    card: Mapping[str, Any] | None = None
    error: str | None = None
    restarts: int = 0
    pid: int | None = None


class EngineAway(Exception):
    """There is no engine just now; it is worth trying again after `retry_after` seconds."""

    def __init__(self, retry_after: float, reason: str) -> None:
        super().__init__(reason)
        self.retry_after, self.reason = retry_after, reason


@dataclass(frozen=True)
class Died:
    """The process died while it drew; `reason` completes "the engine ...". `killed`: by `EngineProcess.kill`."""

    reason: str
    killed: bool


class EngineProcess:
    """One engine process at a time.

    It is a program of its own rather than a fork or a `multiprocessing` child: it imports nothing of the parent's main
    module, and no pickle goes between the two.

    Args:
        on_ready: called whenever an engine has become ready.
    """

    def __init__(self, load: Load, on_ready: Callable[[], None]) -> None:
        self.status = EngineStatus()
        self._load, self._on_ready = load, on_ready
        self._process: Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._broken: str | None = None
        self._killed = False
        self._failures = 0  # in a row, without a finished job between
        self._started_at = self._back_at = self._loading_s = 0.0
        self._calls = count()
        self._checks: dict[int, asyncio.Future[Checked]] = {}
        self._told: asyncio.Queue[JobMessage | Died] | None = None

    # -- life ------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when the engine is ready.

        Raises:
            UserError: the model cannot be loaded as asked.
            RunFailure: loading it failed, or killed the process.
        """
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        await self._first

    async def stop(self) -> None:
        """Ends the process, whatever it does, and starts no other."""
        if self._supervisor is None:
            return
        self._supervisor.cancel()
        await asyncio.wait([self._supervisor])
        if not self._first.done():
            self._first.set_exception(RunFailure("the server is stopping"))

    async def _supervise(self) -> None:
        """Lives of the process, one after the other. A first one that does not get ready is the last."""
        while True:
            reason = await self._live()
            if self._killed:
                self._bury(reason)
                return
            if not self._first.done():
                self._give_up(RunFailure(f"the engine {reason} while it loaded the model"))
            if self.status.state == "failed":
                return
            pause = min(LONGEST_BACK_OFF_S, FIRST_BACK_OFF_S * 2**self._failures)
            self._failures += 1
            self._back_at = asyncio.get_running_loop().time() + pause
            self.status.state, self.status.error = "restarting", f"the engine {reason}"
            self.status.restarts += 1
            log.error("the engine %s; it is started again in %.1f s", reason, pause)
            self._bury(reason)
            await asyncio.sleep(pause)

    def _give_up(self, error: UserError | RunFailure) -> None:
        self.status.state, self.status.error = "failed", str(error)
        self._first.set_exception(error)

    async def _live(self) -> str:
        """One life of the process: until it closes its end of the line. Returns how it ended."""
        loop = asyncio.get_running_loop()
        self._started_at, self._broken = loop.time(), None
        ours, theirs = socket.socketpair()
        with theirs:
            command = (sys.executable, "-P", "-m", "sgl_diffusion.server.worker", str(theirs.fileno()))
            try:
                self._process = process = await asyncio.create_subprocess_exec(
                    *command, stdin=DEVNULL, pass_fds=[theirs.fileno()]
                )
            except OSError as e:
                ours.close()
                return f"could not be started ({e.strerror})"
        self.status.pid = process.pid
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=LONGEST_LINE_BYTES)
        try:
            self._writer.write(self._load.line())
            while (line := await reader.readline()).endswith(b"\n"):
                self._hear(read_answer(line))
        except ConnectionError:
            pass  # it died with something unread
        finally:
            self._writer.close()
            self._writer = None
            # it ends by itself when its line is closed. Killing one that has just died would take its status from
            # asyncio, which could not tell of what it died then
            try:
                async with asyncio.timeout(ENDS_WITHIN_S):
                    status = await process.wait()
            except TimeoutError:
                process.kill()
                status = await process.wait()
            self.status.pid = None
        return self._broken or _death(status)

    def kill(self) -> None:
        """The process dies at once, with what it does, and there is no other."""
        self._killed = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _bury(self, reason: str) -> None:
        """Tells those who wait for an answer that there will be none."""
        for future in self._checks.values():
            if not future.done():
                future.set_exception(self.away())
        if self._told is not None:
            self._told.put_nowait(Died(reason, self._killed))
            self._told = None

    def away(self) -> EngineAway:
        """Why there is no engine, and for how long, as far as that can be told."""
        now = asyncio.get_running_loop().time()
        back = max(self._back_at, self._started_at) + self._loading_s - now
        reason = self.status.error or "the engine is loading the model"
        return EngineAway(max(1.0, back), reason)

    # -- talk ------------------------------------------------------------------------

    def send(self, order: Order) -> None:
        """Raises EngineAway."""
        if self._writer is None or self.status.state != "ready":
            raise self.away()
        self._writer.write(order.line())

    async def check(self, sampling: Mapping[str, Any]) -> Checked:
        """What a request comes to.

        Raises:
            UserError: it cannot be honoured.
            EngineAway: there is nobody to ask.
        """
        call = next(self._calls)
        future: asyncio.Future[Checked] = asyncio.get_running_loop().create_future()
        self._checks[call] = future
        try:
            self.send(Check(call=call, sampling=sampling))
            return await future
        finally:
            del self._checks[call]

    def keep(self) -> None:
        """Has what is drawn stopped at its next step, and kept."""
        with suppress(EngineAway):  # then nothing is drawn
            self.send(Keep())

    def draw(self, order: Draw) -> asyncio.Queue[JobMessage | Died]:
        """Begins to draw; what is told of it comes out of the queue. The engine draws one order at a time.

        Raises:
            EngineAway: there is nobody to draw.
        """
        self.send(order)
        self._told = asyncio.Queue()
        return self._told

    def _hear(self, answer: Answer) -> None:
        match answer:
            case Ready():
                self._loading_s = asyncio.get_running_loop().time() - self._started_at
                self.status.state, self.status.card, self.status.error = "ready", answer.card, None
                if not self._first.done():
                    self._first.set_result(None)
                self._on_ready()
            case LoadFailed():
                self._broken = f"could not load the model: {answer.message}"
                if not self._first.done():
                    self._give_up((UserError if answer.is_user_error else RunFailure)(answer.message))
            case CheckPassed():
                if (future := self._checks.get(answer.call)) and not future.done():
                    future.set_result(answer.checked)
            case CheckRefused():
                if (future := self._checks.get(answer.call)) and not future.done():
                    future.set_exception((UserError if answer.is_user_error else RunFailure)(answer.message))
            case Broken():
                self._broken = f"stopped: {answer.reason}"
            case _:
                if isinstance(answer, Finished):
                    self._failures = 0
                if self._told is not None:
                    self._told.put_nowait(answer)


def _death(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    hint = ": perhaps the host ran out of memory" if status == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"
