"""What the server knows of a job: the record that is kept, and what is told while it is worked on. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """The resource a job is seen as over HTTP."""

    IMAGE = "image"
    IMAGE_EDIT = "image_edit"
    VIDEO = "video"


class Status(StrEnum):
    """Life of a job, in the words of the OpenAI API. A job ends once, and never leaves its end."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


class UploadState(StrEnum):
    """Where the results of a completed job are on their way to cloud storage."""

    LOCAL = "local"  # they stay here
    WAITING = "waiting"  # to be uploaded, or to be tried again
    UPLOADED = "uploaded"  # and gone from here


@dataclass(frozen=True)
class ResultFile:
    """One picture or clip.

    Attributes:
        name: of the file in the job's folder of results.
        url: in cloud storage, once it is there.
    """

    name: str
    media_type: str
    size_bytes: int
    seed: int
    url: str | None = None


@dataclass(frozen=True)
class Failure:
    """Why a job failed: `type`, `code` and `param` as in an OpenAI error."""

    message: str
    type: str = "server_error"
    code: str | None = None
    param: str | None = None


@dataclass(frozen=True)
class NewJob:
    """A job that a client asks for, checked by the engine.

    Attributes:
        id: `img_` or `video_` and 32 hex digits, made by the caller, who may have stored inputs under it.
        tenant: whose share of the engine it counts against: a digest of the API key, or empty.
        priority: higher goes first, whoever asks.
        work: estimated cost, in any unit that is the same for all jobs of a server.
        batch_key: jobs with the same key can be drawn in one batch; None: by itself only.
        sampling: fields of `SamplingParams` that were given.
        presentation: how the client wants it told: response_format, output_format, seconds ...
        idempotency_key: of the client; a second job with it, from the same tenant, is the first one.
        fingerprint: of the request's body; the same idempotency key with another one is a mistake.
    """

    id: str
    kind: Kind
    sampling: Mapping[str, Any]
    presentation: Mapping[str, Any] = field(default_factory=dict)
    tenant: str = ""
    priority: int = 0
    work: float = 1.0
    batch_key: str | None = None
    idempotency_key: str | None = None
    fingerprint: str = ""


@dataclass(frozen=True)
class Job:
    """A job as it is kept. Times are UTC.

    Attributes:
        step, steps: of denoising done, of all; 0 of 0 before the first.
        crashes: of the engine while it worked on this job.
        cancel_asked: the client does not want it any more, and the engine may not know yet.
        upload_error, upload_attempts, upload_next_at: of results whose upload did not succeed yet.
    """

    id: str
    kind: Kind
    status: Status
    sampling: Mapping[str, Any]
    presentation: Mapping[str, Any]
    tenant: str
    priority: int
    work: float
    batch_key: str | None
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    step: int = 0
    steps: int = 0
    crashes: int = 0
    cancel_asked: bool = False
    failure: Failure | None = None
    results: Sequence[ResultFile] = ()
    upload: UploadState = UploadState.LOCAL
    upload_error: str | None = None
    upload_attempts: int = 0
    upload_next_at: datetime | None = None

    @property
    def progress(self) -> int:
        """Percent; 100 only when it is completed."""
        if self.status is Status.COMPLETED:
            return 100
        return min(99, 100 * self.step // self.steps) if self.steps else 0


@dataclass(frozen=True)
class Progress:
    """A job's engine has begun a stage, or done a step."""

    stage: str
    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """A result as it would be if the noise that is left were taken away at once: number of it, and a WebP file."""

    index: int
    step: int
    data: bytes


@dataclass(frozen=True)
class Ended:
    """The last thing told of a job."""

    job: Job


JobEvent = Progress | Preview | Ended
