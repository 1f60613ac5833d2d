"""What a server adds to its engine: time of a request beside the drawing, and answers while the engine is busy."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from itertools import cycle
from typing import Any

import httpx
import torch

from sgl_diffusion.bench.traffic import Amount, Target, closed_loop, pictures_of, spread
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import RunFailure
from sgl_diffusion.runtime.option import parse

BUSY_CLIENTS = 4  # so that the engine always has a next one
BETWEEN_GETS_S = 0.01
AT_REST_S = 0.02  # after an engine's work its threads still spin a little, on cores that the other needs


@dataclass(frozen=True)
class Overhead:
    """Milliseconds of the same requests, one at a time: mean, percentiles, maximum.

    Attributes:
        latency_ms: through the server, as a client sees it.
        engine_ms: of that, what the engine reports of itself.
        bare_ms: drawn by an engine in this process, by turns with the server's.
        beside_ms: of that, what such an engine does not report: it hands out the result, and its report.
        added_ms: latency without what the engine reports, and without what it takes beside that, request by request.
        get_ms: path -> of answers to GET while the engine is busy.
    """

    latency_ms: dict[str, float]
    engine_ms: dict[str, float]
    bare_ms: dict[str, float]
    beside_ms: dict[str, float]
    added_ms: dict[str, float]
    get_ms: dict[str, dict[str, float]]


async def measure(target: Target, model: Mapping[str, Any], requests: int, warmup: int) -> Overhead:
    """Asks the server and an engine of the same model by turns, then the server alone while it is busy.

    Args:
        model: fields of `ServerArgs`.
    Raises:
        RunFailure: a request failed.
    """
    engine = Engine.load(parse(ServerArgs, model))
    latency, inside, bare, beside = [], [], [], []
    with (
        tempfile.TemporaryDirectory(prefix="sglang-bench-") as folder,
        closing(_plain_client(target.client)) as client,
    ):
        for index in range(warmup + requests):
            took, report = _through_server(client, target, index)
            alone, told = _by_engine(engine, target.bodies[index % len(target.bodies)], f"{folder}/{index}")
            if index >= warmup:
                latency.append(took)
                inside.append(report["total_duration_ms"])
                bare.append(alone)
                beside.append(alone - told)
    return Overhead(
        latency_ms=spread(latency),
        engine_ms=spread(inside),
        bare_ms=spread(bare),
        beside_ms=spread(beside),
        added_ms=spread([a - b - c for a, b, c in zip(latency, inside, beside, strict=True)]),
        get_ms=await _gets_while_busy(target, requests),
    )


def _plain_client(like: httpx.AsyncClient) -> HTTPConnection:
    """The plainest of clients: what it takes itself is counted too."""
    return HTTPConnection(like.base_url.host, like.base_url.port)


def _through_server(client: HTTPConnection, target: Target, index: int) -> tuple[float, Mapping[str, Any]]:
    """Milliseconds until the picture is there, and the engine's report of it."""
    time.sleep(AT_REST_S)
    body = json.dumps(target.bodies[index % len(target.bodies)])
    answer, took = _ask(client, target.client, "POST", "/v1/images/generations", body)
    told = json.loads(answer)
    target.check(index, told["id"], pictures_of(told))
    report, _ = _ask(client, target.client, "GET", f"/v1/images/{told['id']}/report")
    return took, json.loads(report)


def _by_engine(engine: Engine, body: Mapping[str, Any], folder: str) -> tuple[float, float]:
    """Milliseconds until the picture is a file, and those that the engine reports."""
    asked = {name: value for name, value in body.items() if name in SamplingParams.model_fields}
    params = parse(SamplingParams, {**asked, "output_path": folder, "output_file_name": "0.png"})
    started = time.perf_counter()
    report = engine.run(params).report
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    return (time.perf_counter() - started) * 1000, report.total_duration_ms


async def _gets_while_busy(target: Target, requests: int) -> dict[str, dict[str, float]]:
    """Latencies of GET, one after the other, while clients keep the engine drawing."""
    job, over = next(iter(target.jobs)), threading.Event()
    paths = ["/health", "/v1/models", "/server_info", "/v1/videos", f"/v1/images/{job}/content"]
    asking = asyncio.create_task(asyncio.to_thread(_get_in_turn, target.client, paths, over))
    try:
        await closed_loop(target.request, BUSY_CLIENTS, Amount(requests))
    finally:
        over.set()
    found = await asking
    told = {path.replace(job, "{id}"): spread(values) for path, values in found.items()}
    return told | {"all": spread([value for values in found.values() for value in values])}


def _get_in_turn(like: httpx.AsyncClient, paths: Sequence[str], over: threading.Event) -> dict[str, list[float]]:
    """In a thread, until it is over: milliseconds by path."""
    found: dict[str, list[float]] = {path: [] for path in paths}
    with closing(_plain_client(like)) as client:
        for path in cycle(paths):
            if over.wait(BETWEEN_GETS_S):
                return found
            found[path].append(_ask(client, like, "GET", path)[1])
    raise AssertionError("a cycle has no end")


def _ask(
    client: HTTPConnection, like: httpx.AsyncClient, method: str, path: str, body: str = ""
) -> tuple[bytes, float]:
    """The answer, and the milliseconds from the request's being sent until it is there.

    Raises:
        RunFailure: the answer is not 200.
    """
    client.putrequest(method, path)
    if "authorization" in like.headers:
        client.putheader("authorization", like.headers["authorization"])
    client.putheader("content-type", "application/json")
    client.putheader("content-length", str(len(body.encode())))
    started = time.perf_counter()
    client.endheaders(body.encode())
    answer = client.getresponse()
    told = answer.read()
    took = (time.perf_counter() - started) * 1000
    if answer.status != httpx.codes.OK:
        raise RunFailure(f"{method} {path} was answered with {answer.status}: {told[:200].decode(errors='replace')}")
    return told, took
