"""An engine that has nothing to do: what is known of a request without it, and how a picture gets to it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dispatching import PROMPT, Run, Server

from sgl_diffusion.runtime.checked import Checked
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.server.database import StoreUnavailable
from sgl_diffusion.server.dispatcher import EngineAway
from sgl_diffusion.server.engine_process import EngineProcess
from sgl_diffusion.server.jobs import Job, Kind, NewJob, Status
from sgl_diffusion.server.messages import Begin, Check, Drop, Order, Prepare
from sgl_diffusion.server.scheduler import POLL_S, Scheduler
from sgl_diffusion.server.verdicts import MOST, Verdicts


@pytest.fixture(scope="module", params=[1, 4])
def server(
    request: pytest.FixtureRequest, runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Of batches of one, where the engine is told of a picture at once, and of larger ones."""
    started = Server(tmp_path_factory.mktemp("server"), max_batch_size=request.param)
    runner.run(started.dispatcher.start())
    yield started
    runner.run(started.dispatcher.stop())


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[Order]:
    """What engines are told, as it happens, but for questions."""
    told: list[Order] = []
    send = EngineProcess.send

    def noted(engine: EngineProcess, order: Order) -> None:
        if not isinstance(order, Check):
            told.append(order)
        send(engine, order)

    monkeypatch.setattr(EngineProcess, "send", noted)
    return told


# -- how a picture gets to it ----------------------------------------------------------


def test_a_picture_goes_to_an_idle_engine_without_a_stay_in_the_queue(server: Server, run: Run) -> None:
    async def scenario() -> None:
        await server.end(await server.submit(num_inference_steps=1))
        await server.rests()
        first, second = await server.submit(num_inference_steps=40), await server.submit(num_inference_steps=1)
        assert (first.status, second.status) == (Status.IN_PROGRESS, Status.QUEUED)
        assert first.started_at == first.created_at
        assert [(await server.end(job)).status for job in (first, second)] == [Status.COMPLETED] * 2
        await server.rests()
        clip = await server.submit(num_inference_steps=1, new={"kind": Kind.VIDEO})
        assert clip.status is Status.QUEUED  # as its client expects
        await server.end(clip)

    run(scenario())


