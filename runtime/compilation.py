"""Compiled code: where it is kept between processes, and how much of it was made.

Triton's kernels and torch.compile's blocks stay on disk, in a folder named after the versions that made them, so that a
second process loads what the first compiled. What is compiled, loaded or tuned is counted: nothing of it should happen
while a user waits.
"""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from triton import knobs

from sgl_diffusion.runtime.errors import UserError

CACHE_ROOT = "SGLANG_DIFFUSION_CACHE_ROOT"
PACKAGES = ("sgl-diffusion", "torch", "triton")


@dataclass(frozen=True)
class Compilations:
    """What was made since the process began; the difference of two is what was made in between."""

    triton: int = 0  # kernels compiled
    triton_from_disk: int = 0  # kernels loaded instead
    torch_traced: int = 0  # graphs that torch.compile found in Python code
    torch_compiled: int = 0  # those of them that it compiled
    torch_from_disk: int = 0  # and those whose code was loaded instead
    tuning_runs: int = 0  # timings made to choose between configurations

    def __sub__(self, before: Compilations) -> Compilations:
        return Compilations(*(getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__))


class _Listener:
    """Called by Triton after every compilation, and after every one that the disk saved."""

    def __init__(self) -> None:
        self.compiled = self.from_disk = 0

    def __call__(self, *, cache_hit: bool, **about: Any) -> None:
        self.from_disk += cache_hit
        self.compiled += not cache_hit


def compilations() -> Compilations:
    """What was made so far. Triton's part counts from the first call on: it has one listener, which is set here."""
    if not isinstance(knobs.compilation.listener, _Listener):
        knobs.compilation.listener = _Listener()
    listener = knobs.compilation.listener
    dynamo = sys.modules.get("torch._dynamo.utils")  # takes seconds to import, and counts nothing before
    counters = dynamo.counters if dynamo else defaultdict(Counter)
    inductor = counters["inductor"]
    return Compilations(
        triton=listener.compiled,
        triton_from_disk=listener.from_disk,
        torch_traced=counters["stats"]["unique_graphs"],
        torch_compiled=inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"],
        torch_from_disk=inductor["fxgraph_cache_hit"],
        tuning_runs=sum(n for name, n in inductor.items() if name.startswith("benchmarking.")),
    )


def cache_folder() -> Path:
    """The folder of code compiled by these versions."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sgl_diffusion"
    root = Path(os.environ.get(CACHE_ROOT) or base).expanduser()
    return root / "compiled" / "-".join(f"{package}-{version(package)}" for package in PACKAGES)


def keep_compiled_code() -> Path:
    """Makes Triton and torch.compile use the folder, but for one that has a folder of its own in the environment.

    Raises:
        UserError: the folder cannot be made.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: no place for compiled code: {e.strerror}; {CACHE_ROOT} names another") from e
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    inductor = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if chosen is None or (inductor is not None and chosen == inductor.default_cache_dir()):  # which its import sets
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    return folder
