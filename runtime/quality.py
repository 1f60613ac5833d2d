"""What quantization costs: a model with quantised layers beside the same model in full, on the same seeds.

Every layer is compared on the inputs that it gets in the model in full, so that its error is its own and not that of
the layers before it; latents and pictures show what all errors together come to.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgl_diffusion.models.embedded import world
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.checkpoint import EMBEDDED
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.events import Pixels
from sgl_diffusion.runtime.pipeline import NativePipeline, Record, ignore
from sgl_diffusion.runtime.pixels import quantised
from sgl_diffusion.runtime.quantization.layers import QuantizedLinear, SideBySide
from sgl_diffusion.runtime.quantization.schemes import SCHEMES
from sgl_diffusion.runtime.quantization.selection import layer_class
from sgl_diffusion.runtime.report import versions
from sgl_diffusion.runtime.request import resolve_request, spelled_out
from sgl_diffusion.runtime.resolve import resolve
from sgl_diffusion.runtime.similarity import WINDOW, Lpips, psnr, ssim
from sgl_diffusion.runtime.trace import Stopwatch

SCENES, SCENES_SEED, FIRST_SEED = 100, 2, 1000  # how many, which, and from what noise
BATCH = 10  # scenes of a request
POINTS = 100  # of a score
IN_FULL: Mapping[str, Any] = {
    "quantization": None,
    "quantization_ignored_layers": [],
    "component_quantizations": {},
    "transformer_weights_path": None,
    "enable_torch_compile": False,  # compiled blocks call no layers
}

# -- one run ----------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """What a request came to: final latents (B, ...), and by result a picture (H, W, 3) or a clip (F, H, W, 3); and how
    long each of its steps took, in milliseconds.
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    latents: Tensor
    pixels: Sequence[Pixels]
    step_ms: Sequence[float]


def draw(engine: Engine, params: SamplingParams, record: Record = ignore) -> Drawing:
    """Draws a request, of which nothing is written.

    Args:
        record: is shown all intermediate tensors.
    Raises:
        UserError: the request cannot be honoured.
    """
    pipeline = _native(engine)
    request = resolve_request(params, engine.model.sampling_defaults, engine.args)
    latents, chunks, watch = [], [], Stopwatch(engine.device)

    def listen(name: str, tensor: Tensor) -> None:
        if name == "final_latents":
            latents.append(tensor.float().cpu())
        elif name == "pixels":
            chunks.append(quantised(tensor).cpu().numpy())
        record(name, tensor)

    for _ in pipeline.run(pipeline.prepare(request), watch, listen):
        pass
    step_ms = [span.duration_ms for span in watch.finish() if span.name == "denoise_step"]
    prompts = [request.prompt_of(i) for i in range(request.count)]
    pixels = np.concatenate(chunks, axis=1) if pipeline.draws_video else chunks[0]
    return Drawing(prompts, request.seeds, latents[0], list(pixels), step_ms)


def _native(engine: Engine) -> NativePipeline:
    assert isinstance(engine.backend, NativePipeline), "only native layers are quantised"
    return engine.backend


# -- layers -----------------------------------------------------------------------


@dataclass(frozen=True)
class LayerError:
    """Errors of a quantised layer, relative L2.

    Attributes:
        format: of its component's weights.
        weights: of all its weights, as numbers again, against those in full.
        worst_row: of the weights of one output.
        outputs: on the inputs it got in the model in full, at the first, the middle and the last step.
    """

    component: str
    layer: str
    format: str
    weights: float
    worst_row: float
    outputs: float

    @property
    def layer_class(self) -> str:
        """Of layers with the same task in all blocks."""
        return layer_class(self.layer)


