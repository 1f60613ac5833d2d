"""Jobs through the dispatcher and a real engine process: what is drawn, in which order, and what a death leaves."""

from __future__ import annotations

import asyncio
import io
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dispatching import MODEL, PROMPT, Run, Server
from PIL import Image

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.server.context import Context
from sgl_diffusion.server.database import StoreUnavailable
from sgl_diffusion.server.dispatcher import EngineAway
from sgl_diffusion.server.drawing import PROGRESS_S
from sgl_diffusion.server.engine_process import EngineProcess
from sgl_diffusion.server.errors import ApiError
from sgl_diffusion.server.files import report
from sgl_diffusion.server.folders import REPORT
from sgl_diffusion.server.jobs import Ended, Job, Kind, Preview, Progress, Status, UploadState
from sgl_diffusion.server.logs import JobLog
from sgl_diffusion.server.messages import Answer, Finished


@pytest.fixture(scope="module")
def server(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for the tests that leave it as they found it."""
    started = Server(tmp_path_factory.mktemp("server"))
    runner.run(started.dispatcher.start())
    yield started
    runner.run(started.dispatcher.stop())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """The file of a request that an engine in this process draws, undisturbed."""
    engine, folder = Engine.load(MODEL), tmp_path_factory.mktemp("alone")

    def draw(prompt: str = PROMPT, **sampling: Any) -> bytes:
        name = f"{uuid.uuid4().hex}.png"
        engine.run(SamplingParams(prompt=[prompt], output_path=str(folder), output_file_name=name, **sampling))
        return (folder / name).read_bytes()

    return draw


# -- drawing ------------------------------------------------------------------------


def test_a_job_is_drawn_and_watched_from_beginning_to_end(
    server: Server, alone: Callable[..., bytes], run: Run
) -> None:
    async def scenario() -> None:
        assert server.dispatcher.engine.card is not None
        assert server.dispatcher.engine.card["draws_video"] is False
        job = await server.submit(seed=3, new={"presentation": {"partial_images": 3}})
        with server.dispatcher.watch(job.id) as slow:
            seen_by_slow = [await anext(slow)]
            events = await server.watched(job)
            seen_by_slow += [event async for event in slow]

        last = events[-1]
        assert isinstance(last, Ended) and last.job.status is Status.COMPLETED and last.job.progress == 100
        steps = [e.step for e in events if isinstance(e, Progress) and e.steps]
        assert steps[0] <= 20 and steps == sorted(steps)  # on a busy machine some give way to newer ones
        assert next(e.stage for e in reversed(events) if isinstance(e, Progress)) == "saving"
        previews = [e for e in events if isinstance(e, Preview)]
        assert [(p.index, p.step) for p in previews] == [(0, 5), (0, 10), (0, 15)]
        pictures = [Image.open(io.BytesIO(p.data)) for p in previews]
        assert [(p.format, p.size) for p in pictures] == [("WEBP", (64, 64))] * 3

        assert [e for e in seen_by_slow if not isinstance(e, Progress)] == [*previews, last]
        assert len(seen_by_slow) < len(events)  # progress that it was too slow for
        await server.end(job)
        recorded = server.store.get(job.id)
        assert recorded is not None and await server.watched(job) == [Ended(recorded)]

        (result,) = last.job.results
        assert (result.name, result.media_type, result.seed) == ("0.png", "image/png", 3)
        (file,) = server.files(last.job)
        assert result.size_bytes == len(file) and file == alone(seed=3)
        report = server.report(last.job)
        assert report["request_id"] == job.id and report["error"] is None and report["meta"]["seed"] == [3]
        assert not list(server.folders.root.glob("snapshots/*")) and not list(server.folders.root.glob("results/.*"))
        with pytest.raises(KeyError), server.dispatcher.watch("img_" + "0" * 32) as none:
            await anext(none)

    run(scenario())


def test_short_steps_are_told_now_and_then(server: Server, run: Run) -> None:
    async def scenario() -> None:
        began = time.monotonic()
        events = await server.watched(await server.submit(num_inference_steps=60))
        steps = [e.step for e in events if isinstance(e, Progress) and e.steps]
        assert 0 < len(steps) <= 1 + (time.monotonic() - began) / PROGRESS_S

    run(scenario())


def test_results_of_one_job_are_numbered(server: Server, alone: Callable[..., bytes], run: Run) -> None:
    async def scenario() -> None:
        job = await server.submit(
            seed=8, num_outputs_per_prompt=2, num_inference_steps=2, new={"presentation": {"output_format": "webp"}}
        )
        ended = await server.end(job)
        assert [(r.name, r.media_type, r.seed) for r in ended.results] == [
            ("0.webp", "image/webp", 8),
            ("1.webp", "image/webp", 9),
        ]

    run(scenario())


def test_a_batch_gives_the_bytes_of_single_requests_though_one_of_it_is_cancelled(
    server: Server, alone: Callable[..., bytes], run: Run
) -> None:
    prompts = ["a red circle", "a white cross on a black background", "a green ring"]

    async def scenario() -> None:
        async with server.busy():
            first, *others = [
                await server.submit(p, seed=9 - 3 * i, num_inference_steps=40) for i, p in enumerate(prompts)
            ]
            other_shape = await server.submit(seed=1, num_inference_steps=2)
        await server.reaches(first, 3)
        await server.dispatcher.cancel(first.id)
        assert (await server.end(first)).status is Status.CANCELLED
        for i, job in enumerate(others, start=1):
            ended = await server.end(job)
            assert server.files(ended) == [alone(prompts[i], seed=9 - 3 * i, num_inference_steps=40)]
            assert server.report(ended)["effective"]["jobs_in_batch"] == 3
            assert server.report(ended)["meta"]["prompt"] == [prompts[i]]
        assert server.report(await server.end(other_shape))["effective"]["jobs_in_batch"] == 1
        assert not server.folders.results(first.id).exists()
        assert not list(server.folders.root.glob("results/.*"))

    run(scenario())


def test_what_one_job_of_a_batch_fails_of_is_not_the_others_fault(server: Server, run: Run) -> None:
    async def scenario() -> None:
        async with server.busy():
            bad = await server.submit("circle " * 30, num_inference_steps=2)
            good = await server.submit(num_inference_steps=2)
        failed = await server.end(bad)
        assert (await server.end(good)).status is Status.COMPLETED
        assert failed.status is Status.FAILED and failed.failure is not None
        assert (failed.failure.type, failed.failure.code) == ("invalid_request_error", "invalid_value")

    run(scenario())


def test_a_request_that_cannot_be_honoured_is_refused_beside_a_running_one(server: Server, run: Run) -> None:
    async def scenario() -> None:
        async with server.busy():
            with pytest.raises(UserError, match="height=65"):
                await server.dispatcher.engine.check({"prompt": [PROMPT], "height": 65})
            assert (await server.dispatcher.engine.check({"prompt": [PROMPT], "num_inference_steps": 7})).steps == 7

    run(scenario())


def test_results_that_cannot_be_stored_are_the_servers_fault(server: Server, run: Run) -> None:
    async def scenario() -> None:
        results = server.folders.root / "results"
        async with server.busy():
            job = await server.submit(num_inference_steps=2)
            results.rename(server.folders.root / "elsewhere")
            results.write_text("a file where there was a folder")
        ended = await server.end(job)
        results.unlink()
        (server.folders.root / "elsewhere").rename(results)
        assert ended.failure is not None
        assert (ended.failure.type, ended.failure.code) == ("server_error", "storage_unavailable")
        assert (await server.end(await server.submit(num_inference_steps=1))).status is Status.COMPLETED

    run(scenario())


def test_who_waits_for_a_picture_has_it_before_it_is_recorded(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may look for the job elsewhere is told when it is known there: of a clip in the list, of any job on a server
    that shares them, or uploads them.
    """

    async def scenario() -> None:
        complete, has_room = server.store.complete, threading.Event()

        def where_there_is_room(*args: Any) -> Job | None:
            if has_room.is_set():
                return complete(*args)
            raise StoreUnavailable("database or disk is full")

        monkeypatch.setattr(server.store, "complete", where_there_is_room)
        job = await server.submit(num_inference_steps=1)
        told = await server.until(job, lambda e: isinstance(e, Ended))
        assert isinstance(told, Ended) and told.job.status is Status.COMPLETED and server.files(told.job)
        known = server.store.get(job.id)
        assert known is not None and known.status is Status.IN_PROGRESS and job.id not in server.ended
        assert server.dispatcher.drawn(job.id) == told.job
        assert await server.watched(job) == [told]  # who comes late
        assert await server.dispatcher.cancel(job.id) == told.job  # as it is
        here = Context(MODEL, server.args, server.dispatcher, server.store, server.folders, 0, JobLog())
        assert await here.job(job.id, "", Kind.IMAGE) == told.job
        with pytest.raises(ApiError, match=job.id):
            await here.job(job.id, "another tenant")
        there, away = server.folders.results(job.id) / REPORT, server.folders.results(job.id) / "away"
        while not there.exists():
            await asyncio.sleep(0.01)
        there.rename(away)
        reading = asyncio.create_task(report(here, told.job))
        await asyncio.sleep(0.1)
        assert not reading.done(), "it is being written"
        away.rename(there)
        assert (await reading).status_code == 200
        has_room.set()
        await server.end(job)
        recorded = server.store.get(job.id)
        assert recorded is not None and recorded.status is Status.COMPLETED and recorded.results == told.job.results
        assert server.dispatcher.drawn(job.id) is None and job.id in server.ended

        (scheduler,) = server.dispatcher.schedulers
        for kind, changed in (
            (Kind.VIDEO, {}),
            (Kind.IMAGE, {"upload_state": UploadState.WAITING}),
            (Kind.IMAGE, {"_alone": False}),
        ):
            with monkeypatch.context() as patch:
                for name, value in changed.items():
                    patch.setattr(scheduler, name, value)
                has_room.clear()
                job = await server.submit(num_inference_steps=1, new={"kind": kind})
                watching = asyncio.create_task(server.watched(job))
                while not server.folders.results(job.id).exists():
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.2)
                assert not watching.done() and server.dispatcher.drawn(job.id) is None
                has_room.set()
                assert isinstance((await watching)[-1], Ended)

    run(scenario())


