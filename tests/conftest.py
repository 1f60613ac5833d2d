"""Without an NVIDIA GPU, kernels run in Triton's interpreter, which is chosen before Triton is imported."""

import os
from collections.abc import Callable
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

        path = root / name
        if not path.exists():
            getattr(tiny_checkpoints, f"build_{name}")(path)
        return path

    return folder
