"""Deaths at any moment, full disks, folders that cannot be written: nothing that was accepted is lost, or changed.

SGLANG_CHAOS_ROUNDS=20 makes more rounds of deaths; each is another seed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server_process import ServerProcess, serving, start_server, wait_for

ROUNDS = int(os.environ.get("SGLANG_CHAOS_ROUNDS", "2"))
FLAGS = ("--snapshot-every", "5", "--max-batch-size", "2")
STEPS = 30
REQUESTS = [{"prompt": f"a circle and {i} squares", "seed": i, "num_inference_steps": STEPS} for i in range(4)]
SOME_MIB = 3 * 2**20


class Servers:
    """One server after the other in the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = start_server(folder, *FLAGS)

    def accepted(self, request: dict[str, Any], key: str) -> str:
        """The job of a request whose client leaves as soon as it knows that it has one."""
        headers, deadline = {"idempotency-key": key}, time.monotonic() + 60
        while True:
            with httpx.stream(
                "POST",
                f"{self.now.api}/images/generations",
                json=request | {"stream": True},
                headers=headers,
                timeout=60,
            ) as answer:
                if answer.status_code == 200:
                    return answer.headers["x-job-id"]
                assert answer.status_code == 503 and time.monotonic() < deadline, answer.read()
            time.sleep(0.1)

    def kill_engine(self) -> str:
        """Returns what happened. While there is no engine, nothing does."""
        found = psutil.Process(self.now.process.pid).children()
        for process in found:
            process.kill()
        return f"killed {len(found)} engine(s)"

    def kill_server(self) -> str:
        self.now.kill()
        self.now = start_server(self.folder, *FLAGS)
        return "killed the server"

    def all_ended(self) -> bool:
        jobs = self.now.get("/server_info")["jobs"]
        return jobs["queued"] + jobs["in_progress"] == 0

    def files(self, ids: list[str]) -> list[str]:
        """Digests of what the jobs have drawn."""
        found = [httpx.get(f"{self.now.api}/images/{id}/content", timeout=60) for id in ids]
        assert [answer.status_code for answer in found] == [200] * len(ids), [answer.text[:200] for answer in found]
        return [hashlib.sha256(answer.content).hexdigest() for answer in found]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("chaos"))
    yield servers
    servers.now.stop()


@pytest.fixture(scope="module")
def undisturbed(servers: Servers) -> list[str]:
    ids = [servers.accepted(request, f"undisturbed-{i}") for i, request in enumerate(REQUESTS)]
    wait_for(servers.all_ended)
    return servers.files(ids)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_whatever_dies_all_accepted_jobs_are_drawn(servers: Servers, undisturbed: list[str], seed: int) -> None:
    """A job is drawn once more after a death of the engine, not twice: one such death a round. Of the server: any."""
    rng = random.Random(seed)
    deaths = [servers.kill_engine, *[servers.kill_server] * rng.choice((1, 1, 2))]
    rng.shuffle(deaths)
    order = rng.sample(range(len(REQUESTS)), len(REQUESTS))
    ids, happened = {}, []
    for i in order:
        ids[i] = servers.accepted(REQUESTS[i], f"{seed}-{i}")
        if deaths and rng.random() < 0.4:
            time.sleep(rng.uniform(0, 0.5))
            happened.append((len(ids), deaths.pop()()))
    while deaths:
        time.sleep(rng.uniform(0, 1.0))
        happened.append((len(ids), deaths.pop()()))
    wait_for(servers.all_ended)
    resumed = [servers.now.get(f"/v1/images/{id}/report")["effective"]["resumed_after_step"] for id in ids.values()]
    print(f"round {seed}: (jobs accepted, then) {happened}; went on from steps {resumed}")
    assert servers.files([ids[i] for i in range(len(REQUESTS))]) == undisturbed
    assert servers.accepted(REQUESTS[0], f"{seed}-0") == ids[0]  # a client that asks again
    assert not [*servers.folder.glob("snapshots/img_*"), *servers.folder.glob("results/.img_*")]


def test_files_that_may_not_grow(servers: Servers) -> None:
    """A full disk, where none can be mounted: the system refuses the engine every write to a file."""
    server, before = servers.now, servers.now.get("/server_info")["engine"]
    (engine,) = psutil.Process(server.process.pid).children()
    assert draw(server)[0] == 200
    most = resource.prlimit(engine.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(engine.pid, resource.RLIMIT_FSIZE, (0, most[1]))
    assert_not_stored(*draw(server))
    resource.prlimit(engine.pid, resource.RLIMIT_FSIZE, most)
    assert draw(server)[0] == 200
    assert server.get("/server_info")["engine"] == before


# -- no room ---------------------------------------------------------------------------


class Disk:
    """A folder of a few MiB that can be full, and that can be written or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    @contextmanager
    def full(self) -> Iterator[None]:
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 512)
        try:
            yield
        finally:
            self._ballast.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        subprocess.run(["mount", "-o", "remount,ro", self.folder], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", self.folder], check=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """Skips the test where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SOME_MIB}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def draw(server: ServerProcess, **fields: Any) -> tuple[int, Any]:
    status, found, _ = server.call(
        "POST", "/v1/images/generations", {"prompt": "a cat", "num_inference_steps": 1} | fields
    )
    return status, found


def assert_not_stored(status: int, found: Any) -> None:
    """Said without the paths of the server."""
    assert status == 500 and found["error"]["code"] == "storage_unavailable", found
    told = found["error"]["message"]
    assert told.startswith("the results cannot be stored") and "/results/" not in told, told


def assert_it_lives(server: ServerProcess) -> None:
    """And draws, and has said nothing that its owner cannot read."""
    status, found = draw(server)
    assert status == 200, found
    assert server.get("/server_info")["engine"]["restarts"] == 0
    assert not any("Traceback" in line for line in server.lines), "\n".join(server.lines)


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Disk, Disk]]:
    """A server with small disks for everything, and for the results."""
    root = tmp_path_factory.mktemp("cramped")
    with small_disk(root) as disk:
        (root / "results").mkdir()
        with small_disk(root / "results") as results, serving(root) as server:
            yield server, disk, results


@pytest.mark.parametrize("how", ["full", "read_only"])
def test_without_a_place_for_results_a_job_fails_readably(cramped: tuple[ServerProcess, Disk, Disk], how: str) -> None:
    server, _, results = cramped
    with getattr(results, how)():
        assert_not_stored(*draw(server))
        assert server.call("GET", "/ready")[0] == 200
    assert_it_lives(server)


def test_a_full_disk_refuses_what_it_could_not_keep(cramped: tuple[ServerProcess, Disk, Disk]) -> None:
    """A job that cannot be written down is not accepted; one that is accepted already is not lost."""
    server, disk, _ = cramped
    with httpx.stream(
        "POST", f"{server.api}/images/generations",
        json={"prompt": "a cat", "num_inference_steps": 60, "stream": True}, headers={"idempotency-key": "x"},
    ) as answer:  # fmt: skip
        accepted = answer.headers["x-job-id"]
    with disk.full():
        found = [draw(server, prompt="a cat" * 500) for _ in range(3)]
        assert {status for status, _ in found} == {503}, found
        assert {answer["error"]["code"] for _, answer in found} == {"store_unavailable"}
        assert server.call("GET", "/health")[0] == 200
        time.sleep(1.5)  # the engine finishes meanwhile, and there is no room for saying so
    wait_for(lambda: server.call("GET", f"/v1/images/{accepted}/content")[0] == 200)
    assert_it_lives(server)
