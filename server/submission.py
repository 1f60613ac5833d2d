"""From a request to a job: its pictures stored, checked by the engine, written down."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from starlette.datastructures import UploadFile

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.server.bodies import Body, read_body
from sgl_diffusion.server.context import Context
from sgl_diffusion.server.errors import ApiError, bad_field, of_user_error
from sgl_diffusion.server.fields import Asked, CommonFields, Fields, input_references, parse
from sgl_diffusion.server.jobs import Job, Kind, NewJob
from sgl_diffusion.server.logs import origin
from sgl_diffusion.server.store import IdempotencyConflict, QueueFull, StoreUnavailable
from sgl_diffusion.server.uploads import Uploads

KEY_HEADER, LONGEST_KEY = "Idempotency-Key", 255
FILE_FIELDS = {Kind.IMAGE: (), Kind.IMAGE_EDIT: ("image", "mask"), Kind.VIDEO: ("input_reference",)}
"""Fields that may be files of a form."""
PICTURE_FIELD = {Kind.IMAGE: "image_path", Kind.IMAGE_EDIT: "image", Kind.VIDEO: "input_reference"}


@dataclass(frozen=True)
class Submission:
    """A request of one kind on its way to a job."""

    here: Context
    tenant: str
    kind: Kind
    body: Body
    key: str | None  # of idempotency

    async def submit(self, fields: CommonFields, asked: Asked) -> tuple[Job, bool]:
        """As `Dispatcher.submit`.

        Raises ApiError, QueueFull, IdempotencyConflict or EngineAway; nothing is left of the request then.

        If it is ended while the job is written down, what it stored stays: the job may be there, and needs it.
        """
        here = self.here
        here.check_model(fields.model)
        self._check_kind()
        job_id = f"{'video' if self.kind is Kind.VIDEO else 'img'}_{uuid.uuid4().hex}"
        inputs = here.folders.inputs(job_id)
        is_needed = False
        try:
            paths = await self._store_pictures(fields, inputs)
            if paths:
                asked.sampling["image_path"] = paths
            new = await self._checked(job_id, asked, paths)
            is_needed = True
            try:
                job, is_needed = await here.dispatcher.submit(new)
            except (QueueFull, IdempotencyConflict, StoreUnavailable):
                is_needed = False
                raise
            if is_needed:
                here.job_log.queued(job)
            return job, is_needed
        finally:
            if not is_needed:
                await asyncio.to_thread(shutil.rmtree, inputs, ignore_errors=True)

    def _check_kind(self) -> None:
        """Clips of a model that draws pictures, and the other way round, are not asked of the engine at all."""
        draws_video = self.here.card["draws_video"]
        if draws_video != (self.kind is Kind.VIDEO):
            told = "clips: POST /v1/videos" if draws_video else "pictures: POST /v1/images/generations"
            raise ApiError(400, f"{self.here.model_name} draws {told}", param="model", code="unsupported_model")

    async def _store_pictures(self, fields: CommonFields, folder: Path) -> Sequence[str]:
        field = PICTURE_FIELD[self.kind]
        given: list[UploadFile | str] = [upload for uploads in self.body.files.values() for upload in uploads]
        given += input_references(fields)
        if not given:
            if self.kind is Kind.IMAGE_EDIT:
                raise bad_field(field, ": is missing")
            return []
        args = self.here.args
        uploads = Uploads(args.max_upload_size, args.max_input_pixels, args.allowed_input_hosts)
        return await uploads.store(given, folder, field)

    async def _checked(self, job_id: str, asked: Asked, paths: Sequence[str]) -> NewJob:
        file_name = f"0.{asked.presentation['output_format']}"  # options of the output depend on the format
        try:
            checked = await self.here.dispatcher.engine.check(asked.sampling | {"output_file_name": file_name})
        except UserError as e:
            raise of_user_error(e, {**asked.spelled, "image_path": PICTURE_FIELD[self.kind]}) from None
        presentation = asked.presentation | {"origin": dict(origin.get())}
        if checked.width is not None:
            presentation["size"] = f"{checked.width}x{checked.height}"
        if checked.fps is not None and checked.num_frames is not None:
            presentation["seconds"] = f"{checked.num_frames / checked.fps:.2f}".rstrip("0").rstrip(".")
        fingerprint = ""
        if self.key is not None:
            fingerprint = await asyncio.to_thread(_fingerprint, self.kind, self.body, paths)
        return NewJob(
            id=job_id,
            kind=self.kind,
            sampling=asked.sampling,
            presentation=presentation,
            tenant=self.tenant,
            priority=asked.priority,
            work=checked.work,
            batch_key=checked.batch_key,
            idempotency_key=self.key,
            fingerprint=fingerprint,
        )


def _fingerprint(kind: Kind, body: Body, paths: Sequence[str]) -> str:
    """The same for requests that mean the same; pictures count by their bytes."""
    digest = hashlib.sha256(json.dumps([kind, body.values], sort_keys=True).encode())
    for path in paths:
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


async def read_submission(
    request: Request, here: Context, tenant: str, kind: Kind, model: type[Fields]
) -> tuple[Submission, Fields]:
    """Raises ApiError: a body that cannot be read, a field that is wrong."""
    key = request.headers.get(KEY_HEADER)
    if key is not None and not 0 < len(key) <= LONGEST_KEY:
        raise ApiError(400, f"{KEY_HEADER}: expected 1 to {LONGEST_KEY} characters", param=KEY_HEADER)
    args = here.args
    body = await read_body(request, args.max_upload_size, args.request_timeout, FILE_FIELDS[kind])
    return Submission(here, tenant, kind, body, key), parse(model, body)
