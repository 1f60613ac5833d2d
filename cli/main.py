"""The commands `sglang` and `sgl-diffusion`: dispatch, and the one place where mistakes become exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from sgl_diffusion.cli.flags import Parser
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.option import nearest

COMMANDS = {
    "generate": "draw pictures or videos from a prompt",
    "serve": "draw for whoever asks over HTTP, in the words of the OpenAI API",
    "verify": "compare the native pipeline with diffusers, stage by stage, or quantised layers with those in full",
    "quantize": "write a checkpoint whose denoisers are quantised",
    "prewarm": "compile what a model's requests need, before there are any",
    "perf": "show and compare reports of runs",
    "plan": "predict the memory of a request, before anything is loaded",
    "bench": "time generations; check, count, time and tune the kernels",
    "version": "print the version",
}
USER_MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, 1 for a failure, 2 for a user's mistake, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return USER_MISTAKE
    except RunFailure as e:
        print(f"failed: {e}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return FAILURE


def _dispatch(argv: list[str]) -> int:
    parser = Parser(prog="sglang", description="Pictures and videos from diffusion models.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, help in COMMANDS.items():
        commands.add_parser(name, help=help, add_help=False)
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(
            f"unknown command {argv[0]!r}; expected one of {', '.join(COMMANDS)}{nearest(argv[0], [*COMMANDS])}"
        )
    run = import_module(f"sgl_diffusion.cli.{argv[0]}").run
    status: int = run(command_parser(argv[0]), argv[1:])
    return status


def command_parser(name: str) -> argparse.ArgumentParser:
    """A fresh parser for one command."""
    return Parser(prog=f"sglang {name}", description=COMMANDS[name].capitalize() + ".", allow_abbrev=False)


if __name__ == "__main__":
    sys.exit(main())
