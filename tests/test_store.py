"""The job store, on SQLite and PostgreSQL: nothing accepted is lost, run twice, or ends twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from job_stores import LOCAL, PICTURE, add, claimed, get, new

from sgl_diffusion.server.jobs import Failure, Kind, Status, UploadState
from sgl_diffusion.server.store import IdempotencyConflict, JobStore, QueueFull

Open = Callable[..., JobStore]


@pytest.fixture
def open_store(database_url: str) -> Iterator[Open]:
    stores = []

    def open_(server_id: str = "server-1", **options: Any) -> JobStore:
        stores.append(JobStore(database_url, server_id, **options))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: Open) -> JobStore:
    return open_store()


# A job's life


def test_a_job_is_kept_as_it_was_given(store: JobStore, open_store: Open) -> None:
    asked = new(
        kind=Kind.VIDEO,
        sampling={"prompt": ["un café\0\U0001f600\ud83d"], "seed": [2**63 - 1], "guidance_scale": 0.1, "n": None},
        presentation={"size": "64x64", "metadata": {"b": 1, "a": [True]}},
        tenant="0123456789abcdef",
        priority=-3,
        work=1e15,
        batch_key="x" * 300,
        fingerprint="f",
        idempotency_key="k" * 1000 + "\0é",
    )
    before = datetime.now(UTC)
    job, created = store.add(asked, 1)
    assert created and (job.status, job.step, job.progress) == (Status.QUEUED, 0, 0)
    assert before - timedelta(seconds=1) < job.created_at < datetime.now(UTC) + timedelta(seconds=1)
    kept = open_store("server-2").get(job.id)
    assert kept == job and kept.created_at.tzinfo is UTC
    for name in ("kind", "sampling", "presentation", "tenant", "priority", "work", "batch_key"):
        assert getattr(kept, name) == getattr(asked, name)
    assert list(kept.presentation["metadata"]) == ["b", "a"]


def test_a_job_is_drawn(store: JobStore) -> None:
    (job_id,) = add(store)
    (job,) = store.claim()
    assert job == get(store, job_id) and job.status is Status.IN_PROGRESS and job.started_at is not None
    assert store.claim() == []
    store.record_step([job_id], 1, 4)
    assert get(store, job_id).progress == 25
    done = store.complete(job_id, [PICTURE], LOCAL)
    assert done == get(store, job_id) and done is not None
    assert (done.status, done.progress, done.results) == (Status.COMPLETED, 100, (PICTURE,))
    assert done.created_at <= job.started_at <= (done.ended_at or job.created_at)
    assert store.renew() == set()


def test_a_job_that_nothing_waits_before_is_taken_as_it_is_added(store: JobStore, open_store: Open) -> None:
    job, is_new = store.add(new(work=2.0), 10, take=True)
    assert is_new and job.status is Status.IN_PROGRESS and job.started_at == job.created_at
    assert get(store, job.id) == job and store.claim() == []
    other = open_store("server-2")
    assert other.complete(job.id, [PICTURE], LOCAL) is None  # it is not that one's
    (waiting,) = add(store)
    later, _ = store.add(new(), 10, take=True)
    assert later.status is Status.QUEUED  # it would go before another
    store.requeue(job.id, crashed=True)
    assert claimed(store) == [job.id, waiting, later.id]  # it was before them, and keeps its turn
    ended = store.complete(job.id, [PICTURE], LOCAL)
    assert ended is not None and ended.status is Status.COMPLETED
    same, is_new = store.add(new(idempotency_key="k", fingerprint="f"), 10, take=True)
    assert is_new and same.status is Status.IN_PROGRESS
    assert store.add(new(idempotency_key="k", fingerprint="f"), 10, take=True) == (same, False)


def test_a_job_fails_with_its_reason(store: JobStore) -> None:
    (job_id,) = add(store)
    store.claim()
    failure = Failure("out of\0 memory", code="oom", param="size")
    store.fail(job_id, failure)
    assert (get(store, job_id).status, get(store, job_id).failure) == (Status.FAILED, failure)


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_by_its_server(store: JobStore) -> None:
    first, second = add(store, 2)
    store.claim()
    asked, cancelled = store.ask_cancel(first), store.ask_cancel(second)
    assert asked is not None and (asked.status, asked.cancel_asked) == (Status.IN_PROGRESS, True)
    assert cancelled is not None and cancelled.status is Status.CANCELLED and cancelled.ended_at is not None
    assert store.renew() == {first}
    assert claimed(store) == []
    ended = store.cancelled(first)
    assert ended is not None and ended.status is Status.CANCELLED
    assert store.renew() == set()
    assert store.ask_cancel("img_" + "0" * 32) is None


ENDS = {
    Status.COMPLETED: lambda store, job_id: store.complete(job_id, [PICTURE], UploadState.WAITING),
    Status.FAILED: lambda store, job_id: store.fail(job_id, Failure("late")),
    Status.CANCELLED: lambda store, job_id: store.cancelled(job_id),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_ended_job_keeps_its_end(store: JobStore, end: Status) -> None:
    (job_id,) = add(store)
    store.claim()
    ended = ENDS[end](store, job_id)
    for late in (*ENDS.values(), lambda store, job_id: store.requeue(job_id, crashed=True)):
        assert late(store, job_id) == ended  # told, and not changed
    store.record_step([job_id], 3, 4)
    assert store.ask_cancel(job_id) == ended == store.get(job_id)
    assert store.release_own() == [] and claimed(store) == []


def test_a_deleted_job_is_gone_when_nobody_works_on_it(store: JobStore) -> None:
    ended, running, waiting = add(store, 3)
    store.claim(2)
    store.cancelled(ended)
    for job_id in (ended, running, waiting):
        store.delete(job_id)
        assert store.get(job_id) is None and store.ask_cancel(job_id) is None
    assert store.list(list(Kind), None, None, 10, True) == ([], False)
    assert store.statuses([ended, running, waiting]) == {running: Status.IN_PROGRESS}
    assert store.renew() == {running}
    last = store.complete(running, [PICTURE], UploadState.WAITING)
    assert last is not None and (last.status, last.results) == (Status.CANCELLED, ())
    assert store.statuses([running]) == {} and store.complete(running, [PICTURE], LOCAL) is None


def test_a_given_back_job_goes_first_and_counts_its_crashes(store: JobStore) -> None:
    first, second = add(store, 2)
    (job,) = store.claim()
    store.record_step([first], 2, 4)
    back = store.requeue(first, crashed=True)
    assert back is not None and (back.status, back.crashes, back.step) == (Status.QUEUED, 1, 2)
    store.claim()
    assert get(store, first).started_at == job.started_at
    again = store.requeue(first, crashed=False)
    assert again is not None and again.crashes == 1
    assert claimed(store) == [first, second]


def test_a_given_back_job_that_nobody_wants_ends(store: JobStore) -> None:
    asked, deleted = add(store, 2)
    store.claim(2)
    store.ask_cancel(asked)
    store.delete(deleted)
    for job_id in (asked, deleted):
        ended = store.requeue(job_id, crashed=True)
        assert ended is not None and ended.status is Status.CANCELLED
    assert store.statuses([asked, deleted]) == {asked: Status.CANCELLED}
    assert claimed(store) == []


# The queue


def test_a_full_queue_takes_no_more(store: JobStore) -> None:
    add(store, 3)
    store.claim()
    store.add(new(), 3)
    with pytest.raises(QueueFull) as full:
        store.add(new(), 3)
    assert full.value.waiting == 3 == store.counts()[Status.QUEUED]
    assert store.counts() == dict.fromkeys(Status, 0) | {Status.QUEUED: 3, Status.IN_PROGRESS: 1}


def test_a_repeated_request_is_the_first_one(store: JobStore) -> None:
    request = {"idempotency_key": "k", "fingerprint": "f", "tenant": "a"}
    first, _ = store.add(new(**request), 1)
    assert store.add(new(**request), 1) == (first, False)  # though the queue is full
    with pytest.raises(IdempotencyConflict, match=first.id):
        store.add(new(**request | {"fingerprint": "g"}), 1)
    other, created = store.add(new(**request | {"tenant": "b"}), 9)
    assert created and other.id != first.id
    (ended,) = store.claim()
    store.complete(ended.id, [PICTURE], LOCAL)
    assert store.add(new(**request), 9) == (store.get(first.id), False)
    store.delete(first.id)
    assert store.add(new(**request | {"fingerprint": "g"}), 9)[1]


def test_the_key_of_a_deleted_running_job_is_free(store: JobStore) -> None:
    first, _ = store.add(new(idempotency_key="k"), 9)
    store.claim()
    store.delete(first.id)
    second, created = store.add(new(idempotency_key="k"), 9)
    assert created and store.get(second.id) == second


def test_requests_at_the_same_time_are_put_in_one_order(store: JobStore) -> None:
    """The same one repeated is one job, and the queue's last place is taken once."""
    together = threading.Barrier(4)

    def ask(key: str | None, max_queue_size: int) -> str | None:
        together.wait(10)
        try:
            return store.add(new(idempotency_key=key), max_queue_size)[0].id
        except QueueFull:
            return None

    with ThreadPoolExecutor(4) as pool:
        for number in range(12):
            ids = list(pool.map(ask, [f"key {number}"] * 4, [99] * 4))
            assert len(set(ids)) == 1 and None not in ids
        for size in range(13, 25):
            assert sum(job_id is not None for job_id in pool.map(ask, [None] * 4, [size] * 4)) == 1