class _Listener:
    """Compares a quantised layer with one in full, whenever that is called.

    Args:
        compares: whether outputs are compared at the step that the model is at.
    """

    def __init__(self, quantized: nn.Module, compares: Callable[[], bool]) -> None:
        self.quantized, self.compares = quantized, compares
        self.weights: tuple[float, float] | None = None  # errors of all and of the worst row, once it ran
        self.error = self.total = 0.0  # sums of squares

    def __call__(self, full: nn.Linear, arguments: tuple[Tensor, ...]) -> None:
        compares, x = self.compares(), arguments[0]
        if not compares and self.weights is not None:
            return
        layer = self.quantized
        if next(layer.parameters()).device != x.device:  # one layer of those that live on the host
            layer = copy.deepcopy(layer).to(x.device)
        if self.weights is None:
            error = (_numbers(layer) - full.weight.float()).norm(dim=1)
            rows = full.weight.float().norm(dim=1)
            worst = (error / rows.clamp_min(torch.finfo(rows.dtype).tiny)).max()
            self.weights = (error.norm() / rows.norm()).item(), worst.item()
        if compares:
            want = full.forward(x).float()
            self.error += (layer(x).float() - want).square().sum().item()
            self.total += want.square().sum().item()

    @property
    def outputs(self) -> float:
        return math.sqrt(self.error / self.total) if self.total else 0.0


def _numbers(layer: nn.Module) -> Tensor:
    """Weights of a quantised layer, fp32 (N, K)."""
    if isinstance(layer, SideBySide):
        return torch.cat([_numbers(part) for part in layer.parts])
    if isinstance(layer, QuantizedLinear):
        return layer.quantized.dequantized(torch.float32)
    return layer.get_parameter("weight").float()


def quantized_layers(module: nn.Module) -> dict[str, nn.Module]:
    """By path; layers side by side in the place of one are one."""
    found: dict[str, nn.Module] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, QuantizedLinear | SideBySide) and path.rpartition(".parts.")[0] not in found:
            found[path] = layer
    return found


