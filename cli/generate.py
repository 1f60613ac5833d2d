"""`sglang generate`: flags and config -> one request -> files, with progress on a terminal."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sgl_diffusion.cli.flags import REQUEST, add_flags, flag, parse_command_line
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs, parse_args
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.events import Event, Finished, Result, StageStarted, StepDone
from sgl_diffusion.runtime.parallel.launch import as_rank, launch
from sgl_diffusion.runtime.parallel.layout import read_layout
from sgl_diffusion.runtime.parallel.ranks import speaks, started_ranks
from sgl_diffusion.server.args import ServeArgs

log = logging.getLogger("sgl_diffusion")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="JSON or YAML file of options; flags win over it"
    )
    add_flags(parser)


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    add_arguments(parser)
    add_flags(parser, [ServeArgs], shown=False)  # a command line or config file may be shared with `sglang serve`
    values = parse_command_line(parser, argv, [*REQUEST, ServeArgs])
    server, sampling = parse_args(values)
    if not sampling.prompt and sampling.prompt_path is None and sampling.resume_latents is None:
        raise UserError("prompt: none given; use --prompt, --prompt-path or the key `prompt` of a config file")
    ranks = read_layout(server).ranks
    if ranks > 1 and started_ranks() == 1:
        launch(server, ranks, "sgl_diffusion", ["generate", *argv])
        return 0
    set_up_logging(server.log_level if speaks() else "warning")
    if ignored := [flag(name) for name in values if name in ServeArgs.model_fields]:
        log.info("ignored: %s: of `sglang serve` alone", ", ".join(ignored))
    with as_rank() if started_ranks() > 1 else nullcontext():
        _draw(server, sampling)
    return 0


def _draw(server: ServerArgs, sampling: SamplingParams) -> None:
    from sgl_diffusion.runtime.engine import Engine

    console = Console(stderr=True)
    with console.status(f"loading {server.model_path}"):
        engine = Engine.load(server, like=sampling)
    with engine:
        if not engine.lockstep.is_first:
            engine.follow()
            return
        result = _show(engine.generate(sampling), console)
    print(result.report.summary())
    for path in result.paths:
        print(f"saved {path}")


def set_up_logging(level: str) -> None:
    """Our own messages on stderr at `level`; libraries' errors alone, and download bars on a terminal alone."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("sgl_diffusion").setLevel(level.upper())
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if level != "debug":
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's tracer says when it starts and stops


def _show(events: Iterator[Event], console: Console) -> Result:
    """Drains the events, with a bar for the stage and its steps on a terminal and nothing elsewhere."""
    with _bar(console) as progress:
        stage, total = None, 1
        for event in events:
            if isinstance(event, Finished):
                return event.result
            if progress is None:
                continue
            if isinstance(event, StageStarted):
                stage, total = progress.add_task(event.name.replace("_", " "), total=None), 1
            elif stage is not None and isinstance(event, StepDone):
                total = event.total
                progress.update(stage, completed=event.step, total=total)
            elif stage is not None:
                progress.update(stage, completed=total, total=total)
    raise AssertionError("generate ends with Finished")


@contextmanager
def _bar(console: Console) -> Iterator[Progress | None]:
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        yield progress