def test_who_has_a_picture_finds_it_counted(server: Server, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while its end is being recorded, which is waited for then."""

    async def scenario() -> None:
        complete, go_on = server.store.complete, threading.Event()

        def slowly(*args: Any) -> Job | None:
            assert go_on.wait(20)
            return complete(*args)

        monkeypatch.setattr(server.store, "complete", slowly)
        before = await server.dispatcher.counts()
        job = await server.submit(num_inference_steps=1)
        await server.watched(job)
        counting = asyncio.create_task(server.dispatcher.counts())
        await asyncio.sleep(0.2)
        was_done = counting.done()
        go_on.set()
        assert await counting == before | {Status.COMPLETED: before[Status.COMPLETED] + 1} and not was_done

    run(scenario())


# -- order and cancelling ------------------------------------------------------------


def test_higher_priorities_go_first(server: Server, run: Run) -> None:
    async def scenario() -> None:
        before = len(server.ended)
        async with server.busy():
            jobs = [
                await server.submit(num_inference_steps=1 + p, new={"priority": p, "presentation": {"p": p}})
                for p in (0, 2, 1)
            ]
        for job in jobs:
            await server.end(job)
        low, high, middle = (job.id for job in jobs)
        assert server.ended[before:] == [high, middle, low]

    run(scenario())


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_within_a_step(server: Server, run: Run) -> None:
    async def scenario() -> None:
        running = await server.submit(num_inference_steps=500, height=320, width=320)  # so large that each step is told
        await server.reaches(running, 2)
        waiting = await server.submit(num_inference_steps=1)
        cancelled = await server.dispatcher.cancel(waiting.id)
        assert cancelled is not None and cancelled.status is Status.CANCELLED
        assert (await server.end(waiting)).status is Status.CANCELLED

        (server.folders.inputs(running.id)).mkdir()
        with server.dispatcher.watch(running.id) as events:
            last = await anext(events)
            await server.dispatcher.cancel(running.id)
            told = [last, *[event async for event in events]]
        steps = [e.step for e in told if isinstance(e, Progress)]
        assert isinstance(told[-1], Ended) and told[-1].job.status is Status.CANCELLED
        assert steps[-1] - steps[0] <= 3  # one that ran, one on the way here, one begun before it heard
        assert not list(server.folders.root.rglob(f"*{running.id}*"))
        assert (await server.dispatcher.cancel(running.id)) == told[-1].job
        assert await server.dispatcher.cancel("img_" + "0" * 32) is None

    run(scenario())


def test_another_server_of_the_same_database_watches_and_cancels(server: Server, run: Run) -> None:
    """It has no engine: all that it sees is in the database."""

    async def scenario() -> None:
        folder = server.folders.root
        other = Server(folder, database_url=f"sqlite:///{folder}/jobs.db")
        job = await server.submit(num_inference_steps=500)
        await server.reaches(job, 1)
        with other.dispatcher.watch(job.id) as events:
            first = await anext(events)
            assert isinstance(first, Progress) and first.step > 0 and first.steps == 500
            asked = await other.dispatcher.cancel(job.id)
            assert asked is not None and asked.status is Status.IN_PROGRESS and asked.cancel_asked
            assert (await server.end(job)).status is Status.CANCELLED
            last = [event async for event in events][-1]
        assert isinstance(last, Ended) and last.job.status is Status.CANCELLED
        await other.dispatcher.stop()
        other.store.close()

    run(scenario())


# -- death and resurrection ----------------------------------------------------------


def test_a_job_whose_engine_is_killed_goes_on_to_the_same_bytes(
    server: Server, alone: Callable[..., bytes], run: Run
) -> None:
    async def scenario() -> None:
        restarts = server.dispatcher.engine.restarts
        job = await server.submit(seed=5, num_inference_steps=60)
        await server.reaches(job, 12)
        await server.dies()
        with pytest.raises(EngineAway) as away:
            await server.dispatcher.engine.check({"prompt": [PROMPT]})
        assert away.value.retry_after >= 1 and "SIGKILL" in away.value.reason
        ended = await server.end(job)
        assert server.dispatcher.engine.restarts == restarts + 1
        assert ended.crashes == 1
        assert server.files(ended) == [alone(seed=5, num_inference_steps=60)]
        assert server.report(ended)["effective"]["resumed_after_step"] >= 10

    run(scenario())


def test_a_job_that_kills_the_engine_twice_fails_and_the_next_is_drawn(server: Server, run: Run) -> None:
    async def scenario() -> None:
        job = await server.submit(num_inference_steps=2000)
        for _ in range(2):
            await server.comes_back()
            await server.reaches(job, 2)
            await server.dies()
        ended = await server.end(job)
        assert ended.status is Status.FAILED and ended.failure is not None
        assert ended.failure.code == "engine_crashed"
        assert not server.folders.snapshot(job.id).exists()
        await server.comes_back()
        assert (await server.end(await server.submit(num_inference_steps=1))).status is Status.COMPLETED

    run(scenario())


def test_a_job_whose_engine_is_killed_as_it_writes_the_report_is_drawn(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results are there, and may be with its client."""

    async def scenario() -> None:
        hear = EngineProcess._hear

        def without_the_end(engine: EngineProcess, answer: Answer) -> None:
            if isinstance(answer, Finished):
                server.kill_engine()
            else:
                hear(engine, answer)

        await server.rests()
        with monkeypatch.context() as patch:
            patch.setattr(EngineProcess, "_hear", without_the_end)
            job = await server.submit(num_inference_steps=2)
            ended = await server.end(job)
        recorded = server.store.get(job.id)
        assert recorded is not None and (recorded.status, recorded.crashes) == (Status.COMPLETED, 0)
        assert recorded.results == ended.results and server.files(recorded)
        while server.dispatcher.engine.state == "ready":
            await asyncio.sleep(0.01)
        await server.comes_back()

    run(scenario())


def test_a_broken_snapshot_is_dropped(server: Server, alone: Callable[..., bytes], run: Run) -> None:
    async def scenario() -> None:
        async with server.busy():
            broken = await server.submit(seed=2, num_inference_steps=3)
            server.folders.snapshot(broken.id).write_bytes(b"no tensors")
        assert server.files(await server.end(broken)) == [alone(seed=2, num_inference_steps=3)]

    run(scenario())


def test_the_next_server_goes_on_where_one_stopped(tmp_path: Path, alone: Callable[..., bytes], run: Run) -> None:
    async def scenario() -> None:
        first = Server(tmp_path, shutdown_timeout=0, snapshot_every=0)
        await first.dispatcher.start()
        running = await first.submit(seed=4, num_inference_steps=60)
        waiting = await first.submit(num_inference_steps=1)
        watched = asyncio.create_task(first.end(waiting))
        await first.reaches(running, 7)
        await first.dispatcher.stop()
        with pytest.raises(AssertionError, match="it ended before"):
            await watched
        assert {s: n for s, n in first.store.counts().items() if n} == {Status.QUEUED: 2}
        first.store.close()

        second = Server(tmp_path, upload=UploadState.WAITING)
        await second.dispatcher.start()
        ended = await second.end(running)
        assert second.files(ended) == [alone(seed=4, num_inference_steps=60)]
        assert second.report(ended)["effective"]["resumed_after_step"] >= 7
        assert ended.crashes == 0 and ended.upload is UploadState.WAITING
        assert (await second.end(waiting)).status is Status.COMPLETED
        assert second.ended == [running.id, waiting.id]

        cut_off = await second.submit(num_inference_steps=2000)
        await second.reaches(cut_off, 6)
        patient = asyncio.create_task(second.dispatcher.stop())
        await asyncio.sleep(0)
        await second.dispatcher.stop(at_once=True)
        await patient
        left = second.store.get(cut_off.id)
        assert left is not None and left.status is Status.QUEUED and left.crashes == 0
        assert second.folders.snapshot(cut_off.id).exists()
        second.store.close()

    run(scenario())


def test_an_engine_that_cannot_load_tells_why(tmp_path: Path, run: Run) -> None:
    async def scenario() -> None:
        nowhere = Server(tmp_path, ServerArgs(model_path=str(tmp_path / "nowhere")))
        with pytest.raises(UserError, match="nowhere"):
            await nowhere.dispatcher.start()
        assert nowhere.dispatcher.engine.state == "failed"
        assert "nowhere" in (nowhere.dispatcher.engine.error or "")
        await nowhere.dispatcher.stop()

        killed = Server(tmp_path)
        starting = asyncio.create_task(killed.dispatcher.start())
        while killed.dispatcher.engine.pid is None:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineAway, match="loading"):
            await killed.dispatcher.engine.check({"prompt": [PROMPT]})
        killed.kill_engine()
        with pytest.raises(RunFailure, match="SIGKILL"):
            await starting
        await killed.dispatcher.stop()

    run(scenario())


def test_no_engine_outlives_its_server(tmp_path: Path) -> None:
    script = f"""
import asyncio
from dispatching import Path, Server
async def main():
    server = Server(Path({str(tmp_path)!r}))
    starting = asyncio.create_task(server.dispatcher.start())
    while server.dispatcher.engine.pid is None:
        await asyncio.sleep(0.01)
    print(server.dispatcher.engine.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    command = [sys.executable, "-P", "-c", script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    ) as parent:
        assert parent.stdout is not None
        engine = Path("/proc") / parent.stdout.readline().decode().strip()
        assert engine.exists()
        parent.kill()
    deadline = time.monotonic() + 10
    while engine.exists() and "Z" not in (engine / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.02)
