"""What the server removes by itself, and what it never does: real files, a time that is passed in."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.server.folders import Folders
from sgl_diffusion.server.jobs import Kind, NewJob, ResultFile, Status, UploadState
from sgl_diffusion.server.retention import Retention
from sgl_diffusion.server.store import JobStore

DAY = timedelta(days=1)
BIG = 400_000  # bytes of a result here


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path / "data")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db", "server-1")
    yield store
    store.close()


def files_of(folders: Folders, job_id: str) -> list[Path]:
    """All that a job can have."""
    files = [
        folders.inputs(job_id) / "0.png",
        folders.results(job_id) / "0.png",
        folders.unfinished(job_id) / "0.png",
        folders.snapshot(job_id),
    ]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"\0" * BIG)
    return files


def there(files: list[Path]) -> list[bool]:
    return [file.exists() for file in files]


ONLY_RESULTS = [False, True, False, False]


def add(store: JobStore) -> str:
    return store.add(NewJob(f"img_{uuid.uuid4().hex}", Kind.IMAGE, {"prompt": ["a"]}), 1000)[0].id


def drawn(store: JobStore, folders: Folders, upload: UploadState = UploadState.LOCAL) -> tuple[str, list[Path]]:
    """A job that has just been completed."""
    job_id = add(store)
    (job,) = store.claim()
    assert job.id == job_id
    files = files_of(folders, job_id)
    store.complete(job_id, [ResultFile("0.png", "image/png", BIG, 1)], upload)
    time.sleep(0.002)  # the next one ends later
    return job_id, files


def test_without_limits_only_what_nobody_needs_goes(store: JobStore, folders: Folders) -> None:
    job_id, files = drawn(store, folders)
    assert Retention(store, folders, None, None).sweep(datetime.now(UTC) + 1000 * DAY) == 0
    assert there(files) == ONLY_RESULTS and store.get(job_id) is not None


def test_old_jobs_go_with_all_their_files(store: JobStore, folders: Folders) -> None:
    retention = Retention(store, folders, 2.0, None)
    job_id, files = drawn(store, folders)
    failed = add(store)
    store.ask_cancel(failed)
    now = datetime.now(UTC)
    assert retention.sweep(now + 1.99 * DAY) == 0
    assert store.get(job_id) is not None and there(files) == ONLY_RESULTS
    assert retention.sweep(now + 2.01 * DAY) == 2
    assert store.get(job_id) is None and store.get(failed) is None and not any(there(files))


def test_beyond_the_quota_those_that_ended_first_go(store: JobStore, folders: Folders) -> None:
    jobs = [drawn(store, folders) for _ in range(5)]
    retention = Retention(store, folders, None, 1)  # MiB: two of them fit
    assert retention.sweep() == 3
    assert [store.get(job_id) is not None for job_id, _ in jobs] == [False] * 3 + [True] * 2
    assert [any(there(files)) for _, files in jobs] == [False] * 3 + [True] * 2
    assert retention.sweep() == 0


def test_the_quota_takes_nothing_that_frees_nothing(store: JobStore, folders: Folders) -> None:
    cancelled = add(store)
    store.ask_cancel(cancelled)
    uploaded, files = drawn(store, folders, UploadState.WAITING)
    store.uploads_due(1)
    store.record_upload(uploaded, urls=["https://bucket/0.png"], error=None, next_at=None)
    files[1].unlink()
    jobs = [drawn(store, folders) for _ in range(3)]
    assert Retention(store, folders, None, 1).sweep() == 1
    assert store.statuses([cancelled, uploaded]).keys() == {cancelled, uploaded}
    assert store.get(jobs[0][0]) is None


def test_neither_unfinished_jobs_nor_those_to_be_uploaded_go(store: JobStore, folders: Folders) -> None:
    """However old they are, and however much they take; nor the files of a deleted one that is still drawn."""
    uploading, results = drawn(store, folders, UploadState.WAITING)
    running, deleted, waiting = add(store), add(store), add(store)
    store.claim(2)
    store.delete(deleted)
    files = {job_id: files_of(folders, job_id) for job_id in (running, deleted, waiting)}
    assert Retention(store, folders, 0.001, 1).sweep(datetime.now(UTC) + 1000 * DAY) == 0
    assert all(all(there(of)) for of in files.values())
    assert there(results) == ONLY_RESULTS
    assert store.statuses([uploading, running, deleted, waiting]) == {
        uploading: Status.COMPLETED,
        running: Status.IN_PROGRESS,
        deleted: Status.IN_PROGRESS,
        waiting: Status.QUEUED,
    }


def test_what_a_crash_left_goes_after_an_hour(store: JobStore, folders: Folders) -> None:
    lost, recent = (files_of(folders, f"{kind}_{uuid.uuid4().hex}") for kind in ("batch", "video"))
    others = [folders.root / "results" / name for name in ("notes.txt", "img_short", ".hidden")]
    for path in others:
        path.write_text("not a job's")
    lost.append(folders.root / "snapshots" / ".tmpAb12")  # cut off before it had its name
    lost[-1].write_text("half of a snapshot")
    for path in [*others, *lost, *(file.parent for file in lost[:3])]:
        os.utime(path, (time.time() - 3700,) * 2)
    retention = Retention(store, folders, None, None)
    assert retention.sweep() == 0
    assert not any(there(lost)) and all(there(recent)) and all(there(others))
    retention.sweep(datetime.now(UTC) + timedelta(minutes=61))
    assert not any(there(recent)) and all(there(others))


def test_many_jobs_are_swept(store: JobStore, folders: Folders) -> None:
    ids = [add(store) for _ in range(250)]
    for job_id in ids:
        store.ask_cancel(job_id)
    for job_id in ids:
        folders.inputs(job_id).mkdir()
    retention = Retention(store, folders, 1.0, None)
    retention.sweep()
    assert list(folders.entries()) == []
    assert retention.sweep(datetime.now(UTC) + 2 * DAY) == 250


def test_files_of_another_databases_jobs_are_left_alone(tmp_path: Path, store: JobStore, folders: Folders) -> None:
    _, files = drawn(store, folders)
    for _ in range(2):
        Retention(store, folders, None, None)
    other = JobStore(f"sqlite:///{tmp_path}/other.db", "server-1")
    with pytest.raises(UserError, match="another database"):
        Retention(other, folders, None, None)
    other.close()
    assert all(there(files))


def test_a_sweep_that_failed_is_finished_by_the_next(
    store: JobStore, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record goes first, so that what is listed can be served."""
    job_id, files = drawn(store, folders)
    retention = Retention(store, folders, 1.0, None)

    def full(_: str) -> None:
        raise OSError("read-only file system")

    with monkeypatch.context() as broken:
        broken.setattr(folders, "remove", full)
        with pytest.raises(OSError, match="read-only"):
            retention.sweep(datetime.now(UTC) + 2 * DAY)
    assert store.get(job_id) is None and all(there(files))
    retention.sweep(datetime.now(UTC) + 2 * DAY)
    assert not any(there(files))
