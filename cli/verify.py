"""`sglang verify MODEL`: does the native pipeline equal diffusers on this checkpoint?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sgl_diffusion.cli.flags import add_flags, given_values
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs, parse_sampling_params, parse_server_args
from sgl_diffusion.runtime.errors import UserError

PROMPT = "a red circle left of a blue square on a yellow background"
