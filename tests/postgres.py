"""A PostgreSQL server of one's own, in a temporary folder, reached over a socket in it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy.schema import CreateSchema


class Postgres:
    """`url`: of its first database, which is empty, as SQLAlchemy writes it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._data = folder, folder / "data"
        self.url = f"postgresql+psycopg://sglang@/postgres?host={folder}"
        self._user: str | None = None
        self._data.mkdir()
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            users = {user.pw_name for user in pwd.getpwall()}
            self._user = "postgres" if "postgres" in users else "nobody"
            for path in (folder, self._data):
                shutil.chown(path, self._user)
        self._run("initdb", "-U", "sglang", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync")

    def start(self) -> None:
        settings = f"-c listen_addresses='' -c fsync=off -k {self._folder}"
        self._run("pg_ctl", "start", "-w", "-o", settings, "-l", f"{self._folder}/log")

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-w", "-m", "immediate")

    def empty(self, name: str) -> str:
        """The URL of an empty room of its own in the database: much faster made than another database."""
        engine = sqlalchemy.create_engine(self.url)
        with engine.begin() as db:
            db.execute(CreateSchema(name))
        engine.dispose()
        return f"{self.url}&options=-csearch_path%3D{name}"

    def _run(self, *command: str) -> None:
        done = subprocess.run(
            command,
            user=self._user,
            env=os.environ | {"PGDATA": str(self._data)},
            cwd=self._folder,
            stdout=subprocess.DEVNULL,  # a pipe would stay open as long as the server
            stderr=subprocess.PIPE,
        )
        assert done.returncode == 0, done.stderr.decode()


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server that runs while the block lasts. Skips the test where PostgreSQL is not installed."""
    if shutil.which("initdb") is None:
        pytest.skip("PostgreSQL's initdb is not installed")
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder:
        server = Postgres(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()
