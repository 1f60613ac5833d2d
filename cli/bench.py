"""`sglang bench NAME`: generations timed; kernels checked, timed and tuned; links between ranks and the cost of
quantization measured.
"""

from __future__ import annotations

import argparse
from importlib import import_module

from sgl_diffusion.cli.flags import Parser
from sgl_diffusion.cli.generate import set_up_logging
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.option import nearest

SUBJECTS = {
    "aot": "compile every kernel for sm_80, sm_89, sm_90 and sm_100 without a GPU, and reject bad code",
    "e2e": "time whole generations against diffusers, by turns in one process",
    "kernels": "time every kernel against what it replaces, after checking its answers",
    "launches": "count the launches of one denoiser call at true size, ours against diffusers",
    "links": "measure latency and bandwidth of the collectives among ranks, for `sglang plan --links`",
    "load": "time loading a checkpoint against diffusers, by turns in one process",
    "parallel": "predict steps on several GPUs for published models, by layout; nothing is measured",
    "quality": "measure what every scheme of quantization costs the embedded model's pictures",
    "serve": "load a server with requests, and tell its latencies and what it adds to its engine",
    "tune": "time tiles on this GPU and rewrite its table",
    "vae": "time the decoding of latents against diffusers, by turns in one process",
}


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    subjects = parser.add_subparsers(dest="subject", metavar="|".join(SUBJECTS), parser_class=Parser)
    for name, help in SUBJECTS.items():
        subjects.add_parser(name, help=help, add_help=False)
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    subject = argv[0]
    if subject not in SUBJECTS:
        raise UserError(f"bench {subject}: expected one of {', '.join(SUBJECTS)}{nearest(subject, [*SUBJECTS])}")
    set_up_logging("warning")
    text = SUBJECTS[subject]
    own = Parser(prog=f"sglang bench {subject}", description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    status: int = import_module(f"sgl_diffusion.bench.{subject}").run(own, argv[1:])
    return status
