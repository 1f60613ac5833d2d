"""/v1/images: pictures, which a request waits for, or watches come."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import Response

from sgl_diffusion.server.auth import Tenant
from sgl_diffusion.server.context import Context, Here
from sgl_diffusion.server.errors import FORESEEN, ApiError, as_api_error, failed_job
from sgl_diffusion.server.fields import EditBody, GenerationBody, body_schema, images_asked
from sgl_diffusion.server.files import ERRORS, content, report
from sgl_diffusion.server.jobs import Ended, Job, Kind, Preview, Progress, Status, UploadState
from sgl_diffusion.server.submission import FILE_FIELDS, Submission, read_submission
from sgl_diffusion.server.waiting import HEARTBEAT, event_stream, sse, sse_aside, sse_error, told, until_ended

router = APIRouter(tags=["images"], responses=ERRORS)

KINDS = (Kind.IMAGE, Kind.IMAGE_EDIT)
UPLOAD_WAIT_S = 30.0  # for a cloud URL; then the picture's URL is ours, for as long as it is here
SMALL_BYTES = 1 << 18  # more is read and encoded in a thread, so that nobody else waits for it
EVENT_NAMES = {Kind.IMAGE: "image_generation", Kind.IMAGE_EDIT: "image_edit"}


class Picture(BaseModel):
    """One result: `b64_json` or `url`, as `response_format` says."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class Images(BaseModel):
    """What was drawn. `id` is that of the job, for GET /v1/images/{id}/content."""

    id: str
    created: int
    background: str
    output_format: str
    quality: str
    size: str | None
    data: list[Picture]


@router.post(
    "/v1/images/generations",
    responses={200: {"model": Images, "content": {"text/event-stream": {}}}},
    openapi_extra=body_schema(GenerationBody),
)
async def generate(request: Request, here: Here, tenant: Tenant) -> Response:
    """Draws pictures from a prompt."""
    submission, fields = await read_submission(request, here, tenant, Kind.IMAGE, GenerationBody)
    job, is_new = await submission.submit(fields, images_asked(fields, here.card))
    return await _answer(request, submission, job, is_new=is_new, stream=bool(fields.stream))


@router.post(
    "/v1/images/edits",
    responses={200: {"model": Images, "content": {"text/event-stream": {}}}},
    openapi_extra=body_schema(EditBody, FILE_FIELDS[Kind.IMAGE_EDIT]),
)
async def edit(request: Request, here: Here, tenant: Tenant) -> Response:
    """Draws pictures from a prompt and pictures."""
    submission, fields = await read_submission(request, here, tenant, Kind.IMAGE_EDIT, EditBody)
    job, is_new = await submission.submit(fields, images_asked(fields, here.card))
    return await _answer(request, submission, job, is_new=is_new, stream=bool(fields.stream))


@router.get("/v1/images/{id}/content", response_class=Response)
async def picture(id: str, here: Here, tenant: Tenant, index: Annotated[int, Query(ge=0)] = 0) -> Response:
    """A picture's file."""
    return await content(here, await here.job(id, tenant, *KINDS), index)


@router.get("/v1/images/{id}/report", response_class=Response)
async def picture_report(id: str, here: Here, tenant: Tenant) -> Response:
    """What took effect and what it cost: the perf dump."""
    return await report(here, await here.job(id, tenant, *KINDS))


# -- answers ---------------------------------------------------------------------------


async def _answer(request: Request, submission: Submission, job: Job, *, is_new: bool, stream: bool) -> Response:
    here, headers, base = submission.here, {"x-job-id": job.id}, str(request.base_url)
    keep = submission.key is not None  # its client can ask again
    if stream:
        return event_stream(_events(here, job, base, keep=keep), headers)
    job = await until_ended(request, here, job, is_new=is_new, keep=keep)
    if job.status is not Status.COMPLETED:
        raise failed_job(job)
    answer: dict[str, Any] = {"id": job.id, "created": int(job.created_at.timestamp())} | _shared(job)
    answer["data"] = await _data(here, job, base)
    size = sum(result.size_bytes for result in job.results)
    body = await _unless_small(size, lambda: json.dumps(answer))
    return Response(body, media_type="application/json", headers=headers)


def _shared(job: Job) -> dict[str, Any]:
    told = job.presentation
    return {name: told.get(name) for name in ("background", "output_format", "quality", "size")}


async def _data(here: Context, job: Job, base: str) -> list[dict[str, Any]]:
    if job.presentation["response_format"] == "url":
        if job.upload is UploadState.WAITING and here.uploader is not None:
            job = await here.uploader.wait(job.id, UPLOAD_WAIT_S) or job
        ours = f"{base}v1/images/{job.id}/content?index="
        return [{"url": r.url or f"{ours}{i}", "seed": r.seed} for i, r in enumerate(job.results)]
    return [{"b64_json": await _base64(here, job, i), "seed": r.seed} for i, r in enumerate(job.results)]


async def _base64(here: Context, job: Job, index: int) -> str:
    """A result's file, wherever it is."""
    path = here.folders.results(job.id) / job.results[index].name
    try:
        size = job.results[index].size_bytes
        return await _unless_small(size, lambda: base64.b64encode(path.read_bytes()).decode())
    except FileNotFoundError:
        if here.uploader is None:
            raise ApiError(410, f"the files of {job.id} are not here any more", code="files_gone") from None
        return base64.b64encode(await here.uploader.fetch(job, index)).decode()


async def _unless_small(size_bytes: int, work: Callable[[], str]) -> str:
    """Work on so many bytes, in a thread unless they are few."""
    return work() if size_bytes <= SMALL_BYTES else await asyncio.to_thread(work)


async def _events(here: Context, job: Job, base: str, *, keep: bool) -> AsyncIterator[bytes]:
    """Progress as comments, previews, then every picture.

    Its job is cancelled when nobody listens any more, unless it is to be kept.
    """
    name, ended, partial = EVENT_NAMES[job.kind], False, 0
    created = {"id": job.id, "created_at": int(job.created_at.timestamp())}
    try:
        async for event in told(here, job.id, here.args.request_timeout, kept=keep):
            match event:
                case None:
                    yield HEARTBEAT
                case Progress(step=step, steps=steps) if steps:
                    yield sse_aside({"step": step, "steps": steps})
                case Preview(index=index, step=step, data=data):
                    shown = {"partial_image_index": partial, "index": index, "step": step}
                    picture = {"b64_json": base64.b64encode(data).decode(), "output_format": "webp"}
                    yield sse(f"{name}.partial_image", created | _shared(job) | shown | picture)
                    partial += 1
                case Ended(job=job):
                    ended = True
                    if job.status is not Status.COMPLETED:
                        raise failed_job(job)
                    for index, item in enumerate(await _data(here, job, base)):
                        yield sse(f"{name}.completed", created | _shared(job) | {"index": index} | item)
    except FORESEEN as e:
        yield sse_error(as_api_error(e))
    finally:
        if not ended and not keep:
            here.in_background(here.dispatcher.cancel(job.id))
