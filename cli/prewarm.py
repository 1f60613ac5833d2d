"""`sglang prewarm`: compiles all that a model's requests need, and leaves it on disk for the processes to come."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sgl_diffusion.cli.flags import add_flags, parse_command_line
from sgl_diffusion.cli.generate import set_up_logging
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.option import parse

if TYPE_CHECKING:
    from sgl_diffusion.runtime.compilation import Compilations


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="JSON or YAML file of options; flags win over it"
    )
    parser.add_argument(
        "--arch",
        choices=("sm_80", "sm_89", "sm_90", "sm_100"),
        default=argparse.SUPPRESS,
        help="compile the kernels for a GPU that is not here; weights are not needed",
    )
    add_flags(parser, [ServerArgs])
    values = parse_command_line(parser, argv)
    arch = values.pop("arch", None)
    server = parse(ServerArgs, {**values, "warmup": True})
    set_up_logging(server.log_level if "log_level" in values else "warning")
    if arch is not None and server.enable_torch_compile:
        raise UserError(f"arch={arch}: torch.compile works on a GPU that is here only; leave out enable_torch_compile")

    from sgl_diffusion.runtime.compilation import cache_folder

    made = _warm_up(server) if arch is None else _compile_for(arch, server)
    compiled, found = made.triton + made.torch_compiled, made.triton_from_disk + made.torch_from_disk
    print(f"compiled {compiled}, found {found} on disk: {cache_folder()}")
    return 0


def _warm_up(server: ServerArgs) -> Compilations:
    from sgl_diffusion.runtime.compilation import Compilations
    from sgl_diffusion.runtime.engine import Engine

    engine = Engine.load(server)
    assert engine.warmed_up is not None
    made = Compilations(**engine.warmed_up["compilations"])
    if made == Compilations():
        raise UserError(
            f"device={engine.device}: nothing to compile; with enable_torch_compile there is, "
            "and --arch sm_90 compiles the kernels for such a GPU that is not here"
        )
    sizes = ", ".join(str(size) for size in engine.warmed_up["sizes"])
    print(f"drew {sizes} in {engine.warmed_up['duration_ms'] / 1000:.1f} s")
    return made


def _compile_for(arch: str, server: ServerArgs) -> Compilations:
    from sgl_diffusion.bench.absent import GPUS, absent
    from sgl_diffusion.runtime.compilation import compilations, keep_compiled_code
    from sgl_diffusion.runtime.prewarm import compile_kernels
    from sgl_diffusion.runtime.resolve import resolve

    if server.precision == "auto":  # that of a GPU
        server = server.model_copy(update={"precision": "bf16"})
    blueprint = resolve(server).blueprint
    if blueprint is None or server.backend == "diffusers":
        raise UserError(f"arch={arch}: {server.model_path} runs on diffusers, which has no kernels of ours")
    keep_compiled_code()
    before = compilations()
    with absent(GPUS[arch]):
        compile_kernels(blueprint)
    return compilations() - before