def test_a_job_that_another_server_is_taking_is_passed_over(postgres_url: str) -> None:
    store = JobStore(postgres_url, "server-1")
    first, second = add(store, 2)
    with ThreadPoolExecutor(1) as pool:
        engine = sqlalchemy.create_engine(postgres_url)
        with engine.begin() as other:
            other.exec_driver_sql(f"SELECT * FROM sglang_jobs WHERE id = '{first}' FOR UPDATE")
            claim = pool.submit(claimed, store)
            done, _ = wait([claim], timeout=5)
        assert done and claim.result() == [second]
        assert claimed(store) == [first]
        engine.dispose()
    store.close()


def test_tenants_share_the_engine(store: JobStore, open_store: Open) -> None:
    """Though one of them was here long before; and after a restart."""
    first = add(store, 100, tenant="a")
    second = add(store, 2, tenant="b")
    assert [store.claim()[0].id for _ in range(3)] == [first[0], second[0], first[1]]
    store.close()
    store = open_store()
    third = add(store, 2, tenant="c")  # where the engine is now, not where it began, nor behind all
    assert claimed(store)[:6] == [second[1], first[2], third[0], first[3], third[1], first[4]]


def test_work_counts_not_jobs(store: JobStore) -> None:
    clips = add(store, 2, tenant="a", work=3.0)
    pictures = add(store, 6, tenant="b", work=1.0)
    assert claimed(store) == [*pictures[:2], clips[0], *pictures[2:5], clips[1], pictures[5]]


