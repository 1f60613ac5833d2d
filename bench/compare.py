"""Native against diffusers on one checkpoint in one process, taking turns: `python -m sgl_diffusion.bench.compare`.

Both sides load the same weights, draw the same request and are timed by the same stopwatch (CUDA events on a GPU).
They alternate, so that a busy machine slows both, and their pictures are compared before any time is believed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgl_diffusion.bench.checkpoints import write_denoiser_checkpoint
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.report import Report, commit_hash, versions

MIN_PSNR_DB = 40.0


@dataclass(frozen=True)
class Side:
    """Medians of one backend, in milliseconds."""

    step_ms: float
    text_encoding_ms: float
    decoding_ms: float
    total_ms: float


@dataclass(frozen=True)
class Comparison:
    native: Side
    diffusers: Side
    step_ratio: float  # diffusers / native: above 1 native is faster
    psnr_db: float  # between the two pictures
    rounds: int
    settings: Mapping[str, Any]
    versions: Mapping[str, Any]
    commit: str | None


def compare(model_path: str, params: SamplingParams, *, rounds: int = 5, warmup: int = 1, **server: Any) -> Comparison:
    """Alternates `rounds` generations of each backend after `warmup` of each.

    Raises:
        RuntimeError: the pictures differ (PSNR below 40 dB): a wrong answer is not timed.
    """
    engines = {b: Engine.load(ServerArgs(model_path=model_path, backend=b, **server)) for b in ("sglang", "diffusers")}
    reports: dict[str, list[Report]] = {b: [] for b in engines}
    pictures: dict[str, np.ndarray] = {}
    for turn in range(warmup + rounds):
        for backend in sorted(engines, reverse=bool(turn % 2)):  # each goes first in every other round
            result = engines[backend].run(params)
            pictures[backend] = np.asarray(result.outputs[0].image, dtype=np.float64)
            if turn >= warmup:
                reports[backend].append(result.report)
    psnr = _psnr(pictures["sglang"], pictures["diffusers"])
    if psnr < MIN_PSNR_DB:
        raise RuntimeError(f"the pictures differ: PSNR {psnr:.1f} dB; not timed")
    native, judge = _side(reports["sglang"]), _side(reports["diffusers"])
    return Comparison(
        native=native,
        diffusers=judge,
        step_ratio=judge.step_ms / native.step_ms,
        psnr_db=psnr,
        rounds=rounds,
        settings={
            "model": model_path,
            **params.model_dump(exclude_unset=True),
            **server,
            "threads": torch.get_num_threads(),
        },
        versions=versions(engines["sglang"].device),
        commit=commit_hash(),
    )


def _side(reports: Sequence[Report]) -> Side:
    def stage(name: str) -> float:
        return statistics.median(next((s.duration_ms for s in r.steps if s.name == name), 0.0) for r in reports)

    return Side(
        step_ms=statistics.median(s.duration_ms for r in reports for s in r.denoise_steps_ms),
        text_encoding_ms=stage("text_encoding"),
        decoding_ms=stage("decoding"),
        total_ms=statistics.median(r.total_duration_ms for r in reports),
    )


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.mean((a - b) ** 2))
    return 99.0 if error == 0 else float(10 * np.log10(255.0**2 / error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model-path",
        help="checkpoint to run; without it a random one of --width and --blocks is written",
    )
    parser.add_argument("--work", type=Path, default=Path("outputs/bench"), help="folder for the random checkpoint")
    parser.add_argument("--width", type=int, default=1024, help="width of the random checkpoint, a multiple of 128")
    parser.add_argument("--blocks", type=int, default=6, help="double blocks, and as many single blocks")
    parser.add_argument("--size", type=int, default=512, help="pixels per side; 512 gives 1024 image tokens")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = args.model_path or str(write_denoiser_checkpoint(args.work, args.width, args.blocks))
    params = SamplingParams(
        prompt=["a red circle left of a blue square on a yellow background"],
        height=args.size,
        width=args.size,
        num_inference_steps=args.steps,
        max_sequence_length=args.text_tokens,
        seed=1,
        save_output=False,
    )
    result = compare(model, params, rounds=args.rounds, precision=args.precision)
    for name, side in (("native", result.native), ("diffusers", result.diffusers)):
        stages = f"text {side.text_encoding_ms:7.1f}  decode {side.decoding_ms:8.1f}  total {side.total_ms:9.1f}"
        print(f"{name:10} step {side.step_ms:9.1f} ms  {stages}")
    print(f"ratio of step medians (diffusers / native): {result.step_ratio:.3f}   PSNR {result.psnr_db:.1f} dB")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(asdict(result), indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
