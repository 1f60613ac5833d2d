"""`sglang plan`: the memory that `sglang generate` would need with the same flags, from configs alone; of several GPUs,
every layout, with the time and the traffic that an analytic model predicts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sgl_diffusion.cli.flags import parse_command_line
from sgl_diffusion.cli.generate import add_arguments, set_up_logging
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs, parse_args
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.report import MIB, MemoryReport

if TYPE_CHECKING:
    from sgl_diffusion.runtime.parallel.costs import Machine
    from sgl_diffusion.runtime.parallel.steps import Observer

GPU = (
    "what layouts are predicted for: here (default), this device, measured; h200, by its data sheet, in bf16 unless "
    "told otherwise; or a FILE of `sglang bench kernels --op attention --json`"
)
LINKS = (
    "INTRA[,INTER] within a host and between hosts, each one of nvlink, pcie5, infiniband-400, loopback, or a FILE of "
    "`sglang bench links` (default: by the device's name, and infiniband-400)"
)


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    add_arguments(parser)
    parser.add_argument("--json", metavar="FILE", default=argparse.SUPPRESS, help="write the prediction there as well")
    parser.add_argument(
        "--measure", action="store_true", default=argparse.SUPPRESS, help="draw it too, and show what it took"
    )
    parser.add_argument("--gpu", metavar="GPU", default=argparse.SUPPRESS, help=GPU)
    parser.add_argument("--links", metavar="LINKS", default=argparse.SUPPRESS, help=LINKS)
    values = parse_command_line(parser, argv)
    file, measure = values.pop("json", None), values.pop("measure", False)
    gpu, links = values.pop("gpu", None), values.pop("links", None)
    server, sampling = parse_args(values)
    if gpu not in (None, "here") and server.precision == "auto":  # what a GPU would run in
        server = server.model_copy(update={"precision": "bf16"})
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
    ranks = planner.plan.layout.ranks
    if ranks == 1 and (gpu or links):
        raise UserError(f"{'gpu' if gpu else 'links'}={gpu or links}: no effect without several GPUs; see num_gpus")
    written = report.model_dump()
    frames = f", {work.size.frames} frames" if work.size.frames > 1 else ""
    size = f"{work.size.width}x{work.size.height}{frames}"
    print(f"{server.model_path} on {model.plan.device}: {work.pictures} of {size}, {work.schedule.steps} steps")
    console = Console(highlight=False, markup=False, emoji=False)
    show(console, report)
    if ranks > 1:
        from sgl_diffusion.runtime.parallel.machines import HERE, machine_of
        from sgl_diffusion.runtime.parallel.steps import Observer, denoiser_dtype

        machine = machine_of(server, ranks, model.plan.device, denoiser_dtype(planner), gpu or HERE, links)
        written["layouts"] = show_layouts(console, Observer(planner, work), server, machine)
    if file is not None:
        _write(Path(file), written)
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


def show_layouts(console: Console, observer: Observer, server: ServerArgs, machine: Machine) -> list[dict[str, Any]]:
    """A table of all layouts, the fastest first, and a warning where fewer GPUs are predicted to be faster; what
    `--json` writes of them.
    """
    from sgl_diffusion.runtime.parallel.costs import slower_than_fewer

    chosen, rates = observer.planner.plan.layout, machine.rates
    (one,), found = (observer.predictions(server, n, machine) for n in (1, chosen.ranks))
    told = f"{rates.name} ({rates.source}), links {machine.within.name}"
    if server.nnodes > 1:
        told += f" within {server.nnodes} hosts of {machine.gpus_per_host}, {machine.between.name} between them"
    if server.use_fsdp_inference:
        told += "; all without use_fsdp_inference, whose gathers are not in the model"
    print(f"layouts of {chosen.ranks} GPUs, PREDICTED by an analytic model, not measured: {told}")
    table = Table("layout", "", box=SIMPLE)
    for column in ("step ms", "speed-up", "of it waiting", "MB sent a rank", "GiB a rank"):
        table.add_column(column, justify="right", no_wrap=True)
    written: list[dict[str, Any]] = []
    for p in found:
        memory, waits = observer.memory(p.layout), sum(p.waits.values())
        marks = ["best"] * (p is found[0]) + ["chosen"] * (p.layout == chosen)
        numbers = f"{p.step_ms:,.2f}", f"{one.step_ms / p.step_ms:.2f}x", f"{waits:,.2f}", f"{p.sent_bytes / 1e6:,.1f}"
        table.add_row(str(p.layout), ", ".join(marks), *numbers, f"{memory / 2**30:,.1f}")
        split = {"products": p.products, "attention": p.attention, "rest": p.rest, "waits": p.waits}
        times = {"layout": asdict(p.layout), "step_ms": p.step_ms, "split_ms": split}
        written.append({**times, "sent_bytes": p.sent, "memory_mb": memory / MIB})
    console.print(table)
    divisors = [n for n in range(1, chosen.ranks) if chosen.ranks % n == 0]
    fewer = [p for n in divisors for p in observer.predictions(server, n, machine)]
    if warning := next((slower_than_fewer(p, fewer) for p in found if p.layout == chosen), None):
        print(f"warning: {warning}")
    return written


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as e:
        raise RunFailure(f"{path} cannot be written: {e.strerror}") from e
