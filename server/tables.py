"""The tables of the job store, and how a row becomes a `Job`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Double,
    Enum,
    Index,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

from sgl_diffusion.server.jobs import Failure, Job, Kind, ResultFile, Status, UploadState

VERSION = 1  # of the tables below; a change to them is a new one


class Utc(TypeDecorator[datetime]):
    """A time with its zone. SQLite keeps no zone, so all times are UTC there."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Id(TypeDecorator[str]):
    """A job's id. Asked for what cannot be one and some databases refuse (NUL), there is no such job."""

    impl = String(64)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value if value is not None and value.isascii() and value.isprintable() else ""


def _words(words: type[StrEnum]) -> Enum:
    """Kept as the words themselves, and given back as members."""
    return Enum(words, native_enum=False, length=16, values_callable=lambda members: [m.value for m in members])


metadata = MetaData()

schema = Table(
    "sglang_schema",
    metadata,
    # the only row: whoever adds a job holds its lock, so that turns, the length of the queue and `seq` are in one order
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("database_id", String(32), nullable=False),
)

clocks = Table(
    "sglang_clocks",
    metadata,
    Column("priority", Integer, primary_key=True, autoincrement=False),
    Column("virtual_time", Double, nullable=False),  # the turn up to which jobs of this priority have been claimed
)

jobs = Table(
    "sglang_jobs",
    metadata,
    Column("seq", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("id", Id, nullable=False, unique=True),
    Column("kind", _words(Kind), nullable=False),
    Column("status", _words(Status), nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("turn", Double, nullable=False),
    Column("work", Double, nullable=False),
    Column("batch_key", Text),
    Column("sampling", JSON, nullable=False),
    Column("presentation", JSON, nullable=False),
    Column("idempotency", String(64)),  # digest of the client's key, which may have any length
    Column("fingerprint", Text, nullable=False),
    Column("created_at", Utc, nullable=False),
    Column("started_at", Utc),
    Column("ended_at", Utc),
    Column("step", Integer, nullable=False, default=0),
    Column("steps", Integer, nullable=False, default=0),
    Column("crashes", Integer, nullable=False, default=0),
    Column("cancel_asked", Boolean, nullable=False, default=False),
    Column("hidden", Boolean, nullable=False, default=False),  # deleted by its client, while it was worked on
    Column("failure", JSON(none_as_null=True)),
    Column("results", JSON, nullable=False, default=list),
    Column("upload", _words(UploadState), nullable=False, default=UploadState.LOCAL),
    Column("upload_error", Text),
    Column("upload_attempts", Integer, nullable=False, default=0),
    Column("upload_next_at", Utc),
    Column("server", String(64)),  # that draws it, or uploads its results
    Column("lease_until", Utc),  # without a word from that server, it is another's to take
    UniqueConstraint("tenant", "idempotency"),
    Index("sglang_jobs_turns", "tenant", "priority", "status", "turn"),
    Index("sglang_jobs_listed", "tenant", "seq"),
    Index("sglang_jobs_of_kind", "tenant", "kind", "seq"),
    Index("sglang_jobs_held", "server"),
    Index("sglang_jobs_ended", "ended_at", "seq"),
    Index("sglang_jobs_uploads", "upload", "status", "ended_at", "seq"),
    sqlite_autoincrement=True,  # a number is not given again when its job is gone
)
Index("sglang_jobs_queue", jobs.c.status, jobs.c.priority.desc(), jobs.c.turn, jobs.c.seq)  # in the order of claims

_FIELDS = [field.name for field in fields(Job)]


def job_of(row: Mapping[str, Any] | RowMapping) -> Job:
    """The job of a row of `jobs`; columns that are missing have their defaults."""
    values = {name: row[name] for name in _FIELDS if name in row}
    if values.get("failure") is not None:
        values["failure"] = Failure(**values["failure"])
    values["results"] = tuple(ResultFile(**result) for result in values.get("results", ()))
    return Job(**values)
