"""A dispatcher with a real engine process, as tests drive it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.server.args import ServeArgs
from sgl_diffusion.server.dispatcher import Dispatcher
from sgl_diffusion.server.folders import REPORT, Folders
from sgl_diffusion.server.jobs import Ended, Job, JobEvent, Kind, NewJob, Progress, UploadState
from sgl_diffusion.server.store import JobStore

PROMPT = "a red circle left of a blue square"
MODEL = ServerArgs(device="cpu", log_level="warning")

LEASE_S = 1.5

Run = Callable[[Coroutine[Any, Any, None]], None]


class Server:
    """A dispatcher with its store, in a folder of its own."""

    def __init__(
        self, folder: Path, model: ServerArgs = MODEL, *, upload: UploadState = UploadState.LOCAL, **serve: Any
    ) -> None:
        self.folders = Folders(folder)
        self.store = JobStore(f"sqlite:///{folder}/jobs.db", uuid.uuid4().hex, lease_seconds=LEASE_S)
        self.args = args = ServeArgs(data_dir=str(folder), **{"snapshot_every": 5, "max_batch_size": 4, **serve})
        self.dispatcher = Dispatcher(model, args, self.store, self.folders, upload)
        self.ended: list[str] = []
        self.dispatcher.news.on_end.append(lambda job: self.ended.append(job.id))

    async def submit(self, prompt: str = PROMPT, *, new: dict[str, Any] | None = None, **sampling: Any) -> Job:
        checked = await self.dispatcher.engine.check({"prompt": [prompt], **sampling})
        job, created = await self.dispatcher.submit(
            NewJob(
                id=f"img_{uuid.uuid4().hex}",
                sampling={"prompt": [prompt], **sampling},
                work=checked.work,
                batch_key=checked.batch_key,
                **{"kind": Kind.IMAGE, **(new or {})},
            )
        )
        assert created
        return job

    async def until(self, job: Job, is_it: Callable[[JobEvent], bool]) -> JobEvent:
        with self.dispatcher.watch(job.id) as events:
            async for event in events:
                if is_it(event):
                    return event
        raise AssertionError("it ended before")

    async def watched(self, job: Job) -> list[JobEvent]:
        with self.dispatcher.watch(job.id) as events:
            return [event async for event in events]

    async def reaches(self, job: Job, step: int) -> None:
        await self.until(job, lambda e: isinstance(e, Progress) and e.step >= step)

    async def end(self, job: Job) -> Job:
        """Told, and recorded."""
        event = await self.until(job, lambda e: isinstance(e, Ended))
        assert isinstance(event, Ended)
        while self.dispatcher.drawn(job.id) is not None:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)  # who waits for results is told first
        return event.job

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """The engine draws something long, so that jobs queue up behind it."""
        long = await self.submit(num_inference_steps=500, seed=0)
        await self.reaches(long, 1)
        yield
        await self.dispatcher.cancel(long.id)
        await self.end(long)
        while long.id not in self.ended:  # a watcher that asks the database may know it before
            await asyncio.sleep(0.01)
        self.ended.remove(long.id)

    async def rests(self) -> None:
        """It has nothing to do."""
        while not all(scheduler.is_idle for scheduler in self.dispatcher.schedulers):
            await asyncio.sleep(0.01)

    def kill_engine(self) -> None:
        pid = self.dispatcher.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    async def dies(self) -> None:
        """The engine is killed, and this is noticed."""
        self.kill_engine()
        while self.dispatcher.engine.state == "ready":
            await asyncio.sleep(0.01)

    async def comes_back(self) -> None:
        """What a dead engine had told before may still be on its way to watchers; not so when the next one is ready."""
        while self.dispatcher.engine.state != "ready":
            await asyncio.sleep(0.01)

    def files(self, job: Job) -> list[bytes]:
        return [(self.folders.results(job.id) / result.name).read_bytes() for result in job.results]

    def report(self, job: Job) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.folders.results(job.id) / REPORT).read_text())
        return report
