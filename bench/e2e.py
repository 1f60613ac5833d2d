"""`sglang bench e2e`: whole generations, ours and those of diffusers, in one process and by turns.

All sides load the same weights, draw the same request, down to what the user left to a default, and are timed by the
same stopwatch (CUDA events on a GPU). They take turns, so that a busy machine slows all, and their pictures are
compared before any time is believed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgl_diffusion.bench.checkpoints import write_denoiser_checkpoint
from sgl_diffusion.bench.launches import spellings
from sgl_diffusion.bench.plot import Bar, bars
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.option import nearest, parse
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.report import MIB, Accounting, Report, StageTime, commit_hash, versions
from sgl_diffusion.runtime.request import resolve_request, spelled_out
from sgl_diffusion.runtime.resolve import presets

PROMPT = "a red circle left of a blue square on a yellow background"
MIN_PSNR_DB = 40.0
RANDOM = re.compile(r"random-(\d+)x(\d+)")
# what ours is compared with -> its server arguments
RIVALS: dict[str, dict[str, Any]] = {
    "diffusers": {"backend": "diffusers"},
    "diffusers-compile": {"backend": "diffusers", "enable_torch_compile": True},
}


@dataclass(frozen=True)
class Side:
    """Medians of one side in milliseconds. A ratio is its time over ours: above 1 ours is faster."""

    name: str
    step_ms: float
    total_ms: float
    stages_ms: dict[str, float]
    step_ratio: float
    total_ratio: float
    step_share: float  # of the shortest time this device could take; see `runtime.accounting`
    total_share: float
    peak_memory_mb: float | None  # of the device, weights included; None on a CPU, where sides share the process
    psnr_db: float  # of the picture, against ours


@dataclass(frozen=True)
class Comparison:
    sides: list[Side]
    accounting: dict[str, Any]  # of ours
    rounds: int
    settings: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None


@dataclass
class Runner:
    """An engine and what its generations showed."""

    engine: Engine
    own_mb: float  # device memory that it keeps between generations
    reports: list[Report] = field(default_factory=list)
    picture: np.ndarray = field(default_factory=lambda: np.zeros(()))
    peak_mb: float = 0.0

    @classmethod
    def load(cls, args: ServerArgs) -> Runner:
        before = _allocated_mb()
        engine = Engine.load(args)
        return cls(engine, _allocated_mb() - before)

    def run(self, params: SamplingParams, *, keep: bool) -> None:
        gpu = self.engine.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.engine.device)
        before = _allocated_mb()
        result = self.engine.run(params)
        if gpu:
            # of all stages: a native run begins to measure anew with each
            grown = result.report.memory_checkpoints["after_forward"].peak_allocated_mb - before
            self.peak_mb = max(self.peak_mb, self.own_mb + grown)
        self.own_mb += _allocated_mb() - before
        output = result.outputs[0]
        self.picture = np.asarray(output.image if output.frames is None else output.frames, dtype=np.float64)
        if keep:
            self.reports.append(result.report)

    def stages(self) -> dict[str, float]:
        """Medians, in the order of the stages."""
        names = dict.fromkeys(stage.name for report in self.reports for stage in report.steps)
        return {
            name: statistics.median(sum(s.duration_ms for s in r.steps if s.name == name) for r in self.reports)
            for name in names
        }

    def step_ms(self) -> float:
        return statistics.median(step.duration_ms for r in self.reports for step in r.denoise_steps_ms)

    def total_ms(self) -> float:
        return statistics.median(r.total_duration_ms for r in self.reports)


def _allocated_mb() -> float:
    return torch.cuda.memory_allocated() / MIB if torch.cuda.is_available() else 0.0


# -- measuring --------------------------------------------------------------------


def compare(
    server: dict[str, Any], params: SamplingParams, rivals: Sequence[str], *, rounds: int = 5, warmup: int = 1
) -> Comparison:
    """`rounds` generations of ours and of every rival by turns, after `warmup` of each.

    Raises:
        RunFailure: a picture differs from ours (PSNR below 40 dB): a wrong answer is not timed.
    """
    sides = {"native": {"backend": "sglang"}} | {name: RIVALS[name] for name in rivals}
    runners = {name: Runner.load(parse(ServerArgs, server | own)) for name, own in sides.items()}
    params = resolved(runners["native"].engine, params)
    names = list(runners)
    for turn in range(warmup + rounds):
        for i in range(len(names)):  # each goes first in its turn
            runners[names[(turn + i) % len(names)]].run(params, keep=turn >= warmup)
    native = runners["native"]
    psnr = {name: _psnr(runner.picture, native.picture) for name, runner in runners.items()}
    for name, decibels in psnr.items():
        if decibels < MIN_PSNR_DB:
            raise RunFailure(f"the picture of {name} differs from ours: PSNR {decibels:.1f} dB; not timed")
    accounts = {name: _account(native.engine, params, runner) for name, runner in runners.items()}
    return Comparison(
        sides=[_side(name, runner, native, accounts[name], psnr[name]) for name, runner in runners.items()],
        accounting=accounts["native"].model_dump(),
        rounds=rounds,
        settings=server | params.model_dump(exclude_unset=True) | {"threads": torch.get_num_threads()},
        versions=versions(native.engine.device),
        commit=commit_hash(),
    )


def resolved(native: Engine, params: SamplingParams) -> SamplingParams:
    """The request with our defaults written out: diffusers has others, and other lengths and steps are other work."""
    assert isinstance(native.backend, NativePipeline)
    request = resolve_request(params, native.model.sampling_defaults, native.args)
    ours = spelled_out(native.backend.prepare(request), native.backend.family)
    return params.model_copy(update=ours)


def _account(native: Engine, params: SamplingParams, runner: Runner) -> Accounting:
    """The work is that of our pipeline: what others do beyond it is their loss."""
    stages = [StageTime(name=name, duration_ms=ms) for name, ms in runner.stages().items()]
    request = resolve_request(params, native.model.sampling_defaults, native.args)
    assert isinstance(native.backend, NativePipeline)
    return native.backend.account(native.backend.prepare(request), stages, runner.total_ms())


def _side(name: str, runner: Runner, native: Runner, accounting: Accounting, psnr: float) -> Side:
    bounds = {stage.name: stage.bound_ms for stage in accounting.stages}
    steps = len(runner.reports[0].denoise_steps_ms)
    return Side(
        name=name,
        step_ms=runner.step_ms(),
        total_ms=runner.total_ms(),
        stages_ms=runner.stages(),
        step_ratio=runner.step_ms() / native.step_ms(),
        total_ratio=runner.total_ms() / native.total_ms(),
        step_share=bounds["denoising"] / steps / runner.step_ms(),
        total_share=sum(bounds.values()) / runner.total_ms(),
        peak_memory_mb=runner.peak_mb if runner.engine.device.type == "cuda" else None,
        psnr_db=psnr,
    )


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.mean((a - b) ** 2))
    return 99.0 if error == 0 else float(10 * np.log10(255.0**2 / error))


# -- report -----------------------------------------------------------------------


def show(result: Comparison) -> None:
    print(f"{'':18}{'step ms':>10}  ratio  share{'total ms':>11}  ratio  share  peak MiB  PSNR")
    for s in result.sides:
        peak = "-" if s.peak_memory_mb is None else f"{s.peak_memory_mb:.0f}"
        step = f"{s.step_ms:10.2f}{s.step_ratio:6.2f}x{s.step_share:7.0%}"
        print(f"{s.name:18}{step}{s.total_ms:11.1f}{s.total_ratio:6.2f}x{s.total_share:7.0%}{peak:>10}{s.psnr_db:6.1f}")
    losses = ", ".join(f"{loss['where']} {loss['ms']:.1f} ms" for loss in result.accounting["largest_losses"])
    print(f"medians of {result.rounds} rounds; ratio: to native; share: of the shortest time this device could take")
    print(f"largest losses of native: {losses}")


def plot(path: Path, result: Comparison) -> None:
    """Times as shares of the slowest side's, and shares of the bound."""
    shares: list[Bar] = []
    for what, time_of, share_of in (
        ("denoising step", "step_ms", "step_share"),
        ("end to end", "total_ms", "total_share"),
    ):
        slowest = max(getattr(s, time_of) for s in result.sides)
        shares += [
            Bar(f"{what}: time, of the slowest ({slowest:.1f} ms)", s.name, getattr(s, time_of) / slowest)
            for s in result.sides
        ]
        shares += [Bar(f"{what}: share of what the device can do", s.name, getattr(s, share_of)) for s in result.sides]
    about = result.versions
    path.write_text(bars(f"{result.settings['model_path']}, {about['device']}, torch {about['torch']}", shares))


