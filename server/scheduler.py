"""Takes jobs from the queue, has them drawn in batches, and records what becomes of them. Torch-free."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from sgl_diffusion.server import messages
from sgl_diffusion.server.args import ServeArgs
from sgl_diffusion.server.database import StoreUnavailable
from sgl_diffusion.server.engine_process import Died, EngineAway, EngineProcess
from sgl_diffusion.server.folders import Folders
from sgl_diffusion.server.jobs import Failure, Job, Kind, NewJob, Preview, Progress, ResultFile, Status, UploadState
from sgl_diffusion.server.messages import Draw, DrawnJob
from sgl_diffusion.server.news import News
from sgl_diffusion.server.store import JobStore
from sgl_diffusion.server.store_thread import StoreThread

log = logging.getLogger("sgl_diffusion")

POLL_S = 1.0  # for jobs that other servers put into a shared queue
RECORD_STEP_S = 0.2  # between two records of a job's progress

Told = asyncio.Queue[messages.JobMessage | Died]
"""What the engine tells of a batch."""


class Scheduler:
    """One engine's: its task is `work`.

    Args:
        upload_state: of the results of jobs that complete.

    Attributes:
        mine: the jobs in progress here.
    """

    def __init__(
        self,
        args: ServeArgs,
        store: JobStore,
        thread: StoreThread,
        folders: Folders,
        engine: EngineProcess,
        news: News,
        upload_state: UploadState,
    ) -> None:
        self.args, self.store, self.folders, self.news, self.upload_state = args, store, folders, news, upload_state
        self.mine: dict[str, Job] = {}
        self._thread, self._engine, self._wake = thread, engine, asyncio.Event()
        self._alone = args.database_url is None  # no other server adds jobs
        self._unwanted: set[str] = set()  # of ours, those that a client cancelled
        self._resting = self._is_reserved = self._stopping = False
        self._expected: Draw | None = None  # the engine gets ready for it
        self._handed: tuple[Job, Told | None] | None = None  # None: the engine does not know of it yet

    async def work(self) -> None:
        """Batch after batch, until `stop`."""
        while not self._stopping or self._handed is not None:
            self._wake.clear()
            handed, self._handed = self._handed, None
            job, told = handed or (None, None)
            try:
                jobs = [] if job is None else [job]
                if told is not None:
                    await self._follow(jobs, told)
                else:
                    if job is None and self._engine.status.state == "ready":
                        jobs = await self._claim()
                    for batch in self._batches(await self._with_company(jobs)):
                        await self._draw(batch)
            except StoreUnavailable as e:
                log.error("no job can be taken from the queue, or be given back: %s", e)
                jobs = []
            if not jobs or (handed is not None and self._alone):  # nothing waited, and who adds something wakes us
                await self._rest()

    async def _rest(self) -> None:
        self._resting = True
        await _set_within(POLL_S, self._wake)
        while self._is_reserved:
            self._wake.clear()
            await self._wake.wait()
        self._resting = False

    @property
    def is_idle(self) -> bool:
        """Whether a job that is next could be drawn at once."""
        ready = self._engine.status.state == "ready" and not self._stopping
        return ready and self._resting and not self._is_reserved and not self._wake.is_set()

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Inside, an idle scheduler takes nothing but what is handed to it."""
        self._is_reserved = True
        try:
            yield
        finally:
            if self._expected is not None:
                self._expected = None
                self._engine.drop()
            self._is_reserved = False
            self._wake.set()

    def expect(self, new: NewJob) -> None:
        """Has the engine get ready for a job that may be handed over next, if no other can join it."""
        if not _has_room([new], self.args.max_batch_size):
            self._expected = _order([new], self.args.snapshot_every)
            with suppress(EngineAway):
                self._engine.prepare(self._expected)

    def hand(self, job: Job) -> None:
        """Draws the job that was expected, and that this server has claimed, as the next."""
        self.mine[job.id], told = job, None
        if (expected := self._expected) is not None:
            self._expected = None
            with suppress(EngineAway):  # then it goes back, as any other
                told = self._begin(expected)
        self._handed = job, told
        self._wake.set()

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def stop(self) -> None:
        """No further batch is begun."""
        self._stopping = True
        self._wake.set()

    def unwant(self, job_id: str) -> None:
        """Ends one of our jobs after its current step."""
        self._unwanted.add(job_id)
        with suppress(EngineAway):  # then it is on its way back, and ends there
            self._engine.send(messages.Cancel(job=job_id))

    # -- what is next ----------------------------------------------------------------

    async def _with_company(self, jobs: list[Job]) -> list[Job]:
        """The job whose turn it is, if any, and others that can be drawn with it, for which it waits a little."""
        if not jobs or not _has_room(jobs, self.args.max_batch_size) or not self._is_sociable(jobs[0]):
            return jobs
        deadline = time.monotonic() + self.args.batch_wait_ms / 1000
        while _has_room(jobs, self.args.max_batch_size) and not self._stopping:
            self._wake.clear()
            room = self.args.max_batch_size - _results(jobs)
            try:
                more = await self._claim(limit=room, batch_key=jobs[0].batch_key, max_results=room)
            except StoreUnavailable as e:
                log.error("%s is drawn without company: %s", jobs[0].id, e)
                break
            jobs += more
            if not more and not await _set_within(deadline - time.monotonic(), self._wake):
                break
        self._wake.set()  # others may have come
        return jobs

    async def _claim(self, **wanted: Any) -> list[Job]:
        jobs = await self._thread.run(self.store.claim, **wanted)
        self.mine |= {job.id: job for job in jobs}
        return jobs

    def _is_sociable(self, job: Job) -> bool:
        """Whether others may be drawn with it: not if it goes on from a snapshot, nor if the engine died of it."""
        return job.batch_key is not None and not job.crashes and not self.folders.snapshot(job.id).exists()

    def _batches(self, jobs: Sequence[Job]) -> list[list[Job]]:
        together = [job for job in jobs if self._is_sociable(job)]
        alone = [[job] for job in jobs if job not in together]
        return [together, *alone] if together else alone

    # -- a batch -----------------------------------------------------------------------

    async def _draw(self, batch: Sequence[Job]) -> None:
        """Until all of them have ended, or are back in the queue."""
        try:
            told = self._begin(_order(batch, self.args.snapshot_every))
        except EngineAway:
            for job in batch:
                await self._give_back(job, crashed=False)
            return
        for job_id in self._unwanted & {job.id for job in batch}:  # while the batch was put together
            self.unwant(job_id)
        await self._follow(batch, told)

    def _begin(self, order: Draw) -> Told:
        """Has the engine draw. Raises EngineAway."""
        if self._stopping:
            raise self._engine.away()
        return self._engine.draw(order)

    async def _follow(self, batch: Sequence[Job], told: Told) -> None:
        left, recorded, begun = {job.id: job for job in batch}, time.monotonic(), False
        drawn: dict[str, Sequence[ResultFile]] = {}
        while left:
            match await told.get():
                case messages.Progress(jobs=ids, stage=stage, step=step, steps=steps):
                    begun = True
                    for job_id in ids:
                        self.news.tell(job_id, Progress(stage, step, steps))
                    if steps and time.monotonic() - recorded >= RECORD_STEP_S:
                        recorded = time.monotonic()
                        await self._record_step(ids, step, steps)
                case messages.Preview(job=job_id, index=index, step=step, data=data):
                    self.news.tell(job_id, Preview(index, step, data))
                case messages.Drawn(job=job_id, results=results):
                    drawn[job_id] = results
                    await self._tell_drawn(left[job_id], results)
                case messages.Finished(job=job_id):
                    await self._complete(left.pop(job_id), drawn[job_id])
                case messages.Failed(job=job_id, failure=failure):
                    await self._end(left.pop(job_id), self.store.fail, failure)
                case messages.Cancelled(job=job_id):
                    await self._end(left.pop(job_id), self.store.cancelled)
                case messages.Kept(job=job_id):
                    await self._give_back(left.pop(job_id), crashed=False)
                case Died(reason=reason, killed=killed):
                    for job in left.values():
                        if job.id in drawn:
                            await self._complete(job, drawn[job.id])
                        else:
                            await self._survive(job, reason, guilty=begun and not killed)
                    return

    async def _record_step(self, job_ids: Sequence[str], step: int, steps: int) -> None:
        try:
            await self._thread.run(self.store.record_step, job_ids, step, steps)
        except StoreUnavailable as e:
            log.warning("progress is not recorded: %s", e)

    # -- the end of a job --------------------------------------------------------------

    async def _complete(self, job: Job, results: Sequence[ResultFile]) -> None:
        await self._end(job, self.store.complete, results, self.upload_state)

    async def _survive(self, job: Job, reason: str, *, guilty: bool) -> None:
        """The engine died while it drew the job, perhaps of it: once more, but not for ever."""
        if guilty and job.crashes:
            told = f"the engine {reason}, for the second time while it drew this"
            await self._end(job, self.store.fail, Failure(told, code="engine_crashed"))
        else:
            await self._give_back(job, crashed=guilty)

    async def _give_back(self, job: Job, *, crashed: bool) -> None:
        """Into the queue, where it keeps its turn. If it was cancelled meanwhile it ends instead."""
        await self._end(job, partial(self.store.requeue, crashed=crashed))

    async def _tell_drawn(self, job: Job, results: Sequence[ResultFile]) -> None:
        """Who waits for a picture has it before that is recorded: its files are there, whole, and if this server dies
        now, the next one draws the same again. Not where others may be asked for the job, who know the record alone.
        """
        if job.kind is Kind.VIDEO or not self._alone or self.upload_state is UploadState.WAITING:
            return
        ended_at = datetime.now(UTC)
        self.news.tell_drawn(replace(job, status=Status.COMPLETED, ended_at=ended_at, results=tuple(results)))
        await asyncio.sleep(0)  # the answer first: the store's thread would take the interpreter from it

    async def _end(self, job: Job, record: Callable[..., Job | None], *args: Any) -> None:
        """Of a job that is ours no more. If nothing is recorded it is another server's by now, and so are its files."""
        now = await self._thread.persist(self._concluded, record, job.id, *args)
        self.mine.pop(job.id, None)
        self._unwanted.discard(job.id)
        if now is not None and now.status.is_end:
            self.news.tell_end(now)
            return
        self.news.forget(job.id)
        if self._stopping:
            self.news.dismiss(lambda job_id: job_id == job.id)

    def _concluded(self, record: Callable[..., Job | None], *args: Any) -> Job | None:
        """In the store's thread: the record, and what the job does not need any more is removed."""
        job = record(*args)
        if job is not None and job.status.is_end:
            self.folders.tidy(job.id, job.status)
        return job


def _order(batch: Sequence[Job | NewJob], snapshot_every: int) -> Draw:
    drawn = [DrawnJob(id=job.id, sampling=job.sampling, presentation=job.presentation) for job in batch]
    return Draw(jobs=drawn, snapshot_every=snapshot_every)


async def _set_within(seconds: float, event: asyncio.Event) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            return await event.wait()
    return False


def _has_room(batch: Sequence[Job | NewJob], most: int) -> bool:
    """Whether one more job like the first fits into a batch of at most so many results."""
    return _results(batch) + _results(batch[:1]) <= most


def _results(jobs: Sequence[Job | NewJob]) -> int:
    return sum(int(job.sampling.get("num_outputs_per_prompt", 1)) for job in jobs)
