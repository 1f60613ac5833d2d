"""`sglang bench tune`: times tiles on this GPU, row by row of its table, and rewrites the table with the fastest.

The order of attention backends is timed likewise (`attention_order.py`).

From every row's tile, and from those of the op's other forms, the search walks to faster neighbours: one value doubled
or halved, one stage more or less. A tile that answers wrongly, or does not fit the GPU, is never taken.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton

from sgl_diffusion.bench import attention_order, tables
from sgl_diffusion.bench.kernels import machine, worst
from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.catalog import OPS
from sgl_diffusion.kernels.launch import Tile
from sgl_diffusion.kernels.op import Case, Op
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.limits import medians_us

WORTH = 0.98  # a tile has to be 2 % faster than the best so far: less is noise
MAX_STAGES, MAX_WARPS = 6, 16
DTYPES = (torch.bfloat16, torch.float32)


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles that differ in one number."""
    for name, value in tile.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        stages = "stages" in name.lower()
        highest = MAX_STAGES if stages else MAX_WARPS if name == "num_warps" else math.inf
        near = (value - 1, value + 1) if stages else (value // 2, value * 2)
        for other in near:
            if 1 <= other <= highest:
                yield {**tile, name: other}


def search(starts: Sequence[Tile], cost: Callable[[Tile], float], seconds: float) -> tuple[Tile, float]:
    """The cheapest tile found by walking downhill from every start, until `seconds` are over.

    An infinite cost is a refusal. Returns the first start, whatever its cost, if nothing is cheaper.
    """
    deadline = time.monotonic() + seconds
    seen: dict[str, float] = {}

    def priced(tile: Tile) -> float:
        key = repr(sorted(tile.items()))
        if key not in seen:
            seen[key] = cost(tile)
        return seen[key]

    best, lowest = starts[0], priced(starts[0])
    for start in starts:
        here, price = start, priced(start)
        walking = True
        while walking and time.monotonic() < deadline:
            walking = False
            for tile in neighbours(here):
                if priced(tile) < WORTH * price:
                    here, price, walking = tile, priced(tile), True
                    break
        if price < WORTH * lowest:
            best, lowest = here, price
    return best, lowest


def tune(op: Op, seconds: float) -> list[tables.Row]:
    """New rows for one op. Rows of the table that no production size uses stay as they are."""
    rows: list[tables.Row] = []
    cases = [case for case in op.cases(op.production) if case.dtype in DTYPES]
    used = {case: rows_used(case) for case in cases}
    for number, row in enumerate(launch.tile_table(launch.architecture())[op.name]):
        mine = [case for case in cases if number in used[case]]
        if not mine:
            rows.append(row)
            continue
        before = row["tile"]
        tile, us = search([before, *op.forms], partial(total_us, mine), seconds)
        print(f"{op.name} row {number}: {us:.1f} us for {len(mine)} cases with {tile}", flush=True)
        rows.append({**row, "tile": tile})
    return rows


def rows_used(case: Case) -> set[int]:
    """Rows of the table a case is run with; none if this GPU does not run it."""
    with tables.noted_rows(case.op.name) as rows:
        try:
            case.op.run(case.inputs("cuda"), "triton")
        except launch.Unsupported:
            return set()
    return set(rows)


def total_us(cases: Sequence[Case], tile: Tile) -> float:
    """Sum of the medians; infinite if the tile does not compile, does not fit, or answers wrongly."""
    total = 0.0
    with launch.forced_tile(cases[0].op.name, tile):
        for case in cases:
            try:
                _, right = worst(case, "cuda", "triton")
                if not right:
                    return math.inf
                inputs = case.inputs("cuda")
                total += medians_us({"": partial(case.op.run, inputs, "triton")}, torch.device("cuda"))[""]
            except (triton.runtime.errors.OutOfResources, triton.compiler.CompilationError, RuntimeError, KeyError):
                return math.inf
    return total


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    names = [*OPS, attention_order.NAME]
    parser.add_argument("--op", action="append", choices=names, help="may be repeated (default: all)")
    parser.add_argument("--seconds", type=float, default=20.0, help="limit for each row of a table (default: 20)")
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        raise UserError(f"seconds={args.seconds}: expected more than 0")
    if not torch.cuda.is_available():
        raise UserError("bench tune: PyTorch sees no CUDA device")
    arch, facts = launch.architecture(), machine("cuda")
    facts.pop("commit")
    path: Any = None
    for name in args.op or names:
        if name == attention_order.NAME:
            path = attention_order.rewrite(arch, torch.device("cuda"), facts)
        else:
            path = tables.put(arch, name, tune(OPS[name], args.seconds), tuned_on=facts)
    print(f"wrote {path}; check tiles with: sglang bench aot --arch {arch}")
    return 0