def test_the_engine_gets_ready_for_a_picture_that_none_can_join_and_begins_as_it_is_handed_over(
    server: Server, run: Run, orders: list[Order], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        told_by_then: list[list[type[Order]]] = []
        hand = Scheduler.hand

        def noted(scheduler: Scheduler, job: Job) -> None:
            hand(scheduler, job)
            told_by_then.append([type(order) for order in orders])

        monkeypatch.setattr(Scheduler, "hand", noted)
        for outputs in (1, 3):  # of batches of four, three leave no room for three others
            await server.rests()
            orders.clear()
            await server.end(await server.submit(num_inference_steps=1, num_outputs_per_prompt=outputs))
        at_once = [Prepare, Begin]
        assert told_by_then == ([at_once, at_once] if server.args.max_batch_size == 1 else [[], at_once])

    run(scenario())


def test_what_the_engine_got_ready_for_in_vain_leaves_nothing(
    server: Server, run: Run, orders: list[Order], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeated request is the first one; and the database may take nothing."""

    async def scenario() -> None:
        folders, key = server.folders, uuid.uuid4().hex
        sampling = {"prompt": [PROMPT], "num_inference_steps": 1, "num_outputs_per_prompt": 3}
        first, second, third, fourth = (
            NewJob(id=f"img_{uuid.uuid4().hex}", kind=Kind.IMAGE, sampling=sampling, idempotency_key=name)
            for name in (key, key, None, None)
        )
        await server.rests()
        job, is_new = await server.dispatcher.submit(first)
        ended = await server.end(job)
        await server.rests()
        orders.clear()
        assert await server.dispatcher.submit(second) == (server.store.get(first.id), False) and is_new
        await server.rests()
        with monkeypatch.context() as broken, pytest.raises(StoreUnavailable):
            broken.setattr(server.store, "add", _full)
            await server.dispatcher.submit(third)
        assert [type(order) for order in orders] == [Prepare, Drop] * 2
        await server.rests()
        last, _ = await server.dispatcher.submit(fourth)
        assert server.files(await server.end(last)) == server.files(ended)
        assert not any(folders.unfinished(new.id).exists() for new in (second, third, fourth))

    run(scenario())


def _full(*_: Any, **__: Any) -> Any:
    raise StoreUnavailable("database or disk is full")


@pytest.mark.parametrize("comes_back", [False, True])
def test_an_engine_that_dies_as_it_got_ready_is_not_the_pictures_fault(
    comes_back: bool, server: Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does another engine know of what it got ready for."""

    async def scenario() -> None:
        loop, add, restarts = asyncio.get_running_loop(), server.store.add, server.dispatcher.engine.restarts

        def slowly(*args: Any, **how: Any) -> tuple[Job, bool]:
            asyncio.run_coroutine_threadsafe(server.dies(), loop).result(60)
            if comes_back:
                asyncio.run_coroutine_threadsafe(server.comes_back(), loop).result(60)
            return add(*args, **how)

        await server.rests()
        with monkeypatch.context() as patch:
            patch.setattr(server.store, "add", slowly)
            job = await server.submit(num_inference_steps=1, num_outputs_per_prompt=3)
        ended = await server.end(job)
        assert (job.status, ended.status, ended.crashes) == (Status.IN_PROGRESS, Status.COMPLETED, 0)
        await server.comes_back()
        assert server.dispatcher.engine.restarts == restarts + 1

    run(scenario())


def test_a_picture_whose_client_leaves_as_it_is_claimed_is_drawn_all_the_same(server: Server, run: Run) -> None:
    async def scenario() -> None:
        for waited in range(4):
            await server.rests()
            sampling = {"prompt": [PROMPT], "num_inference_steps": 1}
            new = NewJob(id=f"img_{uuid.uuid4().hex}", kind=Kind.IMAGE, sampling=sampling)
            submitting = asyncio.create_task(server.dispatcher.submit(new))
            for _ in range(1 + waited):
                await asyncio.sleep(0)
            submitting.cancel()
            await asyncio.wait([submitting])
            while (job := server.store.get(new.id)) is None:
                await asyncio.sleep(0.01)
            assert (await server.end(job)).status is Status.COMPLETED

    run(scenario())


def test_what_comes_while_a_handed_picture_is_drawn_is_next(server: Server, run: Run) -> None:
    """Also where it cannot be drawn with it: nobody waits for a look at the queue now and then."""

    async def scenario() -> None:
        for _ in range(3):
            await server.rests()
            first = await server.submit(num_inference_steps=20)
            other = await server.submit(num_inference_steps=1)
            ended = await server.end(first), await server.end(other)
            began, over = ended[1].started_at, ended[0].ended_at
            assert began is not None and over is not None and (began - over).total_seconds() < POLL_S / 2

    run(scenario())


def test_a_picture_that_is_begun_at_once_can_be_cancelled_at_once(server: Server, run: Run) -> None:
    async def scenario() -> None:
        await server.rests()
        job = await server.submit(num_inference_steps=2000)
        await server.dispatcher.cancel(job.id)
        assert (await server.end(job)).status is Status.CANCELLED

    run(scenario())


def test_an_engine_that_dies_as_it_gets_a_picture_is_not_the_pictures_fault(server: Server, run: Run) -> None:
    async def scenario() -> None:
        await server.rests()
        job = await server.submit(num_inference_steps=1)
        server.kill_engine()
        ended = await server.end(job)
        assert (ended.status, ended.crashes) == (Status.COMPLETED, 0)
        await server.comes_back()

    run(scenario())


def test_a_picture_that_comes_as_the_server_stops_goes_into_the_queue(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        server = Server(tmp_path, max_batch_size=1)
        await server.dispatcher.start()
        await server.rests()
        loop, add, (scheduler,) = asyncio.get_running_loop(), server.store.add, server.dispatcher.schedulers

        def as_it_stops(*args: Any, **how: Any) -> tuple[Job, bool]:
            added = add(*args, **how)
            loop.call_soon_threadsafe(scheduler.stop)
            return added

        monkeypatch.setattr(server.store, "add", as_it_stops)
        job = await server.submit(num_inference_steps=1)
        assert job.status is Status.IN_PROGRESS
        await server.dispatcher.stop()
        left = server.store.get(job.id)
        assert left is not None and (left.status, left.crashes) == (Status.QUEUED, 0)
        server.store.close()

    run(scenario())


# -- what is known of a request without it ---------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """What engines are asked about, as it happens."""
    told: list[Mapping[str, Any]] = []
    check = EngineProcess.check

    async def noted(engine: EngineProcess, sampling: Mapping[str, Any]) -> Checked:
        told.append(sampling)
        return await check(engine, sampling)

    monkeypatch.setattr(EngineProcess, "check", noted)
    return told


def test_settings_that_were_asked_about_are_not_asked_about_again(
    server: Server, run: Run, asked: list[Mapping[str, Any]]
) -> None:
    """But where jobs are drawn together: which of them can be changes while they are drawn."""
    each_time = server.args.max_batch_size > 1

    async def scenario() -> None:
        async def questions(*requests: Mapping[str, Any]) -> int:
            asked.clear()
            told = [
                await server.dispatcher.engine.check({"output_file_name": "0.png"} | request) for request in requests
            ]
            engine = server.dispatcher.engine.best
            assert told == [await engine.check(request) for request in requests]
            return len(asked) - len(requests)

        small = {"height": 64, "width": 96, "num_inference_steps": 3}
        first = {"prompt": ["a"], "seed": 1, **small}
        second = {"prompt": ["b"], "seed": 2**62, **small}
        assert await questions(first, second, {"prompt": ["c"], **small}) == (3 if each_time else 1)
        others = [
            {"height": 96}, {"num_outputs_per_prompt": 2}, {"prompt": ["a", "b"]},
            {"prompt": ["a", "b"], "seed": [1, 2]}, {"negative_prompt": "x", "true_cfg_scale": 2.0},
        ]  # fmt: skip
        assert await questions(*(first | other for other in others)) == len(others)

    run(scenario())


def test_what_depends_on_the_prompt_is_asked_about_every_time(server: Server, run: Run) -> None:
    """A JPEG has no room for a long prompt."""

    async def scenario() -> None:
        for prompt, fits in (("short", True), ("x" * 50_000, False), ("short", True), ("x" * 50_000, False)):
            checking = server.dispatcher.engine.check({"prompt": [prompt], "output_file_name": "0.jpg"})
            if fits:
                await checking
            else:
                with pytest.raises(UserError, match="too long to be kept inside a .jpg"):
                    await checking

    run(scenario())


def test_what_is_refused_is_refused_again(server: Server, run: Run) -> None:
    async def scenario() -> None:
        for seed in range(3):
            with pytest.raises(UserError, match="height"):
                await server.dispatcher.engine.check({"prompt": [PROMPT], "height": 65, "seed": seed})

    run(scenario())


def test_another_engine_is_asked_anew(server: Server, run: Run, asked: list[Mapping[str, Any]]) -> None:
    async def scenario() -> None:
        settings = {"prompt": [PROMPT], "num_inference_steps": 7}
        known = await server.dispatcher.engine.check(settings)
        await server.dies()
        with pytest.raises(EngineAway):
            await server.dispatcher.engine.check(settings)
        await server.comes_back()
        asked.clear()
        assert await server.dispatcher.engine.check(settings) == known and len(asked) == 1
        status = server.dispatcher.engine.best.status
        status.state = "failed"  # as it is when nothing more will be drawn
        with pytest.raises(EngineAway):
            await server.dispatcher.engine.check(settings)
        status.state = "ready"

    run(scenario())


def test_verdicts_are_kept_for_the_latest_settings() -> None:
    checked = Checked(64, 64, 1, None, 4, 1, 64.0, None, for_any_prompt=True)
    verdicts = Verdicts()
    for steps in range(MOST):
        verdicts.keep({"num_inference_steps": steps}, replace(checked, steps=steps))
    assert verdicts.find({"num_inference_steps": 0}) == replace(checked, steps=0)
    verdicts.keep({"num_inference_steps": MOST}, checked)
    assert verdicts.find({"num_inference_steps": 1}) is None, "the one that nobody asked for the longest is gone"
    assert all(verdicts.find({"num_inference_steps": steps}) is not None for steps in (0, 2, MOST))
    verdicts.keep({"height": 8}, replace(checked, for_any_prompt=False))
    assert verdicts.find({"height": 8}) is None
