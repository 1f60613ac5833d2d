"""`sglang version`."""

from __future__ import annotations

import argparse
from importlib.metadata import version

from sgl_diffusion.runtime.report import commit_hash


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.parse_args(argv)
    commit = commit_hash()
    print(version("sgl-diffusion") + (f" ({commit[:10]})" if commit else ""))
    return 0
