"""`sglang perf show|compare`: reports of runs as tables, ratios and a timeline."""

from __future__ import annotations

import argparse
import html
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sgl_diffusion.cli.flags import Parser
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.report import Accounting, LoadReport, Report

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2")
STEP_COLOUR, BOUND_COLOUR = "#9ecae9", "#222222"
WIDTH, ROW, MARGIN, LEGEND = 1000, 46, 16, 22  # pixels of a timeline


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Exit code 1 from `compare --fail-over` if the last report is slower by more than that share."""
    actions = parser.add_subparsers(dest="action", metavar="show|compare", parser_class=Parser, required=True)
    show = actions.add_parser("show", help="one report as a table", allow_abbrev=False)
    show.add_argument("reports", type=Path, nargs=1, metavar="A.json")
    compare = actions.add_parser("compare", help="two or more reports, with ratios to the first", allow_abbrev=False)
    compare.add_argument("reports", type=Path, nargs="+", metavar="REPORT.json", help="the first is the baseline")
    compare.add_argument("--fail-over", metavar="5%", help="exit 1 if the last is slower, in total or by step")
    for action in (show, compare):
        action.add_argument("--plot", type=Path, metavar="FILE", help="write a timeline, .png or .html")
    args = parser.parse_args(argv)
    limit = _share(args.fail_over) if args.action == "compare" and args.fail_over else None
    if args.action == "compare" and len(args.reports) < 2:
        raise UserError("perf compare: needs two reports or more")
    reports = [Report.read(path) for path in args.reports]
    names = [path.name for path in args.reports]
    if args.plot is not None:
        plot(args.plot, names, reports)
    console = Console(highlight=False, markup=False, emoji=False)  # names of files are no markup
    if args.action == "show":
        print(reports[0].summary())
        for output in reports[0].outputs:
            print(f"saved {output}")
    console.print(comparison(names, reports))
    if args.action == "show" and reports[0].load is not None and reports[0].load.components:
        _show_load(console, reports[0].load)
    if args.action == "show" and reports[0].accounting is not None:
        _show_accounting(console, reports[0].accounting)
    if limit is None:
        return 0
    slower = _slower(args.reports[0], reports[0], args.reports[-1], reports[-1])
    told = ", ".join(f"{name} {abs(s):.1%} {'slower' if s >= 0 else 'faster'}" for name, s in slower.items())
    print(f"{names[-1]} against {names[0]}: {told} (limit {limit:.1%})")
    return 1 if max(slower.values()) > limit else 0


def _share(text: str) -> float:
    """`5%` or `0.05` -> 0.05."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise UserError(f"fail_over={text}: expected a share such as 5% or 0.05")
    return value


def _slower(first_path: Path, first: Report, last_path: Path, last: Report) -> dict[str, float]:
    """Shares by which `last` takes longer, in total and by the median step where both have steps.

    Raises:
        RunFailure: one of the runs failed, so that its times say nothing.
        UserError: the first holds no time to compare with.
    """
    for path, report in ((first_path, first), (last_path, last)):
        if report.error is not None:
            raise RunFailure(f"{path}: not comparable, the run failed: {report.error.type}: {report.error.message}")
    pairs = {"total": (first.total_duration_ms, last.total_duration_ms)}
    if first.median_step_ms is not None and last.median_step_ms is not None:
        pairs["median step"] = (first.median_step_ms, last.median_step_ms)
    if any(a <= 0 for a, _ in pairs.values()):
        raise UserError(f"{first_path}: holds no time to compare with")
    return {name: b / a - 1 for name, (a, b) in pairs.items()}


def times(report: Report) -> dict[str, float]:
    """What a comparison shows, in milliseconds: every stage, the median step, the total."""
    rows: dict[str, float] = {}
    for stage in report.steps:  # a stage may come twice: once for each batch
        rows[stage.name] = rows.get(stage.name, 0.0) + stage.duration_ms
    if report.median_step_ms is not None:
        rows["step (median)"] = report.median_step_ms
    return rows | {"total": report.total_duration_ms}


def comparison(names: Sequence[str], reports: Sequence[Report]) -> Table:
    """A column for every report, and after the first its ratio to the first (above 1 is slower)."""
    table = Table("milliseconds")
    columns = [times(r) for r in reports]
    for i, name in enumerate(names):
        table.add_column(name, justify="right")
        if i:
            table.add_column("ratio", justify="right")
    for row in dict.fromkeys(name for column in columns for name in column):
        cells = [row]
        for i, column in enumerate(columns):
            cells.append(f"{column[row]:.1f}" if row in column else "-")
            if i:
                both = row in column and columns[0].get(row, 0) > 0
                cells.append(f"{column[row] / columns[0][row]:.3f}" if both else "-")
        table.add_row(*cells)
    return table


