"""What may become of a job: every change of status, guarded by what the job is at that moment. Torch-free.

queued -> in_progress -> completed | failed | cancelled; in_progress -> queued again; queued -> cancelled.
A job in progress, and one whose results are being uploaded, has a server and a lease. `held` below is "its server is
this one": what a server does not hold any more, it does not change.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam, func, select

from sgl_diffusion.server.jobs import Job, NewJob, Status, UploadState
from sgl_diffusion.server.tables import job_of, jobs

Condition = sa.ColumnElement[bool]

UNENDED = (Status.QUEUED, Status.IN_PROGRESS)
RUNNING = jobs.c.status == Status.IN_PROGRESS
RELEASED: dict[str, Any] = {"server": None, "lease_until": None}

# statements of every request are built once: that takes longer than to run them
_of_id = select(jobs).where(jobs.c.id == bindparam("id"))
_of_key = select(jobs).where(jobs.c.tenant == bindparam("tenant"), jobs.c.idempotency == bindparam("key"))
_insert = jobs.insert()
_end = jobs.update().where(jobs.c.id == bindparam("of"), jobs.c.server == bindparam("by"), RUNNING)
_due = (
    select(jobs)
    .where(
        jobs.c.upload == UploadState.WAITING,
        jobs.c.status == Status.COMPLETED,
        jobs.c.server.is_(None),
        sa.or_(jobs.c.upload_next_at.is_(None), jobs.c.upload_next_at <= bindparam("now")),
    )
    .order_by(jobs.c.ended_at, jobs.c.seq)
    .limit(bindparam("limit"))
    .with_for_update(skip_locked=True)
)


def insert(
    db: sa.Connection, new: NewJob, turn: float, idempotency: str | None, now: datetime, lease: dict[str, Any] | None
) -> Job:
    """A job that waits from now on, or (with a lease) is begun at once."""
    row = {name: value for name, value in vars(new).items() if name != "idempotency_key"}
    row |= {"status": Status.QUEUED, "turn": turn, "idempotency": idempotency, "created_at": now}
    if lease is not None:
        row |= {"status": Status.IN_PROGRESS, "started_at": now, **lease}
    db.execute(_insert, row)
    return job_of(row)


def row_of(db: sa.Connection, job_id: str) -> sa.RowMapping | None:
    return db.execute(_of_id, {"id": job_id}).mappings().one_or_none()


def row_of_key(db: sa.Connection, tenant: str, idempotency: str) -> sa.RowMapping | None:
    return db.execute(_of_key, {"tenant": tenant, "key": idempotency}).mappings().one_or_none()


def start(db: sa.Connection, job_ids: Collection[str], now: datetime, lease: dict[str, Any]) -> None:
    """Jobs that wait, locked by `turns.take_turns`, are begun."""
    begun = {"status": Status.IN_PROGRESS, "started_at": func.coalesce(jobs.c.started_at, now)}
    waiting = (jobs.c.id.in_(job_ids), jobs.c.status == Status.QUEUED)
    db.execute(jobs.update().where(*waiting).values(begun | lease))


def cancel(db: sa.Connection, job_id: str, now: datetime) -> None:
    """A job that waits ends; of one in progress it is noted that it should."""
    it = jobs.c.id == job_id
    # the first statement locks the row, so that the job cannot be claimed, or given back, before the second
    db.execute(jobs.update().where(it, jobs.c.status.in_(UNENDED)).values(cancel_asked=True))
    cancelled = {"status": Status.CANCELLED, "ended_at": now}
    db.execute(jobs.update().where(it, jobs.c.status == Status.QUEUED).values(cancelled))


def end(db: sa.Connection, job_id: str, server_id: str, ending: dict[str, Any]) -> Job | None:
    """A job in progress gets its end. Returns an ended job with the end that it has; None of any other."""
    db.execute(_end, {"of": job_id, "by": server_id, **ending, **RELEASED})
    row = row_of(db, job_id)
    if row is None or row["status"] in UNENDED:
        return None
    if row["hidden"]:
        db.execute(jobs.delete().where(jobs.c.id == job_id))
        return replace(job_of(row), status=Status.CANCELLED, failure=None, results=())
    return job_of(row)


def give_back(db: sa.Connection, job_id: str, held: Condition, crashes: int) -> Job | None:
    """A job in progress waits again. None where it is not, or should be cancelled."""
    running = (jobs.c.id == job_id, held, RUNNING, ~jobs.c.cancel_asked)
    back = {"status": Status.QUEUED, "crashes": jobs.c.crashes + crashes, **RELEASED}
    if not db.execute(jobs.update().where(*running).values(back)).rowcount:
        return None
    row = row_of(db, job_id)
    return None if row is None else job_of(row)


def release(db: sa.Connection, lost: Condition, now: datetime) -> list[str]:
    """What `lost` servers worked on: jobs wait again, or end where that was asked for; uploads are due again.

    Returns:
        The ids of the jobs that wait again.
    """
    cancelled = {"status": Status.CANCELLED, "ended_at": now, **RELEASED}
    db.execute(jobs.delete().where(RUNNING, lost, jobs.c.hidden))
    db.execute(jobs.update().where(RUNNING, lost, jobs.c.cancel_asked).values(cancelled))
    ids = list(db.execute(select(jobs.c.id).where(RUNNING, lost).with_for_update()).scalars())
    db.execute(jobs.update().where(jobs.c.id.in_(ids)).values(status=Status.QUEUED, **RELEASED))
    db.execute(jobs.update().where(~RUNNING, lost).values(RELEASED))
    return ids


def take_uploads(db: sa.Connection, limit: int, now: datetime, lease: dict[str, Any]) -> list[Job]:
    """Completed jobs whose results are to be uploaded now."""
    due = [job_of(row) for row in db.execute(_due, {"limit": limit, "now": now}).mappings()]
    db.execute(jobs.update().where(jobs.c.id.in_([job.id for job in due])).values(lease))
    return due


def end_upload(
    db: sa.Connection,
    job_id: str,
    held: Condition,
    urls: Sequence[str] | None,
    error: str | None,
    next_at: datetime | None,
) -> None:
    """The results are at `urls`; or (None) they are not, and are due at `next_at`."""
    waiting = (jobs.c.id == job_id, held, jobs.c.upload == UploadState.WAITING)
    results = db.execute(select(jobs.c.results).where(*waiting)).scalar_one_or_none()
    if results is None:
        return
    news: dict[str, Any] = {"upload_error": error, "upload_next_at": next_at}
    if urls is None:
        news["upload_attempts"] = jobs.c.upload_attempts + 1
    else:
        news["results"] = [result | {"url": url} for result, url in zip(results, urls, strict=True)]
        news["upload"] = UploadState.UPLOADED
    db.execute(jobs.update().where(*waiting).values(news | RELEASED))
