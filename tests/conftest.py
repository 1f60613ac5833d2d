"""Without an NVIDIA GPU, kernels run in Triton's interpreter, which is chosen before Triton is imported."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Coroutine, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from postgres import Postgres

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("sdxl")`: the folder of a tiny random checkpoint, built once a session by `build_sdxl` of a `tiny_*.py`."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            modules = (import_module(file.stem) for file in sorted(Path(__file__).parent.glob("tiny_*.py")))
            next(vars(module)[f"build_{name}"] for module in modules if f"build_{name}" in vars(module))(path)
        return path

    return folder


@pytest.fixture
def repaired_interpreter() -> Iterator[None]:
    """Triton's interpreter, right about bf16 and fp8."""
    import interpreter

    with interpreter.repaired_interpreter():
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that an element a kernel does not write is seen."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def nothing_compiled() -> None:
    """torch.compile begins anew: it keeps code by Python function, and would run what an earlier test's engine made."""
    import torch

    torch.compiler.reset()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    from postgres import running_postgres

    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """Of a database with nothing in it."""
    return postgres.empty(f"store_{uuid.uuid4().hex}")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/jobs.db"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Of an empty database, of each kind."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """An event loop for all tests of a module."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def run(runner: asyncio.Runner) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs a scenario in that loop, for a limited time: that is ten times longer than it takes on an idle machine."""

    async def limited(work: Coroutine[Any, Any, None]) -> None:
        async with asyncio.timeout(150.0):
            await work

    return lambda work: runner.run(limited(work))
