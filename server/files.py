"""Files of ended jobs over HTTP: results, in parts if asked for, and reports."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.types import Message, Receive, Scope, Send

from sgl_diffusion.server.context import Context
from sgl_diffusion.server.errors import ApiError, ErrorBody
from sgl_diffusion.server.folders import REPORT
from sgl_diffusion.server.jobs import Job, Status

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
"""What routes declare beside their own answers."""

# a result never changes, and is its owner's alone
HEADERS = {"cache-control": "private, max-age=86400, immutable", "x-content-type-options": "nosniff"}


class ResultResponse(FileResponse):
    """A file, or the ranges of it that were asked for; ranges that it does not have are refused in our own shape."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused: ApiError | None = None

        async def checked(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                kept = [(k.decode(), v.decode()) for k, v in message["headers"] if k == b"content-range"]
                refused = ApiError(
                    message["status"], "range: the file has no such part", param="range", headers=dict(kept)
                )
                await refused.response()(scope, receive, send)
            elif refused is None:
                await send(message)

        await super().__call__(scope, receive, checked)


async def content(here: Context, job: Job, index: int) -> Response:
    """A result, or the way to it.

    Raises:
        ApiError: there is none (yet).
    """
    if job.status is not Status.COMPLETED:
        raise ApiError(404, f"{job.id} is {job.status}: there is nothing to fetch", code="not_completed")
    if index >= len(job.results):
        raise ApiError(404, f"index={index}: {job.id} has {len(job.results)}", param="index", code="not_found")
    result = job.results[index]
    if result.url is not None:
        return RedirectResponse(result.url, 307)
    name = f"{job.id}-{index}{os.path.splitext(result.name)[1]}"
    path = here.folders.results(job.id) / result.name
    return await _file(path, media_type=result.media_type, filename=name)


async def report(here: Context, job: Job) -> Response:
    """Raises ApiError: there is none (yet)."""
    await here.dispatcher.news.recorded()  # results are told of before their report is there
    return await _file(here.folders.results(job.id) / REPORT, media_type="application/json")


async def _file(path: os.PathLike[str], **kwargs: Any) -> Response:
    try:
        found = await asyncio.to_thread(os.stat, path)
    except FileNotFoundError:
        raise ApiError(404, "the file is not here (any more)", code="not_found") from None
    return ResultResponse(path, headers=HEADERS, stat_result=found, content_disposition_type="inline", **kwargs)
