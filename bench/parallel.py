"""`sglang bench parallel`: steps of published models on several GPUs, predicted by layout. Nothing is measured here.

The analytic model is that of `sglang plan` (`runtime/parallel/costs.py`). The figures depend on what a GPU reaches and
on its links: of a data sheet, with assumed shares, unless files of measurements are given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sgl_diffusion.bench.plot import Bar, bars
from sgl_diffusion.runtime.args import ServerArgs, parse_args
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parallel.costs import Machine
from sgl_diffusion.runtime.parallel.layout import Layout
from sgl_diffusion.runtime.parallel.machines import machine_of
from sgl_diffusion.runtime.parallel.steps import Observer
from sgl_diffusion.runtime.report import MIB, commit_hash
from sgl_diffusion.runtime.request import resolve_request
from sgl_diffusion.runtime.resolve import presets, resolve

CPU = torch.device("cpu")  # where shapes alone are
HOSTS = {1: 1, 2: 1, 4: 1, 8: 1, 16: 2}  # by number of GPUs
MARKER = "<!-- sglang bench parallel -->"  # the docs' table stands between two of them


@dataclass(frozen=True)
class Subject:
    """A published checkpoint's request. Checkpoints are named by the end of their hub id."""

    checkpoint: str
    height: int
    width: int
    frames: int = 1

    def __str__(self) -> str:
        clip = f" x {self.frames} frames" if self.frames > 1 else ""
        return f"{self.checkpoint} {self.width}x{self.height}{clip}"


@dataclass(frozen=True)
class Row:
    """A layout's prediction; `speedup` is over one GPU."""

    subject: str
    gpus: int
    hosts: int
    layout: Layout
    step_ms: float
    speedup: float
    waits_ms: dict[str, float]
    sent_bytes: dict[str, int]
    memory_mb: float


def rows_of(subject: Subject, hub_id: str, machines: dict[int, tuple[ServerArgs, Machine]]) -> Iterator[Row]:
    """Of every layout of every number of GPUs, the fastest of each number first."""
    given = {"model_path": hub_id, "load_format": "dummy", "prompt": [""], "precision": "bf16", "device": "cpu"}
    size = {"height": subject.height, "width": subject.width}
    if subject.frames > 1:
        size["num_frames"] = subject.frames
    server, sampling = parse_args({**given, **size})
    planner = resolve(server, [sampling]).memory
    assert planner is not None, "a preset runs natively"
    observer = Observer(planner, planner.rehearsal.workload(resolve_request(sampling, {}, server)))
    one: float | None = None
    for gpus, (args, machine) in machines.items():
        for p in observer.predictions(args, gpus, machine):
            one = one or p.step_ms
            told = str(subject), gpus, args.nnodes, p.layout, p.step_ms, one / p.step_ms
            yield Row(*told, dict(p.waits), dict(p.sent), observer.memory(p.layout) / MIB)


def shown(rows: Sequence[Row]) -> list[Row]:
    """Of each subject and number of GPUs: the fastest layout, and the fastest of those that split along one dimension,
    or along guidance and one more.
    """
    kept: list[Row] = []
    for row in rows:
        degrees = {of for of, n in asdict(row.layout).items() if n > 1}
        first = not kept or (kept[-1].subject, kept[-1].gpus) != (row.subject, row.gpus)
        if first or len(degrees - {"cfg"}) == 1 or (row.hosts > 1 and degrees - {"cfg"} == {"ring", "ulysses"}):
            kept.append(row)
    return kept


def markdown(rows: Sequence[Row]) -> str:
    """A table for every subject."""
    lines: list[str] = []
    for subject in dict.fromkeys(row.subject for row in rows):
        lines += ["", f"**{subject}**, predicted", ""]
        lines += ["| GPUs | layout | step ms | speed-up | ms waiting | MB sent a rank and step | GiB a rank |"]
        lines += ["| ---: | --- | ---: | ---: | ---: | ---: | ---: |"]
        for row in rows:
            if row.subject == subject:
                gpus = f"{row.hosts} x {row.gpus // row.hosts}" if row.hosts > 1 else str(row.gpus)
                waits, sent = sum(row.waits_ms.values()), sum(row.sent_bytes.values()) / 1e6
                numbers = f"{row.step_ms:,.1f} | {row.speedup:.2f} | {waits:,.2f} | {sent:,.1f}"
                lines.append(f"| {gpus} | {row.layout} | {numbers} | {row.memory_mb / 1024:.1f} |")
    return "\n".join([*lines, ""])


