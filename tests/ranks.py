"""Functions run by several processes at once, as the ranks of one gloo group."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from forks import FORKS

TIMEOUT_S = 240.0


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function of a module returns on each of so many ranks, which it finds in `torch.distributed`.

    Arguments and results are pickled. A rank that raises, dies or is late fails the test, with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines, processes = [], []
        for rank in range(count):
            ours, theirs = FORKS.Pipe(duplex=False)
            given = (theirs, f"file://{folder}/store", rank, count, function, arguments)
            process = FORKS.Process(target=_be_rank, args=given, daemon=True)
            process.start()
            theirs.close()
            lines.append(ours)
            processes.append(process)
        try:
            return _results(lines)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(lines: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(lines):
        ready = wait([line for rank, line in enumerate(lines) if rank not in results], timeout=TIMEOUT_S)
        assert ready, f"only ranks {sorted(results)} of {len(lines)} ended within {TIMEOUT_S:g} s"
        for line in ready:
            rank = lines.index(line)  # type: ignore[arg-type]
            try:
                results[rank], failure = pickle.loads(line.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                failure = "died"
            assert failure is None, f"rank {rank}: {failure}"
    return [results[rank] for rank in range(len(lines))]


def _be_rank(
    line: Connection, store: str, rank: int, count: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store, timedelta(seconds=TIMEOUT_S), rank=rank, world_size=count)
        line.send_bytes(pickle.dumps((function(*arguments), None)))  # tensors by value: the rank ends
        dist.barrier()  # no one leaves while others still talk to it
    except BaseException:
        line.send_bytes(pickle.dumps((None, traceback.format_exc())))
