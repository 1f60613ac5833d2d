"""`sglang bench serve`: a server under load, and what it adds to its engine.

Requests are the same for the same seed. No time is told of wrong answers: every one has to be a job of its own, and
equal requests have equal bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from sgl_diffusion.bench import overhead
from sgl_diffusion.bench.overhead import Overhead
from sgl_diffusion.bench.plot import Bar, bars
from sgl_diffusion.bench.traffic import PERCENTILES, Amount, Load, Target, closed_loop, open_loop, summary
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.report import commit_hash

PROMPT = "a red circle left of a blue square on a yellow background"
TIMEOUT_S = 3600.0  # of one request: how long it may wait is the server's to say


@dataclass(frozen=True)
class Result:
    """
    Attributes:
        load_average: of this machine before and after, over a minute: what else it did.
        serve_args: in effect on the server; None if it does not tell.
        versions: of what draws there.
    """

    loads: list[Load]
    overhead: Overhead | None
    load_average: tuple[float, float]
    settings: dict[str, Any]
    serve_args: dict[str, Any] | None
    versions: dict[str, str | None]
    commit: str | None


# -- measuring -------------------------------------------------------------------------


async def measure(url: str, args: argparse.Namespace) -> Result:
    """All loads one after the other, or the overhead, after requests that are not counted.

    Raises:
        UserError: there is no server at `url`, or it cannot be measured as asked.
        RunFailure: an answer is wrong; see `Target.request`.
    """
    before = os.getloadavg()[0]
    headers = {"authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S, limits=limits) as client:
        card = await _told(client, "/model_info")
        draws_video = bool(card.get("draws_video")) if args.task == "auto" else args.task == "video"
        target = Target(client, _bodies(args, draws_video), draws_video)
        loads: list[Load] = []
        added = None
        if args.overhead:
            if draws_video:
                raise UserError("overhead: is measured with pictures, and this model draws clips")
            added = await overhead.measure(target, _model(args), args.num_prompts, args.warmup_requests)
        else:
            await closed_loop(target.request, 1, Amount(args.warmup_requests))
            loads = [await _load(target, args, rate=rate) for rate in args.request_rate]
            loads += [await _load(target, args, clients=clients) for clients in args.max_concurrency]
        settings = (await _told(client, "/server_info")).get("serve_args")
        if settings is not None:
            settings.pop("data_dir", None)  # a place on one machine says nothing to others
    hidden = ("api_key", "output_file", "plot")
    return Result(
        loads=loads,
        overhead=added,
        load_average=(before, os.getloadavg()[0]),
        settings={name: value for name, value in vars(args).items() if name not in hidden and value not in (None, [])},
        serve_args=settings,
        versions=card.get("versions", {}),
        commit=commit_hash(),
    )


async def _told(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    """Of a server that does not know the path: nothing.

    Raises:
        UserError: nobody answers, or not to us.
    """
    try:
        answer = await client.get(path)
    except httpx.TransportError as e:
        raise UserError(f"base_url={client.base_url}: nobody answers there: {e}") from e
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise UserError(f"base_url={client.base_url}: it asks for an --api-key")
    found: dict[str, Any] = answer.json() if answer.is_success else {}
    return found


def _bodies(args: argparse.Namespace, draws_video: bool) -> list[dict[str, Any]]:
    """Of requests that differ in their seeds."""
    asked = {"height": args.height, "width": args.width, "num_inference_steps": args.steps}
    asked |= {"num_frames": args.frames} if draws_video else {"response_format": "b64_json"}
    given = {name: value for name, value in asked.items() if value is not None}
    return [{"prompt": args.prompt, "seed": seed, **given} for seed in range(args.distinct)]


def _model(args: argparse.Namespace) -> dict[str, Any]:
    names = ("model_path", "device", "precision")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


async def _load(target: Target, args: argparse.Namespace, rate: float = 0.0, clients: int = 0) -> Load:
    amount = Amount(None if args.duration else args.num_prompts, args.duration)
    started = time.perf_counter()
    if clients:
        answers = await closed_loop(target.request, clients, amount)
    else:
        answers = await open_loop(target.request, rate, amount, args.seed)
    shape = f"{clients} at a time" if clients else f"{rate:g} a second"
    return summary(shape, answers, time.perf_counter() - started, args.slo_ms)


@contextmanager
def own_server(args: argparse.Namespace, further: Sequence[str]) -> Iterator[str]:
    """The URL of a server of our own, which ends with the context.

    Raises:
        RunFailure: it did not get ready; it has said why.
    """
    with tempfile.TemporaryDirectory(prefix="sglang-bench-") as data_dir:
        command = [sys.executable, "-P", "-m", "sgl_diffusion.cli.main", "serve", "--port", "0"]
        command += ["--data-dir", data_dir, "--log-level", "warning"]
        for name, value in _model(args).items():
            command += [f"--{name.replace('_', '-')}", value]
        with subprocess.Popen([*command, *further], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                url = next((line.split()[1] for line in process.stdout if line.startswith("ready: ")), None)
                if url is None:
                    raise RunFailure(f"the server ended with {process.wait()} before it was ready")
                yield url
            finally:
                process.terminate()


# -- report ----------------------------------------------------------------------------


def show(result: Result) -> None:
    if result.loads:
        print(f"{'':16}{'done':>6}{'failed':>8}{'refused':>8}{'per s':>8}{'mean ms':>9}", end="")
        print("".join(f"{name:>9}" for name in PERCENTILES) + ("      SLO" if _slo(result) else ""))
    for load in result.loads:
        print(f"{load.shape:16}{load.completed:6}{load.failed:8}{load.refused:8}{load.per_second:8.2f}", end="")
        print("".join(f"{load.latency_ms.get(name, float('nan')):9.1f}" for name in ("mean", *PERCENTILES)), end="")
        print("" if load.slo_share is None else f"{load.slo_share:9.1%}")
        for told, times in load.errors.items():
            print(f"{'':16}{times:6} x {told}")
    if (added := result.overhead) is not None:
        print(f"{'milliseconds':36}{'mean':>9}" + "".join(f"{name:>9}" for name in PERCENTILES))
        rows = {"through the server": added.latency_ms, "its engine, of that": added.engine_ms}
        rows |= {"what the server added": added.added_ms, "an engine in this process": added.bare_ms}
        rows |= {f"GET {path}, engine busy": values for path, values in added.get_ms.items()}
        for name, values in rows.items():
            print(f"{name:36}" + "".join(f"{values[column]:9.2f}" for column in ("mean", *PERCENTILES)))
    print("load average of this machine, before and after: {:.2f}, {:.2f}".format(*result.load_average))


def _slo(result: Result) -> float | None:
    slo: float | None = result.settings.get("slo_ms")
    return slo


def plot(path: Path, result: Result) -> None:
    """Latencies of every load as shares of the objective, or without one of the longest."""
    latencies = {load.shape: load.latency_ms for load in result.loads}
    if (added := result.overhead) is not None:
        latencies = {"through the server": added.latency_ms, "an engine in this process": added.bare_ms}
    whole = _slo(result) or max(values["p99"] for values in latencies.values() if values)
    what = "objective" if _slo(result) else "longest p99"
    shares = [
        Bar(f"{shape}: latency, of the {what} ({whole:.0f} ms)", name, values[name] / whole)
        for shape, values in latencies.items()
        for name in PERCENTILES
        if values
    ]
    path.write_text(bars(f"sglang serve, {result.versions.get('device')}", shares))


# -- command line ----------------------------------------------------------------------


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    argv, further = argv[:split], argv[split + 1 :]
    parser.epilog = "What comes after -- is given to the server that is started, as flags of sglang serve."
    parser.add_argument("--base-url", metavar="URL", help="of a server that runs (default: one is started)")
    parser.add_argument("--api-key", default=os.environ.get("SGLANG_API_KEY"), help="(default: SGLANG_API_KEY)")
    for name, what in (("model-path", "of the server that is started"), ("device", ""), ("precision", "")):
        parser.add_argument(f"--{name}", help=f"{what or 'the same'}, as of sglang generate")
    parser.add_argument("--task", choices=("auto", "image", "video"), default="auto", help="(default: the model's)")
    parser.add_argument("--prompt", default=PROMPT, help="what to draw")
    parser.add_argument("--distinct", type=int, default=8, help="different seeds, asked in turn (default: 8)")
    sizes = {"height": "pixels", "width": "pixels", "frames": "of a clip", "steps": "denoising steps"}
    for name, what in sizes.items():
        parser.add_argument(f"--{name}", type=int, help=f"{what} (default: the model's)")
    parser.add_argument("--num-prompts", type=int, default=50, help="requests of every load (default: 50)")
    parser.add_argument("--duration", type=float, metavar="S", help="seconds of every load, in place of --num-prompts")
    parser.add_argument("--warmup-requests", type=int, default=3, help="that are not counted (default: 3)")
    parser.add_argument("--request-rate", type=float, nargs="+", default=[], metavar="R",
                        help="open loop: requests a second, at random moments; a load of each rate")  # fmt: skip
    parser.add_argument("--max-concurrency", type=int, nargs="+", default=[], metavar="N",
                        help="closed loop: clients that wait for their answers; a load of each number")  # fmt: skip
    parser.add_argument("--slo-ms", type=float, help="objective for a latency: which share of requests meets it")
    parser.add_argument("--overhead", action="store_true", help="what the server adds to its engine, in place of loads")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of an open loop (default: 0)")
    parser.add_argument("--output-file", type=Path, metavar="FILE", help="write the figures there as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the latencies, as .svg")
    args = parser.parse_args(argv)
    _check(args, further)
    if args.base_url is not None:
        result = asyncio.run(measure(args.base_url, args))
    else:
        with own_server(args, further) as url:
            result = asyncio.run(measure(url, args))
    show(result)
    if args.output_file:
        args.output_file.write_text(json.dumps(asdict(result), indent=1) + "\n")
    if args.plot:
        plot(args.plot, result)
    return 0


def _check(args: argparse.Namespace, further: Sequence[str]) -> None:
    """Raises UserError."""
    if args.base_url is not None:
        if args.overhead:
            raise UserError("overhead: is measured beside a server of its own; leave --base-url away")
        if further or _model(args):
            raise UserError(f"base_url={args.base_url}: its model and flags are chosen; leave yours away")
    if not args.overhead and not args.request_rate and not args.max_concurrency:
        raise UserError("one of --request-rate, --max-concurrency, --overhead is needed")
    if args.overhead and (args.request_rate or args.max_concurrency or args.duration or args.slo_ms):
        raise UserError("overhead: takes one request at a time; leave rates, clients, --duration and --slo-ms away")
    lowest = {"num_prompts": 1, "warmup_requests": 0, "distinct": 1, "request_rate": 0.001, "max_concurrency": 1}
    lowest |= {"duration": 0.1, "slo_ms": 0.001}
    for name, least in lowest.items():
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not number >= least:
                raise UserError(f"{name}={number}: must be at least {least}")
    if args.plot and args.plot.suffix != ".svg":
        raise UserError(f"plot={args.plot}: expected a name ending in .svg")
    for name in ("output_file", "plot"):
        if (file := getattr(args, name)) and not file.resolve().parent.is_dir():
            raise UserError(f"{name}={file}: the folder {file.parent} does not exist")
