"""`sglang verify MODEL`: does the native pipeline equal diffusers on this checkpoint? Of a model with quantised layers:
what do they cost, compared with the same model in full?
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Column, Table

from sgl_diffusion.cli.flags import add_flags, parse_command_line
from sgl_diffusion.cli.generate import set_up_logging
from sgl_diffusion.runtime.args import parse_args
from sgl_diffusion.runtime.errors import UserError

if TYPE_CHECKING:
    from sgl_diffusion.runtime.quality import LayerError, Quality
    from sgl_diffusion.runtime.verify import Verification

COLUMNS = ("stage", "shape", "max abs", "max/std", "rel. L2", "PSNR dB", "")
LAYER_COLUMNS = ("layer", "format", "weights", "worst row", "outputs")
PICTURE_COLUMNS = ("picture", "seed", "final latents", "PSNR dB", "SSIM", "LPIPS")
WORST = 8  # layers that are shown
FILE_WIDTH = 120  # columns where the output is not a terminal
PROMPT = "a red circle left of a blue square on a yellow background"


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Exit code 0 if every stage is within the tolerance, or every error within the scheme's; 1 if not."""
    parser.usage = "sglang verify [MODEL] [--output FILE] [--tolerance X] [--scenes N] [flags of generate]"
    own = parser.add_argument_group("Comparison")
    own.add_argument("--output", type=Path, default=argparse.SUPPRESS, help="write the comparison to this JSON file")
    own.add_argument(
        "--tolerance", type=float, default=argparse.SUPPRESS,
        help="largest |difference| over the std of diffusers' tensor (default: 1e-4 in fp32)",
    )  # fmt: skip
    own.add_argument(
        "--scenes", type=int, default=argparse.SUPPRESS,
        help="pictures of the embedded model that code judges, where layers are quantised (default: 100)",
    )  # fmt: skip
    add_flags(parser)
    if argv and not argv[0].startswith("-"):
        argv = ["--model-path", *argv]
    values = parse_command_line(parser, argv)
    output, tolerance, scenes = (values.pop(name, None) for name in ("output", "tolerance", "scenes"))
    if output is not None and not output.resolve().parent.is_dir():
        raise UserError(f"output={output}: the folder {output.parent} does not exist")
    server, sampling = parse_args({"prompt": PROMPT, **values, "save_output": False})
    set_up_logging(server.log_level if "log_level" in values else "warning")

    from sgl_diffusion.runtime.quality import is_quantized, judge_quantization

    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False, markup=False)
    result: Quality | Verification
    if is_quantized(server, sampling):
        if tolerance is not None:
            raise UserError(f"tolerance={tolerance:g}: of the comparison with diffusers; schemes declare their own")
        result = judge_quantization(server, sampling, scenes)
        _show_quality(console, result)
    else:
        if scenes is not None:
            raise UserError(f"scenes={scenes}: has no effect without quantised layers; see quantization")
        from sgl_diffusion.runtime.verify import verify  # with diffusers, which takes a second to import

        result = verify(server, sampling, tolerance)
        _show_stages(console, result)
    console.print("passed" if result.passed else "FAILED")
    if output is not None:
        output.write_text(json.dumps(result.as_dict(), indent=2, default=str) + "\n")
    return 0 if result.passed else 1


def _show_stages(console: Console, result: Verification) -> None:
    table = _table(COLUMNS)
    for c in result.comparisons:
        numbers = (f"{c.max_abs:.2e}", f"{c.relative_max:.2e}", f"{c.relative_l2:.2e}", f"{c.psnr:.1f}")
        table.add_row(c.stage, "x".join(map(str, c.shape)), *numbers, "ok" if c.passed else "FAIL")
    console.print(table)
    known = ", ".join(f"{k} {v}" for k, v in result.versions.items() if v)
    console.print(f"tolerance {result.tolerance:g} of the std; {known}")


def _table(columns: Sequence[str]) -> Table:
    """Of names, and of prompts, which may take several lines."""
    return Table(*(Column(name, no_wrap=name != "picture") for name in columns), box=box.SIMPLE)


def _show_quality(console: Console, result: Quality) -> None:
    for key, receipt in result.receipts.items():
        size = f"{receipt['weights_mb']:.2f} MiB instead of {receipt['in_full_mb']:.2f}"
        console.print(f"{key}: {receipt['format']}, {receipt['layers']} layers, {size}")
    classes: dict[tuple[str, str], list[LayerError]] = {}
    for error in result.layers:
        classes.setdefault((f"{error.component}.{error.layer_class}", error.format), []).append(error)
    table = _table(LAYER_COLUMNS)
    for (name, format), errors in classes.items():
        means = [statistics.mean(column) for column in zip(*map(_numbers, errors), strict=True)]
        table.add_row(f"{name} (mean of {len(errors)})", format, *(f"{x:.4f}" for x in means))
    table.add_section()
    for error in sorted(result.layers, key=lambda e: e.outputs, reverse=True)[:WORST]:
        table.add_row(f"{error.component}.{error.layer}", error.format, *(f"{x:.4f}" for x in _numbers(error)))
    console.print(table)
    table = _table(PICTURE_COLUMNS)
    for p in result.pictures:
        seen = ["" if x is None else f"{x:.4f}" for x in (p.ssim, p.lpips)]
        table.add_row(p.prompt, str(p.seed), f"{p.latents:.4f}", f"{p.psnr:.1f}", *seen)
    console.print(table)
    times, how = result.step_ms, "slower" if result.step_ms.is_slower else "not slower"
    console.print(f"a step takes {times.quantized:.2f} ms, in full {times.full:.2f} ms: quantised is {how} here")
    if result.lpips:
        console.print(f"no LPIPS: {result.lpips}")
    if scores := result.scores:
        for name in ("scene", "shapes"):
            shares = f"{scores.full[name]:.1%} in full, {scores.quantized[name]:.1%} quantised"
            console.print(f"{name} right: {shares}, of {scores.scenes} held-out scenes")
    if not result.checks:
        console.print("these formats declare no tolerance")
    for check in result.checks:
        told = f"{check.what}: at worst {check.worst:.4g}, allowed {check.allowed:g}"
        console.print(f"{told}: {'ok' if check.passed else 'FAIL'}")


def _numbers(error: LayerError) -> tuple[float, float, float]:
    return error.weights, error.worst_row, error.outputs