def put_between_markers(path: Path, table: str) -> None:
    """Raises UserError for a file without two markers."""
    parts = path.read_text(encoding="utf-8").split(MARKER)
    if len(parts) != 3:
        raise UserError(f"markdown={path}: expected two lines {MARKER}")
    path.write_text(MARKER.join([parts[0], f"\n{table}", parts[2]]), encoding="utf-8")


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Shares of the ideal speed-up: of every subject and number of GPUs, the fastest layout of each kind."""
    fastest: dict[tuple[str, str], Bar] = {}
    for row in rows:
        kind = " + ".join(of for of, n in asdict(row.layout).items() if n > 1)
        hosts = f" on {row.hosts} hosts" if row.hosts > 1 else ""
        group = f"{row.subject}, {row.gpus} GPUs{hosts}"
        if kind:
            fastest.setdefault((group, kind), Bar(group, kind, row.speedup / row.gpus))
    path.write_text(bars("Predicted, not measured: share of the ideal speed-up", list(fastest.values())))


def subjects(asked: Sequence[str]) -> dict[Subject, str]:
    """With their hub ids. Raises UserError for a request that is none."""
    ids = {hub_id.rpartition("/")[2]: hub_id for hub_id in presets()}
    found: dict[Subject, str] = {}
    for text in asked:
        name, _, size = text.partition(":")
        sides = size.split("x")
        if name not in ids or len(sides) not in (2, 3) or not all(side.isdigit() for side in sides):
            raise UserError(f"request={text}: expected CHECKPOINT:WIDTHxHEIGHT[xFRAMES], of {', '.join(ids)}")
        width, height, *frames = map(int, sides)
        found[Subject(name, height, width, *frames)] = ids[name]
    return found


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("requests", nargs="+", metavar="CHECKPOINT:WIDTHxHEIGHT[xFRAMES]", help="of the presets' names")
    parser.add_argument("--gpu", default="h200", help="h200 (default), or a FILE, as of `sglang plan`")
    parser.add_argument("--links", default="nvlink,infiniband-400", metavar="INTRA,INTER", help="as of `sglang plan`")
    parser.add_argument("--gpus", default=",".join(map(str, HOSTS)), metavar="N,M", help="numbers; 16 are two hosts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions of all layouts there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help=f"put the table between the lines {MARKER}")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw shares of the ideal speed-up, as .svg")
    args = parser.parse_args(argv)
    if args.gpu == "here":
        raise UserError("gpu=here: expected h200 or a FILE")
    machines: dict[int, tuple[ServerArgs, Machine]] = {}
    for gpus in [1, *(int(n) for n in args.gpus.split(",") if n != "1")]:
        server, _ = parse_args({"model_path": "embedded", "num_gpus": gpus, "nnodes": HOSTS.get(gpus, 1)})
        machines[gpus] = server, machine_of(server, gpus, CPU, torch.bfloat16, args.gpu, args.links)
    rows: list[Row] = []
    for subject, hub_id in subjects(args.requests).items():
        rows += rows_of(subject, hub_id, machines)
    any_machine = machines[1][1]
    told = f"PREDICTED by an analytic model, not measured: {any_machine.rates.name} ({any_machine.rates.source}); "
    told += f"links: {any_machine.within.source}; between hosts: {any_machine.between.source}"
    print(told)
    print(markdown(shown(rows)))
    if args.json:
        about = {"about": told, "commit": commit_hash(), "rates": asdict(any_machine.rates)}
        about |= {"links": {"within": asdict(any_machine.within), "between": asdict(any_machine.between)}}
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)  # a layout a line
        args.json.write_text(f'{json.dumps(about)[:-1]},\n"rows": [\n{lines}\n]}}\n')
    if args.markdown:
        put_between_markers(args.markdown, markdown(shown(rows)))
    if args.plot:
        plot(args.plot, shown(rows))
    return 0
