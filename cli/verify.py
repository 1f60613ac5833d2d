"""`sglang verify MODEL`: does the native pipeline equal diffusers on this checkpoint?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Column, Table

from sgl_diffusion.cli.flags import add_flags, parse_command_line
from sgl_diffusion.cli.generate import set_up_logging
from sgl_diffusion.runtime.args import parse_args
from sgl_diffusion.runtime.errors import UserError

COLUMNS = ("stage", "shape", "max abs", "max/std", "rel. L2", "PSNR dB", "")
FILE_WIDTH = 120  # columns where the output is not a terminal
PROMPT = "a red circle left of a blue square on a yellow background"


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Exit code 0 if every stage is within the tolerance, 1 if not."""
    parser.usage = "sglang verify [MODEL] [--output FILE] [--tolerance X] [flags of generate]"
    own = parser.add_argument_group("Comparison")
    own.add_argument("--output", type=Path, default=argparse.SUPPRESS, help="write the comparison to this JSON file")
    own.add_argument(
        "--tolerance", type=float, default=argparse.SUPPRESS,
        help="largest |difference| over the std of diffusers' tensor (default: 1e-4 in fp32)",
    )  # fmt: skip
    add_flags(parser)
    if argv and not argv[0].startswith("-"):
        argv = ["--model-path", *argv]
    values = parse_command_line(parser, argv)
    output, tolerance = values.pop("output", None), values.pop("tolerance", None)
    if output is not None and not output.resolve().parent.is_dir():
        raise UserError(f"output={output}: the folder {output.parent} does not exist")
    server, sampling = parse_args({"prompt": PROMPT, **values, "save_output": False})
    set_up_logging(server.log_level if "log_level" in values else "warning")

    from sgl_diffusion.runtime.verify import verify

    result = verify(server, sampling, tolerance)
    table = Table(*(Column(name, no_wrap=True) for name in COLUMNS), box=box.SIMPLE)
    for c in result.comparisons:
        numbers = (f"{c.max_abs:.2e}", f"{c.relative_max:.2e}", f"{c.relative_l2:.2e}", f"{c.psnr:.1f}")
        table.add_row(c.stage, "x".join(map(str, c.shape)), *numbers, "ok" if c.passed else "FAIL")
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(table)
    known = ", ".join(f"{k} {v}" for k, v in result.versions.items() if v)
    console.print(f"tolerance {result.tolerance:g} of the std; {known}", highlight=False)
    console.print("passed" if result.passed else "FAILED")
    if output is not None:
        output.write_text(json.dumps(result.as_dict(), indent=2, default=str) + "\n")
    return 0 if result.passed else 1
