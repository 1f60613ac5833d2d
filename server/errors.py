"""Errors in the shape that clients of the OpenAI API read, whatever went wrong and wherever.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from sgl_diffusion.runtime.args import SamplingParams
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.server.database import StoreUnavailable
from sgl_diffusion.server.dispatcher import EngineAway
from sgl_diffusion.server.jobs import Failure, Job, Status
from sgl_diffusion.server.logs import route_of
from sgl_diffusion.server.store import IdempotencyConflict
from sgl_diffusion.server.turns import QueueFull

RETRY_QUEUE_FULL_S, RETRY_STORE_S = 5, 2
DO_NOT_RETRY = {"x-should-retry": "false"}  # the official clients repeat 409 and 5xx by themselves, unless told


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every answer with a status from 400 on looks like."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer other than the one hoped for.

    Args:
        status: of HTTP.
        param: the request's field that is at fault.
        code: for programs.
        type: `invalid_request_error` below 500 and `server_error` from there on, if not said.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or ("server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def bad_field(param: str, message: str, *, code: str | None = None) -> ApiError:
    """A field whose value cannot be honoured; the message begins with its name."""
    return ApiError(400, f"{param}{message}", param=param, code=code)


def not_found(kind: str, id: str) -> ApiError:
    return ApiError(404, f"no {kind} has the id {id!r}", param="id", code="not_found")


def failed_job(job: Job) -> ApiError:
    """What a request is told that waited for a job which did not complete."""
    if job.status is Status.CANCELLED:
        return ApiError(410, f"{job.id} was cancelled", code="job_cancelled")
    failure = job.failure or Failure(f"{job.id} failed")
    status = 400 if failure.type == "invalid_request_error" else 500
    param = failure.param or (_option_of(failure.message) if status == 400 else None)
    return ApiError(status, failure.message, param=param, code=failure.code, type=failure.type, headers=DO_NOT_RETRY)


def of_user_error(error: UserError, spelled: Mapping[str, str] | None = None) -> ApiError:
    """
    Args:
        spelled: option -> the request's field that it came from, where that has another name.
    """
    option = _option_of(str(error))
    return ApiError(400, str(error), param=(spelled or {}).get(option or "", option))


def _option_of(message: str) -> str | None:
    """Messages about an option begin with its name."""
    named = re.match(r"([a-z_]\w*)[.=:]", message)
    return named[1] if named and named[1] in SamplingParams.model_fields else None


# -- what was raised -> what is answered ---------------------------------------------------


def _of_routing(error: HTTPException) -> ApiError:
    told = {404: "there is nothing at this path", 405: "this path does not take this method"}
    code = {404: "not_found", 405: "method_not_allowed"}
    message = told.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, code=code.get(error.status_code), headers=error.headers)


def _of_query(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    return bad_field(str(first["loc"][-1]), f"={first.get('input')}: {first['msg'].lower()}")


def _of_full_queue(error: QueueFull) -> ApiError:
    return ApiError(
        429,
        f"{error.waiting} jobs are waiting, as many as may; try again later",
        type="rate_limit_error",
        code="queue_full",
        headers=retry_after(RETRY_QUEUE_FULL_S),
    )


def _of_key_conflict(error: IdempotencyConflict) -> ApiError:
    return ApiError(
        409, str(error), param="Idempotency-Key", code="idempotency_conflict", headers=DO_NOT_RETRY
    )  # fmt: skip


def _of_absence(error: EngineAway) -> ApiError:
    return ApiError(
        503,
        f"nothing can be drawn just now: {error.reason}",
        code="engine_away",
        headers=retry_after(error.retry_after),
    )


def _of_store(error: StoreUnavailable) -> ApiError:
    return ApiError(
        503, f"the jobs cannot be reached: {error}", code="store_unavailable", headers=retry_after(RETRY_STORE_S)
    )  # fmt: skip


def _of_left_client(error: ClientDisconnect) -> ApiError:
    return ApiError(400, "the connection was closed before the request was complete")  # nobody reads it


def _of_our_mistake(error: Exception) -> ApiError:
    """The traceback is in the server's log; a client learns no more than that."""
    return ApiError(500, "the server made a mistake; its log tells more", code="internal_error")


def retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}


ANSWERS: Mapping[type[Exception], Callable[[Any], ApiError]] = {
    ApiError: lambda error: error,
    UserError: of_user_error,
    RunFailure: lambda error: ApiError(500, str(error), headers=DO_NOT_RETRY),
    HTTPException: _of_routing,
    RequestValidationError: _of_query,
    QueueFull: _of_full_queue,
    IdempotencyConflict: _of_key_conflict,
    EngineAway: _of_absence,
    StoreUnavailable: _of_store,
    ClientDisconnect: _of_left_client,
    Exception: _of_our_mistake,
}

FORESEEN = (ApiError, EngineAway, StoreUnavailable, RunFailure)
"""What may end a stream of events that has begun."""


def as_api_error(error: Exception) -> ApiError:
    return next(ANSWERS[kind](error) for kind in type(error).__mro__ if kind in ANSWERS)


async def _handle(request: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    if answer.status == 405:
        methods = request.app.openapi()["paths"].get(route_of(request.scope), {})
        if methods:  # the router names those of the path's first route alone
            answer.headers = {"allow": ", ".join(sorted(method.upper() for method in methods))}
    return answer.response()


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = dict.fromkeys(
    ANSWERS, _handle
)
"""For FastAPI."""
