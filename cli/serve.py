"""`sglang serve`: flags and config -> a server that draws for whoever asks over HTTP."""

from __future__ import annotations

import argparse

from sgl_diffusion.cli.flags import add_flags, parse_command_line
from sgl_diffusion.cli.generate import set_up_logging
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.option import parse
from sgl_diffusion.server.args import ServeArgs

MODELS = (ServerArgs, ServeArgs)


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", default=argparse.SUPPRESS,
                        help="the same as --model-path")  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="JSON or YAML file of options; flags win over it"
    )
    add_flags(parser, MODELS)
    values = parse_command_line(parser, argv, MODELS)
    if (model := values.pop("model_argument", None)) is not None:
        if any(word.partition("=")[0] in ("--model-path", "--model") for word in argv):
            raise UserError(f"{model}: --model-path says it too; give one of them")
        values["model_path"] = model
    server_args = parse(ServerArgs, {k: v for k, v in values.items() if k in ServerArgs.model_fields})
    serve_args = parse(ServeArgs, {k: v for k, v in values.items() if k in ServeArgs.model_fields})
    set_up_logging(server_args.log_level)
    if server_args.node_rank > 0:
        from sgl_diffusion.server.follower import follow

        return follow(server_args, serve_args)

    from sgl_diffusion.server.run import serve

    return serve(server_args, serve_args, on_ready=lambda url: print(f"ready: {url}", flush=True))
