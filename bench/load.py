"""`sglang bench load`: from a checkpoint on disk to weights that can be used, ours and diffusers', by turns.

A load is over when every page of every weight has been touched: diffusers leaves weights whose dtype is the file's as
views of the mapped file, and would only read them in the first request. Before each load the files are dropped from
the page cache where the system does so; the report says how much of them was still there.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgl_diffusion.bench.checkpoints import write_denoiser_checkpoint
from sgl_diffusion.bench.e2e import RANDOM
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.option import parse
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.report import commit_hash, versions

SIDES = {"native": "sglang", "diffusers": "diffusers"}  # and their --backend
DEFAULT_MODEL = "random-1536x3"  # 1.5 GB in fp32
PAGE = 4096
SAMPLES = 64  # places of a file that are asked whether they are in the page cache


@dataclass
class Loads:
    """Milliseconds of every round: until `load` returns, and until the weights have been touched."""

    load_ms: list[float] = field(default_factory=list)
    ready_ms: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)  # share of the files in the page cache before
    weights_gb: float = 0.0
    split_ms: list[dict[str, float]] = field(default_factory=list)  # read, convert, upload; of ours


@dataclass(frozen=True)
class Result:
    sides: dict[str, Loads]
    ratio: float  # median time until ready of diffusers over ours: above 1 ours is faster
    files_gb: float
    cold: bool
    settings: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None


def compare(folder: Path, server: Mapping[str, Any], rounds: int, *, cold: bool) -> Result:
    """`rounds` loads of each side by turns, after one of each that is not counted (imports, first allocations)."""
    files = sorted(folder.rglob("*.safetensors"))
    sides = {name: Loads() for name in SIDES}
    for turn in range(rounds + 1):
        for name in sorted(SIDES, reverse=bool(turn % 2)):  # each goes first in its turn
            cached = drop_from_cache(files) if cold else share_in_cache(files)
            args = parse(ServerArgs, {**server, "model_path": str(folder), "backend": SIDES[name]})
            loads = Loads() if turn == 0 else sides[name]
            device = measure(args, loads)
            loads.cached.append(cached)
    native, diffusers = (statistics.median(sides[name].ready_ms) for name in ("native", "diffusers"))
    return Result(
        sides=sides,
        ratio=diffusers / native,
        files_gb=sum(file.stat().st_size for file in files) / 1e9,
        cold=cold,
        settings={"model_path": str(folder), "rounds": rounds, "threads": torch.get_num_threads(), **server},
        versions=versions(device),
        commit=commit_hash(),
    )


def measure(args: ServerArgs, loads: Loads) -> torch.device:
    """Loads once and lets go of it; the device it was on."""
    started = time.perf_counter()
    engine = Engine.load(args)
    loaded = time.perf_counter()
    weights = [*_weights(engine)]
    for weight in weights:
        weight.detach().reshape(-1).view(torch.uint8)[::PAGE].sum()
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    ready = time.perf_counter()
    loads.load_ms.append((loaded - started) * 1000)
    loads.ready_ms.append((ready - started) * 1000)
    loads.weights_gb = sum(weight.nbytes for weight in weights) / 1e9
    if isinstance(engine.backend, NativePipeline):
        assert engine.load_report is not None and engine.load_report.total is not None
        loads.split_ms.append(engine.load_report.total.split())
    device = engine.device
    del engine, weights
    gc.collect()  # pipelines hold themselves in cycles; a mapped file stays in the page cache
    return device


def _weights(engine: Engine) -> Iterator[torch.Tensor]:
    backend = engine.backend
    parts = backend.parts if isinstance(backend, NativePipeline) else backend.pipe.components
    for part in parts.values():
        if isinstance(part, nn.Module):
            yield from part.parameters()


# -- page cache ---------------------------------------------------------------------


def drop_from_cache(files: list[Path]) -> float:
    """Asks the system to forget the files; the share of them that it still holds."""
    for file in [*files, *files]:  # pages on their way to the system's lists are missed by the first call
        _forget(file)
    held = share_in_cache(files)
    for file in files:  # asking may have read ahead
        _forget(file)
    return held


def _forget(file: Path) -> None:
    with file.open("rb") as f:
        os.fsync(f.fileno())  # pages that have not been written out stay
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def share_in_cache(files: list[Path]) -> float:
    """By a few reads in every file that do not wait for the disk."""
    held = asked = 0
    for file in files:
        with file.open("rb", buffering=0) as f:
            for place in range(0, file.stat().st_size, max(file.stat().st_size // SAMPLES, 1)):
                asked += 1
                held += _is_cached(f.fileno(), place)
    return held / max(asked, 1)


def _is_cached(descriptor: int, place: int) -> bool:
    try:
        os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT)
    except OSError as e:
        if e.errno == errno.EAGAIN:
            return False
        raise UserError(f"the system cannot tell what is in its page cache: {e.strerror}; use --warm") from e
    return True


# -- report -------------------------------------------------------------------------


def show(result: Result) -> None:
    print(f"{'':12}{'load ms':>10}{'ready ms':>10}{'GB/s':>8}  weights GB  cached before")
    for name, side in result.sides.items():
        load, ready = statistics.median(side.load_ms), statistics.median(side.ready_ms)
        speed, cached = result.files_gb / ready * 1000, max(side.cached)
        print(f"{name:12}{load:10.0f}{ready:10.0f}{speed:8.2f}{side.weights_gb:12.2f}{cached:15.0%}")
    split = result.sides["native"].split_ms
    parts = ", ".join(f"{part} {statistics.median(s[part] for s in split):.0f} ms" for part in split[0])
    print(f"native, time of all its threads: {parts}")
    print(f"{result.files_gb:.2f} GB of files; ready: every weight touched; diffusers / native = {result.ratio:.2f}")
    if result.cold and any(max(side.cached) > 0 for side in result.sides.values()):
        print("the page cache could not be dropped whole: these are not cold loads")


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument(
        "--model-path",
        default=DEFAULT_MODEL,
        help="checkpoint folder, or random-WIDTHxBLOCKS, a random checkpoint of that width and so many double and "
        f"single blocks in fp32 (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--precision", default="bf16", help="as of sglang generate (default: bf16)")
    parser.add_argument("--device", default="auto", help="as of sglang generate")
    parser.add_argument("--rounds", type=int, default=5, help="timed loads of each side (default: 5)")
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--work", type=Path, default=Path("outputs/bench"), help="folder for random checkpoints")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UserError(f"rounds={args.rounds}: must be at least 1")
    if args.json and not args.json.resolve().parent.is_dir():
        raise UserError(f"json={args.json}: the folder {args.json.parent} does not exist")
    random = RANDOM.fullmatch(args.model_path)
    folder = write_denoiser_checkpoint(args.work, int(random[1]), int(random[2])) if random else Path(args.model_path)
    if not any(folder.rglob("*.safetensors")):
        raise UserError(f"model_path={args.model_path}: no safetensors files in that folder")
    server = {"precision": args.precision, "device": args.device}
    result = compare(folder, server, args.rounds, cold=not args.warm)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
    return 0