def test_a_tenant_that_was_away_has_saved_nothing_up(store: JobStore) -> None:
    add(store, 50, tenant="a")
    claimed(store)
    first, second = add(store, 3, tenant="a"), add(store, 3, tenant="b")
    assert claimed(store) == [job_id for pair in zip(first, second, strict=True) for job_id in pair]


def test_priority_goes_first_and_disturbs_no_share(store: JobStore) -> None:
    usual = add(store, 50, tenant="a")
    late = add(store, 1, tenant="a", priority=-1)
    urgent = add(store, 2, tenant="a", priority=5)
    assert [store.claim()[0].id for _ in range(3)] == [*urgent, usual[0]]
    other = add(store, 2, tenant="b")  # not behind the turns of the urgent ones
    assert claimed(store) == [usual[1], other[0], usual[2], other[1], *usual[3:], *late]


def test_company_for_a_batch_has_its_key_and_fits(store: JobStore) -> None:
    square = {"batch_key": "64x64"}
    head, *others = add(store, 3, **square)
    (wide,) = add(store, batch_key="96x64")
    (many,) = add(store, **square, sampling={"prompt": ["a"], "num_outputs_per_prompt": 4})
    (last,) = add(store, **square)
    assert [job.id for job in store.claim()] == [head]
    assert [job.id for job in store.claim(8, "64x64", max_results=4)] == [*others, last]
    assert store.claim(8, "64x64", max_results=3) == []
    assert claimed(store) == [wide, many]


def test_company_moves_nobody_back(store: JobStore) -> None:
    first = add(store, 9, tenant="a") + add(store, 1, tenant="a", batch_key="b")
    store.claim()
    assert [job.id for job in store.claim(1, "b")] == [first[-1]]
    second = add(store, 1, tenant="b")
    assert claimed(store)[:2] == [first[1], second[0]]