def _show_load(console: Console, load: LoadReport) -> None:
    """How every component came to where it lives, before the first request."""
    table = Table("component", title=f"load, {load.readers} threads", title_justify="left", box=SIMPLE)
    for column in ("weights", "GB", "GB/s", "ms", "read", "convert", "upload"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, c in load.components.items():
        size, speed = f"{c.bytes_read / 1e9:.3f}", f"{c.gb_per_s:.2f}"
        table.add_row(name, c.weights, size, speed, *(f"{ms:.1f}" for ms in (c.wall_ms, *c.split().values())))
    console.print(table)


def _show_accounting(console: Console, accounting: Accounting) -> None:
    """Every stage beside the shortest time this device could take, and the largest losses."""
    limits = accounting.limits
    reached = ", ".join(f"{rate:.2f} TFLOP/s in {dtype}" for dtype, rate in limits.matmul_tflop_per_s.items())
    table = Table("stage", box=SIMPLE)
    for column in ("TFLOP", "GB", "bound ms", "by", "took ms", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in accounting.stages:
        flops, moved = (sum(getattr(w, of) for w in stage.classes.values()) for of in ("flops", "bytes"))
        amounts = f"{flops / 1e12:.4f}", f"{moved / 1e9:.3f}", f"{stage.bound_ms:.2f}"
        table.add_row(stage.name, *amounts, stage.bound_by, f"{stage.measured_ms:.1f}", f"{stage.share:.0%}")
    console.print(table)
    print(f"limits of this device, measured: copy {limits.copy_gb_per_s:.1f} GB/s, products {reached}")
    losses = ", ".join(f"{loss.where} {loss.ms:.1f} ms" for loss in accounting.largest_losses)
    print(f"largest losses: {losses or 'none'}")


# -- timeline -------------------------------------------------------------------------


def plot(path: Path, names: Sequence[str], reports: Sequence[Report]) -> None:
    """One row for every report: its stages to a common scale, the denoising steps and each bound inside their stage.

    Raises:
        UserError: another suffix than .png or .html, or a place that cannot be written.
    """
    if path.suffix.lower() not in (".png", ".html"):
        raise UserError(f"plot={path}: expected a .png or .html file")
    if not path.resolve().parent.is_dir():
        raise UserError(f"plot={path}: the folder {path.parent} does not exist")
    stages = list(dict.fromkeys(s.name for r in reports for s in r.steps))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(stages)}
    longest = max(map(_length, reports))
    bars = [bar for row, report in enumerate(reports) for bar in _bars(row, report, longest, colours)]
    height = MARGIN + len(reports) * (ROW + LEGEND) + LEGEND
    try:
        if path.suffix.lower() == ".html":
            path.write_text(_svg_page(names, bars, colours, height), encoding="utf-8")
        else:
            _draw(names, bars, colours, height).save(path)
    except OSError as e:
        raise UserError(f"plot={path}: cannot be written: {e.strerror}") from e


Bar = tuple[float, float, float, float, str, str]  # left, top, right, bottom, colour, label


def _length(report: Report) -> float:
    return max(sum(s.duration_ms for s in report.steps), 1e-9)


def _bars(row: int, report: Report, longest: float, colours: Mapping[str, str]) -> list[Bar]:
    scale = (WIDTH - 2 * MARGIN) / longest
    top = MARGIN + row * (ROW + LEGEND) + LEGEND
    left = float(MARGIN)
    bars: list[Bar] = []
    steps = iter(report.denoise_steps_ms)
    batches = sum(stage.name == "denoising" for stage in report.steps)  # each of them takes the same number of steps
    steps_each = math.ceil(len(report.denoise_steps_ms) / max(batches, 1))
    bounds = {} if report.accounting is None else {a.name: a for a in report.accounting.stages}
    for stage in report.steps:
        right = left + stage.duration_ms * scale
        bars.append((left, top, right, top + ROW, colours[stage.name], f"{stage.name}: {stage.duration_ms:.1f} ms"))
        if (account := bounds.get(stage.name)) is not None:
            label = f"bound of {stage.name}: {account.bound_ms:.1f} ms ({account.share:.0%})"
            bars.append((left, top, left + account.bound_ms * scale, top + ROW * 0.15, BOUND_COLOUR, label))
        if stage.name == "denoising":
            at = left
            for step in islice(steps, steps_each):
                end = at + step.duration_ms * scale
                bars.append((at, top + ROW * 0.55, max(at, end - 2), top + ROW, STEP_COLOUR,
                             f"step {step.step}: {step.duration_ms:.1f} ms"))  # fmt: skip
                at = end
        left = right
    return bars


def _svg_page(names: Sequence[str], bars: Sequence[Bar], colours: Mapping[str, str], height: int) -> str:
    """A page of its own, without scripts; every bar tells its time on hover."""
    shapes = [
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(r - x, 0.5):.1f}" height="{b - y:.1f}" fill="{c}">'
        f"<title>{html.escape(label)}</title></rect>"
        for x, y, r, b, c, label in bars
    ]
    titles = [
        f'<text x="{MARGIN}" y="{MARGIN + i * (ROW + LEGEND) + LEGEND - 6}">{html.escape(name)}</text>'
        for i, name in enumerate(names)
    ]
    entries = "".join(f'<tspan fill="{c}"> &#9632; {html.escape(name)} </tspan>' for name, c in colours.items())
    legend = f'<text x="{MARGIN}" y="{height - 6}">{entries}</text>'
    font = 'font-family="sans-serif" font-size="13"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" {font}>'
    return f"<!doctype html><title>timeline</title>{svg}{''.join(shapes + titles)}{legend}</svg>\n"


def _draw(names: Sequence[str], bars: Sequence[Bar], colours: Mapping[str, str], height: int) -> Image.Image:
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    for x, y, r, b, colour, _ in bars:
        draw.rectangle((x, y, max(r, x + 0.5), b), fill=colour)
    for i, name in enumerate(names):
        draw.text((MARGIN, MARGIN + i * (ROW + LEGEND) + 4), name, fill="black")
    x = float(MARGIN)
    for stage, colour in colours.items():
        draw.rectangle((x, height - LEGEND + 5, x + 10, height - LEGEND + 15), fill=colour)
        draw.text((x + 14, height - LEGEND + 4), stage, fill="black")
        x += 24 + draw.textlength(stage)
    return image
