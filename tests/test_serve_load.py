"""Two hundred clients at once: what they are given is theirs, whole, and all of it; what is refused leaves no trace."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import uuid
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import ServerProcess, serving, wait_for
from test_bench import bench

CLIENTS, EACH, PLACES, DISTINCT = 200, 1, 120, 8  # requests of each client; jobs that may wait; different requests
STEPS = 1


class Clients:
    """`jobs`: id of every answer by its idempotency key; `digests`: of every request's pictures."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.http = httpx.AsyncClient(base_url=url, timeout=120, limits=limits)
        self.jobs: dict[str, set[str]] = defaultdict(set)
        self.digests: dict[int, set[str]] = defaultdict(set)
        self.refused = 0

    async def all(self) -> None:
        async with self.http:
            await asyncio.gather(*(self.client(number) for number in range(CLIENTS)))

    async def client(self, number: int) -> None:
        """Some ask twice at the same time, as one does whose first attempt seemed to be lost."""
        rng = random.Random(number)
        for _ in range(EACH):
            which, key = rng.randrange(DISTINCT), uuid.UUID(int=rng.getrandbits(128)).hex
            await asyncio.gather(*(self.ask(which, key, rng.random()) for _ in range(rng.choice((1, 1, 1, 2)))))

    async def ask(self, which: int, key: str, patience: float) -> None:
        body = {"prompt": f"a red circle and {which}", "seed": which, "num_inference_steps": STEPS}
        while True:
            answer = await self.http.post("/v1/images/generations", json=body, headers={"idempotency-key": key})
            if answer.status_code != 429:
                break
            assert answer.json()["error"]["code"] == "queue_full" and int(answer.headers["retry-after"]) > 0
            self.refused += 1
            await asyncio.sleep(0.2 + patience)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert answer.headers["x-job-id"] == found["id"]
        self.jobs[key].add(found["id"])
        self.digests[which].add(hashlib.sha256(found["data"][0]["b64_json"].encode()).hexdigest())


def test_two_hundred_clients_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, ["--max-queue-size", str(PLACES), "--max-batch-size", "8"]) as server:
        clients = Clients(server.url)
        asyncio.run(clients.all())
        ids = reconciled(server, clients)
        for path in (tmp_path / "results").iterdir():
            report = json.loads((path / "report.json").read_text())
            assert report["request_id"] == path.name and len(report["outputs"]) == 1
    assert clients.refused > 0, "the queue was never full"
    assert len(ids) == CLIENTS * EACH
    assert all(len(found) == 1 for found in clients.digests.values()), "equal requests had different pictures"
    assert len(clients.digests) == len({next(iter(found)) for found in clients.digests.values()}) == DISTINCT
    assert not any("Traceback" in line or " ERROR " in line for line in server.lines), "\n".join(server.lines[-50:])


def reconciled(server: ServerProcess, clients: Clients) -> set[str]:
    """The ids that clients were given are those of the completed jobs and of the files, one for each key."""
    assert all(len(ids) == 1 for ids in clients.jobs.values()), "a repeated request was drawn twice"
    ids = {next(iter(ids)) for ids in clients.jobs.values()}
    assert len(ids) == len(clients.jobs), "two requests were given one job"
    told = server.get("/server_info")
    others = {"queued": 0, "in_progress": 0, "failed": 0, "cancelled": 0}
    assert told["jobs"] == {"completed": len(ids)} | others and told["engine"]["restarts"] == 0
    # the folder that a batch was drawn into goes after its jobs are told
    wait_for(lambda: {path.name for path in (server.data_dir / "results").iterdir()} == ids)
    assert not list((server.data_dir / "snapshots").iterdir()) and not list((server.data_dir / "inputs").iterdir())
    return ids


# -- sglang bench serve ----------------------------------------------------------------


def test_figures_of_a_load_are_whole(tmp_path: Path) -> None:
    report, plot = tmp_path / "s.json", tmp_path / "s.svg"
    files = ("--output-file", str(report), "--plot", str(plot))
    small = ("--steps", "1", "--distinct", "2", "--warmup-requests", "1", "--num-prompts", "6", "--slo-ms", "60000")
    loads = ("--request-rate", "20", "--max-concurrency", "1", "3")
    code, out, err = bench("serve", *small, *loads, *files, "--", "--max-batch-size", "2")
    assert code == 0, out + err
    found: dict[str, Any] = json.loads(report.read_text())
    assert [load["shape"] for load in found["loads"]] == ["20 a second", "1 at a time", "3 at a time"]
    for load in found["loads"]:
        assert (load["completed"], load["failed"], load["refused"], load["slo_share"]) == (6, 0, 0, 1.0)
        assert load["per_second"] == pytest.approx(6 / load["seconds"])
        shares = [load["latency_ms"][name] for name in ("p50", "p90", "p95", "p99", "max")]
        assert shares == sorted(shares) and 0 < shares[-1] <= load["seconds"] * 1000
    assert found["serve_args"]["max_batch_size"] == 2 and found["versions"]["torch"]
    assert "overhead" not in out and plot.read_text().count("<rect") == 4 + 3 * 4


def test_what_a_server_adds_is_told_beside_its_engine(tmp_path: Path) -> None:
    report = tmp_path / "s.json"
    small = ("--steps", "1", "--distinct", "2", "--warmup-requests", "1", "--num-prompts", "4")
    code, out, err = bench("serve", "--overhead", *small, "--output-file", str(report))
    assert code == 0, out + err
    found = json.loads(report.read_text())["overhead"]
    assert 0 < found["added_ms"]["p50"] < found["latency_ms"]["p50"] and found["bare_ms"]["p50"] > 0
    assert found["latency_ms"]["mean"] == pytest.approx(
        sum(found[part]["mean"] for part in ("engine_ms", "beside_ms", "added_ms"))
    )
    assert set(found["get_ms"]) >= {"/health", "/v1/models", "/v1/images/{id}/content", "all"}


def test_clips_are_waited_for(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    report = tmp_path / "s.json"
    small = ("--steps", "2", "--frames", "5", "--height", "32", "--width", "48", "--num-prompts", "3")
    code, out, err = bench(
        "serve", "--model-path", str(tiny("wan")), *small, "--max-concurrency", "2", "--output-file", str(report)
    )
    assert code == 0, out + err
    (load,) = json.loads(report.read_text())["loads"]
    assert (load["completed"], load["failed"], load["refused"]) == (3, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "one of --request-rate, --max-concurrency, --overhead is needed"),
        (("--overhead", "--base-url", "http://x"), "overhead: is measured beside a server of its own"),
        (("--request-rate", "0"), "request_rate=0.0: must be at least 0.001"),
        (("--max-concurrency", "1", "--plot", "x.png"), "plot=x.png: expected a name ending in .svg"),
        (("--max-concurrency", "1", "--output-file", "none/x"), "output_file=none/x: the folder none does not exist"),
        (("--max-concurrency", "1", "--base-url", "http://127.0.0.1:9"), "nobody answers there"),
        (("--max-concurrency", "1", "--base-url", "http://x", "--", "--port", "1"), "leave yours away"),
    ],
)
def test_a_mistake_is_named(arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sgl_diffusion.cli.main import main

    assert main(["bench", "serve", *arguments]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