def test_pages_stay_as_they_are_while_jobs_come(store: JobStore) -> None:
    ids = add(store, 5, tenant="a")
    for kind, tenant in ((Kind.VIDEO, "a"), (Kind.IMAGE, "b")):
        add(store, kind=kind, tenant=tenant)
    seen: list[str] = []
    more, pages = True, 0
    while more:
        page, more = store.list([Kind.IMAGE], "a", seen[-1] if seen else None, 2, True)
        seen += [job.id for job in page]
        add(store, tenant="a")
        pages += 1
    assert (seen, pages) == (ids[::-1], 3)
    page, more = store.list([Kind.IMAGE, Kind.VIDEO], "a", ids[2], 3, False)
    assert [job.kind for job in page] == [Kind.IMAGE, Kind.IMAGE, Kind.VIDEO] and more
    assert len(store.list(list(Kind), None, None, 100, False)[0]) == 10
    store.delete(ids[0])
    for unknown in ("nothing", ids[0], "\0"):
        with pytest.raises(KeyError):
            store.list([Kind.IMAGE], "a", unknown, 2, True)
    with pytest.raises(KeyError):  # another tenant's is as good as none
        store.list([Kind.IMAGE], "b", ids[1], 2, True)
    assert store.get(ids[1], "b") is None and store.get(ids[1], "a") is not None and store.get("\0") is None


# Servers that die


def test_a_dead_servers_jobs_go_to_another(open_store: Open) -> None:
    dying, well, alive = (
        open_store("dead", lease_seconds=0.01),
        open_store("dead", lease_seconds=60),
        open_store("alive"),
    )
    wanted, asked, deleted, kept = add(alive, 4)
    dying.claim(3)
    alive.claim()
    dying.record_step([wanted], 2, 4)
    dying.ask_cancel(asked)
    dying.delete(deleted)
    well.renew()
    time.sleep(0.02)
    assert alive.reclaim() == []  # it is not dead yet
    dying.renew()
    time.sleep(0.02)
    assert dying.reclaim() == []  # it would know best, and renews
    assert alive.reclaim() == [wanted]
    assert alive.statuses([wanted, asked, deleted, kept]) == {
        wanted: Status.QUEUED,
        asked: Status.CANCELLED,
        kept: Status.IN_PROGRESS,
    }
    (job,) = alive.claim()
    assert (job.id, job.step, job.crashes) == (wanted, 2, 0)
    # back to life, it changes nothing
    dying.record_step([wanted], 4, 4)
    dying.renew()
    late = [end(dying, wanted) for end in ENDS.values()] + [dying.requeue(wanted, crashed=True)]
    assert late == [None] * 4 and get(alive, wanted) == job
    assert (dying.complete(asked, [PICTURE], LOCAL) or job).status is Status.CANCELLED
    done = alive.complete(wanted, [PICTURE], LOCAL)
    assert done == dying.fail(wanted, Failure("late")) == alive.get(wanted)


def test_a_restarted_server_goes_on_at_once(store: JobStore, open_store: Open) -> None:
    running, waiting, uploading, asked = add(store, 4)
    store.claim(4)
    store.requeue(waiting, crashed=False)
    store.complete(uploading, [PICTURE], UploadState.WAITING)
    store.uploads_due(1)
    store.ask_cancel(asked)
    store.close()
    store = open_store("server-2")
    assert store.uploads_due(1) == []
    assert store.release_own() == [running]
    assert claimed(store) == [running, waiting]
    assert get(store, asked).status is Status.CANCELLED
    assert [job.id for job in store.uploads_due(9)] == [uploading]


def test_results_wait_for_their_upload(store: JobStore, open_store: Open) -> None:
    first, second, local = add(store, 3)
    store.claim(3)
    for job_id in (first, second):
        store.complete(job_id, [PICTURE, replace(PICTURE, name="1.png")], UploadState.WAITING)
    store.complete(local, [PICTURE], LOCAL)
    assert [job.id for job in store.uploads_due(1)] == [first]
    assert [job.id for job in open_store("server-2").uploads_due(9)] == [second]  # each by one server
    later = datetime.now(UTC) + timedelta(hours=1)
    store.record_upload(first, urls=None, error="bucket is away", next_at=later)
    store.record_upload(second, urls=["stolen", "stolen"], error=None, next_at=None)
    waits = get(store, first)
    assert (waits.upload, waits.upload_error, waits.upload_attempts) == (UploadState.WAITING, "bucket is away", 1)
    assert waits.upload_next_at == later and store.uploads_due(9) == []
    assert [job.id for job in store.ended(None, 9)] == [local]
    (third,) = add(store)
    store.claim()
    store.complete(third, [PICTURE], UploadState.WAITING)
    assert [job.id for job in store.uploads_due(9)] == [third]
    store.record_upload(third, urls=None, error="again", next_at=None)
    assert [job.id for job in store.uploads_due(9)] == [third]
    store.record_upload(third, urls=["https://bucket/0.png"], error=None, next_at=None)
    there = get(store, third)
    assert (there.upload, there.upload_error) == (UploadState.UPLOADED, None)
    assert there.results == (replace(PICTURE, url="https://bucket/0.png"),)
    assert [job.id for job in store.ended(None, 9)] == [local, third]
    assert [job.id for job in store.ended(None, 9, with_results=True)] == [local]


