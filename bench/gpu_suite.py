"""Everything a GPU has to show, in one command: answers first, then times.

    python -m sgl_diffusion.bench.gpu_suite [--out FOLDER] [--part correctness|kernels|end_to_end]

Each part writes FOLDER/<part>*.json. Exit code 1 if an answer is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from sgl_diffusion.bench import e2e, kernels
from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.catalog import OPS
from sgl_diffusion.runtime.args import SamplingParams
from sgl_diffusion.runtime.limits import limits
from sgl_diffusion.runtime.resolve import presets

WORKERS = 8


def correctness(out: Path) -> bool:
    """Every op at every size, on the GPU, against the reference in float64; production sizes in bf16 alone.

    Most of the time goes into compiling, so ops are shared out over processes.
    """
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        rows = [row for of_op in pool.map(check_op, OPS) for row in of_op]
    for row in rows:
        if not row["ok"]:
            print(f"WRONG {row['op']} {row['case']}: rel_l2 {row['rel_l2']:.1e}", flush=True)
    right = sum(bool(row["ok"]) for row in rows)
    print(f"correctness: {right} of {len(rows)} cases within tolerance")
    write(out / "correctness.json", rows)
    return right == len(rows)


def check_op(name: str) -> list[dict[str, Any]]:
    """A row for every case of an op that this GPU runs; one that raises has an error of infinity."""
    op, rows = OPS[name], []
    for case in [*op.cases(op.tiny), *(c for c in op.cases(op.production) if c.dtype == torch.bfloat16)]:
        try:
            error, ok = kernels.worst(case, "cuda")
        except launch.Unsupported:
            continue
        except RuntimeError as e:
            error, ok = math.inf, False
            print(f"{name} {case}: {e}", flush=True)
        rows.append({"op": name, "case": str(case), "rel_l2": error, "ok": ok})
    return rows


def kernel_times(out: Path) -> bool:
    """bf16 at production sizes, against the sequences diffusers runs and other libraries' attention."""
    limit, rows = limits(torch.device("cuda"), torch.bfloat16), []
    for row in kernels.measure_all([*OPS.values()], ["eager", "triton", "cudnn", "fa"], "cuda", limit):
        kernels.show(row)
        rows.append(row)
    write(out / "kernels.json", [asdict(row) for row in rows], limits=asdict(limit))
    return all(row.us is not None or row.rel_l2 is None for row in rows)


def end_to_end(out: Path) -> bool:
    """Every preset at true size with dummy weights, against diffusers and diffusers compiled."""
    for name in presets():
        params = SamplingParams(prompt=["a cat"], height=1024, width=1024, save_output=False)
        server = {"model_path": name, "load_format": "dummy", "device": "cuda"}
        print(name)
        result = e2e.compare(server, params, [*e2e.RIVALS], rounds=3)
        e2e.show(result)
        short = name.rpartition("/")[2]
        e2e.write_json(out / f"end_to_end-{short}.json", result)
        e2e.plot(out / f"end_to_end-{short}.svg", result)
        torch.cuda.empty_cache()
    return True


PARTS: dict[str, Callable[[Path], bool]] = {
    "correctness": correctness,
    "kernels": kernel_times,
    "end_to_end": end_to_end,
}


def write(path: Path, rows: list[dict[str, Any]], **facts: object) -> None:
    path.write_text(json.dumps({**kernels.machine("cuda"), **facts, "rows": rows}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sgl_diffusion.bench.gpu_suite", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_suite"), help="folder for the reports")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated (default: all)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device")
    args.out.mkdir(parents=True, exist_ok=True)
    print(" | ".join(f"{key} {value}" for key, value in kernels.machine("cuda").items()))
    results = [PARTS[name](args.out) for name in args.part or PARTS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
