"""`sglang bench vae`: the decoding of latents, ours and that of diffusers, in one process and by turns.

Both autoencoders hold the same random weights and decode the same latents, and their results are compared before any
time is believed. In tiles, clips are compared with the decode of the whole by diffusers, whose own tiles have seams.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.bench.launches import find
from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.kernels.op import rel_l2
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.runtime.checkpoint import read_json
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.live_bytes import LiveBytes
from sgl_diffusion.runtime.report import MIB, commit_hash, versions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2}  # relative L2; in bf16 both round at every layer, at other places


@dataclass(frozen=True)
class Comparison:
    """Medians and the most memory of tensors beside the weights. Ratios are diffusers' over ours: above 1 is better."""

    native_ms: float
    diffusers_ms: float
    ratio: float
    native_peak_mib: float
    diffusers_peak_mib: float
    memory_ratio: float
    difference: float  # relative L2
    rounds: int
    whole_ms: float | None = None  # of ours without tiles, beside ours in tiles
    whole_peak_mib: float | None = None


def compare(
    sides: Mapping[str, Callable[[], Tensor]],
    device: torch.device,
    precision: str,
    rounds: int,
    judge: Tensor | None = None,
) -> Comparison:
    """`native`, `diffusers` and perhaps `whole` by turns, one way round and the other.

    Args:
        judge: what `native` has to give, if it is not what `diffusers` gives.
    Raises:
        RunFailure: the results differ: a wrong answer is not timed.
    """
    peaks, results = {}, {}
    for name, decode in sides.items():
        with LiveBytes(device.type) as live:
            results[name] = decode()
        peaks[name] = live.peak / MIB
    difference = rel_l2(results["native"], results["diffusers"] if judge is None else judge)
    if not difference < TOLERANCE[precision]:
        raise RunFailure(f"the results differ: relative L2 {difference:.1e}; not timed")
    results.clear()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sorted(sides, reverse=turn % 2 == 0):
            times[name].append(_milliseconds(sides[name], device))
    ours, theirs = (statistics.median(times[name]) for name in ("native", "diffusers"))
    return Comparison(
        native_ms=ours,
        diffusers_ms=theirs,
        ratio=theirs / ours,
        native_peak_mib=peaks["native"],
        diffusers_peak_mib=peaks["diffusers"],
        memory_ratio=peaks["diffusers"] / peaks["native"],
        difference=difference,
        rounds=rounds,
        whole_ms=statistics.median(times["whole"]) if "whole" in sides else None,
        whole_peak_mib=peaks.get("whole"),
    )


def _milliseconds(run: Callable[[], Tensor], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autoencoders(model: str, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Ours and that of diffusers, with the same random weights.

    Raises:
        UserError: a config that is not implemented natively.
    """
    import diffusers

    family, _ = find(model)
    theirs = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    theirs.to(device, dtype).eval().requires_grad_(False)
    try:
        with torch.device("meta"):
            ours = family.build("vae", theirs.config, attention, {"with_encoder": True})
    except ConfigError as e:
        raise UserError(f"config: {e}") from e
    ours.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("--model", required=True, help="a preset: its hub id, or its name in small letters")
    parser.add_argument("--config", type=Path, metavar="FILE", help="another vae/config.json for this family")
    parser.add_argument("--height", type=int, default=64, help="pixels (default: 64)")
    parser.add_argument("--width", type=int, default=96, help="pixels (default: 96)")
    parser.add_argument("--frames", type=int, default=5, help="of a clip, 4 k + 1; pictures have one (default: 5)")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="default: fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--tiling", action="store_true", help="decode in tiles on both sides, and beside them as a whole"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed turns (default: 5)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    if args.frames % 4 != 1:
        raise UserError(f"frames={args.frames}: expected 4 k + 1")
    for name, lowest in (("height", 1), ("width", 1), ("rounds", 1), ("threads", 1)):
        if (value := getattr(args, name)) is not None and value < lowest:
            raise UserError(f"{name}={value}: must be at least {lowest}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: PyTorch sees no GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    config = _config(args.model, args.config)
    result, device = _measure(args, config), torch.device(args.device)
    frames = f" of {args.frames} frames" if args.frames > 1 else ""
    print(f"decoding {args.width}x{args.height}{frames} as {args.model}, {args.precision} on {args.device}")
    print(f"native {result.native_ms:.1f} ms, diffusers {result.diffusers_ms:.1f} ms: {result.ratio:.2f}x")
    print(
        f"most memory beside weights: native {result.native_peak_mib:.0f} MiB, "
        f"diffusers {result.diffusers_peak_mib:.0f} MiB: {result.memory_ratio:.2f}x"
    )
    if result.whole_ms is not None:
        print(f"native without tiles {result.whole_ms:.1f} ms, {result.whole_peak_mib:.0f} MiB")
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "config")}
        facts = {"settings": settings, "config": dict(config), "threads": torch.get_num_threads()}
        about = {"versions": versions(device), "commit": commit_hash()}
        args.json.write_text(json.dumps({**asdict(result), **facts, **about}, indent=1, default=str) + "\n")
    return 0


def _config(model: str, file: Path | None) -> Mapping[str, Any]:
    _, preset = find(model)
    if "vae" not in preset.components:
        raise UserError(f"model={model}: its autoencoder is not native")
    if file is None:
        return preset.components["vae"]
    return {"_class_name": preset.components["vae"]["_class_name"], **read_json(file)}


def _measure(args: argparse.Namespace, config: Mapping[str, Any]) -> Comparison:
    device, dtype = torch.device(args.device), DTYPES[args.precision]
    torch.manual_seed(0)
    ours, theirs = autoencoders(args.model, config, device, dtype)
    f = ours.config.downsampling
    for name in ("height", "width"):
        if getattr(args, name) % f:
            raise UserError(f"{name}={getattr(args, name)}: expected a multiple of {f}")
    is_clip = "z_dim" in config
    if args.frames > 1 and not is_clip:
        raise UserError(f"frames={args.frames}: {args.model} makes pictures, expected 1")
    frames = (1 + args.frames // 4,) if is_clip else ()
    channels = config["z_dim" if is_clip else "latent_channels"]
    z = torch.randn(1, channels, *frames, args.height // f, args.width // f).to(device, dtype)

    def native(tiling: bool) -> Tensor:
        ours.tiling = tiling
        decoded: Tensor = ours.decode(z)
        return decoded

    sides = {"native": lambda: native(args.tiling), "diffusers": lambda: theirs.decode(z).sample}
    judge = None
    with torch.inference_mode():
        if args.tiling:
            sides["whole"] = lambda: native(False)
            judge = theirs.decode(z).sample if is_clip else None
            theirs.enable_tiling()
        return compare(sides, device, args.precision, args.rounds, judge)
