"""The engine process, seen from the API process: started, listened to, and started again when it dies. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from asyncio import FIRST_COMPLETED
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from sgl_diffusion.runtime.checked import Checked
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.server.messages import (
    LAST_WORDS,
    LINE,
    LOAD,
    Answer,
    Begin,
    Broken,
    Check,
    CheckPassed,
    CheckRefused,
    Draw,
    Drop,
    Finished,
    JobMessage,
    Keep,
    Load,
    LoadFailed,
    Order,
    Prepare,
    RankFailed,
    Ready,
    read_answer,
)

log = logging.getLogger("sgl_diffusion")

FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 30.0
LONGEST_LINE_BYTES = 1 << 28  # a preview of the largest picture fits well into it
ENDS_WITHIN_S = 5.0  # of its line being closed


EngineState = Literal["starting", "ready", "restarting", "failed"]


@dataclass
class EngineStatus:
    """How the engine is.

    Attributes:
        card: of the model, once it was loaded.
        error: why it is not ready, if that is a failure.
        restarts: since the server started.
        pid: of its process, while there is one.
    """

    state: EngineState = "starting"
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
    module, and no pickle goes between the two. Where the model runs on several ranks, it starts and watches them; the
    first of them draws and has the line to this process, and all of them live and die together.

    Args:
        on_ready: called whenever an engine has become ready.
        environment: of the process; None for ours.
    """

    def __init__(self, load: Load, on_ready: Callable[[], None], environment: Mapping[str, str] | None = None) -> None:
        self.status = EngineStatus()
        self._load, self._on_ready, self._environment = load, on_ready, environment
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
        self._prepared: Draw | None = None

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
        connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = loop.create_future()

        def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not connected.done():
                connected.set_result((reader, writer))

        with TemporaryDirectory(prefix="sgl-diffusion-engine-") as folder:
            Path(folder, LOAD).write_bytes(self._load.line())
            line = await asyncio.start_unix_server(on_connection, f"{folder}/{LINE}", limit=LONGEST_LINE_BYTES)
            async with line:
                command = (sys.executable, "-P", "-m", "sgl_diffusion.server.worker", folder)
                try:
                    self._process = process = await asyncio.create_subprocess_exec(
                        *command, stdin=DEVNULL, env=self._environment, start_new_session=True
                    )
                except OSError as e:
                    return f"could not be started ({e.strerror})"
                self.status.pid = process.pid
                try:
                    ended: asyncio.Future[Any] = asyncio.ensure_future(process.wait())
                    await asyncio.wait([connected, ended], return_when=FIRST_COMPLETED)
                    if connected.done():
                        await self._listen(*connected.result())
                finally:
                    status = await _end_of(process, at_once=not connected.done())
                    self.status.pid = None
            if (words := Path(folder, LAST_WORDS)).exists():
                self._hear(read_answer(words.read_bytes()))
        return self._broken or _death(status)

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the process closes its end of the line."""
        self._writer = writer
        try:
            while (line := await reader.readline()).endswith(b"\n"):
                self._hear(read_answer(line))
        except ConnectionError:
            pass  # it died with something unread
        finally:
            self._writer = None
            writer.close()

    def kill(self) -> None:
        """The process dies at once, with what it does, and there is no other."""
        self._killed = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _bury(self, reason: str) -> None:
        """Tells those who wait for an answer that there will be none."""
        self._prepared = None
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

    def prepare(self, order: Draw) -> None:
        """Has the engine, which draws nothing, get ready for an order that is given to `draw` next, or to nobody.

        Raises EngineAway.
        """
        self.send(Prepare(order=order))
        self._prepared = order

    def drop(self) -> None:
        """What was prepared will not be drawn."""
        if self._prepared is not None:
            self._prepared = None
            with suppress(EngineAway):
                self.send(Drop())

    def draw(self, order: Draw) -> asyncio.Queue[JobMessage | Died]:
        """Begins to draw; what is told of it comes out of the queue. The engine draws one order at a time.

        Raises:
            EngineAway: there is nobody to draw.
        """
        prepared, self._prepared = self._prepared, None
        self.send(Begin() if order is prepared else order)
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
            case RankFailed():
                self._broken = f"failed: {answer.message}"
                if not self._first.done() and answer.is_user_error:
                    self._give_up(UserError(answer.message))
            case _:
                if isinstance(answer, Finished):
                    self._failures = 0
                if self._told is not None:
                    self._told.put_nowait(answer)


async def _end_of(process: Process, *, at_once: bool) -> int:
    """The exit status. A process ends by itself when its line is closed, soon, or is killed."""
    if at_once and process.returncode is None:
        process.kill()
    # killing one that has just died would take its status from asyncio, which could not tell of what it died then
    try:
        async with asyncio.timeout(ENDS_WITHIN_S):
            return await process.wait()
    except TimeoutError:
        process.kill()
        return await process.wait()


def _death(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    hint = ": perhaps the host ran out of memory" if status == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"
