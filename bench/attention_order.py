"""Times exact attention backends on this device and rewrites `runtime/attention_order.json`, which `auto` follows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion import runtime
from sgl_diffusion.kernels.attention import OP
from sgl_diffusion.kernels.op import rel_l2
from sgl_diffusion.runtime.attention import BACKENDS, EXACT, Case, order_table
from sgl_diffusion.runtime.limits import medians_us

NAME = "attention_order"
FILE = Path(runtime.__path__[0]) / f"{NAME}.json"
WRONG = 1e-2  # relative L2 distance from PyTorch's answer, in bf16

Shape = tuple[int, int, int, int]
CLASSES: Sequence[tuple[Mapping[str, int], Sequence[Shape]]] = (  # a row of the table; B, Q, S, H it is timed on
    ({"itemsize": 2, "head_dim": 64, "keys": 1024}, ((1, 1024, 1024, 24), (2, 4096, 512, 12))),
    ({"itemsize": 2, "head_dim": 64}, ((1, 4096, 4096, 24),)),
    ({"itemsize": 2, "head_dim": 128, "keys": 1024}, ((1, 1024, 1024, 24), (2, 32760, 512, 12))),
    ({"itemsize": 2, "head_dim": 128}, ((1, 4608, 4608, 24), (1, 32760, 32760, 12))),
)


def measured_rows(device: torch.device, rest: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row of the table for every class of shapes, and a last one for all other shapes."""
    for at_most, shapes in CLASSES:
        order = fastest_first([(*shape, at_most["head_dim"]) for shape in shapes], device)
        print(f"{NAME} {dict(at_most)}: {', '.join(order)}", flush=True)
        yield {"at_most": dict(at_most), "order": order}
    yield {"order": list(rest)}


def fastest_first(shapes: Sequence[tuple[int, int, int, int, int]], device: torch.device) -> list[str]:
    """Exact backends that run all of these shapes (B, Q, S, H, K) in bf16 and answer rightly, by their total time."""
    totals: dict[str, float] = {}
    for name in EXACT:
        if not any(BACKENDS[name].reasons(Case(device, torch.bfloat16, K, S)) for _, _, S, _, K in shapes):
            totals[name] = 0.0
    for B, Q, S, H, K in shapes:
        inputs = OP.inputs(str(device), torch.bfloat16, B=B, Q=Q, S=S, H=H, K=K)
        q, k, v, out = (inputs[name] for name in ("q_BLHK", "k_BLHK", "v_BLHK", "out"))
        calls: dict[str, Callable[[], Tensor]] = {n: partial(BACKENDS[n].run, q, k, v, out=out) for n in totals}
        want = BACKENDS["torch_sdpa"].run(q, k, v)
        for name in [n for n, call in calls.items() if not rel_l2(call(), want) < WRONG]:
            print(f"{NAME}: {name} answers wrongly at {(B, Q, S, H, K)}; left out")
            del calls[name], totals[name]
        for name, us in medians_us(calls, device).items():
            totals[name] += us
    return sorted(totals, key=lambda name: totals[name])


def rewrite(arch: str, device: torch.device, facts: Mapping[str, Any], file: Path = FILE) -> Path:
    """Replaces the entry of one architecture, with the device and versions it was timed on."""
    table = order_table()
    rows = list(measured_rows(device, table[arch]["rows"][-1]["order"]))
    table = {**table, arch: {"measured": True, **facts, "rows": rows}}
    file.write_text(text_of(table))
    order_table.cache_clear()
    return file


def text_of(table: Mapping[str, Mapping[str, Any]]) -> str:
    """The file's layout: a fact a line, a row a line."""
    entries = []
    for arch, entry in table.items():
        facts = [f"    {json.dumps(name)}: {json.dumps(value)}," for name, value in entry.items() if name != "rows"]
        rows = ",\n".join(f"      {json.dumps(row)}" for row in entry["rows"])
        entries.append("\n".join([f"  {json.dumps(arch)}: {{", *facts, f'    "rows": [\n{rows}\n    ]\n  }}']))
    return "{\n" + ",\n".join(entries) + "\n}\n"
