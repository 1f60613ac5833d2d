"""`sglang plan`: the memory that `sglang generate` would need with the same flags, from configs alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sgl_diffusion.cli.flags import parse_command_line
from sgl_diffusion.cli.generate import add_arguments, set_up_logging
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs, parse_args
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.report import MemoryReport


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    add_arguments(parser)
    parser.add_argument("--json", metavar="FILE", default=argparse.SUPPRESS, help="write the prediction there as well")
    parser.add_argument(
        "--measure", action="store_true", default=argparse.SUPPRESS, help="draw it too, and show what it took"
    )
    values = parse_command_line(parser, argv)
    file, measure = values.pop("json", None), values.pop("measure", False)
    server, sampling = parse_args(values)
    set_up_logging(server.log_level)

    from sgl_diffusion.runtime.latents import resumed
    from sgl_diffusion.runtime.request import resolve_request
    from sgl_diffusion.runtime.resolve import resolve

    sampling, latents = resumed(sampling, server)
    if not sampling.prompt and sampling.prompt_path is None:  # its words do not matter here
        sampling = sampling.model_copy(update={"prompt": [""]})
    model = resolve(server, [sampling])
    planner = model.memory
    if planner is None:
        raise UserError(f"model_path={server.model_path}: runs on diffusers ({model.why}), which cannot be planned")
    request = resolve_request(sampling, model.sampling_defaults, server)
    work = planner.rehearsal.workload(request, decode_only=latents is not None)
    tiling, refusal = planner.choose(work)
    report = planner.report(work, tiling)
    if measure and not refusal:
        report = _measured(server, sampling)
    if file is not None:
        _write(Path(file), report)
    frames = f", {work.size.frames} frames" if work.size.frames > 1 else ""
    size = f"{work.size.width}x{work.size.height}{frames}"
    print(f"{server.model_path} on {model.plan.device}: {work.pictures} of {size}, {work.schedule.steps} steps")
    show(Console(highlight=False, markup=False, emoji=False), report)
    if refusal:
        raise UserError(refusal)
    return 0


def _measured(server: ServerArgs, sampling: SamplingParams) -> MemoryReport:
    """The prediction, beside what drawing it took. No picture is saved."""
    from sgl_diffusion.runtime.engine import Engine

    sampling = sampling.model_copy(update={"measure_memory": True, "save_output": False})
    report = Engine.load(server, like=sampling).run(sampling).report.memory
    assert report is not None, "a measured run has one"
    return report


def show(console: Console, report: MemoryReport) -> None:
    """Tables of the components and of the stages, and what they come to."""
    measured = report.measured_peak_mb is not None
    components = Table("component", "dtype", "weights are", box=SIMPLE)
    stages = Table("stage", box=SIMPLE)
    for column in ("MiB", "on the device"):
        components.add_column(column, justify="right")
    for column in ("weights", "activations", "MiB", *(("measured", "error") if measured else ())):
        stages.add_column(column, justify="right")
    for name, c in report.components.items():
        where = f"{c.residency}, {c.host}" if c.host else c.residency
        components.add_row(name, c.dtype, where, f"{c.weights_mb:,.1f}", f"{c.device_mb:,.1f}")
    for s in report.stages:
        row = [f"{mib:,.1f}" for mib in (s.weights_mb, s.activations_mb, s.predicted_mb)]
        if s.measured_mb is not None:
            row += [f"{s.measured_mb:,.1f}", f"{s.predicted_mb / s.measured_mb - 1:+.2%}"]
        stages.add_row(s.name, *row)
    console.print(components)
    console.print(stages)
    told = [f"peak {report.peak_mb:,.1f} MiB"]
    for name, size in {
        "workspace in it": report.workspace_mb,
        "captured steps beside it": report.graphs_mb,
        "pinned host memory": report.pinned_host_mb,
        "pageable host memory": report.pageable_host_mb,
        "in mapped files": report.mapped_host_mb,
    }.items():
        if size:
            told.append(f"{name} {size:,.1f}")
    if report.available_mb is not None:
        told.append(f"available {report.available_mb:,.1f}")
    print(", ".join([*told, f"decode {'in tiles' if report.decode == 'tiles' else 'as a whole'}"]))
    if numbers := report.chosen.get("offload_numbers"):
        needed = ", ".join(f"{way} {mib:,.1f}" for way, mib in numbers["needed_mb"].items())
        print(f"performance mode auto chose: {numbers['way']} ({needed} MiB of {numbers['available_mb']:,.1f})")


def _write(path: Path, report: MemoryReport) -> None:
    try:
        path.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as e:
        raise RunFailure(f"{path} cannot be written: {e.strerror}") from e
