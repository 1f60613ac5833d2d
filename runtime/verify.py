"""Native against diffusers on the same checkpoint, seed and settings, stage by stage."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.diffusers_backend import DiffusersPipeline, replaced
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.report import versions
from sgl_diffusion.runtime.request import resolve_request, spelled_out
from sgl_diffusion.runtime.trace import Stopwatch

# largest |difference| allowed, relative to the std of diffusers' tensor
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True)
class Comparison:
    """One stage. `max_abs` is absolute; `relative_max` is max_abs over the std of diffusers' tensor; psnr in dB."""

    stage: str
    shape: tuple[int, ...]
    max_abs: float
    relative_max: float
    relative_l2: float
    psnr: float
    passed: bool


@dataclass(frozen=True)
class Verification:
    comparisons: tuple[Comparison, ...]
    tolerance: float
    settings: Mapping[str, Any]
    versions: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite PSNR (equal tensors) becomes null."""
        rows = [{**asdict(c), "psnr": None if math.isinf(c.psnr) else c.psnr} for c in self.comparisons]
        return {
            "passed": self.passed,
            "tolerance": self.tolerance,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "stages": rows,
        }


def verify(args: ServerArgs, params: SamplingParams, tolerance: float | None = None) -> Verification:
    """Runs both backends and compares prompt embeddings, initial latents, timesteps, predictions, latents, pixels.

    Args:
        tolerance: bound on `relative_max` of every stage; by the denoiser's dtype where None.
    Raises:
        UserError: the model has no native implementation, or the request cannot be honoured.
    """
    native = Engine.load(args.model_copy(update={"backend": "sglang"}))
    nothing = UserError(f"model_path={args.model_path}: load_format={args.load_format} leaves nothing to compare")
    if not isinstance(native.backend, NativePipeline):
        raise nothing
    whole = {"vae_tiling": False} if native.backend.family.exact_tiles else {}  # diffusers' own tiles have seams
    judge = Engine.load(args.model_copy(update={"backend": "diffusers", **whole}))
    if not isinstance(judge.backend, DiffusersPipeline):
        raise nothing
    request = resolve_request(params, native.model.sampling_defaults, args)
    job = native.backend.prepare(request)
    given = spelled_out(job, native.backend.family)
    if "max_sequence_length" not in judge.backend.call_arguments:
        del given["max_sequence_length"]
    asked = replace(request, given=given)

    ours: dict[str, Tensor] = {}
    chunks: list[Tensor] = []

    def record(name: str, tensor: Tensor) -> None:
        if name == "pixels":
            chunks.append(tensor.clone())
        else:
            ours[name] = tensor.clone()

    _drain(native.backend.run(job, Stopwatch(native.device), record))
    ours["pixels"] = torch.cat(chunks, dim=2) if native.backend.draws_video else chunks[0]
    with Eavesdropper(judge.backend) as theirs:
        _drain(judge.backend.run(asked, Stopwatch(judge.device)))
    if not native.backend.draws_video and theirs.seen["pixels"].ndim == 5:  # of an autoencoder for clips
        theirs.seen["pixels"] = theirs.seen["pixels"][:, :, 0]

    dtype = next(native.backend.parts[k].parameters().__next__().dtype for k in native.backend.attention)
    bound = TOLERANCE[dtype] if tolerance is None else tolerance
    middle = f"prediction_{job.steps // 2}"
    names = [n for n in ours if not n.startswith("prediction_")]
    predictions = dict.fromkeys(["prediction_0", middle, f"prediction_{job.steps - 1}"])
    at = names.index("final_latents")
    rows = tuple(_compare(n, ours[n], theirs.seen[n], bound) for n in [*names[:at], *predictions, *names[at:]])
    settings = {
        "model": args.model_path,
        "prompts": list(request.prompts),
        "seeds": request.seeds,
        **given,
    }
    return Verification(rows, bound, settings, versions(native.device))


def _drain(events: Any) -> None:
    for _ in events:
        pass


def _compare(stage: str, ours: Tensor, theirs: Tensor, bound: float) -> Comparison:
    if ours.shape != theirs.shape:
        raise UserError(f"{stage}: shapes differ, {tuple(ours.shape)} natively and {tuple(theirs.shape)} in diffusers")
    a, b = ours.double().cpu(), theirs.double().cpu()
    worst = (a - b).abs().max().item()
    std = b.std().item() if b.numel() > 1 else 0.0
    scale = std or b.abs().max().item() or 1.0
    square = (a - b).square().mean().item()
    peak = (b.max() - b.min()).item() or 1.0
    return Comparison(
        stage=stage,
        shape=tuple(ours.shape),
        max_abs=worst,
        relative_max=worst / scale,
        relative_l2=((a - b).norm() / b.norm().clamp_min(1e-30)).item(),
        psnr=math.inf if square == 0 else 10 * math.log10(peak**2 / square),
        passed=worst / scale <= bound,
    )


class Eavesdropper:
    """Listens to a diffusers pipeline: its denoiser's first inputs, its scheduler's steps, its VAE's output."""

    def __init__(self, backend: DiffusersPipeline) -> None:
        self.backend = backend
        self.seen: dict[str, Tensor] = {}
        self.by_result: dict[str, list[Tensor]] = {}  # those of the negative branch may come last
        self.grids: list[tuple[int, int]] = []  # rows and columns of given pictures' tokens, behind those of the state
        self.undo = ExitStack()
        self.timesteps: list[float] = []

    def __enter__(self) -> Eavesdropper:
        pipe = self.backend.pipe
        for denoiser in self.backend.denoisers().values():
            handle = denoiser.register_forward_pre_hook(self._denoiser_called, with_kwargs=True)
            self.undo.callback(handle.remove)
        step, decode = pipe.scheduler.step, pipe.vae.decode

        def heard_step(model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            self.seen.setdefault("initial_latents", sample.clone())
            self.seen[f"prediction_{len(self.timesteps)}"] = model_output.clone()
            self.timesteps.append(float(timestep))
            result = step(model_output, timestep, sample, **kwargs)
            self.seen["final_latents"] = result[0].clone()
            return result

        def heard_decode(*args: Any, **kwargs: Any) -> Any:
            result = decode(*args, **kwargs)
            self.seen["pixels"] = result[0].clone()
            return result

        self.undo.enter_context(replaced(pipe.scheduler, "step", heard_step))
        self.undo.enter_context(replaced(pipe.vae, "decode", heard_decode))
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        """What a denoiser sees of given pictures is beside the state, in more channels, or is its first frame."""
        self.undo.close()
        if kind is not None:  # little was heard
            return
        seen = self.seen
        seen["timesteps"] = torch.tensor(self.timesteps)
        B, C = seen["initial_latents"].shape[:2]
        seen.update({name: pad_sequence(each[:B], batch_first=True) for name, each in self.by_result.items()})
        if (given := seen.get("hidden_states")) is None:
            return
        seen["latent_condition"] = given[:, C:] if given.shape[1] > C else given[:, :, :1]
        if self.grids:
            each = torch.split(given[:, C:], [rows * columns for rows, columns in self.grids], dim=1)
            for i, (tokens, grid) in enumerate(zip(each, self.grids, strict=True)):
                seen[f"latent_condition_{i}"] = tokens.reshape(B, *grid, -1)
        if (places := seen.get("img_ids")) is not None and places.ndim == 3:  # of the state's tokens, then of theirs
            seen["condition_ids"] = places[:, C:]
        if (pictures := seen.get("encoder_hidden_states_image")) is not None:  # several of a clip are a batch there
            seen["encoder_hidden_states_image"] = pictures.reshape(len(given), -1, pictures.shape[-1])

    def _denoiser_called(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self.timesteps or {"timestep", "t"} & self.seen.keys():
            return
        for name, value in inspect.signature(module.forward).bind(*args, **kwargs).arguments.items():
            if isinstance(value, Tensor):
                self.seen[name] = value.clone()
            elif name == "img_shapes":  # frames, rows and columns of every picture
                self.grids = [shape[1:] for shape in value[0][1:]]
            elif isinstance(value, list) and all(isinstance(each, Tensor) for each in value):
                self.by_result[name] = [each.clone() for each in value]