def layer_errors(full: Engine, quantized: Engine, params: SamplingParams) -> tuple[list[LayerError], Drawing]:
    """Every quantised layer that runs, compared while the model in full draws; and what that drew.

    Of inputs and outputs, one layer's are there at a time. Raises as `draw`.
    """
    judge, other, step = _native(full), _native(quantized), 0
    steps = judge.prepare(resolve_request(params, full.model.sampling_defaults, full.args)).steps

    def record(name: str, tensor: Tensor) -> None:
        nonlocal step
        step += name.startswith("prediction_")

    listeners: dict[tuple[str, str], _Listener] = {}
    with ExitStack() as hooks:
        for key in other.blueprint.quantization:
            for path, layer in quantized_layers(other.parts[key]).items():
                listener = _Listener(layer, lambda: step in (0, steps // 2, steps - 1))
                hook = judge.parts[key].get_submodule(path).register_forward_pre_hook(listener)
                hooks.callback(hook.remove)
                listeners[key, path] = listener
        for graphs in judge.graphs.values():  # a replay calls no layer
            hooks.callback(setattr, graphs, "why_not", graphs.why_not)
            graphs.why_not = "layers are compared"
        drawing = draw(full, params, record)
    formats = {key: q.format for key, q in other.blueprint.quantization.items()}
    return [
        LayerError(key, path, formats[key], *heard.weights, heard.outputs)
        for (key, path), heard in listeners.items()
        if heard.weights is not None
    ], drawing


# -- pictures ---------------------------------------------------------------------


@dataclass(frozen=True)
class PictureError:
    """A result of the quantised model beside that of the model in full.

    Attributes:
        latents: relative L2 error of the final latents.
        psnr: in dB, infinite for equal pictures; of a clip, over all its frames.
        ssim: None for pictures too small for it; of a clip, the mean of its frames.
        lpips: None where it cannot be computed.
    """

    prompt: str
    seed: int
    latents: float
    psnr: float
    ssim: float | None
    lpips: float | None


def picture_errors(full: Drawing, quantized: Drawing, lpips: Lpips | None = None) -> list[PictureError]:
    """Result by result, of the same request."""
    errors = []
    for i, (judge, pixels) in enumerate(zip(full.pixels, quantized.pixels, strict=True)):
        want = full.latents[i]
        errors.append(
            PictureError(
                prompt=full.prompts[i],
                seed=full.seeds[i],
                latents=((quantized.latents[i] - want).norm() / want.norm()).item(),
                psnr=psnr(pixels, judge),
                ssim=None if min(pixels.shape[-3:-1]) < WINDOW else ssim(pixels, judge),
                lpips=None if lpips is None else lpips(pixels, judge),
            )
        )
    return errors


# -- scenes -----------------------------------------------------------------------


@dataclass(frozen=True)
class SceneScores:
    """Shares of the embedded model's pictures in which something is right, from 0 to 1; see `world.score`."""

    scenes: int
    full: Mapping[str, float]
    quantized: Mapping[str, float]

    @property
    def points_lost(self) -> float:
        """Of 100, in scenes or in shapes, wherever more are lost; below 0 where the quantised model is better."""
        return max(POINTS * (self.full[name] - self.quantized[name]) for name in ("scene", "shapes"))


def held_out_scenes(count: int) -> list[world.Scene]:
    """Scenes that the embedded model was not trained on, always the same."""
    return world.draw_scenes(world.split_scenes(held_out=True), np.random.default_rng(SCENES_SEED), count)


def of_scenes(scenes: Sequence[world.Scene], steps: int | None = None, seed: int = FIRST_SEED) -> SamplingParams:
    """A picture of each scene, in so many steps, or as many as the model's."""
    prompts = [world.caption(scene) for scene in scenes]
    return SamplingParams(prompt=prompts, seed=[seed], num_inference_steps=steps, save_output=False)


def draw_scenes(engine: Engine, scenes: Sequence[world.Scene], steps: int | None = None) -> Drawing:
    """Draws scenes in requests of `BATCH`: all but the first replay what that has captured. Raises as `draw`."""
    drawn = []
    for start in range(0, len(scenes), BATCH):
        drawn.append(draw(engine, of_scenes(scenes[start : start + BATCH], steps, FIRST_SEED + start)))
    return Drawing(
        prompts=[prompt for each in drawn for prompt in each.prompts],
        seeds=[seed for each in drawn for seed in each.seeds],
        latents=torch.cat([each.latents for each in drawn]),
        pixels=[pixels for each in drawn for pixels in each.pixels],
        step_ms=[ms for each in drawn for ms in each.step_ms],
    )


def score(drawing: Drawing, scenes: Sequence[world.Scene]) -> dict[str, float]:
    """`world.score` of what was drawn of these scenes."""
    return world.score([_signed(pixels) for pixels in drawing.pixels], scenes)


def _signed(pixels: Pixels) -> world.Picture:
    """(3, H, W) in [-1, 1]."""
    signed: world.Picture = pixels.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    return signed


# -- time -------------------------------------------------------------------------


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of a step, the median of a request's, on this device."""

    full: float
    quantized: float

    @property
    def is_slower(self) -> bool:
        return self.quantized > self.full


def step_times(full: Engine, quantized: Engine, params: SamplingParams) -> StepTimes:
    """Of requests drawn one after the other, once each has been drawn: nothing is compiled or captured any more.

    Raises as `draw`.
    """
    for engine in (full, quantized):
        draw(engine, params)
    return StepTimes(*(statistics.median(draw(engine, params).step_ms) for engine in (full, quantized)))


# -- the verdict ------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """The largest of some errors beside what a scheme declares."""

    what: str
    worst: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.worst <= self.allowed


@dataclass(frozen=True)
class Quality:
    """What quantization costs.

    Attributes:
        receipts: of quantised components, see `runtime.quantization.receipt`.
        lpips: why it was not computed; empty if it was.
        step_ms: what a step takes.
        scores: of the embedded model alone.
        checks: of what schemes declare; formats that files come in declare nothing.
    """

    receipts: Mapping[str, Mapping[str, Any]]
    layers: Sequence[LayerError]
    pictures: Sequence[PictureError]
    step_ms: StepTimes
    lpips: str
    scores: SceneScores | None
    checks: Sequence[Check]
    settings: Mapping[str, Any]
    versions: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite PSNR (equal pictures) becomes null."""
        pictures = [{**asdict(p), "psnr": None if math.isinf(p.psnr) else p.psnr} for p in self.pictures]
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        scores = None if self.scores is None else asdict(self.scores) | {"points_lost": self.scores.points_lost}
        return {"passed": self.passed, **asdict(self), "pictures": pictures, "checks": checks, "scores": scores}


def is_quantized(args: ServerArgs, params: SamplingParams) -> bool:
    """Whether layers of the model are quantised, while it is loaded or in its files. Raises UserError as `resolve`."""
    blueprint = resolve(args, [params]).blueprint
    return blueprint is not None and bool(blueprint.quantization)


def judge_quantization(args: ServerArgs, params: SamplingParams, scene_count: int | None = None) -> Quality:
    """Loads the model twice, quantised and in full, draws the request with both and compares.

    Args:
        scene_count: of the embedded model, to draw and score; `SCENES` where None.
    Raises:
        UserError: there are no weights in full to compare with, scenes of another model, or the request cannot be
            honoured.
    """
    is_embedded = args.model_path == EMBEDDED
    if scene_count is not None and (scene_count < 0 or not is_embedded):
        raise UserError(
            f"scenes={scene_count}: expected 0 or more, of model_path={EMBEDDED}, whose pictures code can judge"
        )
    in_full = args.model_copy(update=IN_FULL)
    if is_quantized(in_full, params):
        raise UserError(f"model_path={args.model_path}: its weights are quantised; there are none in full to judge by")
    quantized, full = Engine.load(args), Engine.load(in_full)
    layers, judge = layer_errors(full, quantized, params)
    lpips, why = _lpips()
    pictures = picture_errors(judge, draw(quantized, params), lpips)
    times = step_times(full, quantized, params)
    backend, checks, scores = _native(quantized), layer_checks(layers), None
    if is_embedded and (scenes := held_out_scenes(SCENES if scene_count is None else scene_count)):
        ours, theirs = (draw_scenes(engine, scenes, params.num_inference_steps) for engine in (quantized, full))
        scores = SceneScores(len(scenes), score(theirs, scenes), score(ours, scenes))
        formats = {key: q.format for key, q in backend.blueprint.quantization.items()}
        if formats.keys() == {"transformer"}:  # schemes declare nothing of several components together
            checks += scene_checks(formats["transformer"], picture_errors(theirs, ours), scores)
    job = backend.prepare(resolve_request(params, quantized.model.sampling_defaults, args))
    settings = {"model": args.model_path, **spelled_out(job, backend.family)}
    return Quality(
        backend.quantization, layers, pictures, times, why, scores, checks, settings, versions(quantized.device)
    )


def _lpips() -> tuple[Lpips | None, str]:
    """Or why there is none."""
    try:
        return Lpips(), ""
    except ImportError as e:
        return None, str(e)


def layer_checks(layers: Sequence[LayerError]) -> list[Check]:
    """Of the worst layers of every component whose format is a scheme."""
    found = []
    for key, format in dict.fromkeys((error.component, error.format) for error in layers):
        if format in SCHEMES:
            own, allowed = [e for e in layers if e.component == key], SCHEMES[format].tolerance
            found += [
                Check(f"weights of {key}", max(e.weights for e in own), allowed.weights),
                Check(f"rows of weights of {key}", max(e.worst_row for e in own), allowed.rows),
                Check(f"outputs of {key}", max(e.outputs for e in own), allowed.outputs),
            ]
    return found


def scene_checks(format: str, pictures: Sequence[PictureError], scores: SceneScores) -> list[Check]:
    """Of held-out scenes, if the format of the denoiser is a scheme. Their captions leave nothing open: where a prompt
    does, as for a background, a small error may choose another, and says little.
    """
    if format not in SCHEMES:
        return []
    allowed = SCHEMES[format].tolerance
    return [
        Check("final latents of scenes", max(p.latents for p in pictures), allowed.latents),
        Check("points lost", scores.points_lost, allowed.points),
    ]
