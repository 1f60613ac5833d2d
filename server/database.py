"""The database behind the job store: opened, set up, locked as each kind of database needs it. Torch-free."""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.server.tables import VERSION, metadata, schema

BUSY_TIMEOUT_S = 10  # for another process's write to a SQLite file
CONNECT_TIMEOUT_S = 10
PREPARE_LOCK = (
    0x5611D1FF  # PostgreSQL: an advisory lock while the tables are made, so that two servers can start at once
)


class StoreUnavailable(Exception):
    """The database does not answer, or cannot write. The same call can be made again.

    Nothing was changed, but for this: where the connection broke at the very end, it may all have been.
    """


class Database:
    """Transactions on the tables of `tables.py`, which are made where they are missing.

    SQLite: write-ahead log, so that readers never wait; `synchronous=NORMAL` survives the death of the process at any
    moment, and of the machine with at most the last few transactions missing.

    Raises:
        UserError: the URL cannot be read, its driver is missing, its server does not answer, or its tables are of
            another version.
    """

    def __init__(self, url: str) -> None:
        self.name, self._engine = _engine(url)
        self._sqlite = self._engine.dialect.name == "sqlite"
        self._postgres = self._engine.dialect.name == "postgresql"
        if self._sqlite:
            sa.event.listen(self._engine, "connect", _set_up_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)
        elif self._postgres:
            sa.event.listen(self._engine, "connect", _set_up_postgres)
        # threads of this process queue up here for the one write lock of SQLite, rather than poll for it; whoever has
        # it writes by the same connection: to take one out of the pool and put it back takes longer than a statement
        self._writer = threading.Lock() if self._sqlite else nullcontext()
        self._writes: sa.Connection | None = None
        no_transaction: dict[str, Any] = {"sqlite_begin": None} if self._sqlite else {"isolation_level": "AUTOCOMMIT"}
        self._reads = self._engine.execution_options(**no_transaction)
        try:
            self._make_tables()
        except exc.SQLAlchemyError as e:
            self.close()
            raise UserError(f"database_url={self.name}: {_first_line(e)}") from e

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Statements that see each what is there at that moment."""
        with _answering(), self._reads.connect() as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """All of it happens, or, where an exception leaves the block, nothing."""
        with _answering(), self._writer, self._connection() as db, db.begin():
            yield db

    def _connection(self) -> AbstractContextManager[sa.Connection]:
        """To write by. SQLite's stays open; SQLAlchemy opens it anew if it breaks."""
        if not self._sqlite:
            return self._engine.connect()
        if self._writes is None:
            self._writes = self._engine.connect()
        return nullcontext(self._writes)

    def now(self, db: sa.Connection) -> datetime:
        """The one clock of all servers that share the database: for SQLite, that of their machine."""
        if self._postgres:
            time_there: datetime = db.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
            return time_there.astimezone(UTC)
        return datetime.now(UTC)

    def close(self) -> None:
        """Waits for a write under way: SQLite ends the process where a connection is closed under a statement."""
        with self._writer:
            if self._writes is not None:
                self._writes.close()
            self._writes = None
        self._engine.dispose()

    def _make_tables(self) -> None:
        with self._engine.begin() as db:
            if self._postgres:
                db.execute(sa.select(sa.func.pg_advisory_xact_lock(PREPARE_LOCK)))
            if not sa.inspect(db).has_table(schema.name):
                metadata.create_all(db)
                db.execute(schema.insert().values(version=VERSION, database_id=uuid.uuid4().hex))
            found = db.execute(sa.select(schema.c.version)).scalar_one()
        if found != VERSION:
            self.close()
            raise UserError(
                f"database_url={self.name}: its tables are of version {found}, this sglang's of version {VERSION}; "
                "serve them with the sglang that made them, or name another database"
            )


def _engine(url: str) -> tuple[str, sa.Engine]:
    """The URL without its password, and an engine for it that has not connected yet."""
    try:
        parsed = sa.make_url(url)
        name = parsed.render_as_string(hide_password=True)
        dialect = parsed.get_dialect()
    except exc.NoSuchModuleError as e:
        raise UserError(f"database_url={name}: there is no dialect {parsed.drivername}") from e
    except (exc.ArgumentError, ValueError) as e:
        raise UserError(
            "database_url: cannot be read; expected DIALECT://USER:PASSWORD@HOST/DATABASE, "
            "postgresql://user@host/sglang for instance, or sqlite:////folder/jobs.db"
        ) from e
    if dialect.is_async:
        raise UserError(f"database_url={name}: {parsed.drivername} is an asynchronous driver; leave +... away")
    options: dict[str, Any] = {"pool_pre_ping": True, "isolation_level": "READ COMMITTED"}
    if dialect.name == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise UserError(f"database_url={name}: in memory jobs do not survive; expected sqlite:////folder/jobs.db")
        options = {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
    elif dialect.name == "postgresql":
        options["connect_args"] = {"connect_timeout": CONNECT_TIMEOUT_S}
    try:
        return name, sa.create_engine(parsed, hide_parameters=True, **options)
    except ImportError as e:
        raise UserError(f"database_url={name}: its driver is not installed: {e.name or e}") from e


def _set_up_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # or the driver would begin transactions by itself, and not as they are needed
    connection.execute("PRAGMA synchronous=NORMAL")
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as e:
            # the first server to open the file makes it so; SQLite does not let another one wait for that
            if e.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(db: sa.Connection) -> None:
    """Writers ask for the lock at once: one that read first could not get it when another wrote meanwhile."""
    if db.get_execution_options().get("sqlite_begin", "IMMEDIATE"):
        db.exec_driver_sql("BEGIN IMMEDIATE")


def _set_up_postgres(connection: Any, _record: object) -> None:
    """A server that stops in the middle of a transaction does not keep the locks for ever."""
    with connection.cursor() as cursor:
        cursor.execute("SET idle_in_transaction_session_timeout = '10s'")
    connection.commit()


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except (exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.TimeoutError) as e:
        raise StoreUnavailable(_first_line(e)) from e


def _first_line(error: exc.SQLAlchemyError) -> str:
    """What the driver says, without the statement."""
    said = str(getattr(error, "orig", None) or error).strip()
    return said.splitlines()[0] if said else type(error).__name__
