"""Waiting for jobs: until one ends, or its client has left, and telling what happens as server-sent events."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse

from sgl_diffusion.server.context import Context
from sgl_diffusion.server.errors import ApiError, not_found
from sgl_diffusion.server.jobs import Ended, Job, JobEvent

HEARTBEAT_S = 15.0  # proxies close connections on which nothing is said
HEARTBEAT = b": still there\n\n"
NOT_BUFFERED = {"cache-control": "no-store", "x-accel-buffering": "no"}


async def until_ended(request: Request, here: Context, job: Job, *, is_new: bool, keep: bool) -> Job:
    """Waits for a job's end on behalf of a client, and cancels it when there is nobody to wait for it any more.

    Args:
        is_new: the job has just been submitted: it is as it is told.
        keep: let it go on all the same; its client can come back for it.
    Raises:
        ApiError: 504, it took longer than `request_timeout`; 503, the server is about to stop.
    """
    ended: Job | None = None
    left = asyncio.ensure_future(_disconnected(request))
    try:
        with here.dispatcher.watch(job.id, known=job if is_new else None, end_only=True, until=left) as events:
            async with asyncio.timeout(here.args.request_timeout):
                async for event in events:
                    if isinstance(event, Ended):
                        ended = event.job
    except KeyError:
        raise not_found("job", job.id) from None
    except TimeoutError:
        why = timed_out(here, job.id, kept=keep)
    else:
        if ended is not None:
            return ended
        if not left.done():
            raise _shutting_down(job.id)
        why = ApiError(400, "the client has left")  # and reads none of this
    finally:
        left.cancel()
    if not keep:
        await here.dispatcher.cancel(job.id)
    raise why


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def timed_out(here: Context, job_id: str, *, kept: bool) -> ApiError:
    told = "it goes on, ask again" if kept else "it is cancelled"
    return ApiError(
        504, f"{job_id} took more than {here.args.request_timeout:g} s; {told}", code="timeout", type="timeout_error"
    )


def _shutting_down(job_id: str) -> ApiError:
    return ApiError(
        503,
        f"the server is shutting down; {job_id} is kept, and goes on when it is back",
        code="shutting_down",
        headers={"retry-after": "10"},
    )


# -- server-sent events --------------------------------------------------------------------


def sse_aside(data: Mapping[str, Any]) -> bytes:
    """A comment: clients of the OpenAI API, which know no such event, do not see it."""
    return f": {json.dumps(data)}\n\n".encode()


def sse(name: str, data: Mapping[str, Any]) -> bytes:
    """One event; its name is in the data too, as the official clients expect."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


def sse_error(error: ApiError) -> bytes:
    """The last event of a stream that cannot go on; the official clients raise it."""
    return f"event: error\ndata: {json.dumps(error.body())}\n\n".encode()


def event_stream(chunks: AsyncIterator[bytes], headers: Mapping[str, str]) -> StreamingResponse:
    return StreamingResponse(chunks, media_type="text/event-stream", headers={**NOT_BUFFERED, **headers})


async def told(
    here: Context, job_id: str, timeout_s: float = math.inf, *, kept: bool = False
) -> AsyncIterator[JobEvent | None]:
    """What happens to a job, up to its end; None whenever nothing did for `HEARTBEAT_S`.

    Args:
        kept: the job goes on when the time is over.
    Raises:
        ApiError: the server is about to stop, or `timeout_s` are over, or the job was deleted.
    """
    now = asyncio.get_running_loop().time
    deadline = now() + timeout_s
    with here.dispatcher.watch(job_id) as events:
        following = asyncio.ensure_future(_next(events, job_id))
        try:
            while True:
                done, _ = await asyncio.wait({following}, timeout=min(HEARTBEAT_S, max(0.0, deadline - now())))
                if not done:
                    if now() >= deadline:
                        raise timed_out(here, job_id, kept=kept)
                    yield None
                    continue
                if (event := following.result()) is None:
                    raise _shutting_down(job_id)
                yield event
                if isinstance(event, Ended):
                    return
                following = asyncio.ensure_future(_next(events, job_id))
        finally:
            following.cancel()


async def _next(events: AsyncIterator[JobEvent], job_id: str) -> JobEvent | None:
    try:
        return await anext(events, None)
    except KeyError:
        raise not_found("job", job_id) from None
