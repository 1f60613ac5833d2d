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

from sgl_diffusion.bench import e2e, kernels, launches
from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.catalog import OPS
from sgl_diffusion.runtime.args import SamplingParams
from sgl_diffusion.runtime.limits import limits
from sgl_diffusion.runtime.resolve import presets

WORKERS = 8
CLIP_STEPS = 4


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
    """Presets at true size with dummy weights: pictures against diffusers and diffusers compiled; of clips, those from
    a prompt by the smallest denoiser, a few steps against diffusers.
    """
    for name in [*(n for n in presets() if not _is_clip(n)), _smallest_clip()]:
        server = {"model_path": name, "load_format": "dummy", "device": "cuda"}
        print(name)
        if _is_clip(name):
            params = SamplingParams(prompt=["a cat"], num_inference_steps=CLIP_STEPS, save_output=False)
            result = e2e.compare(server, params, ["diffusers"], rounds=1)
        else:
            params = SamplingParams(prompt=["a cat"], height=1024, width=1024, save_output=False)
            result = e2e.compare(server, params, [*e2e.RIVALS], rounds=3)
        e2e.show(result)
        short = name.rpartition("/")[2]
        e2e.write_json(out / f"end_to_end-{short}.json", result)
        e2e.plot(out / f"end_to_end-{short}.svg", result)
        torch.cuda.empty_cache()
    return True


def _is_clip(name: str) -> bool:
    return launches.find(name)[1].defaults.num_frames > 1


def _smallest_clip() -> str:
    """Of those that need no picture: a denoiser's output has as many channels as its input."""
    configs = {name: launches.find(name)[1].components["transformer"] for name in presets() if _is_clip(name)}
    alone = {name: c for name, c in configs.items() if c["in_channels"] == c["out_channels"]}
    return min(alone, key=lambda name: alone[name]["num_layers"] * alone[name]["num_attention_heads"])


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
