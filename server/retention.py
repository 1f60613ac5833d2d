"""What goes by itself: old results, those beyond a quota, and what a crash left behind. Torch-free."""

from __future__ import annotations

import shutil
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.server.folders import Folders
from sgl_diffusion.server.store import JobStore

PAGE = 100  # jobs looked at together
LEFT_BEHIND_AFTER = timedelta(hours=1)  # a job's inputs are stored before the job: they are not its record's yet
MIB = 1024 * 1024


class Retention:
    """Removes ended jobs with their files; never an unfinished one, nor results that wait for their upload.

    Attributes:
        retain_days: that an ended job is kept; None: for ever.
        disk_quota_mb: MiB of results, beyond which those of the jobs that ended first go; None: no limit.

    Raises:
        UserError: the folder holds the files of another database's jobs, all of which would look left behind.
    """

    def __init__(self, store: JobStore, folders: Folders, retain_days: float | None, disk_quota_mb: int | None) -> None:
        self._store, self._folders = store, folders
        self._retain = None if retain_days is None else timedelta(days=retain_days)
        self._quota = None if disk_quota_mb is None else disk_quota_mb * MIB
        _bind(folders.root / "database-id", store.database_id())

    def sweep(self, now: datetime | None = None) -> int:
        """Removes what is due at `now`. Returns how many jobs it were. Takes seconds with many files.

        Raises:
            StoreUnavailable, OSError: what is left to do, the next sweep does.
        """
        now = now or datetime.now(UTC)
        removed = self._remove_old(now) + self._remove_beyond_quota()
        self._remove_left_behind(now)
        return removed

    def _remove_old(self, now: datetime) -> int:
        removed = 0
        while self._retain is not None and (old := self._store.ended(now - self._retain, PAGE)):
            for job in old:
                self._remove(job.id)
            removed += len(old)
        return removed

    def _remove_beyond_quota(self) -> int:
        if self._quota is None:
            return 0
        sizes = {
            job_id: _size(path) for job_id, path in self._folders.entries() if path == self._folders.results(job_id)
        }
        total, removed = sum(sizes.values()), 0
        while total > self._quota and (oldest := self._store.ended(None, PAGE, with_results=True)):
            for job in oldest:
                if total <= self._quota:
                    break
                self._remove(job.id)
                total -= sizes.get(job.id, 0)
                removed += 1
        return removed

    def _remove(self, job_id: str) -> None:
        """The record first: files without a record are found again after a crash, a record without files is not."""
        self._store.delete(job_id)
        self._folders.remove(job_id)

    def _remove_left_behind(self, now: datetime) -> None:
        """Files of jobs that there are not, and of ended jobs everything but their results."""
        entries = list(self._folders.entries())
        for start in range(0, len(entries), PAGE):
            page = entries[start : start + PAGE]
            statuses = self._store.statuses({job_id for job_id, _ in page})
            for job_id, path in page:
                status = statuses.get(job_id)
                with suppress(FileNotFoundError):  # its job has just ended, or another server swept it
                    if status is None:
                        if _changed_at(path) < now - LEFT_BEHIND_AFTER:
                            _delete(path)
                    elif status.is_end and path != self._folders.results(job_id):
                        _delete(path)
        for path in list(self._folders.half_written()):
            with suppress(FileNotFoundError):  # it is whole by now, and has its name
                if _changed_at(path) < now - LEFT_BEHIND_AFTER:
                    _delete(path)


def _bind(mark: Path, database_id: str) -> None:
    try:
        mark.touch()
        found = mark.read_text(encoding="ascii").strip()
        if not found:
            mark.write_text(database_id, encoding="ascii")
    except OSError as e:
        raise UserError(f"data_dir={mark.parent}: {mark.name} cannot be written: {e.strerror}") from e
    if found not in ("", database_id):
        raise UserError(
            f"data_dir={mark.parent}: it holds the files of jobs in another database; name that one, or another "
            f"data_dir, or delete {mark} to have files without a job removed"
        )


def _size(folder: Path) -> int:
    """Bytes of the files in it."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # deleted meanwhile
            size += path.stat().st_size if path.is_file() else 0
    return size


def _changed_at(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
