"""Processes that need not import torch and transformers anew, and `sglang` as users run it in one of them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SGLANG = Path(sys.executable).with_name("sglang")
TIMEOUT_S = 300.0

# each is the fork of a process that has imported what takes seconds, and has run nothing of it
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch.distributed",
        "transformers.models.clip.modeling_clip",
        "transformers.models.t5.modeling_t5",
        "sgl_diffusion.cli.generate",
        "sgl_diffusion.runtime.engine",
        "sgl_diffusion.runtime.parallel.mesh",
    ]
)


def sglang(*words: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`sglang` with these words, in a folder, an environment and with output of its own. What a package reads of the
    environment when it is imported has been read: for that, `SGLANG` is there to be started.

    Raises:
        subprocess.TimeoutExpired: it was at it for more than five minutes.
    """
    command = ["sglang", *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        process = FORKS.Process(target=_be_sglang, args=(command, cwd, {**os.environ, **(env or {})}, streams))
        process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, TIMEOUT_S)
        out, err = (stream.read_text() for stream in streams)
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _be_sglang(command: list[str], cwd: Path, env: dict[str, str], streams: tuple[Path, Path]) -> None:
    for number, stream in enumerate(streams, start=1):
        file = os.open(stream, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = command
    from sgl_diffusion.cli.main import main

    sys.exit(main())
