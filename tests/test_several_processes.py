"""Several processes as users start them: `sglang` alone, torchrun, two hosts; and what becomes of one that dies."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from forks import SGLANG, sglang
from PIL import Image
from server_process import serving, wait_for

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
REQUEST = ("--prompt", "a red circle", "--device", "cpu", "--num-inference-steps", "4", "--output-file-name", "a.png")
FOREVER = ("--prompt", "a red circle", "--device", "cpu", "--num-inference-steps", "3000", "--log-level", "warning")
U2, U2R2 = ("--num-gpus", "2", "--ulysses-degree", "2"), ("--num-gpus", "4", "--ulysses-degree=2", "--ring-degree=2")
LEAST_PSNR = 50.0  # of 8-bit pixels: fewer than one in a hundred differ by one


def start(*command: str | Path, cwd: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*command: str | Path, cwd: Path) -> tuple[int, str, str]:
    process = start(*command, cwd=cwd)
    out, error = process.communicate(timeout=280)
    return process.returncode, out, error


def pixels(folder: Path) -> np.ndarray[Any, Any]:
    (path,) = folder.glob("**/a.png")
    return np.asarray(Image.open(path)).astype(float)


def psnr(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    error = float(((a - b) ** 2).mean())
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray[Any, Any]:
    """The picture of one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = sglang("generate", *REQUEST, cwd=folder, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return pixels(folder)


def assert_drawn(folder: Path, alone: np.ndarray[Any, Any], what: str) -> None:
    found = psnr(pixels(folder), alone)
    print(f"{what}: PSNR {found:.1f} dB")
    assert found >= LEAST_PSNR


# -- who starts them -----------------------------------------------------------------


@pytest.mark.parametrize("layout", [U2, U2R2], ids=["ulysses 2", "ulysses 2 x ring 2"])
def test_sglang_starts_the_ranks(layout: tuple[str, ...], tmp_path: Path, alone: np.ndarray[Any, Any]) -> None:
    dump = ("--perf-dump-path", "report.json")
    code, out, error = run(SGLANG, "generate", *REQUEST, *layout, *dump, cwd=tmp_path)
    assert code == 0, error
    assert out.count("saved ") == 1 and "Traceback" not in error
    assert_drawn(tmp_path, alone, " ".join(layout))
    parallel = json.loads((tmp_path / "report.json").read_text())["effective"]["parallel"]
    assert parallel["ulysses"] == 2 and parallel["ranks"] == int(layout[1])
    assert parallel["sent"]["ulysses"]["all_to_all"]["bytes"] > 0


def test_torchrun_starts_the_ranks(tmp_path: Path, alone: np.ndarray[Any, Any]) -> None:
    """And says how many there are."""
    launcher = (TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "sgl_diffusion")
    code, out, error = run(*launcher, "generate", *REQUEST, "--ring-degree", "2", cwd=tmp_path)
    assert code == 0, error
    assert out.count("saved ") == 1
    assert_drawn(tmp_path, alone, "torchrun, ring 2")


def within(name: str) -> list[str]:
    return ["ip", "netns", "exec", name]


@pytest.fixture
def hosts() -> Iterator[tuple[list[str], list[str], str]]:
    """How to run something on each of two hosts, and the first one's address: network namespaces with a wire between
    them where the tests may make such, else this host twice.
    """
    names = [f"sgl{os.getpid()}{i}" for i in (0, 1)]
    wires = [f"w{os.getpid()}{i}" for i in (0, 1)]
    commands = [
        *(["ip", "netns", "add", name] for name in names),
        ["ip", "link", "add", wires[0], "type", "veth", "peer", "name", wires[1]],
        *(["ip", "link", "set", wires[i], "netns", names[i]] for i in (0, 1)),
        *(
            [*within(names[i]), "ip", "addr", "add", f"10.77.7.{i + 1}/24", "dev", wires[i]] for i in (0, 1)
        ),
        *([*within(names[i]), "ip", "link", "set", wires[i], "up"] for i in (0, 1)),
        *([*within(name), "ip", "link", "set", "lo", "up"] for name in names),
    ]  # fmt: skip
    try:
        done = [subprocess.run(command, capture_output=True).returncode == 0 for command in commands]
    except FileNotFoundError:
        done = [False]
    if all(done):
        yield within(names[0]), within(names[1]), "10.77.7.1"
    else:
        yield [], [], "127.0.0.1"
    for name in names if any(done) else ():
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def free_port() -> int:
    with socket.create_server(("", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_two_hosts_draw_together(
    tmp_path: Path, hosts: tuple[list[str], list[str], str], alone: np.ndarray[Any, Any]
) -> None:
    *where, address = hosts
    asked = (
        "--nnodes",
        "2",
        "--dist-init-addr",
        f"{address}:{free_port()}",
        "--ulysses-degree",
        "2",
        "--num-gpus",
        "2",
    )
    folders = [tmp_path / "first", tmp_path / "second"]
    processes = []
    for rank, (host, folder) in enumerate(zip(where, folders, strict=True)):
        folder.mkdir()
        processes.append(start(*host, SGLANG, "generate", *REQUEST, *asked, "--node-rank", str(rank), cwd=folder))
    told = [process.communicate(timeout=280) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert_drawn(folders[0], alone, f"two hosts ({'network namespaces' if where[0] else 'one host, twice'})")
    assert not list(folders[1].iterdir())


@pytest.mark.parametrize("node_rank", ["0", "1"])
def test_hosts_that_do_not_meet_are_told_so(node_rank: str, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    asked = ("--nnodes", "2", "--node-rank", node_rank, "--dist-init-addr", address, "--dist-timeout", "2")
    code, out, error = run(SGLANG, "generate", *REQUEST, *U2, *asked, cwd=tmp_path)
    assert code == 1 and not out and not list(tmp_path.iterdir())
    assert error.startswith(f"failed: dist_init_addr={address}: the hosts do not meet there: "), error
    assert error.count("\n") == 1


# -- what cannot be ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--num-gpus 4 --ulysses-degree 3", "num_gpus=4: sp 4 = ulysses x ring, but ulysses 3 x ring 1 = 3"),
        ("--num-gpus 3 --tp-size 2", "num_gpus=3: must be a multiple of dp 1 x cfg 1 x tp 2 = 2"),
        ("--num-gpus 4 --ulysses-degree 2 --ring-degree 2 --tp-size 2", "num_gpus=4: dp 1 x cfg 1 x tp 2 = 2, x sp 4"),
        ("--num-gpus 3 --nnodes 2", "nnodes=2: must divide num_gpus"),
        ("--ulysses-degree 2 --nnodes 2", "nnodes=2: needs dist_init_addr=HOST:PORT"),
        ("--vae-sp", "vae_sp=true: no effect without several ranks"),
        ("--node-rank 1", "node_rank=1: must be below nnodes=1"),
        ("--dist-timeout 5", "dist_timeout=5.0: no effect without several ranks"),
    ],
)
def test_impossible_layouts_are_refused_with_the_arithmetic(words: str, told: str, tmp_path: Path) -> None:
    done = sglang("generate", *REQUEST, *words.split(), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {told}"), done.stderr
    assert done.stderr.count("\n") == 1 and not done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("node_rank", ["0", "1"])
def test_replicas_of_a_server_are_on_one_host(node_rank: str, tmp_path: Path) -> None:
    where = ("--nnodes", "2", "--node-rank", node_rank, "--dist-init-addr", "127.0.0.1:1", "--port", "0")
    done = sglang("serve", "--num-gpus", "2", "--dp-size", "2", *where, "--data-dir", "data", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == (
        "error: dp_size=2: replicas are on one host, and nnodes=2; servers on several may share a --database-url\n"
    )


def test_what_only_the_model_can_tell_is_one_line_too(tmp_path: Path) -> None:
    """Found by every rank, told once."""
    code, out, error = run(SGLANG, "generate", *REQUEST, "--num-gpus", "2", "--dp-size", "2", cwd=tmp_path)
    assert code == 2 and "error: dp_size=2: " in error and error.count("error: ") == 1, error
    assert "Traceback" not in error and not out and not list(tmp_path.glob("**/*.png"))


# -- a rank that fails ---------------------------------------------------------------


def ranks_of(launcher: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    """Those that draw, by rank."""
    wait_for(lambda: list(folder.glob("outputs/.*")) or list(folder.glob("outputs")), timeout=120)
    time.sleep(2)
    return sorted(psutil.Process(launcher.pid).children(), key=lambda p: int(p.environ()["RANK"]))


@pytest.mark.parametrize(
    ("signum", "within_s", "told"),
    [
        (signal.SIGKILL, 15, r"rank 1 was killed by SIGKILL"),
        (signal.SIGSTOP, 60, r"did not answer within dist_timeout"),  # 30 s of these the agent waits for it to end
    ],
    ids=["killed", "asleep"],
)
def test_a_rank_that_is_lost_ends_the_job(signum: int, within_s: float, told: str, tmp_path: Path) -> None:
    launcher = start(SGLANG, "generate", *FOREVER, *U2, "--dist-timeout", "5", cwd=tmp_path)
    ranks = ranks_of(launcher, tmp_path)
    os.kill(ranks[1].pid, signum)
    began = time.monotonic()
    _, error = launcher.communicate(timeout=120)
    assert time.monotonic() - began < within_s
    assert launcher.returncode == 1
    (line,) = (line for line in error.splitlines() if line.startswith("failed: "))
    assert re.search(told, line), error
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert not list(tmp_path.glob("**/*.png"))


def test_ranks_die_with_what_started_them(tmp_path: Path) -> None:
    launcher = start(SGLANG, "generate", *FOREVER, *U2, cwd=tmp_path)
    ranks = ranks_of(launcher, tmp_path)
    launcher.kill()
    launcher.communicate()
    wait_for(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks), timeout=15)


def test_a_server_outlives_a_killed_rank(tmp_path: Path) -> None:
    """And draws the request that the rank died of, once more."""
    with serving(tmp_path, [*U2, "--device", "cpu"]) as server:
        body = {"prompt": "a red circle", "size": "64x64", "seed": 1, "num_inference_steps": 300}
        answer: list[Any] = []
        client = threading.Thread(target=lambda: answer.append(server.call("POST", "/v1/images/generations", body)))
        client.start()
        wait_for(lambda: server.get("/server_info")["jobs"]["in_progress"] == 1)
        (launcher,) = psutil.Process(server.process.pid).children()
        victim = next(p for p in launcher.children() if p.environ()["RANK"] == "1")
        victim.kill()
        client.join(timeout=110)
        assert answer and answer[0][0] == 200, answer
        info = server.get("/server_info")
        assert info["engine"]["restarts"] == 1 and (info["jobs"]["completed"], info["jobs"]["failed"]) == (1, 0)
        assert not any("Traceback" in line for line in server.lines), server.lines


def test_a_server_on_two_hosts_outlives_a_killed_rank(tmp_path: Path, alone: np.ndarray[Any, Any]) -> None:
    """Of the host that has no connections: both start their ranks again, and the request is drawn once more."""
    hosts = ("--device", "cpu", *U2, "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}")
    follower = start(SGLANG, "serve", *hosts, "--node-rank", "1", "--data-dir", "second", cwd=tmp_path)
    try:
        with serving(tmp_path / "first", hosts) as server:
            body = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 42}
            answers: list[Any] = []

            def ask(**more: Any) -> None:
                answers.append(server.call("POST", "/v1/images/generations", body | more))

            client = threading.Thread(target=ask, kwargs={"size": "64x64", "num_inference_steps": 200})
            client.start()
            wait_for(lambda: server.get("/server_info")["jobs"]["in_progress"] == 1)
            (victim,) = psutil.Process(follower.pid).children()
            victim.kill()
            client.join(timeout=110)
            ask()
            assert [status for status, *_ in answers] == [200, 200], answers
            info = server.get("/server_info")
            assert info["engine"]["restarts"] == 1 and (info["jobs"]["completed"], info["jobs"]["failed"]) == (2, 0)
            drawn = np.asarray(Image.open(BytesIO(base64.b64decode(answers[1][1]["data"][0]["b64_json"]))))
        assert psnr(drawn.astype(float), alone) >= LEAST_PSNR
        follower.terminate()
        out, error = follower.communicate(timeout=30)
    finally:
        follower.kill()
        follower.communicate()
    assert follower.returncode == 0 and not out and not (tmp_path / "second").exists()
    assert "the ranks of this host ended: rank 1 was killed by SIGKILL; they are started again in 2 s" in error
    assert "node_rank=1: of effect on the first host alone: data_dir\n" in error
    assert "Traceback" not in error


def test_replicas_take_requests_from_one_queue(tmp_path: Path) -> None:
    """Each draws; one that dies is started again, and its request is drawn once more, while the other goes on."""
    with serving(tmp_path, ["--dp-size", "2", "--device", "cpu"]) as server:
        engines = psutil.Process(server.process.pid).children()
        assert len(engines) == 2
        answers: list[int] = []
        body = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 200}

        def ask(seed: int) -> None:
            answers.append(server.call("POST", "/v1/images/generations", body | {"seed": seed})[0])

        clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for client in clients:
            client.start()
        wait_for(lambda: server.get("/server_info")["jobs"]["in_progress"] == 2)
        engines[0].kill()
        for client in clients:
            client.join(timeout=110)
        assert answers == [200] * 4
        assert server.get("/server_info")["engine"]["restarts"] == 1
