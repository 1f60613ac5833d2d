"""What the routes work with."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.server.args import ServeArgs
from sgl_diffusion.server.cloud import Uploader
from sgl_diffusion.server.dispatcher import Dispatcher, EngineAway
from sgl_diffusion.server.errors import ApiError, not_found
from sgl_diffusion.server.folders import Folders
from sgl_diffusion.server.jobs import Job, Kind
from sgl_diffusion.server.logs import JobLog
from sgl_diffusion.server.store import JobStore

RETRY_STARTING_S = 5.0


@dataclass(frozen=True)
class Context:
    """A running server: its arguments, its jobs, and who works on them.

    Attributes:
        started_at: seconds since the epoch.
        uploader: where results go to cloud storage.
    """

    model: ServerArgs
    args: ServeArgs
    dispatcher: Dispatcher
    store: JobStore
    folders: Folders
    started_at: int
    job_log: JobLog
    uploader: Uploader | None = None
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def model_name(self) -> str:
        return self.args.served_model_name or self.model.model_path

    @property
    def card(self) -> Mapping[str, Any]:
        """What the engine says about the model.

        Raises:
            EngineAway: it has not said it yet.
        """
        if self.dispatcher.engine.card is None:
            raise EngineAway(reason="the engine is loading the model", retry_after=RETRY_STARTING_S)
        return self.dispatcher.engine.card

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 if a request is meant for a model other than ours."""
        if name not in (None, self.model_name, self.model.model_path):
            raise ApiError(
                404, f"model={name}: this server has {self.model_name}", param="model", code="model_not_found"
            )

    async def job(self, id: str, tenant: str, *kinds: Kind) -> Job:
        """A tenant's job, of one of these kinds if there are any.

        Raises:
            ApiError: 404 for others' jobs too.
        """
        job = self.dispatcher.drawn(id)
        if job is None and is_job_id(id):
            job = await asyncio.to_thread(self.store.get, id, tenant)
        if job is None or job.tenant != tenant or (kinds and job.kind not in kinds):
            raise not_found("video" if kinds == (Kind.VIDEO,) else "image" if kinds else "job", id)
        return job

    async def delete(self, job: Job) -> None:
        """Ends and removes a job; its files too, or once it has ended."""
        await self.dispatcher.cancel(job.id)
        await asyncio.to_thread(self.store.delete, job.id)
        if job.status.is_end:
            await asyncio.to_thread(self.folders.remove, job.id)

    def in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Has something done for a client that will not wait for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def is_job_id(text: str) -> bool:
    """Only these are asked of the store: not every database takes every text."""
    prefix, _, digits = text.partition("_")
    return prefix in ("img", "video") and len(digits) == 32 and set(digits) <= set("0123456789abcdef")


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Here = Annotated[Context, Depends(_context)]
