"""Without an NVIDIA GPU, kernels run in Triton's interpreter, which is chosen before Triton is imported."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("sdxl")`: the folder of a tiny random checkpoint, built once a session by `build_<name>`."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        import tiny_checkpoints
        import tiny_wan

        path, module = root / name, tiny_wan if name.startswith("wan") else tiny_checkpoints
        if not path.exists():
            getattr(module, f"build_{name}")(path)
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
