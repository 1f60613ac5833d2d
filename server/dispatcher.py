"""The engines and their work, as the routes see them. Torch-free.

A job that is submitted is in the store. A scheduler takes it out when its turn comes, its engine process draws it, and
whoever watches it hears of that. Of several engines (dp_size), replicas of one model, each has a scheduler, and all of
these take from the one store.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.server import messages
from sgl_diffusion.server.args import ServeArgs
from sgl_diffusion.server.database import StoreUnavailable
from sgl_diffusion.server.engine_process import EngineAway, EngineProcess
from sgl_diffusion.server.folders import Folders
from sgl_diffusion.server.jobs import Ended, Job, JobEvent, Kind, NewJob, Progress, Status, UploadState
from sgl_diffusion.server.news import Feed, News
from sgl_diffusion.server.replicas import Replicas, environments, of_a_replica
from sgl_diffusion.server.scheduler import POLL_S, Scheduler
from sgl_diffusion.server.store import JobStore
from sgl_diffusion.server.store_thread import StoreThread

__all__ = ["Dispatcher", "EngineAway"]

log = logging.getLogger("sgl_diffusion")


class Dispatcher:
    """Belongs to one event loop.

    Args:
        upload_state: of the results of jobs that complete: WAITING if there is a place to upload them to.

    Attributes:
        schedulers: one an engine.
        news: of all jobs that this server works on.
    """

    def __init__(
        self,
        server_args: ServerArgs,
        serve_args: ServeArgs,
        store: JobStore,
        folders: Folders,
        upload_state: UploadState = UploadState.LOCAL,
    ) -> None:
        self._args, self._store, self._folders = serve_args, store, folders
        self._thread, self.news = StoreThread(), News()
        self._alone = serve_args.database_url is None  # no other server touches these jobs
        load = messages.Load(
            server_args=of_a_replica(server_args).model_dump(mode="json", exclude_unset=True),
            data_dir=str(folders.root),
            log_format=serve_args.log_format,
        )
        self._engines = [
            EngineProcess(load, self._wake, environment) for environment in environments(server_args, os.environ)
        ]
        self.schedulers = [
            Scheduler(serve_args, store, self._thread, folders, engine, self.news, upload_state)
            for engine in self._engines
        ]
        # where jobs are drawn together, which of them can be is found out as they are drawn
        self.engine = Replicas(self._engines, verdicts_last=serve_args.max_batch_size == 1)
        self._working: list[asyncio.Task[None]] = []
        self._tending: asyncio.Task[None] | None = None
        self._stop: asyncio.Task[None] | None = None

    # -- life ------------------------------------------------------------------------

    async def start(self) -> None:
        """Takes up the work. Returns when the engine is ready; jobs can be submitted before.

        Raises:
            UserError: the model cannot be loaded as asked.
            RunFailure: loading it failed, or killed the engine.
        """
        if self._alone:
            await self._thread.run(self._store.release_own)
        self._working = [asyncio.create_task(scheduler.work()) for scheduler in self.schedulers]
        self._tending = asyncio.create_task(self._tend())
        for task in (*self._working, self._tending):
            task.add_done_callback(self._notice)
        starting = [asyncio.create_task(engine.start()) for engine in self._engines]
        try:
            await asyncio.gather(*starting)
        finally:  # one that failed is enough
            for task in starting:
                task.cancel()

    def _wake(self) -> None:
        for scheduler in self.schedulers:
            scheduler.wake()

    async def _tend(self) -> None:
        """Keeps the leases of our jobs, hears which were cancelled elsewhere, frees those of servers that died."""
        while True:
            await asyncio.sleep(self._store.lease_seconds / 3)
            try:
                unwanted = await self._thread.run(self._store.renew)
                if await self._thread.run(self._store.reclaim):
                    self._wake()
            except StoreUnavailable as e:
                log.error("leases cannot be renewed: %s", e)
                continue
            for job_id in unwanted:
                self._unwant(job_id)

    def _is_ours(self, job_id: str) -> bool:
        """Whether one of our engines works on it."""
        return any(job_id in scheduler.mine for scheduler in self.schedulers)

    def _unwant(self, job_id: str) -> None:
        for scheduler in self.schedulers:
            if job_id in scheduler.mine:
                scheduler.unwant(job_id)

    def _notice(self, task: asyncio.Task[None]) -> None:
        """A task that fails takes the server's readiness with it: work would be accepted and never done."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the dispatcher failed", exc_info=error)
            for engine in self._engines:
                engine.status.state, engine.status.error = "failed", "the dispatcher failed; the log has more"

    async def stop(self, *, at_once: bool = False) -> None:
        """Takes no more jobs, and returns when none is worked on.

        The running ones may end within `shutdown_timeout`. Then they stop after their next step and go back into the
        queue, and the next server goes on with them from there.

        Args:
            at_once: end the engines now; their jobs go back with the snapshots they have. Also during another `stop`.
        """
        if at_once:
            for scheduler in self.schedulers:
                scheduler.stop()
            self._thread.patient = False
            for engine in self._engines:
                engine.kill()
        if self._stop is None:
            self._stop = asyncio.create_task(self._wind_down())
        await asyncio.shield(self._stop)

    async def _wind_down(self) -> None:
        for scheduler in self.schedulers:
            scheduler.stop()
        self.news.dismiss(lambda job_id: not self._is_ours(job_id))
        if self._working:
            _, late = await asyncio.wait(self._working, timeout=self._args.shutdown_timeout)
            if late:
                self._thread.patient = False
                for engine in self._engines:
                    engine.keep()
                await asyncio.wait(late)
        if self._tending is not None:
            self._tending.cancel()
        await asyncio.gather(*(engine.stop() for engine in self._engines))
        self.news.dismiss(lambda _: True)

    # -- what clients want -----------------------------------------------------------

    async def submit(self, new: NewJob) -> tuple[Job, bool]:
        """Puts a job into the queue; from then on it is safe. False: it was there already, by its idempotency key.

        A picture that nothing waits before goes to an engine that has nothing to do, without a stay in the queue. (Who
        asks for a clip expects to be told that it is queued.)

        Raises:
            QueueFull, IdempotencyConflict, StoreUnavailable: as `JobStore.add`.
        """
        # to its end, though nobody may wait for it any more: a job that was claimed has to be drawn
        return await asyncio.shield(asyncio.create_task(self._add(replace(new, batch_key=_batch_key(new)))))

    async def _add(self, new: NewJob) -> tuple[Job, bool]:
        idle = None if new.kind is Kind.VIDEO else next((s for s in self.schedulers if s.is_idle), None)
        with nullcontext() if idle is None else idle.reserved():
            limit = self._args.max_queue_size
            if idle is not None:
                idle.expect(new)
            job, is_new = await self._thread.run(self._store.add, new, limit, take=idle is not None)
            if is_new and idle is not None and job.status is Status.IN_PROGRESS:
                idle.hand(job)
            elif is_new:
                self._wake()
        return job, is_new

    def drawn(self, job_id: str) -> Job | None:
        """A job whose end was told to those who wait for it, as long as the store does not know that yet."""
        return self.news.drawn.get(job_id)

    async def counts(self) -> dict[Status, int]:
        """Jobs of every status, those among them whose end was told."""
        await self.news.recorded()
        return await asyncio.to_thread(self._store.counts)

    async def cancel(self, job_id: str) -> Job | None:
        """Ends a waiting job, and a running one after its current step. One that has ended stays as it is.

        Returns:
            The job as it is now; None if there is none.
        """

        if (drawn := self.drawn(job_id)) is not None:
            return drawn

        def ask() -> tuple[Job | None, bool]:
            before, now = self._store.get(job_id), self._store.ask_cancel(job_id)
            has_ended = before is not None and now is not None and now.status.is_end and not before.status.is_end
            if has_ended:
                self._folders.tidy(job_id, Status.CANCELLED)
            return now, has_ended

        now, has_ended = await self._thread.run(ask)
        if now is not None and has_ended:
            self.news.tell_end(now)
        self._unwant(job_id)
        return now

    @contextmanager
    def watch(
        self,
        job_id: str,
        *,
        known: Job | None = None,
        end_only: bool = False,
        until: asyncio.Future[None] | None = None,
    ) -> Iterator[AsyncIterator[JobEvent]]:
        """What happens to a job from now on. The last event is `Ended`, at once if it has ended already.

        Without `Ended` it ends only because `until` is done, or the server stops: the job is kept then, and the next
        server goes on with it. The iterator raises KeyError if there is no such job.

        Args:
            known: the job as it is now; it is looked up where that is not known.
            end_only: steps on the way do not wake the watcher.
        """
        with self.news.feed(job_id, end_only=end_only) as feed:
            if until is not None:
                until.add_done_callback(lambda _: feed.put(None))
            yield self._events(job_id, known, feed)

    async def _events(self, job_id: str, known: Job | None, feed: Feed) -> AsyncIterator[JobEvent]:
        job = known or self.drawn(job_id) or await self._thread.run(self._store.get, job_id)
        if job is None:
            raise KeyError(job_id)
        while not job.status.is_end:
            if self._stop is not None and not self._is_ours(job_id):
                return
            try:
                async with asyncio.timeout(None if self._alone else POLL_S):
                    event = await feed.get()
            except TimeoutError:  # another server may draw it
                if not self._is_ours(job_id):
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
