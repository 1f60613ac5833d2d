"""The model, the server, and how they are; cancelling."""

from __future__ import annotations

import importlib.metadata
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from sgl_diffusion.server.auth import Tenant
from sgl_diffusion.server.context import Context, Here
from sgl_diffusion.server.errors import ApiError, retry_after
from sgl_diffusion.server.files import ERRORS
from sgl_diffusion.server.jobs import Job, Kind
from sgl_diffusion.server.videos import video_object

router = APIRouter(responses=ERRORS)

RETRY_NOT_READY_S = 2.0


class Model(BaseModel):
    """OpenAI's words, and under `card` what the engine says."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    card: dict[str, Any] | None


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class CancelledJob(BaseModel):
    """A job as it is after it was asked to end: one that is being drawn ends with its current step."""

    id: str
    object: str
    status: str


@router.get("/v1/models", tags=["models"], responses={200: {"model": Models}})
async def list_models(here: Here, tenant: Tenant) -> Response:
    """The one model."""
    return JSONResponse({"object": "list", "data": [_model(here)]})


@router.get("/v1/models/{id:path}", tags=["models"], responses={200: {"model": Model}})
async def retrieve_model(id: str, here: Here, tenant: Tenant) -> Response:
    """The model, if that is its id."""
    here.check_model(id)
    return JSONResponse(_model(here))


@router.get("/model_info", tags=["models"])
async def model_info(here: Here, tenant: Tenant) -> Response:
    """The model's defaults and limits, how it is run, and with which versions."""
    return JSONResponse({"id": here.model_name, **here.card})


@router.get("/server_info", tags=["server"])
async def server_info(here: Here, tenant: Tenant) -> Response:
    """The settings in effect, without secrets, and how the server is."""
    engine = here.dispatcher.engine
    serve = here.args.model_dump(mode="json", exclude={"api_key", "database_url"})
    database = (here.args.database_url or "sqlite").partition(":")[0]
    counts = await here.dispatcher.counts()
    return JSONResponse(
        {
            "version": importlib.metadata.version("sgl-diffusion"),
            "started_at": here.started_at,
            "model": here.model_name,
            "engine": {"state": engine.state, "error": engine.error, "restarts": engine.restarts},
            "jobs": {str(status): count for status, count in counts.items()},
            "server_args": here.model.model_dump(mode="json"),
            "serve_args": {**serve, "database": database, "storage": "local" if here.uploader is None else "s3"},
        }
    )


@router.post("/v1/cancel/{id}", tags=["server"], responses={200: {"model": CancelledJob}})
async def cancel(request: Request, id: str, here: Here, tenant: Tenant) -> Response:
    """Ends a job: a waiting one at once, one that is being drawn after its current step, an ended one not at all."""
    job = await here.job(id, tenant)
    job = await here.dispatcher.cancel(id) or job
    return JSONResponse(_job_object(here, job, str(request.base_url)))


def _job_object(here: Context, job: Job, base: str) -> dict[str, Any]:
    if job.kind is Kind.VIDEO:
        return video_object(here, job, base)
    return {"id": job.id, "object": "image", "status": job.status, "progress": job.progress}


def _model(here: Context) -> dict[str, Any]:
    return {
        "id": here.model_name,
        "object": "model",
        "created": here.started_at,
        "owned_by": "sglang",
        "root": here.model.model_path,
        "parent": None,
        "card": here.dispatcher.engine.card,
    }


# -- health: for those who watch the server, without a key --------------------------------


@router.get("/health", tags=["health"])
async def health() -> Response:
    """The server answers; whether it can draw, /ready tells."""
    return JSONResponse({"status": "ok"})


@router.get("/ready", tags=["health"])
@router.get("/health_generate", tags=["health"])
async def ready(here: Here) -> Response:
    """The engine can draw: 200, or 503 with the reason."""
    engine = here.dispatcher.engine
    if engine.state == "ready":
        return JSONResponse({"status": "ready"})
    why = f"the engine is {engine.state}" + (f": {engine.error}" if engine.error else "")
    raise ApiError(503, why, code=f"engine_{engine.state}", headers=retry_after(RETRY_NOT_READY_S))
