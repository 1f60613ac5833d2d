"""What a loaded model can draw, and what a request to it comes to: told without drawing anything."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_diffusion.models.family import Guidance, Size
from sgl_diffusion.runtime.args import SamplingParams
from sgl_diffusion.runtime.checked import Checked
from sgl_diffusion.runtime.output import CRAMPED, output_names
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.plan import dtype_name
from sgl_diffusion.runtime.prewarm import size_step
from sgl_diffusion.runtime.report import versions
from sgl_diffusion.runtime.request import DEFAULT_FPS, Request, guided_by_default, overridden, resolve_request

if TYPE_CHECKING:
    from sgl_diffusion.runtime.engine import Engine

MOST_PICTURES = 4  # that any family looks at
FRAME_STEPS = range(1, 17)


def check(engine: Engine, params: SamplingParams) -> Checked:
    """Finds out whether a request can be honoured, but for its prompt's length and its memory. Touches no weights.

    Raises:
        UserError: it cannot.
    """
    backend, request = engine.backend, resolve_request(params, engine.model.sampling_defaults, engine.args)
    for_any_prompt = "image_path" not in request.given
    if params.save_output:
        names = output_names(params, request, is_video=backend.draws_video)
        for_any_prompt &= Path(names[0]).suffix.lower() not in CRAMPED
    if isinstance(backend, NativePipeline):
        job = backend.prepare(request)
        branches = 1 if job.negative_prompt is None else 2
        work = float(job.steps * backend.family.image_tokens(job.size) * request.count * branches)
        alone = bool(job.pictures) or backend.neighbours.keep_apart(job.size)
        key, size = None if alone else _batch_key(request), job.size
        shape = size.height, size.width, size.frames, job.fps
        return Checked(*shape, job.steps, request.count, work, key, for_any_prompt)
    backend.prepare(request)
    given = request.given
    height, width, frames, steps = (given.get(k) for k in ("height", "width", "num_frames", "num_inference_steps"))
    work = float((height or 1024) * (width or 1024) * (frames or 1) * (steps or 50) * request.count)
    fps = given.get("fps", DEFAULT_FPS) if backend.draws_video else None
    frames = frames if backend.draws_video else 1
    return Checked(height, width, frames, fps, steps, request.count, work, None, for_any_prompt)


def _batch_key(request: Request) -> str:
    """Of all that is the same for every prompt of a request."""
    shared = [request.negative_prompt, request.outputs_per_prompt, dict(request.given)]
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def card(engine: Engine) -> dict[str, Any]:
    """The model and how it runs, as plain values: for people who have to choose a size, and for those who ask."""
    backend, args, model = engine.backend, engine.args, engine.model
    told: dict[str, Any] = {
        "model": args.model_path,
        "pipeline_class": model.pipeline_class,
        "backend": backend.name,
        "backend_reason": model.why,
        "draws_video": backend.draws_video,
        "device": str(engine.device),
        "precision": {key: dtype_name(dtype) for key, dtype in backend.plan.dtypes.items()},
        "performance_mode": {"mode": args.performance_mode, "chose": dict(backend.plan.chosen)},
        "warmup": engine.warmed_up,
        "versions": versions(engine.device),
        "settings": args.model_dump(mode="json", exclude_defaults=True),
    }
    if isinstance(backend, NativePipeline):
        defaults = overridden(backend.defaults, model.sampling_defaults)
        size = Size(defaults.height, defaults.width, defaults.num_frames)
        family = backend.family

        def takes(size: Size, pictures: int) -> bool:
            guidance = Guidance(None if family.classifier_free else defaults.guidance_scale)
            with suppress(ValueError):
                family.check(size, guidance, defaults.max_sequence_length, pictures)
                return True
            return False

        pictures = [n for n in range(MOST_PICTURES + 1) if takes(size, n)]
        told |= {
            "defaults": asdict(defaults),
            "negative_prompt_by_default": guided_by_default(family, defaults),
            "takes_pictures": pictures,
            "size_step": size_step(family, defaults),
            "frame_step": next((n for n in FRAME_STEPS if takes(replace(size, frames=1 + n), pictures[0])), None),
        }
    return told
