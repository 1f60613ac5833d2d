"""Reads and writes `kernels/tuned/<architecture>.json`, one row of tiles a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgl_diffusion import kernels
from sgl_diffusion.kernels import launch

FOLDER = Path(kernels.__path__[0]) / "tuned"
Row = Mapping[str, Any]


def put(arch: str, op: str, rows: Sequence[Row], *, triton_minor: str | None = None, **facts: object) -> Path:
    """Replaces the rows of one op. `facts`, such as device and measured, replace those of the table.

    Args:
        triton_minor: "3.6" writes the table of that Triton version alone.
    """
    path = FOLDER / (f"{arch}.triton-{triton_minor}.json" if triton_minor else f"{arch}.json")
    table = json.loads(path.read_text()) if path.is_file() else {"ops": {}}
    ops = {**table.pop("ops"), op: list(rows)}
    path.write_text(_text({**table, **facts}, ops))
    launch.tile_table.cache_clear()
    return path


def _text(facts: Mapping[str, object], ops: Mapping[str, Sequence[Row]]) -> str:
    lines = ["{", *(f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in facts.items()), '  "ops": {']
    blocks = []
    for op, rows in sorted(ops.items()):
        body = ",\n".join(f"      {json.dumps(row)}" for row in rows)
        blocks.append(f"    {json.dumps(op)}: [\n{body}\n    ]")
    return "\n".join([*lines, ",\n".join(blocks), "  }", "}", ""])
