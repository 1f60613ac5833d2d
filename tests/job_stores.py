"""Jobs as tests put them into a store."""

from __future__ import annotations

import uuid
from typing import Any

from sgl_diffusion.server.jobs import Job, Kind, NewJob, ResultFile, UploadState
from sgl_diffusion.server.store import JobStore

PICTURE = ResultFile("0.png", "image/png", 1234, 7)
LOCAL = UploadState.LOCAL


def new(**fields: Any) -> NewJob:
    defaults = {"id": f"img_{uuid.uuid4().hex}", "kind": Kind.IMAGE, "sampling": {"prompt": ["a red circle"]}}
    return NewJob(**defaults | fields)


def add(store: JobStore, count: int = 1, **fields: Any) -> list[str]:
    return [store.add(new(**fields), 10_000)[0].id for _ in range(count)]


def claimed(store: JobStore) -> list[str]:
    """All that wait, in the order of claims."""
    ids = []
    while jobs := store.claim():
        ids += [job.id for job in jobs]
    return ids


def get(store: JobStore, job_id: str) -> Job:
    job = store.get(job_id)
    assert job is not None
    return job
