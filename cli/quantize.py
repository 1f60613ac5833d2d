"""`sglang quantize`: writes a checkpoint with quantised denoisers."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgl_diffusion.cli.flags import add_flags, parse_command_line
from sgl_diffusion.cli.generate import set_up_logging
from sgl_diffusion.runtime.args import SamplingParams, parse_args
from sgl_diffusion.runtime.errors import UserError


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.usage = "sglang quantize --model-path MODEL --quantization SCHEME --output DIR [flags of generate]"
    own = parser.add_argument_group("Written")
    own.add_argument("--output", type=Path, required=True, help="a new folder, for --model-path")
    own.add_argument(
        "--calibration-prompts", type=Path, default=argparse.SUPPRESS, metavar="FILE",
        help="text file with one prompt a line, drawn first: fp8 and int8 get fixed scales of activations, int4 and "
        "svdquant smooth channels with large ones; sizes and steps as of generate",
    )  # fmt: skip
    add_flags(parser)
    values = parse_command_line(parser, argv)
    output, file = values.pop("output"), values.pop("calibration_prompts", None)
    drawn = {name: value for name, value in values.items() if name in SamplingParams.model_fields}
    if drawn and (file is None or "prompt" in drawn):
        name = "prompt" if "prompt" in drawn else next(iter(drawn))
        raise UserError(f"{name}={drawn[name]}: no effect here; calibration_prompts says what is drawn, if anything is")
    if file is not None:
        drawn["prompt"] = _prompts(file)
    server, sampling = parse_args(values | drawn)
    set_up_logging(server.log_level if "log_level" in values else "warning")

    from sgl_diffusion.runtime.quantization.convert import quantize_checkpoint

    for key, r in quantize_checkpoint(server, output, None if file is None else sampling).items():
        layers = f"{r['layers']} layers quantised, {sum(r['kept'].values())} kept"
        print(f"{key}: {r['format']}: {layers}; {r['weights_mb']:,.1f} MiB instead of {r['in_full_mb']:,.1f} MiB")
        for reason, count in r["kept"].items():
            print(f"  kept {count}: {reason}")
    print(f"wrote {output}")
    return 0


def _prompts(file: Path) -> list[str]:
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"calibration_prompts={file}: cannot be read: {e}") from e
    if not prompts:
        raise UserError(f"calibration_prompts={file}: has no prompts")
    return prompts
