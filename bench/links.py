"""`sglang bench links`: latency and bandwidth of what ranks tell each other, measured, for `sglang plan --links`."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sgl_diffusion.runtime.args import parse_args
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parallel.group import Group
from sgl_diffusion.runtime.parallel.launch import as_rank, launch
from sgl_diffusion.runtime.parallel.links import COLLECTIVES, Line, Links, write_links
from sgl_diffusion.runtime.parallel.mesh import process_group
from sgl_diffusion.runtime.parallel.ranks import local_rank, speaks, started_ranks
from sgl_diffusion.runtime.report import commit_hash

KIB = 1024
SIZES = {  # bytes of the tensor that each rank has
    "cuda": [64 * KIB * 4**i for i in range(6)],  # to 64 MiB
    "cpu": [16 * KIB * 4**i for i in range(5)],  # to 4 MiB
}
ROUNDS, CALLS = 5, {"cuda": 20, "cpu": 4}  # medians of rounds, of so many calls in a row

Points = dict[str, list[tuple[float, float]]]
"""By collective: bytes that a rank sends to others, and microseconds of the slowest rank."""


def measure(group: Group, device: torch.device, sizes: Sequence[int]) -> Points:
    """All ranks of the group call this, and get the same."""
    points: Points = {name: [] for name in COLLECTIVES}
    for size in sizes:
        for name, call in _calls(group, device, size).items():
            call()  # connects
            before = group.traffic[name].bytes
            call()
            sent = group.traffic[name].bytes - before
            points[name].append((sent, _slowest_us(group, device, call)))
    return points


def _calls(group: Group, device: torch.device, size: int) -> Mapping[str, Callable[[], object]]:
    P, each = group.size, size // 4 // group.size
    x, received = torch.ones(P * each, device=device), torch.empty(P * each, device=device)
    after, before = (group.rank + 1) % P, (group.rank - 1) % P
    return {
        "all_to_all": lambda: group.all_to_all(x, [each] * P, [each] * P),
        "all_gather": lambda: group.all_gather(x[:each]),
        "all_reduce": lambda: group.all_reduce(x),
        "exchange": lambda: group.exchange([(after, x)], [(before, received)]).wait(),
    }


def _slowest_us(group: Group, device: torch.device, call: Callable[[], object]) -> float:
    """Of one call, on the rank that takes the longest."""
    times: list[float] = []
    for _ in range(ROUNDS):
        dist.barrier(group.process_group)
        _synchronize(device)
        start = time.perf_counter_ns()
        for _ in range(CALLS[device.type]):
            call()
        _synchronize(device)
        times.append((time.perf_counter_ns() - start) / 1e3 / CALLS[device.type])
    slowest = torch.tensor(statistics.median(times), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group.process_group)
    return slowest.item()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fitted(name: str, source: str, points: Points) -> Links:
    return Links(name, source, {of: Line.through(measured) for of, measured in points.items()})


# -- report -------------------------------------------------------------------------


def show(links: Links, points: Points) -> None:
    print(f"{'collective':14}{'latency':>12}{'bandwidth':>14}   bytes a rank sends: time of the slowest")
    for name, line in links.lines.items():
        times = ", ".join(f"{sent / KIB:,.0f} KiB {us:,.0f} us" for sent, us in points[name])
        print(f"{name:14}{line.latency_us:9.1f} us{line.gb_per_s:9.2f} GB/s   {times}")


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    for name, what in {
        "num-gpus": "ranks on all hosts (default: those that torchrun started)",
        "nnodes": "hosts; run this on each of them",
        "node-rank": "which of the hosts this one is, from 0",
        "dist-init-addr": "HOST:PORT of the first host, free there",
        "dist-timeout": "seconds until a rank that others wait for is given up",
    }.items():
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=name.split("-")[-1].upper(), help=what)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--name", default="measured", help="of these links, in tables (default: measured)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, for `sglang plan --links`")
    args = parser.parse_args(argv)
    named = {name: value for name, value in vars(args).items() if name not in ("device", "name", "json")}
    server, _ = parse_args({"model_path": "embedded", **named})
    ranks = server.num_gpus or started_ranks()
    if ranks == 1:
        raise UserError("num_gpus=1: one rank has no links to measure; expected at least 2")
    if started_ranks() == 1:
        launch(server, ranks, "sgl_diffusion", ["bench", "links", *argv])
        return 0
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda", local_rank()) if kind == "cuda" else torch.device("cpu")
    with as_rank() if started_ranks() > 1 else nullcontext(), process_group(device, server.dist_timeout):
        group = Group("world", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
        points = measure(group, device, SIZES[kind])
        if speaks():
            report(args, device, group.size, server.nnodes, points)
    return 0


def report(args: argparse.Namespace, device: torch.device, ranks: int, nnodes: int, points: Points) -> None:
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "backend": dist.get_backend(),
        "ranks": ranks,
        "hosts": nnodes,
        "torch": torch.__version__,
        "commit": commit_hash(),
    }
    links = fitted(args.name, "measured", points)
    print(" | ".join(f"{key} {value}" for key, value in about.items()))
    show(links, points)
    if args.json:
        write_links(args.json, links, about | {"points": points})
        print(f"wrote {args.json}; use it with: sglang plan --links {json.dumps(str(args.json))}")
