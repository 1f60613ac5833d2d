"""The queue of jobs and their records, in a database: what is told here survives the death of the server. Torch-free.

`turns.py` says which job is next, `transitions.py` what may become of it. A job in progress is leased to one server,
which renews the lease while it lives: one that lost its lease changes nothing any more, and an ended job keeps its end.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func, select

from sgl_diffusion.server.database import Database, StoreUnavailable
from sgl_diffusion.server.jobs import Failure, Job, Kind, NewJob, ResultFile, Status, UploadState
from sgl_diffusion.server.tables import job_of, jobs, schema
from sgl_diffusion.server.transitions import (
    RUNNING,
    UNENDED,
    cancel,
    end,
    end_upload,
    give_back,
    insert,
    release,
    row_of,
    row_of_key,
    start,
    take_uploads,
)
from sgl_diffusion.server.turns import QueueFull, advance, line_up, take_turns, turn_of

__all__ = ["IdempotencyConflict", "JobStore", "QueueFull", "StoreUnavailable"]

Jobs = list[Job]  # `list` is a method below
Ids = list[str]


class IdempotencyConflict(Exception):
    """The idempotency key was used for another request."""


class JobStore:
    """Jobs in a database; thread-safe. Every method may raise `StoreUnavailable`, and can be called again.

    Attributes:
        server_id: of this server's life: no other server, and no earlier one, has it.
        lease_seconds: after which, without `renew`, another server may take over this one's jobs.

    Raises:
        UserError: as `Database`.
    """

    def __init__(self, url: str, server_id: str, *, lease_seconds: float = 15.0) -> None:
        self.server_id, self.lease_seconds = server_id, lease_seconds
        self._database = Database(url)
        self._held = jobs.c.server == server_id
        self._takes = threading.Lock()
        self._doubtful: set[str] = set()  # taken in a transaction whose end was not told

    def close(self) -> None:
        self._database.close()

    # Clients ask

    def add(self, new: NewJob, max_queue_size: int, *, take: bool = False) -> tuple[Job, bool]:
        """Puts a job into the queue, or finds the one that the same idempotency key made (then False).

        Args:
            take: claims it for this server in the same breath, if no other job waits: it is in progress then.

        Raises:
            QueueFull: as many jobs as that wait already.
            IdempotencyConflict: the key is another request's.
        """
        key = None if new.idempotency_key is None else hashlib.sha256(new.idempotency_key.encode()).hexdigest()
        with self._taking() as taken, self._database.writing() as db:
            line_up(db)
            if key is not None and (first := row_of_key(db, new.tenant, key)) is not None:
                if first["fingerprint"] != new.fingerprint:
                    raise IdempotencyConflict(f"the idempotency key is that of {first['id']}, another request")
                return job_of(first), False
            turn, is_next = turn_of(db, new, max_queue_size)
            now, lease = self._database.now(db), None
            if take and is_next:
                taken.add(new.id)
                lease = self._lease(now)
                advance(db, [(new.priority, turn)])
            return insert(db, new, turn, key, now, lease), True

    def get(self, job_id: str, tenant: str | None = None) -> Job | None:
        """None where there is none, it is deleted, or another tenant's (`tenant` None: whose it is does not matter)."""
        with self._database.reading() as db:
            row = row_of(db, job_id)
        if row is None or row["hidden"] or tenant not in (None, row["tenant"]):
            return None
        return job_of(row)

    def list(
        self, kinds: Collection[Kind], tenant: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[Jobs, bool]:
        """A page of jobs in the order in which they came, and whether there are more.

        Raises:
            KeyError: there is no job `after`.
        """
        wanted = [jobs.c.kind.in_(kinds), *_visible(tenant)]
        order = jobs.c.seq.desc() if newest_first else jobs.c.seq.asc()
        with self._database.reading() as db:
            if after is not None:
                seq = db.execute(select(jobs.c.seq).where(jobs.c.id == after, *wanted)).scalar_one_or_none()
                if seq is None:
                    raise KeyError(after)
                wanted.append(jobs.c.seq < seq if newest_first else jobs.c.seq > seq)
            rows = db.execute(select(jobs).where(*wanted).order_by(order).limit(limit + 1)).mappings().all()
        return [job_of(row) for row in rows[:limit]], len(rows) > limit

    def ask_cancel(self, job_id: str) -> Job | None:
        """Cancels a waiting job; of one in progress, asks its server to (`renew`). An ended one is left as it is."""
        with self._database.writing() as db:
            cancel(db, job_id, self._database.now(db))
            row = row_of(db, job_id)
        return None if row is None or row["hidden"] else job_of(row)

    def delete(self, job_id: str) -> None:
        """Takes the record away. One in progress is cancelled and hidden at once, and away when its server ends it."""
        with self._database.writing() as db:
            cancel(db, job_id, self._database.now(db))
            # its client may use its key again
            db.execute(jobs.update().where(jobs.c.id == job_id).values(hidden=True, idempotency=None))
            db.execute(jobs.delete().where(jobs.c.id == job_id, jobs.c.status.not_in(UNENDED)))

    # The server works

    def claim(self, limit: int = 1, batch_key: str | None = None, max_results: int | None = None) -> Jobs:
        """Takes the jobs whose turn it is, for this server.

        Args:
            batch_key: takes only jobs with it: company for one that is claimed already.
            max_results: of all of them together; of the next `limit` jobs, those that do not fit keep their turn.
        """
        with self._taking() as taken, self._database.writing() as db:
            rows = take_turns(db, limit, batch_key, max_results)
            if not rows:
                return []
            taken.update(row["id"] for row in rows)
            now = self._database.now(db)
            start(db, taken, now, self._lease(now))
        return [replace(job_of(row), status=Status.IN_PROGRESS, started_at=row["started_at"] or now) for row in rows]

    @contextmanager
    def _taking(self) -> Iterator[set[str]]:
        """Keeps in mind the ids that the block adds when nobody knows whether they are this server's (see `renew`)."""
        taken: set[str] = set()
        with self._takes:
            try:
                yield taken
            except StoreUnavailable:
                self._doubtful |= taken
                raise
            self._doubtful -= taken

    def renew(self) -> set[str]:
        """Extends the leases of all that this server works on. Returns its jobs whose cancellation is asked for.

        What it took without being told so, as the connection broke at that moment, waits again.
        """
        with self._takes, self._database.writing() as db:
            now = self._database.now(db)
            if self._doubtful:
                release(db, self._held & jobs.c.id.in_(self._doubtful), now)
            db.execute(jobs.update().where(self._held).values(self._lease(now)))
            asked = select(jobs.c.id).where(self._held, RUNNING, jobs.c.cancel_asked)
            to_cancel = set(db.execute(asked).scalars())
        self._doubtful = set()
        return to_cancel

    def record_step(self, job_ids: Collection[str], step: int, steps: int) -> None:
        with self._database.writing() as db:
            db.execute(jobs.update().where(jobs.c.id.in_(job_ids), self._held, RUNNING).values(step=step, steps=steps))

    def complete(self, job_id: str, results: Sequence[ResultFile], upload: UploadState) -> Job | None:
        """Ends a job of this server's. Returns it as it is now, which is as it ended before if it had.

        A job that was deleted meanwhile is returned as cancelled, whatever its end: its files are to go.
        None: it is another server's by now, or gone; its files are not this one's any more.
        """
        return self._end(job_id, Status.COMPLETED, results=[asdict(result) for result in results], upload=upload)

    def fail(self, job_id: str, failure: Failure) -> Job | None:
        """As `complete`."""
        return self._end(job_id, Status.FAILED, failure=asdict(failure))

    def cancelled(self, job_id: str) -> Job | None:
        """As `complete`."""
        return self._end(job_id, Status.CANCELLED)

    def _end(self, job_id: str, status: Status, **values: Any) -> Job | None:
        with self._database.writing() as db:
            return end(db, job_id, self.server_id, values | {"status": status, "ended_at": self._database.now(db)})

    def requeue(self, job_id: str, *, crashed: bool) -> Job | None:
        """Gives a job of this server's back; it keeps its turn. One whose cancellation is asked for ends instead.

        Args:
            crashed: the engine died of it, perhaps; `crashes` counts them.

        Returns:
            As `complete`; or the job, queued.
        """
        with self._database.writing() as db:
            back = give_back(db, job_id, self._held, int(crashed))
        return back or self.cancelled(job_id)

    # Servers that died

    def reclaim(self) -> Ids:
        """Puts the jobs of other servers whose leases ran out back into the queue; those to be cancelled end.

        Returns:
            The ids of those that wait again. They keep their turns and steps.
        """
        with self._database.writing() as db:
            now = self._database.now(db)
            return release(db, ~self._held & (jobs.c.lease_until < now), now)

    def release_own(self) -> Ids:
        """As `reclaim`, of all jobs in progress: for a start where no other server uses the database."""
        with self._database.writing() as db:
            return release(db, jobs.c.server.is_not(None), self._database.now(db))

    # Results on their way to cloud storage

    def uploads_due(self, limit: int) -> Jobs:
        """Takes completed jobs whose results are to be uploaded now, for this server, as `claim` does.

        Each is this server's until it calls `record_upload`, or dies.
        """
        with self._taking() as taken, self._database.writing() as db:
            now = self._database.now(db)
            due = take_uploads(db, limit, now, self._lease(now))
            taken.update(job.id for job in due)
        return due

    def record_upload(
        self, job_id: str, *, urls: Sequence[str] | None, error: str | None, next_at: datetime | None
    ) -> None:
        """The results are at `urls`, one each; or (None) they are not, because of `error`, and are due at `next_at`."""
        with self._database.writing() as db:
            end_upload(db, job_id, self._held, urls, error, next_at)

    def _lease(self, now: datetime) -> dict[str, Any]:
        return {"server": self.server_id, "lease_until": now + timedelta(seconds=self.lease_seconds)}

    # Figures, and what can go

    def database_id(self) -> str:
        """What tells this database from others."""
        with self._database.reading() as db:
            return str(db.execute(select(schema.c.database_id)).scalar_one())

    def counts(self) -> dict[Status, int]:
        """Jobs of every status, those with none included."""
        with self._database.reading() as db:
            found = db.execute(select(jobs.c.status, func.count()).group_by(jobs.c.status)).all()
        return dict.fromkeys(Status, 0) | dict(found)

    def uploads_waiting(self) -> int:
        """Completed jobs whose results are still to be uploaded."""
        with self._database.reading() as db:
            return int(db.execute(select(func.count()).where(jobs.c.upload == UploadState.WAITING)).scalar_one())

    def ended(self, before: datetime | None, limit: int, *, with_results: bool = False) -> Jobs:
        """Ended jobs, those that ended first first; without those whose results wait for their upload.

        Args:
            with_results: only those whose results are kept here.
        """
        wanted = [jobs.c.ended_at.is_not(None), jobs.c.upload != UploadState.WAITING, *_visible(None)]
        if before is not None:
            wanted.append(jobs.c.ended_at < before)
        if with_results:
            wanted += [jobs.c.status == Status.COMPLETED, jobs.c.upload == UploadState.LOCAL]
        oldest = select(jobs).where(*wanted).order_by(jobs.c.ended_at, jobs.c.seq).limit(limit)
        with self._database.reading() as db:
            return [job_of(row) for row in db.execute(oldest).mappings()]

    def statuses(self, job_ids: Collection[str]) -> dict[str, Status]:
        """Of the jobs that there are among them, deleted ones that are still worked on included."""
        with self._database.reading() as db:
            found = db.execute(select(jobs.c.id, jobs.c.status).where(jobs.c.id.in_(job_ids))).all()
        return dict(found)


def _visible(tenant: str | None) -> list[sa.ColumnElement[bool]]:
    return [~jobs.c.hidden] if tenant is None else [~jobs.c.hidden, jobs.c.tenant == tenant]
