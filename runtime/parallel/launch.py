"""Processes as the ranks of one job, started and watched by torch's elastic agent.

One that fails ends all: the agent terminates the others, and what the first to fail had said is told here. Ranks die
with the process that started them, however it dies.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import signal
import socket
import struct
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.errors import RunFailure, UserError

PR_SET_PDEATHSIG = 1
SIOCGIFADDR = 0x8915  # asks for an interface's address
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where the agent looks for what a rank had to say
CPP_LOGS = "TORCH_CPP_LOG_LEVEL"  # read when torch is imported
LAUNCHED = "SGL_DIFFUSION_LAUNCHED"  # set for ranks that `launch` started
USER_MISTAKE, INTERRUPTED = 2, 130
ENDS_WITHIN_S = 5  # of the signal that asks the launcher to end; then ranks are killed
ONE_CAUSE_S = 5  # ranks that fail within it fail of the same; later, the agent has ended them
MONITOR_INTERVAL_S = 0.1
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL", "Broken pipe")


def launch(args: ServerArgs, ranks: int, module: str, argv: Sequence[str]) -> None:
    """Runs `python -m MODULE ARGV` once for every rank on this host, until all have ended.

    Args:
        ranks: on all hosts together; they divide evenly.
    Raises:
        UserError: a rank found a mistake of the user.
        RunFailure: a rank failed or died, with its number and its last words; or other hosts did not come.
    """
    with _without_stacks():
        from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:  # each has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what failed is told below
    here = ranks // args.nnodes
    if args.nnodes > 1 and args.dist_init_addr is not None:
        _tell_gloo_where(args.dist_init_addr)
    os.environ[LAUNCHED] = str(os.getpid())
    # each would take all cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // here)))
    with TemporaryDirectory(prefix="sgl-diffusion-ranks-") as folder:
        config = LaunchConfig(
            min_nodes=args.nnodes,
            max_nodes=args.nnodes,
            nproc_per_node=here,
            run_id=args.dist_init_addr or uuid.uuid4().hex,
            max_restarts=0,
            monitor_interval=MONITOR_INTERVAL_S,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=ENDS_WITHIN_S,
            **_rendezvous(args),
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *argv)
        except ChildFailedError as e:
            raise _failure(e) from None
        except SignalException as e:
            raise KeyboardInterrupt from e
        except DistError as e:
            where = f"dist_init_addr={args.dist_init_addr}"
            raise RunFailure(f"{where}: the hosts do not meet there: {str(e).splitlines()[0]}") from None


@contextmanager
def _without_stacks() -> Iterator[None]:
    """A torch that is imported here prints no stacks of its C++ when hosts do not meet; those of the ranks still do."""
    before = os.environ.get(CPP_LOGS)
    os.environ.setdefault(CPP_LOGS, "FATAL")
    try:
        yield
    finally:
        if before is None:
            del os.environ[CPP_LOGS]


def _rendezvous(args: ServerArgs) -> dict[str, Any]:
    """Where ranks find each other."""
    if args.nnodes == 1:
        endpoint = args.dist_init_addr or "127.0.0.1:0"
        return {"rdzv_backend": "c10d", "rdzv_endpoint": endpoint, "local_addr": endpoint.partition(":")[0]}
    if args.dist_init_addr is None:
        raise UserError(f"nnodes={args.nnodes}: needs dist_init_addr=HOST:PORT, an address of the first host")
    rendezvous = {"rank": args.node_rank, "timeout": args.dist_timeout}
    return {"rdzv_backend": "static", "rdzv_endpoint": args.dist_init_addr, "rdzv_configs": rendezvous}


def _tell_gloo_where(address: str) -> None:
    """Which network the other hosts are on; by itself, gloo takes that of the host's name, which may be no more than
    this host.
    """
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, int(port)))  # sends nothing: only the route is looked up
        except (OSError, ValueError) as e:
            raise UserError(f"dist_init_addr={address}: cannot be reached: {e}") from e
        ours = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # without an address
                continue
            if socket.inet_ntoa(found[20:24]) == ours:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _failure(error: object) -> UserError | RunFailure:
    """What the rank said that failed of itself. That others lost it is no news."""
    failures: dict[int, Any] = error.failures  # type: ignore[attr-defined]
    began = min(failure.timestamp for failure in failures.values())
    first = [r for r, failure in failures.items() if failure.timestamp - began < ONE_CAUSE_S]
    rank = min(first, key=lambda r: (_is_echo(failures[r]), failures[r].timestamp))
    failure = failures[rank]
    if failure.exitcode == USER_MISTAKE:
        return UserError(failure.message)
    if failure.exitcode < 0:
        return RunFailure(f"rank {rank} was killed by {signal.Signals(-failure.exitcode).name}")
    told = failure.message if Path(failure.error_file).is_file() else f"ended with status {failure.exitcode}"
    return RunFailure(f"rank {rank}: {told}")


def _is_echo(failure: Any) -> bool:
    """Whether a rank failed because another did, or did not answer."""
    return bool(failure.exitcode == -signal.SIGTERM or failure.error_file_data.get("echo"))


# -- in a rank ----------------------------------------------------------------------


@contextmanager
def as_rank() -> Iterator[None]:
    """For the life of a rank: dies with its launcher, and leaves its last words for it.

    Raises:
        SystemExit: with status 2 for a user's mistake, which the launcher tells.
    """
    launcher = os.environ.get(LAUNCHED)
    if launcher is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(launcher):  # it died before
            sys.exit(1)
    try:
        yield
    except (UserError, RunFailure) as e:
        _leave_word(str(e))
        if launcher is None:  # torchrun tells nothing in one line
            raise
        sys.exit(USER_MISTAKE if isinstance(e, UserError) else 1)
    except KeyboardInterrupt:
        if launcher is not None:
            sys.exit(INTERRUPTED)  # the launcher tells, once
        raise
    except Exception as e:
        told = " ".join(str(e).split())[:500]
        if lost := of_a_lost_rank(e):
            told = f"another rank is gone, or did not answer within dist_timeout ({told})"
        _leave_word(f"{type(e).__name__}: {told}", echo=lost)
        if launcher is not None and lost:
            sys.exit(1)  # where it was waiting is no news
        raise


def of_a_lost_rank(error: Exception) -> bool:
    """Whether what failed here is a message to or from another rank."""
    return any(words in str(error) for words in LOST_PEER)


def _leave_word(told: str, *, echo: bool = False) -> None:
    if path := os.environ.get(ERROR_FILE):
        Path(path).write_text(json.dumps({"message": told, "timestamp": int(time.time()), "echo": echo}))
