"""/v1/videos: clips, which a request does not wait for."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from sgl_diffusion.server.auth import Tenant
from sgl_diffusion.server.context import Context, Here
from sgl_diffusion.server.errors import FORESEEN, ApiError, as_api_error, bad_field, failed_job
from sgl_diffusion.server.fields import VideoBody, body_schema, video_asked
from sgl_diffusion.server.files import ERRORS, content, report
from sgl_diffusion.server.jobs import Ended, Job, Kind, Preview, Progress, Status
from sgl_diffusion.server.submission import FILE_FIELDS, read_submission
from sgl_diffusion.server.waiting import HEARTBEAT, event_stream, sse, sse_error, told

router = APIRouter(tags=["videos"], responses=ERRORS)

VIDEO_ID = "^video_[0-9a-f]{32}$"


class VideoError(BaseModel):
    code: str
    message: str
    param: str | None
    type: str


class Storage(BaseModel):
    """Where the results are: local, waiting to be uploaded, or uploaded."""

    state: Literal["local", "waiting", "uploaded"]
    attempts: int
    error: str | None


class Video(BaseModel):
    """A clip on its way, in OpenAI's words, and a little more."""

    id: str
    object: Literal["video"]
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    progress: int
    created_at: int
    started_at: int | None
    completed_at: int | None
    expires_at: int | None
    prompt: str
    seconds: str
    size: str
    quality: Literal["standard"]
    remixed_from_video_id: None
    error: VideoError | None
    url: str | None
    urls: list[str]
    storage: Storage


class Videos(BaseModel):
    """A page of them."""

    object: Literal["list"]
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


@router.post(
    "/v1/videos",
    responses={200: {"model": Video}},
    openapi_extra=body_schema(VideoBody, FILE_FIELDS[Kind.VIDEO]),
)
async def create(request: Request, here: Here, tenant: Tenant) -> Response:
    """Puts a clip into the queue."""
    submission, fields = await read_submission(request, here, tenant, Kind.VIDEO, VideoBody)
    job, _ = await submission.submit(fields, video_asked(fields, here.card))
    return JSONResponse(video_object(here, job, str(request.base_url)), headers={"x-job-id": job.id})


@router.get("/v1/videos", responses={200: {"model": Videos}})
async def list_videos(
    request: Request,
    here: Here,
    tenant: Tenant,
    after: Annotated[str | None, Query(pattern=VIDEO_ID)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The clips, newest first unless asked otherwise; `after` is the last id of the page before."""
    try:
        page, more = await asyncio.to_thread(here.store.list, [Kind.VIDEO], tenant, after, limit, order == "desc")
    except KeyError:
        raise bad_field("after", f"={after}: there is no such video") from None
    base = str(request.base_url)
    found = [video_object(here, job, base) for job in page]
    ends = {"first_id": page[0].id if page else None, "last_id": page[-1].id if page else None}
    return JSONResponse({"object": "list", "data": found, **ends, "has_more": more})


@router.get("/v1/videos/{id}", responses={200: {"model": Video}})
async def retrieve(request: Request, id: str, here: Here, tenant: Tenant) -> Response:
    """One clip's state."""
    return JSONResponse(video_object(here, await here.job(id, tenant, Kind.VIDEO), str(request.base_url)))


@router.delete("/v1/videos/{id}", responses={200: {"model": DeletedVideo}})
async def delete(id: str, here: Here, tenant: Tenant) -> Response:
    """Removes a clip and its files. If it is being drawn, that ends with the current step."""
    await here.delete(await here.job(id, tenant, Kind.VIDEO))
    return JSONResponse({"id": id, "object": "video.deleted", "deleted": True})


@router.get("/v1/videos/{id}/content", response_class=Response)
async def clip(
    id: str,
    here: Here,
    tenant: Tenant,
    variant: Annotated[Literal["video"], Query(description="Thumbnails and spritesheets are not made here.")] = "video",
    index: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """The clip's file, or ranges of it."""
    return await content(here, await here.job(id, tenant, Kind.VIDEO), index)


@router.get("/v1/videos/{id}/report", response_class=Response)
async def clip_report(id: str, here: Here, tenant: Tenant) -> Response:
    """What took effect and what it cost: the perf dump."""
    return await report(here, await here.job(id, tenant, Kind.VIDEO))


@router.get("/v1/videos/{id}/events", responses={200: {"content": {"text/event-stream": {}}}}, response_class=Response)
async def events(request: Request, id: str, here: Here, tenant: Tenant) -> Response:
    """Progress as server-sent events, up to the end; nobody has to listen."""
    job = await here.job(id, tenant, Kind.VIDEO)
    return event_stream(_events(here, job, str(request.base_url)), {})


@router.post("/v1/videos/{id}/remix", include_in_schema=False)
async def remix(id: str, here: Here, tenant: Tenant) -> Response:
    """OpenAI's models can do it."""
    await here.job(id, tenant, Kind.VIDEO)
    raise ApiError(400, "remix: this server's models draw from prompts and pictures only", code="unsupported")


# -- answers ---------------------------------------------------------------------------


def video_object(here: Context, job: Job, base: str) -> dict[str, Any]:
    """A clip as the API tells it; `base` is the server's URL as its client knows it."""
    presentation, done = job.presentation, job.status is Status.COMPLETED
    ours = f"{base}v1/videos/{job.id}/content"
    urls = [r.url or (ours if i == 0 else f"{ours}?index={i}") for i, r in enumerate(job.results)] if done else []
    ended_at = None if job.ended_at is None else int(job.ended_at.timestamp())
    days = here.args.retain_days
    return {
        "id": job.id,
        "object": "video",
        "model": presentation.get("model") or here.model_name,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created_at.timestamp()),
        "started_at": None if job.started_at is None else int(job.started_at.timestamp()),
        "completed_at": ended_at if done else None,
        "expires_at": None if days is None or ended_at is None else int(ended_at + days * 86400),
        "prompt": job.sampling["prompt"][0],
        "seconds": presentation.get("seconds", ""),
        "size": presentation.get("size", ""),
        "quality": "standard",
        "remixed_from_video_id": None,
        "error": _error(job),
        "url": urls[0] if urls else None,
        "urls": urls,
        "storage": {"state": job.upload, "attempts": job.upload_attempts, "error": job.upload_error},
    }


def _error(job: Job) -> dict[str, Any] | None:
    if job.failure is None:
        return None
    failure = failed_job(job)
    return {
        "code": failure.code or failure.type,
        "message": failure.message,
        "param": failure.param,
        "type": failure.type,
    }


async def _events(here: Context, job: Job, base: str) -> AsyncIterator[bytes]:
    percent = job.progress
    try:
        async for event in told(here, job.id):
            match event:
                case None:
                    yield HEARTBEAT
                case Progress(stage=stage, step=step, steps=steps):
                    percent = min(99, 100 * step // steps) if steps else percent  # other stages have no steps
                    progress = {"stage": stage, "step": step, "steps": steps, "progress": percent}
                    yield sse("video.progress", {"id": job.id} | progress)
                case Preview(index=index, step=step, data=data):
                    picture = {"b64_json": base64.b64encode(data).decode(), "output_format": "webp"}
                    yield sse("video.preview", {"id": job.id, "index": index, "step": step} | picture)
                case Ended(job=job):
                    yield sse(f"video.{job.status}", video_object(here, job, base))
    except FORESEEN as e:
        yield sse_error(as_api_error(e))
