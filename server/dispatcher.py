"""The engine and its work, as the routes see them. Torch-free.

A job that is submitted is in the store. The scheduler takes it out when its turn comes, the engine process draws it,
and whoever watches it hears of that.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.checked import Checked
from sgl_diffusion.server import messages
from sgl_diffusion.server.args import ServeArgs
from sgl_diffusion.server.engine_process import EngineAway, EngineProcess, EngineStatus
from sgl_diffusion.server.folders import Folders
from sgl_diffusion.server.jobs import Ended, Job, JobEvent, NewJob, Preview, Progress, Status, UploadState
from sgl_diffusion.server.news import News
from sgl_diffusion.server.scheduler import POLL_S, Scheduler
from sgl_diffusion.server.store import JobStore
from sgl_diffusion.server.store_thread import StoreThread

__all__ = ["Dispatcher", "EngineAway"]

log = logging.getLogger("sgl_diffusion")


class Dispatcher:
    """Belongs to one event loop.

    Args:
        upload_state: of the results of jobs that complete: WAITING if there is a place to upload them to.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        serve_args: ServeArgs,
        store: JobStore,
        folders: Folders,
        upload_state: UploadState = UploadState.LOCAL,
    ) -> None:
        self._args, self._store, self._thread, self._news = serve_args, store, StoreThread(), News()
        self._alone = serve_args.database_url is None  # no other server touches these jobs
        self._wake = asyncio.Event()
        load = messages.Load(
            server_args=server_args.model_dump(mode="json", exclude_unset=True),
            data_dir=str(folders.root),
            log_format=serve_args.log_format,
        )
        self._engine = EngineProcess(load, on_ready=self._wake.set)
        self._scheduler = Scheduler(
            serve_args, store, self._thread, folders, self._engine, self._news, self._wake, upload_state
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._stop: asyncio.Task[None] | None = None

    @property
    def engine(self) -> EngineStatus:
        return self._engine.status

    @property
    def on_event(self) -> list[Callable[[str, Progress | Preview], None]]:
        """Called with all progress and previews of this server's jobs, in the event loop."""
        return self._news.on_event

    @property
    def on_end(self) -> list[Callable[[Job], None]]:
        """Called with every job that ends on this server, in the event loop."""
        return self._news.on_end

    # -- life ------------------------------------------------------------------------

    async def start(self) -> None:
        """Takes up the work. Returns when the engine is ready; jobs can be submitted before.

        Raises:
            UserError: the model cannot be loaded as asked.
            RunFailure: loading it failed, or killed the engine.
        """
        if self._alone:
            await self._thread.run(self._store.release_own)
        self._tasks = [asyncio.create_task(self._scheduler.work()), asyncio.create_task(self._scheduler.tend())]
        for task in self._tasks:
            task.add_done_callback(self._notice)
        await self._engine.start()

    def _notice(self, task: asyncio.Task[None]) -> None:
        """A task that fails takes the server's readiness with it: work would be accepted and never done."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the dispatcher failed", exc_info=error)
            self.engine.state, self.engine.error = "failed", "the dispatcher failed; the log has more"

    async def stop(self, *, at_once: bool = False) -> None:
        """Takes no more jobs, and returns when none is worked on.

        The running ones may end within `shutdown_timeout`. Then they stop after their next step and go back into the
        queue, and the next server goes on with them from there.

        Args:
            at_once: end the engine now; its jobs go back with the snapshots they have. Also during another `stop`.
        """
        if at_once:
            self._scheduler.stop()
            self._thread.patient = False
            self._engine.kill()
        if self._stop is None:
            self._stop = asyncio.create_task(self._wind_down())
        await asyncio.shield(self._stop)

    async def _wind_down(self) -> None:
        self._scheduler.stop()
        self._news.dismiss(lambda job_id: job_id not in self._scheduler.mine)
        if self._tasks:
            work, tend = self._tasks
            done, _ = await asyncio.wait([work], timeout=self._args.shutdown_timeout)
            if not done:
                self._thread.patient = False
                self._engine.keep()
                await asyncio.wait([work])
            tend.cancel()
        await self._engine.stop()
        self._news.dismiss(lambda _: True)

    # -- what clients want -----------------------------------------------------------

    async def check(self, sampling: Mapping[str, Any]) -> Checked:
        """What a request comes to.

        Raises:
            UserError: it cannot be honoured.
            EngineAway: there is nobody to ask.
        """
        return await self._engine.check(sampling)

    async def submit(self, new: NewJob) -> tuple[Job, bool]:
        """Puts a job into the queue; from then on it is safe. False: it was there already, by its idempotency key.

        Raises:
            QueueFull, IdempotencyConflict, StoreUnavailable: as `JobStore.add`.
        """
        new = replace(new, batch_key=_batch_key(new))
        job, is_new = await self._thread.run(self._store.add, new, self._args.max_queue_size)
        if is_new:
            self._wake.set()
        return job, is_new

    async def cancel(self, job_id: str) -> Job | None:
        """Ends a waiting job, and a running one after its current step. One that has ended stays as it is.

        Returns:
            The job as it is now; None if there is none.
        """

        def ask() -> tuple[Job | None, Job | None]:
            return self._store.get(job_id), self._store.ask_cancel(job_id)

        before, now = await self._thread.run(ask)
        if before is not None and now is not None and now.status.is_end and not before.status.is_end:
            await self._scheduler.conclude(now)
        if job_id in self._scheduler.mine:
            self._scheduler.unwant(job_id)
        return now

    async def watch(self, job_id: str, *, end_only: bool = False) -> AsyncIterator[JobEvent]:
        """What happens to a job from now on. The last event is `Ended`, at once if it has ended already.

        With `end_only`, steps on the way do not wake the watcher.

        Without `Ended` it ends only because the server stops: the job is kept, and the next server goes on with it.

        Raises:
            KeyError: there is no such job.
        """
        with self._news.feed(job_id, end_only=end_only) as feed:
            job = await self._thread.run(self._store.get, job_id)
            if job is None:
                raise KeyError(job_id)
            while not job.status.is_end:
                if self._stop is not None and job_id not in self._scheduler.mine:
                    return
                try:
                    async with asyncio.timeout(None if self._alone else POLL_S):
                        event = await feed.get()
                except TimeoutError:  # another server may draw it
                    if job_id not in self._scheduler.mine:
                        seen, job = job, await self._look(job)
                        if job.step != seen.step:
                            yield Progress("denoising", job.step, job.steps)
                    continue
                if event is None:
                    return
                yield event
                if isinstance(event, Ended):
                    return
            yield Ended(job)

    async def _look(self, job: Job) -> Job:
        """The job as it is now; a deleted one is as good as cancelled."""
        return await self._thread.run(self._store.get, job.id) or replace(job, status=Status.CANCELLED)


def _batch_key(new: NewJob) -> str | None:
    """Of all that the results of a batch have in common, as it was given: a file tells its settings, and has to be the
    same bytes as if it were drawn alone.
    """
    if new.batch_key is None or len(new.sampling["prompt"]) != 1:
        return None
    shared = {name: value for name, value in new.sampling.items() if name not in ("prompt", "seed")}
    told = json.dumps([new.batch_key, shared, new.presentation.get("output_format")], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
