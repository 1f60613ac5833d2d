"""`sglang bench quality`: what every scheme of quantization costs the embedded model, whose pictures code can judge.

All schemes draw the same held-out scenes from the same noise as the model in full.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sgl_diffusion.models.embedded.world import Scene
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.quality import (
    SCENES,
    Drawing,
    SceneScores,
    draw_scenes,
    held_out_scenes,
    layer_errors,
    of_scenes,
    picture_errors,
    score,
)
from sgl_diffusion.runtime.quantization.schemes import SCHEMES
from sgl_diffusion.runtime.report import commit_hash, versions

COMPARED = 4  # scenes whose drawing the layers are compared in


@dataclass(frozen=True)
class Row:
    """A scheme. Errors are relative L2 against the model in full; weights are the denoiser's, in MiB."""

    scheme: str
    weights_mb: float
    in_full_mb: float
    weight_error: float  # of the worst layer
    worst_row_error: float  # of the weights of one output
    output_error: float  # of the worst layer
    mean_output_error: float
    latent_error: float  # mean of all pictures
    worst_latent_error: float
    psnr_db: float  # mean of all pictures that are not equal
    worst_psnr_db: float
    equal_pictures: int
    ssim: float  # mean of all pictures
    worst_ssim: float
    scene: float  # share of pictures with background, colours and layout right
    shapes: float  # share of pictures with all shapes right
    points_lost: float


@dataclass(frozen=True)
class InFull:
    """What the schemes are compared with: the model in full, and what it drew of the scenes."""

    engine: Engine
    scenes: Sequence[Scene]
    steps: int | None
    drawing: Drawing
    score: Mapping[str, float]

    @classmethod
    def draw(cls, args: ServerArgs, scenes: Sequence[Scene], steps: int | None) -> InFull:
        engine = Engine.load(args)
        drawing = draw_scenes(engine, scenes, steps)
        return cls(engine, scenes, steps, drawing, score(drawing, scenes))


def measure(scheme: str, full: InFull, args: ServerArgs) -> Row:
    """Draws the scenes with one scheme."""
    engine = Engine.load(args.model_copy(update={"quantization": scheme}))
    assert isinstance(engine.backend, NativePipeline), "the embedded model is native"
    (receipt,) = engine.backend.quantization.values()
    layers, _ = layer_errors(full.engine, engine, of_scenes(full.scenes[:COMPARED], full.steps))
    drawing = draw_scenes(engine, full.scenes, full.steps)
    errors, right = picture_errors(full.drawing, drawing), score(drawing, full.scenes)
    latents, ssim = [e.latents for e in errors], [e.ssim for e in errors if e.ssim is not None]
    psnr = [e.psnr for e in errors if not math.isinf(e.psnr)]
    outputs = [layer.outputs for layer in layers]
    return Row(
        scheme=scheme,
        weights_mb=receipt["weights_mb"],
        in_full_mb=receipt["in_full_mb"],
        weight_error=max(layer.weights for layer in layers),
        worst_row_error=max(layer.worst_row for layer in layers),
        output_error=max(outputs),
        mean_output_error=statistics.mean(outputs),
        latent_error=statistics.mean(latents),
        worst_latent_error=max(latents),
        psnr_db=statistics.mean(psnr),
        worst_psnr_db=min(psnr),
        equal_pictures=len(errors) - len(psnr),
        ssim=statistics.mean(ssim),
        worst_ssim=min(ssim),
        scene=right["scene"],
        shapes=right["shapes"],
        points_lost=SceneScores(len(full.scenes), full.score, right).points_lost,
    )


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=[*SCHEMES], help="default: all")
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"pictures of each (default: {SCENES})")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--precision", default="auto", help="as of sglang generate")
    parser.add_argument("--device", default="auto", help="as of sglang generate")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    for name in ("scenes", "steps", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    if args.json and not args.json.resolve().parent.is_dir():
        raise UserError(f"json={args.json}: the folder {args.json.parent} does not exist")
    if args.threads:
        torch.set_num_threads(args.threads)
    server, scenes = ServerArgs(device=args.device, precision=args.precision), held_out_scenes(args.scenes)
    full = InFull.draw(server, scenes, args.steps)
    print(f"{args.scenes} scenes on {full.engine.device}; in full {full.score['scene']:.1%} right", end=", ")
    print(f"{full.score['shapes']:.1%} with all shapes")
    columns = {"MiB": 7, "scenes": 9, "shapes": 9, "PSNR dB": 9, "SSIM": 8, "latents": 9, "outputs": 9, "weights": 9}
    print(" " * 10 + "".join(f"{name:>{width}}" for name, width in columns.items()))
    rows = []
    for scheme in args.schemes:
        rows.append(row := measure(scheme, full, server))
        shares = f"{row.scene:9.1%}{row.shapes:9.1%}{row.psnr_db:9.1f}{row.ssim:8.4f}"
        errors = f"{row.latent_error:9.4f}{row.output_error:9.4f}{row.weight_error:9.4f}"
        print(f"{scheme:10}{row.weights_mb:7.2f}{shares}{errors}", flush=True)
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "schemes")}
        facts = {"settings": settings, "in_full": full.score, "schemes": [asdict(row) for row in rows]}
        about = {"versions": versions(full.engine.device), "commit": commit_hash()}
        args.json.write_text(json.dumps({**facts, **about}, indent=1, default=str) + "\n")
    return 0
