"""Reads and writes `kernels/tuned/<architecture>.json`, one row of tiles a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from sgl_diffusion import kernels
from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.launch import Tile

FOLDER = Path(kernels.__path__[0]) / "tuned"
Row = Mapping[str, Any]


@contextmanager
def noted_rows(op: str) -> Iterator[dict[int, Tile]]:
    """Row numbers and tiles that launches of `op` look up inside the `with`."""
    rows: dict[int, Tile] = {}
    tile_row = launch.tile_row

    def noted(arch: str, name: str, **size: int) -> tuple[int, Tile]:
        number, tile = tile_row(arch, name, **size)
        if name == op:
            rows[number] = dict(tile)
        return number, tile

    with mock.patch.object(launch, "tile_row", noted):
        yield rows


def put(
    arch: str,
    op: str,
    rows: Sequence[Row],
    *,
    tuned_on: Mapping[str, Any] | None = None,
    triton_minor: str | None = None,
) -> Path:
    """Replaces the rows of one op.

    Args:
        tuned_on: device and versions the rows were timed on. The table counts as measured once all of its ops were
            timed on one device.
        triton_minor: "3.6" writes the table of that Triton version alone.
    """
    path = FOLDER / (f"{arch}.triton-{triton_minor}.json" if triton_minor else f"{arch}.json")
    table: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"measured": False, "ops": {}}
    ops = {**table.pop("ops"), op: list(rows)}
    if tuned_on is not None:
        timed = [*table.get("timed", []), op] if all(table.get(k) == v for k, v in tuned_on.items()) else [op]
        table = {**tuned_on, "measured": set(ops) <= set(timed), "timed": sorted(set(timed))}
    path.write_text(_text(table, ops))
    launch.tile_table.cache_clear()
    return path


def _text(facts: Mapping[str, object], ops: Mapping[str, Sequence[Row]]) -> str:
    lines = ["{", *(f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in facts.items()), '  "ops": {']
    blocks = []
    for op, rows in sorted(ops.items()):
        body = ",\n".join(f"      {json.dumps(row)}" for row in rows)
        blocks.append(f"    {json.dumps(op)}: [\n{body}\n    ]")
    return "\n".join([*lines, ",\n".join(blocks), "  }", "}", ""])