def test_the_first_to_end_is_the_first_to_go(store: JobStore) -> None:
    ids = add(store, 4)
    store.claim(3)
    for job_id in (ids[2], ids[0]):
        store.complete(job_id, [PICTURE], LOCAL)
        time.sleep(0.002)
    assert [job.id for job in store.ended(None, 9)] == [ids[2], ids[0]]
    assert [job.id for job in store.ended(get(store, ids[0]).ended_at, 9)] == [ids[2]]
    assert [job.id for job in store.ended(None, 1)] == [ids[2]]


# Many at once


def test_threads_neither_lose_nor_share_a_job(store: JobStore) -> None:
    def work(number: int) -> tuple[list[str], list[str]]:
        choose = random.Random(number)
        added, drawn = [], []
        for _ in range(15):
            added += add(store, tenant=choose.choice("ab"), priority=choose.randrange(2))
            drawn += [job.id for job in store.claim(choose.randrange(1, 3))]
        return added, drawn

    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(work, range(6)))
    drawn = [job_id for _, ids in done for job_id in ids] + claimed(store)
    assert Counter(drawn) == Counter(job_id for ids, _ in done for job_id in ids)


def _serve(url: str, server_id: str, log: str) -> None:
    """A server that adds and draws until it is killed. What it was told is in its log, a line each."""
    store = JobStore(url, server_id, lease_seconds=0.5)
    told = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        (job_id,) = add(store, tenant=server_id)
        os.write(told, f"added {job_id}\n".encode())
        store.renew()
        store.reclaim()
        for job in store.claim(2):
            if random.random() < 0.2:
                os.write(told, f"back {job.id}\n".encode())
                store.requeue(job.id, crashed=True)
                continue
            mine = replace(PICTURE, name=f"{uuid.uuid4()}.png")
            ended = store.complete(job.id, [mine], LOCAL)
            if ended is not None and ended.results == (mine,):  # not another's, where the lease was lost
                os.write(told, f"drawn {job.id}\n".encode())


SPAWN = multiprocessing.get_context("spawn")


def _told(logs: list[Path], word: str) -> list[str]:
    lines = [line.split() for log in logs if log.exists() for line in log.read_text().splitlines()]
    return [job_id for said, job_id in lines if said == word]


def test_killed_servers_lose_nothing(database_url: str, tmp_path: Path, open_store: Open) -> None:
    """Three of them share the queue (of SQLite too, though that is not for sharing), and die in the middle."""
    logs = [tmp_path / f"server-{number}" for number in range(3)]
    servers = [SPAWN.Process(target=_serve, args=(database_url, log.name, str(log)), daemon=True) for log in logs]
    for server in servers:
        server.start()
    deadline = time.monotonic() + 60
    for server, log in zip(servers, logs, strict=True):
        while len(_told([log], "drawn")) < 12:
            assert time.monotonic() < deadline and server.is_alive()
            time.sleep(0.02)
    for server in servers:
        server.kill()
        server.join()
    store = open_store("heir")
    added, drawn = _told(logs, "added"), _told(logs, "drawn")
    assert len(set(drawn)) == len(drawn), "drawn twice"
    for job_id in added:
        assert store.get(job_id) is not None, "an accepted job is lost"
    for job_id in drawn:
        assert get(store, job_id).status is Status.COMPLETED
    time.sleep(0.6)  # their leases run out
    store.reclaim()
    rest = claimed(store)
    assert not set(rest) & set(drawn)
    for job_id in rest:
        store.complete(job_id, [PICTURE], LOCAL)
    counts = store.counts()
    assert counts[Status.COMPLETED] == sum(counts.values()) >= len(added)
    if database_url.startswith("sqlite"):
        with sqlite3.connect(database_url.removeprefix("sqlite:///")) as file:
            assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
