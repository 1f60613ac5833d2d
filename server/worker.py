"""The engine process: `python -m sgl_diffusion.server.worker FOLDER`, where it meets the API process (`messages.py`).

Of several ranks it starts the processes, all of them this program again; the first is the one to draw and to talk.
Its main thread draws; another one listens, answers questions, and takes what is to be heard while something is drawn.
torch is imported late: that takes seconds, in which the process can be told to end like at any other time.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.option import parse
from sgl_diffusion.runtime.parallel.launch import as_rank, launch, of_a_lost_rank
from sgl_diffusion.runtime.parallel.layout import read_layout
from sgl_diffusion.runtime.parallel.ranks import speaks, started_ranks
from sgl_diffusion.server.folders import Folders
from sgl_diffusion.server.jobs import Failure
from sgl_diffusion.server.logs import set_up_logs
from sgl_diffusion.server.messages import (
    LAST_WORDS,
    LINE,
    LOAD,
    Answer,
    Begin,
    Broken,
    Cancel,
    Check,
    CheckPassed,
    CheckRefused,
    Draw,
    Drop,
    Keep,
    Load,
    LoadFailed,
    Prepare,
    RankFailed,
    Ready,
    read_order,
)

if TYPE_CHECKING:
    from sgl_diffusion.runtime.engine import Engine
    from sgl_diffusion.server.drawing import Batch

log = logging.getLogger("sgl_diffusion")

PR_SET_PDEATHSIG = 1
POLITENESS = 5  # of a drawing CPU: whoever asks the server something is answered first


class Worker:
    """The state that both threads share: `cancelled` and `keep` are set by the listener and read between steps."""

    def __init__(self, load: Load, server_args: ServerArgs, line: socket.socket) -> None:
        self._in, self._out = line.makefile("rb"), line.makefile("wb")
        self._speaking = threading.Lock()
        self._orders: queue.SimpleQueue[Draw | Prepare | Begin | Drop] = queue.SimpleQueue()
        self._cancelled: set[str] = set()
        self._keep = threading.Event()
        self._server_args = server_args
        self._folders = Folders(Path(load.data_dir))
        self._engine: Engine | None = None

    def tell(self, answer: Answer) -> None:
        with self._speaking:
            self._out.write(answer.line())
            self._out.flush()

    def run(self) -> None:
        """Draws for as long as the process lives."""
        threading.Thread(target=self._listen, daemon=True, name="listener").start()
        from sgl_diffusion.runtime.card import card
        from sgl_diffusion.runtime.engine import Engine
        from sgl_diffusion.server.drawing import is_fatal

        try:
            self._engine = engine = Engine.load(self._server_args)
        except (UserError, RunFailure) as e:
            self.tell(LoadFailed(message=str(e), is_user_error=isinstance(e, UserError)))
            os._exit(1)
        if engine.device.type == "cpu":
            os.nice(POLITENESS)
        self.tell(Ready(card=card(engine)))
        for batch in self._ordered(engine):
            try:
                batch.draw()
            except Exception as e:
                if engine.lockstep.broken and of_a_lost_rank(e):  # where it was waiting is no news
                    log.error("another rank is gone, or did not answer: %s", str(e).splitlines()[0])
                else:
                    log.exception("an unforeseen failure")
                if is_fatal(e) or engine.lockstep.broken:
                    self.tell(Broken(reason=str(e).splitlines()[0]))
                    os._exit(1)
                batch.fail(Failure("the engine failed in a way that it does not know; its log has more"))
            self._cancelled.difference_update(job.id for job in batch.jobs)
            if engine.lockstep.broken:
                self.tell(Broken(reason="a request failed on some of its ranks, which are started again"))
                os._exit(1)

    def _ordered(self, engine: Engine) -> Iterator[Batch]:
        """What is to be drawn, one after the other, for ever."""
        from sgl_diffusion.server.drawing import Batch

        prepared: Batch | None = None
        while True:
            order = self._orders.get()
            if isinstance(order, Begin):
                assert prepared is not None, "Begin follows Prepare"
                yield prepared
                prepared = None
                continue
            if prepared is not None:
                prepared.drop()
                prepared = None
            if not isinstance(order, Drop):
                draw = order.order if isinstance(order, Prepare) else order
                batch = Batch(engine, self._folders, draw, self.tell, self._cancelled, self._keep)
                if isinstance(order, Prepare):
                    batch.prepare()
                    prepared = batch
                else:
                    yield batch

    def _listen(self) -> None:
        """Until the API process closes the line, or dies: nothing is to work for nobody."""
        try:
            for line in self._in:
                match read_order(line):
                    case Check(call=call, sampling=sampling):
                        self.tell(self._check(call, sampling))
                    case Draw() | Prepare() | Begin() | Drop() as order:
                        self._orders.put(order)
                    case Cancel(job=job):
                        self._cancelled.add(job)
                    case Keep():
                        self._keep.set()
        except Exception:
            log.exception("an unforeseen failure of the listener")
        finally:
            os._exit(0)

    def _check(self, call: int, sampling: Mapping[str, object]) -> CheckPassed | CheckRefused:
        from sgl_diffusion.runtime.card import check  # there by now

        assert self._engine is not None, "nothing is asked before Ready"
        try:
            return CheckPassed(call=call, checked=check(self._engine, parse(SamplingParams, sampling)))
        except UserError as e:
            return CheckRefused(call=call, message=str(e), is_user_error=True)
        except Exception:
            log.exception("an unforeseen failure of a check")
            told = "the engine failed to check the request; its log has more"
            return CheckRefused(call=call, message=told, is_user_error=False)


def main() -> None:
    _die_with_the_parent()
    folder = Path(sys.argv[1])
    load = Load.model_validate_json((folder / LOAD).read_bytes())
    server_args = parse(ServerArgs, load.server_args)
    ranks, started = read_layout(server_args).ranks, started_ranks()
    set_up_logs(server_args.log_level if speaks() else "error", load.log_format)
    if ranks > 1 and started == 1:
        _start_ranks(server_args, ranks, folder)
        return
    with as_rank() if ranks > 1 else nullcontext():
        if not speaks():
            _follow(server_args)
            return
        for signum in (signal.SIGINT, signal.SIGTERM):  # meant for the server, which decides what becomes of the work
            signal.signal(signum, signal.SIG_IGN)
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(folder / LINE))
            Worker(load, server_args, line).run()


def _start_ranks(server_args: ServerArgs, ranks: int, folder: Path) -> None:
    """Until they end, which is when the first one's line is closed, or when one of them fails."""
    try:
        launch(server_args, ranks, "sgl_diffusion.server.worker", [str(folder)])
    except (UserError, RunFailure) as e:
        last_words = RankFailed(message=str(e), is_user_error=isinstance(e, UserError))
        (folder / LAST_WORDS).write_bytes(last_words.line())
        sys.exit(1)


def _follow(server_args: ServerArgs) -> None:
    from sgl_diffusion.runtime.engine import Engine

    engine = Engine.load(server_args)
    if engine.device.type == "cpu":
        os.nice(POLITENESS)
    with engine:
        engine.follow()


def _die_with_the_parent() -> None:
    """At once, even in the middle of something that does not let the listener run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
