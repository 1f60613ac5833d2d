"""A server's life: everything is opened and checked, it serves, and it stops without losing a job."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.server.app import make_app
from sgl_diffusion.server.args import ServeArgs
from sgl_diffusion.server.auth import ENVIRONMENT, LOOPBACK, Gate, api_keys
from sgl_diffusion.server.cloud import CloudStorage, Uploader, read_settings
from sgl_diffusion.server.context import Context
from sgl_diffusion.server.database import StoreUnavailable
from sgl_diffusion.server.dispatcher import Dispatcher
from sgl_diffusion.server.folders import Folders
from sgl_diffusion.server.jobs import UploadState
from sgl_diffusion.server.logs import JobLog, RequestLog, set_up_logs
from sgl_diffusion.server.metrics import Metrics
from sgl_diffusion.server.retention import Retention
from sgl_diffusion.server.store import JobStore
from sgl_diffusion.server.tracing import open_tracing

log = logging.getLogger("sgl_diffusion")

BACKLOG = 2048
SWEEP_S = 60.0  # between looks for results that are to go
KEEP_ALIVE_S = 75  # longer than clients keep idle connections: the one they reuse is not the one we close just then
GOODBYE_S = 5  # for answers under way when everything else has stopped


def serve(model: ServerArgs, args: ServeArgs, on_ready: Callable[[str], None]) -> int:
    """Serves until a signal asks it to stop. Returns the exit code.

    Args:
        on_ready: called with the server's URL when the engine can draw.
    Raises:
        UserError: something cannot be had as asked: the port, the folder, the database, the model.
        RunFailure: the engine died of loading the model.
    """
    set_up_logs(model.log_level, args.log_format)
    gate = Gate(api_keys(args.api_key))
    if gate.is_open and args.host not in LOOPBACK:
        log.warning("host=%s without an API key: whoever reaches it may use it; set %s", args.host, ENVIRONMENT)
    folders = Folders(Path(args.data_dir).absolute())
    with _listening(args.host, args.port) as listener, _alone_in(folders, args):
        store = JobStore(args.database_url or f"sqlite:///{folders.root / 'jobs.sqlite'}", uuid.uuid4().hex)
        try:
            with asyncio.Runner(loop_factory=uvicorn.Config("", loop="auto").get_loop_factory()) as runner:
                runner.run(_serve(model, args, gate, folders, store, listener, on_ready))
        finally:
            store.close()
    return 0


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Before the model is loaded: a port that is taken is known at once. Connections wait until they are answered."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as e:
        raise UserError(f"host={host}, port={port}: cannot be listened on: {e.strerror}") from e
    with listener:
        yield listener


@contextmanager
def _alone_in(folders: Folders, args: ServeArgs) -> Iterator[None]:
    """Two servers on one SQLite file would each take the other's running jobs for those of a dead predecessor."""
    if args.database_url is not None:
        yield
        return
    with (folders.root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UserError(
                f"data_dir={args.data_dir}: another server works in it; servers share one with --database-url"
            ) from e
        yield


class _Http(uvicorn.Server):
    """uvicorn, which tells of signals instead of stopping at once."""

    def __init__(self, app: ASGIApp, on_signal: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=GOODBYE_S,
            )
        )
        self._loop, self._on_signal = asyncio.get_running_loop(), on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._on_signal)

    @asynccontextmanager
    async def running(self, listener: socket.socket) -> AsyncIterator[asyncio.Task[None]]:
        """Answers connections inside the context; at its end, those under way get a little time."""
        task = asyncio.create_task(self.serve(sockets=[listener]))
        try:
            yield task
        finally:
            self.should_exit = True
            await task


async def _serve(
    model: ServerArgs,
    args: ServeArgs,
    gate: Gate,
    folders: Folders,
    store: JobStore,
    listener: socket.socket,
    on_ready: Callable[[str], None],
) -> None:
    """What is opened here is closed in the reverse order: the engine first, the connections after their answers."""
    async with AsyncExitStack() as open_:
        settings, tracing = read_settings(os.environ), open_tracing(os.environ)
        uploader = None if settings is None else Uploader(store, folders, CloudStorage(settings))
        state = UploadState.LOCAL if uploader is None else UploadState.WAITING
        retention = Retention(store, folders, args.retain_days, args.disk_quota_mb)
        dispatcher = Dispatcher(model, args, store, folders, state)
        metrics, job_log = Metrics(dispatcher.engine, folders, store.counts, uploader, store.uploads_waiting), JobLog()
        context = Context(model, args, dispatcher, store, folders, int(time.time()), job_log, uploader)
        app: ASGIApp = make_app(context, gate, metrics)
        if tracing is not None:
            from sgl_diffusion.server.spans import TracedRequests  # OpenTelemetry is not installed for everyone

            open_.callback(tracing.close)
            dispatcher.news.on_event.append(tracing.on_event)
            dispatcher.news.on_end.append(tracing.on_end)
            app = TracedRequests(app, tracing)
        dispatcher.news.on_event.append(job_log.on_event)
        dispatcher.news.on_end.extend([job_log.on_end, metrics.on_end])
        stop = asyncio.Event()

        def on_signal() -> None:
            """The first asks to finish what is begun; the second does not wait for it."""
            if stop.is_set():
                context.in_background(dispatcher.stop(at_once=True))
            stop.set()

        http = _Http(RequestLog(app, metrics.on_request), on_signal)
        serving = await open_.enter_async_context(http.running(listener))
        if uploader is not None:
            wake = uploader.wake
            dispatcher.news.on_end.append(lambda job: wake())
            await uploader.start()
            open_.push_async_callback(uploader.stop)
        sweeping = asyncio.create_task(_sweep(retention))
        open_.callback(sweeping.cancel)
        open_.push_async_callback(dispatcher.stop)
        starting, stopped = asyncio.create_task(dispatcher.start()), asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopped, serving}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            on_ready(_url(args.host, listener))
            await asyncio.wait({stopped, serving}, return_when=asyncio.FIRST_COMPLETED)


async def _sweep(retention: Retention) -> None:
    while True:
        try:
            await asyncio.to_thread(retention.sweep)
        except (StoreUnavailable, OSError) as e:
            log.warning("old results cannot be removed: %s", e)
        await asyncio.sleep(SWEEP_S)


def _url(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"