def write_json(path: Path, result: Comparison) -> None:
    path.write_text(json.dumps(asdict(result), indent=1, default=str) + "\n")


# -- command line -----------------------------------------------------------------


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument(
        "--model",
        default="embedded",
        help="preset (hub id or its name in small letters), checkpoint folder, embedded, or random-WIDTHxBLOCKS, "
        "a random checkpoint of that width and so many double and single blocks (default: embedded)",
    )
    parser.add_argument("--load-format", default="auto", help="dummy: random weights at true shape (default: auto)")
    parser.add_argument(
        "--compare", metavar="A,B", default="diffusers", help=f"of {', '.join(RIVALS)} (default: diffusers)"
    )
    parser.add_argument("--image-path", nargs="+", metavar="FILE", help="pictures to begin and end a clip with")
    sizes = {"height": "pixels", "width": "pixels", "frames": "of a clip", "steps": "denoising steps"}
    for name, what in sizes.items():
        parser.add_argument(f"--{name}", type=int, help=f"{what} (default: the model's)")
    parser.add_argument("--text-tokens", type=int, help="length of the text (default: the model's)")
    parser.add_argument("--rounds", type=int, default=5, help="timed generations of each side (default: 5)")
    parser.add_argument("--warmup", type=int, default=1, help="generations of each side before them (default: 1)")
    parser.add_argument("--precision", default="auto", help="as of sglang generate")
    parser.add_argument("--device", default="auto", help="as of sglang generate")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--work", type=Path, default=Path("outputs/bench"), help="folder for random checkpoints")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw times and shares, as .svg")
    args = parser.parse_args(argv)
    rivals = args.compare.split(",")
    if unknown := [name for name in rivals if name not in RIVALS]:
        raise UserError(f"compare={unknown[0]}: expected any of {', '.join(RIVALS)}{nearest(unknown[0], [*RIVALS])}")
    for name, lowest in (("rounds", 1), ("warmup", 0), ("threads", 1)):
        if (value := getattr(args, name)) is not None and value < lowest:
            raise UserError(f"{name}={value}: must be at least {lowest}")
    if args.plot and args.plot.suffix != ".svg":
        raise UserError(f"plot={args.plot}: expected a name ending in .svg")
    for name in ("json", "plot"):
        if (file := getattr(args, name)) and not file.resolve().parent.is_dir():
            raise UserError(f"{name}={file}: the folder {file.parent} does not exist")
    if args.threads:
        torch.set_num_threads(args.threads)
    server = {
        "model_path": _model_path(args.model, args.work),
        "load_format": args.load_format,
        "precision": args.precision,
        "device": args.device,
    }
    asked = {
        "height": args.height,
        "width": args.width,
        "num_frames": args.frames,
        "num_inference_steps": args.steps,
        "max_sequence_length": args.text_tokens,
        "image_path": args.image_path,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    params = parse(SamplingParams, {"prompt": PROMPT, "seed": 1, "save_output": False, **given})
    result = compare(server, params, rivals, rounds=args.rounds, warmup=args.warmup)
    show(result)
    if args.json:
        write_json(args.json, result)
    if args.plot:
        plot(args.plot, result)
    return 0


def _model_path(model: str, work: Path) -> str:
    """A preset's hub id, the folder of a random checkpoint, or the name as it is."""
    if random := RANDOM.fullmatch(model):
        return str(write_denoiser_checkpoint(work, int(random[1]), int(random[2])))
    return {spelling: hub_id for hub_id in presets() for spelling in spellings(hub_id)}.get(model, model)
