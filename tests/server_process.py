"""A real `sglang serve` for tests: a process of its own, on a free port, with a folder of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

READY_S = 120.0


@dataclass
class ServerProcess:
    """`url` is that of the server's root; `lines` is what it has said so far."""

    process: subprocess.Popen[str]
    data_dir: Path
    url: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def api(self) -> str:
        """The `base_url` of an OpenAI client."""
        return f"{self.url}/v1"

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Any:
        """The JSON at a path, whatever the status."""
        return self.call("GET", path, None, headers)[1]

    def call(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON (or bytes, where it is none) and headers of an answer."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, dict(headers or {}), method=method)
        if data is not None and not request.has_header("Content-type"):
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, found, told = answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as e:
            status, found, told = e.code, e.read(), e.headers
        is_json = "json" in (told.get("content-type") or "")
        return status, json.loads(found) if is_json else found, told

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 60.0) -> int:
        """Asks the server to end; returns its exit code."""
        self.process.send_signal(sig)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """As a crash of the machine would."""
        self.process.kill()
        self.process.wait()


def start_server(data_dir: Path, *flags: str, env: Mapping[str, str] | None = None, wait: bool = True) -> ServerProcess:
    """Starts `sglang serve`; with `wait`, returns when it is ready.

    Raises:
        AssertionError: it ended, or took too long; the message holds what it said.
    """
    command = [sys.executable, "-P", "-m", "sgl_diffusion.cli.main", "serve", "--data-dir", str(data_dir)]
    if "--port" not in flags:
        command += ["--port", "0"]
    process = subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})},
    )
    server = ServerProcess(process, data_dir)
    ready = threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            server.lines.append(line.rstrip("\n"))
            if said := re.match(r"ready: (http://\S+)", line):
                server.url = said[1]
                ready.set()
        ready.set()

    threading.Thread(target=listen, daemon=True).start()
    if wait:
        ready.wait(READY_S)
        if not server.url:
            process.kill()
        assert server.url, "\n".join(server.lines)
    return server


@contextmanager
def serving(data_dir: Path, flags: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    """A ready server, which is ended when the context is left."""
    server = start_server(data_dir, *flags, env=env)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            try:
                server.process.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def documented(section: str) -> list[str]:
    """The examples of a section of docs/server.md, Python and shell, in the order in which they stand there."""
    text = (Path(__file__).parents[1] / "docs" / "server.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {section}\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE)
    return [f"{language}\n{code}" for language, code in re.findall(r"```(python|bash)\n(.*?)```", found, re.DOTALL)]


def run_documented(example: str, server: ServerProcess, names: dict[str, Any]) -> str:
    """Runs an example in the current folder, with the test's server for the documented one; returns what it prints."""
    language, _, code = example.partition("\n")
    code = code.replace("http://localhost:30010", server.url)
    if language == "bash":
        return subprocess.run(["bash", "-ec", code], check=True, text=True, stdout=subprocess.PIPE).stdout
    exec(code, names)
    return ""


def wait_for(condition: Any, timeout: float = 60.0, every: float = 0.02) -> Any:
    """What `condition()` returns once that is true."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)
    return found
