"""The database behind the job store: opened, shared, lost and found again."""

from __future__ import annotations

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from job_stores import PICTURE, add, claimed, get
from postgres import running_postgres

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.server.database import Database, StoreUnavailable
from sgl_diffusion.server.jobs import Status, UploadState
from sgl_diffusion.server.store import JobStore
from sgl_diffusion.server.tables import schema


def test_readers_of_sqlite_do_not_wait_for_a_writer(sqlite_url: str) -> None:
    store = JobStore(sqlite_url, "server-1")
    (job_id,) = add(store)
    writer = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("UPDATE sglang_jobs SET step = 5")
    began = time.monotonic()
    assert get(store, job_id).step == 0
    assert time.monotonic() - began < 1
    writer.close()
    store.close()


def test_two_servers_make_the_tables_together(database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda number: JobStore(database_url, f"server-{number}"), range(4)))
    assert len({store.database_id() for store in stores}) == 1
    for store in stores:
        store.close()


def test_tables_of_another_version_are_left_alone(database_url: str) -> None:
    JobStore(database_url, "server-1").close()
    engine = sqlalchemy.create_engine(database_url)
    with engine.begin() as db:
        db.exec_driver_sql("UPDATE sglang_schema SET version = 99")
    with pytest.raises(UserError, match="version 99.*version 1"):
        JobStore(database_url, "server-2")
    engine.dispose()


def test_a_database_that_went_away_is_named_and_found_again() -> None:
    with running_postgres() as server:
        store = JobStore(server.url, "server-1")
        (job_id,) = add(store)
        server.stop()
        for call in (lambda: store.get(job_id), lambda: store.claim(), lambda: store.renew()):
            with pytest.raises(StoreUnavailable) as away:
                call()
            assert "\n" not in str(away.value)
        server.start()
        assert claimed(store) == [job_id]
        store.close()


def test_what_was_taken_without_an_answer_waits_again(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JobStore(postgres_url, "server-1")
    uploading, drawn = add(store, 2)
    store.claim()
    store.complete(uploading, [PICTURE], UploadState.WAITING)
    commit = psycopg.Connection.commit

    def break_after(connection: Any) -> None:
        commit(connection)
        raise psycopg.OperationalError("the connection is lost")

    with monkeypatch.context() as broken:
        broken.setattr(psycopg.Connection, "commit", break_after)
        for call in (store.claim, lambda: store.uploads_due(1)):
            with pytest.raises(StoreUnavailable):
                call()
    assert get(store, drawn).status is Status.IN_PROGRESS and store.uploads_due(1) == []
    assert store.renew() == set()
    assert claimed(store) == [drawn] and [job.id for job in store.uploads_due(9)] == [uploading]
    store.renew()
    assert get(store, drawn).status is Status.IN_PROGRESS and store.uploads_due(9) == []
    store.close()


def test_the_connection_that_writes_is_opened_anew_when_it_breaks(tmp_path: Path) -> None:
    opened: list[sqlite3.Connection] = []

    def note(connection: sqlite3.Connection, _: object) -> None:
        opened.append(connection)

    sqlalchemy.event.listen(sqlalchemy.Pool, "connect", note)
    try:
        with closing(JobStore(f"sqlite:///{tmp_path}/jobs.db", "server-1")) as store:
            ids = add(store, 2)
            for connection in opened:
                connection.close()
            with pytest.raises(sqlalchemy.exc.ProgrammingError, match="closed database"):
                add(store)
            assert claimed(store) == ids
    finally:
        sqlalchemy.event.remove(sqlalchemy.Pool, "connect", note)


def test_a_write_under_way_ends_before_its_connection_is_closed(tmp_path: Path) -> None:
    """A server that stops leaves threads behind. SQLite does not survive a close under a statement."""
    database = Database(f"sqlite:///{tmp_path}/jobs.db")
    begun, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with database.writing() as db:
            begun.set()
            assert go_on.wait(20)
            db.execute(schema.update().values(database_id="written"))

    with ThreadPoolExecutor(2) as threads:
        writing = threads.submit(write)
        assert begun.wait(20)
        closed = threads.submit(database.close)
        with pytest.raises(TimeoutError):
            closed.result(timeout=0.3)
        go_on.set()
        writing.result(20)
        closed.result(20)
    with closing(sqlite3.connect(tmp_path / "jobs.db")) as file:
        assert file.execute(f"SELECT database_id FROM {schema.name}").fetchone() == ("written",)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("jobs.db", "cannot be read"),
        ("sqlite:///{tmp}/missing/jobs.db", "unable to open database file"),
        ("sqlite:///{tmp}/not-one.db", "not a database"),
        ("sqlite://", "in memory"),
        ("sqlite+aiosqlite:///{tmp}/jobs.db", "asynchronous"),
        ("quicksand://host/jobs", "quicksand"),
        ("oracle+oracledb://scott:tiger@host/jobs", "driver is not installed: oracledb"),
        ("postgresql://scott:tiger@127.0.0.1:1/jobs", "refused"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line(tmp_path: Path, url: str, says: str) -> None:
    (tmp_path / "not-one.db").write_bytes(b"nothing of the kind " * 100)
    with pytest.raises(UserError) as refused:
        JobStore(url.format(tmp=tmp_path), "server-1")
    line = str(refused.value)
    assert line.startswith("database_url") and says in line and "\n" not in line and "tiger" not in line
