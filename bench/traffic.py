"""Load on a server: requests sent by a plan of arrivals, and what became of each.

Open loop: requests come when they come (a Poisson process), however many wait already; a latency counts from the moment
the request was due. Closed loop: each of so many clients sends its next request when the last one is answered.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import httpx
import numpy as np

from sgl_diffusion.runtime.errors import RunFailure

REFUSALS = (429, 503)  # the server says when to come again
PERCENTILES = {"p50": 50, "p90": 90, "p95": 95, "p99": 99}

Outcome = Literal["completed", "failed", "refused"]


@dataclass(frozen=True)
class Answer:
    """One request: `job` and `digest` (of the results' bytes) where it was completed, else why not."""

    outcome: Outcome
    latency_ms: float
    job: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Load:
    """What a load came to.

    Attributes:
        shape: of the load, in words.
        seconds: from the first request to the last answer.
        per_second: completed requests.
        latency_ms: of the completed ones.
        slo_share: of all that were sent, those completed within the objective; None without one.
    """

    shape: str
    completed: int
    failed: int
    refused: int
    seconds: float
    per_second: float
    latency_ms: dict[str, float]
    slo_share: float | None
    errors: dict[str, int]


@dataclass(frozen=True)
class Amount:
    """How many requests a load has: so many, or those of so many seconds."""

    requests: int | None = None
    seconds: float | None = None

    def is_done(self, sent: int, elapsed_s: float) -> bool:
        if self.seconds is not None:
            return elapsed_s >= self.seconds
        return sent >= (self.requests or 0)


@dataclass
class Target:
    """A server, and what it is asked: request i is `bodies[i % len(bodies)]`.

    Attributes:
        draws_video: clips, which take a request to begin and a stream of events to wait for.
        digests: of the results of every body; equal requests have equal results.
        jobs: ids of all completed ones.
    """

    client: httpx.AsyncClient
    bodies: Sequence[Mapping[str, Any]]
    draws_video: bool
    digests: dict[int, str] = field(default_factory=dict)
    jobs: set[str] = field(default_factory=set)

    async def request(self, index: int, due: float) -> Answer:
        """Sends a request and waits for its results; `due` is when it should have been sent.

        Raises:
            RunFailure: the results are not those that an equal request had, or are another job's.
        """
        which = index % len(self.bodies)
        try:
            job, results = await (self._clip if self.draws_video else self._pictures)(self.bodies[which])
        except httpx.HTTPStatusError as e:
            outcome: Outcome = "refused" if e.response.status_code in REFUSALS else "failed"
            return Answer(outcome, _since(due), error=_told(e.response))
        except (httpx.TransportError, _NotDrawn) as e:
            return Answer("failed", _since(due), error=str(e) or type(e).__name__)
        latency_ms = _since(due)
        self.check(index, job, results)
        return Answer("completed", latency_ms, job)

    def check(self, index: int, job: str, results: bytes) -> None:
        """What a request was answered with. Raises RunFailure as `request`."""
        which = index % len(self.bodies)
        if job in self.jobs:
            raise RunFailure(f"{job} was given to two requests")
        self.jobs.add(job)
        digest = hashlib.sha256(results).hexdigest()
        if self.digests.setdefault(which, digest) != digest:
            raise RunFailure(f"{job} has other bytes than the same request had before: {dict(self.bodies[which])}")

    async def _pictures(self, body: Mapping[str, Any]) -> tuple[str, bytes]:
        answer = (await self.client.post("/v1/images/generations", json=body)).raise_for_status().json()
        return answer["id"], pictures_of(answer)

    async def _clip(self, body: Mapping[str, Any]) -> tuple[str, bytes]:
        job = (await self.client.post("/v1/videos", json=body)).raise_for_status().json()["id"]
        told: dict[str, Any] = {}
        async with self.client.stream("GET", f"/v1/videos/{job}/events") as events:
            async for line in events.raise_for_status().aiter_lines():
                if line.startswith("data:"):
                    told = json.loads(line[5:])
        if told.get("status") != "completed":
            raise _NotDrawn((told.get("error") or {}).get("message", "the events ended before the clip was drawn"))
        return job, (await self.client.get(f"/v1/videos/{job}/content")).raise_for_status().content


def pictures_of(answer: Mapping[str, Any]) -> bytes:
    """What was drawn, of an answer to a request for `b64_json`."""
    return "".join(picture["b64_json"] for picture in answer["data"]).encode()


class _NotDrawn(Exception):
    """A clip was accepted, and did not come."""


def _since(due: float) -> float:
    return (time.perf_counter() - due) * 1000


def _told(answer: httpx.Response) -> str:
    """The status and the server's word for it."""
    try:
        code = answer.json()["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = None
    return f"{answer.status_code} {code or answer.reason_phrase}"


# -- arrivals --------------------------------------------------------------------------

Send = Callable[[int, float], Awaitable[Answer]]


async def open_loop(send: Send, rate: float, amount: Amount, seed: int) -> list[Answer]:
    """`rate` requests a second on average, at random moments."""
    rng, started, due = random.Random(seed), time.perf_counter(), 0.0
    async with asyncio.TaskGroup() as group:
        tasks = []
        for index in count():
            due += rng.expovariate(rate)
            if amount.is_done(index, due):
                break
            await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
            tasks.append(group.create_task(_sent(send, index, started + due)))
    return [task.result() for task in tasks]


async def closed_loop(send: Send, clients: int, amount: Amount) -> list[Answer]:
    """`clients` requests at a time."""
    answers: list[Answer] = []
    started, indices = time.perf_counter(), count()

    async def client() -> None:
        while not amount.is_done(index := next(indices), time.perf_counter() - started):
            answers.append(await send(index, time.perf_counter()))

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return answers


async def _sent(send: Send, index: int, due: float) -> Answer:
    return await send(index, due)


# -- figures ---------------------------------------------------------------------------


def summary(shape: str, answers: Sequence[Answer], seconds: float, slo_ms: float | None) -> Load:
    done = [answer.latency_ms for answer in answers if answer.outcome == "completed"]
    outcomes = Counter(answer.outcome for answer in answers)
    in_time = sum(latency <= slo_ms for latency in done) if slo_ms is not None else 0
    return Load(
        shape=shape,
        completed=outcomes["completed"],
        failed=outcomes["failed"],
        refused=outcomes["refused"],
        seconds=seconds,
        per_second=len(done) / seconds,
        latency_ms=spread(done),
        slo_share=None if slo_ms is None else in_time / max(1, len(answers)),
        errors=dict(Counter(answer.error for answer in answers if answer.error is not None)),
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles and maximum; nothing of nothing."""
    if not values:
        return {}
    found = {name: float(np.percentile(values, share)) for name, share in PERCENTILES.items()}
    return {"mean": float(np.mean(values)), **found, "max": max(values)}
