"""Everything a GPU has to show, in one command: answers first, then times.

    python -m sgl_diffusion.bench.gpu_suite [--out FOLDER] [--part correctness|kernels|end_to_end|quantized]

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
from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.kernels.catalog import OPS
from sgl_diffusion.models.family import Guidance, Size
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.limits import limits
from sgl_diffusion.runtime.quantization.schemes import SCHEMES
from sgl_diffusion.runtime.rehearsal import fewest_pictures
from sgl_diffusion.runtime.resolve import presets, resolve

WORKERS = 8
MOST_STEPS = 8  # of a comparison
WEIGHTS_SHARE = 0.85  # of the GPU's memory; the rest is for what the sides compute


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
    """A model of every pipeline class, at true size with dummy weights, a few steps against diffusers; the first also
    against diffusers compiled.
    """
    for i, name in enumerate(compared()):
        print(name)
        defaults = launches.find(name)[1].defaults
        params = SamplingParams(
            prompt=["a cat"], num_inference_steps=min(defaults.num_inference_steps, MOST_STEPS), save_output=False
        )
        server = {"model_path": name, "load_format": "dummy", "device": "cuda"}
        rivals = [*e2e.RIVALS] if i == 0 else ["diffusers"]
        result = e2e.compare(server, params, rivals, rounds=1 if defaults.num_frames > 1 else 3)
        e2e.show(result)
        short = name.rpartition("/")[2]
        e2e.write_json(out / f"end_to_end-{short}.json", result)
        e2e.plot(out / f"end_to_end-{short}.svg", result)
        torch.cuda.empty_cache()
    return True


def quantized(out: Path) -> bool:
    """Steps of the first model that is compared, in full and by every scheme, and what multiplied in them."""
    rows, model = [], compared()[0]
    for scheme in (None, *SCHEMES):
        server = {"model_path": model, "load_format": "dummy", "device": "cuda", "quantization": scheme}
        args = ServerArgs.model_validate(server)
        params = SamplingParams(prompt=["a cat"], num_inference_steps=MOST_STEPS, save_output=False)
        with Engine.load(args) as engine:
            engine.run(params)
            report = engine.run(params).report
        receipt = report.effective["quantization"].get("transformer", {})
        rows.append({"scheme": scheme, "step_ms": report.median_step_ms, "receipt": receipt})
        print(f"{scheme or 'in full'}: {report.median_step_ms:.1f} ms a step, {receipt.get('products', '')}")
        torch.cuda.empty_cache()
    write(out / "quantized.json", rows, model=model)
    return True


def compared() -> list[str]:
    """Of every pipeline class, the preset with the fewest weights that draws from a prompt alone, if this GPU holds it
    twice: ours and diffusers'.
    """
    room = torch.cuda.get_device_properties(0).total_memory * WEIGHTS_SHARE
    smallest: dict[str, tuple[int, str]] = {}
    for name in presets():
        resolved = resolve(ServerArgs(model_path=name, load_format="dummy", device="cuda"))
        blueprint = resolved.blueprint
        assert blueprint is not None, "presets are of native families"
        parts, defaults = blueprint.shape_only_parts(lambda key: attention), blueprint.defaults
        size, family = Size(defaults.height, defaults.width, defaults.num_frames), blueprint.family_of(parts)
        if fewest_pictures(family, size, Guidance(None), defaults.max_sequence_length) == 0:
            weights = sum(p.nbytes for key in blueprint.plan.dtypes for p in parts[key].parameters())
            known = smallest.setdefault(resolved.pipeline_class, (weights, name))
            smallest[resolved.pipeline_class] = min(known, (weights, name))
    for weights, name in smallest.values():
        if 2 * weights > room:
            print(f"{name}: not compared, two times {weights / 2**30:.0f} GiB of weights do not fit")
    return [name for weights, name in smallest.values() if 2 * weights <= room]


PARTS: dict[str, Callable[[Path], bool]] = {
    "correctness": correctness,
    "kernels": kernel_times,
    "end_to_end": end_to_end,
    "quantized": quantized,
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
