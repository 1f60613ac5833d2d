"""A request with every default filled in, checked before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from sgl_diffusion.models.family import Defaults, Family, Guidance, Size
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.pictures import read_pictures
from sgl_diffusion.runtime.schedulers import Sampler, Schedule

DEFAULT_SEED = 42
DEFAULT_FPS = 24


@dataclass(frozen=True)
class Request:
    """What to draw. `given` holds what the user or the checkpoint's `sampling_defaults.json` said about sampling.

    Picture `i` of a request has prompt `prompts[i // outputs_per_prompt]` and seed `seeds[i]`.
    """

    prompts: tuple[str, ...]
    negative_prompt: str | None
    outputs_per_prompt: int
    seeds: tuple[int, ...]
    given: Mapping[str, Any]
    diffusers_kwargs: Mapping[str, Any]
    model: Mapping[str, Any]  # the server arguments that differ from their defaults: they change the picture too

    @property
    def count(self) -> int:
        return len(self.prompts) * self.outputs_per_prompt

    def prompt_of(self, index: int) -> str:
        return self.prompts[index // self.outputs_per_prompt]


# fields of SamplingParams that say how to sample, as opposed to what to draw and where to save it
SAMPLING_FIELDS = (
    "height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "guidance_scale_2",
    "true_cfg_scale", "flow_shift", "max_sequence_length", "image_path",
)  # fmt: skip


def resolve_request(params: SamplingParams, checkpoint_defaults: Mapping[str, Any], server: ServerArgs) -> Request:
    """Merges the user's parameters over the checkpoint's defaults.

    Raises:
        UserError: no prompt, an unreadable prompt file, an unknown default of the checkpoint, names for files that
            are not saved.
    """
    if unknown := sorted(set(checkpoint_defaults) - set(SAMPLING_FIELDS)):
        raise UserError(
            f"sampling_defaults.json: unknown key {unknown[0]}; expected one of {', '.join(SAMPLING_FIELDS)}"
        )
    said = {f: getattr(params, f) for f in SAMPLING_FIELDS}
    given = {**checkpoint_defaults, **{k: v for k, v in said.items() if v not in (None, [], ())}}
    prompts = _prompts(params)
    if not params.save_output:
        for field in ("output_file_name", "output_quality"):
            if (value := getattr(params, field)) is not None:
                raise UserError(f"{field}={value}: has no effect with save_output=false")
        if params.profile:
            raise UserError("profile=true: the trace is written beside the results; not with save_output=false")
    return Request(
        prompts=prompts,
        negative_prompt=params.negative_prompt,
        outputs_per_prompt=params.num_outputs_per_prompt,
        seeds=_seeds(params, len(prompts)),
        given=given,
        diffusers_kwargs=params.diffusers_kwargs,
        model=server.model_dump(exclude_defaults=True, exclude={"log_level"}) | {"model_path": server.model_path},
    )


@dataclass(frozen=True)
class Job:
    """A request as a native family will run it.

    Attributes:
        negative_prompt: of the negative branch; None without one.
        pictures: that the model looks at.
        fps: of a clip; None for a picture.
    """

    request: Request
    size: Size
    guidance: Guidance
    schedule: Schedule
    text_length: int
    negative_prompt: str | None
    pictures: tuple[Image, ...]
    fps: int | None

    @property
    def steps(self) -> int:
        return self.schedule.steps


def settle(request: Request, defaults: Defaults, family: Family, sampler: Sampler) -> Job:
    """What a request comes to with a native family, whose weights are not touched.

    Raises:
        UserError: anything this family or checkpoint cannot honour.
    """
    if request.diffusers_kwargs:
        raise UserError(f"diffusers_kwargs={dict(request.diffusers_kwargs)}: needs --backend diffusers")
    given = request.given
    if "fps" in given and not family.draws_video:
        raise UserError(f"fps={given['fps']}: this model draws pictures")
    chosen, paths = overridden(defaults, given), given.get("image_path", ())
    if family.classifier_free:
        guidance, negative = _classifier_free(request, chosen, family.unguided_scale)
    else:
        guidance, negative = _embedded(request, chosen)
    try:
        # before any picture is read: one is of no use to a model that takes none
        family.check(_size(chosen), guidance, chosen.max_sequence_length, len(paths))
        pictures = tuple(read_pictures(paths))
        if pictures:
            height, width = family.fitting_size(pictures, defaults)
            chosen = overridden(replace(defaults, height=height, width=width), given)
        if (shift := given.get("flow_shift")) is not None:
            sampler = sampler.with_shift(shift)
        schedule = schedule_of(family, sampler, _size(chosen), chosen.num_inference_steps)
    except ValueError as e:
        raise UserError(str(e)) from e
    fps = (chosen.fps or DEFAULT_FPS) if family.draws_video else None
    return Job(request, _size(chosen), guidance, schedule, chosen.max_sequence_length, negative, pictures, fps)


def _size(chosen: Defaults) -> Size:
    return Size(chosen.height, chosen.width, chosen.num_frames)


def schedule_of(family: Family, sampler: Sampler, size: Size, steps: int) -> Schedule:
    """Raises ValueError for a number of steps that cannot be taken."""
    shift, levels = family.dynamic_shift(size, steps), family.noise_levels(steps)
    return sampler.schedule(steps, family.image_tokens(size), shift, levels)


def guided_by_default(family: Family, defaults: Defaults) -> bool:
    """Whether a request that says nothing of guidance has a negative branch."""
    scale = defaults.guidance_scale
    return family.classifier_free and scale is not None and scale > family.unguided_scale


def overridden(defaults: Defaults, given: Mapping[str, Any]) -> Defaults:
    """The defaults, but for those of the sampling fields that are given."""
    return replace(defaults, **{name: value for name, value in given.items() if hasattr(defaults, name)})


def spelled_out(job: Job, family: Family) -> dict[str, Any]:
    """The sampling fields that make diffusers, which has defaults of its own, do the same."""
    guidance, given = job.guidance, job.request.given
    fields: dict[str, Any] = {
        "height": job.size.height,
        "width": job.size.width,
        "num_inference_steps": job.steps,
        "max_sequence_length": job.text_length,
        "guidance_scale": guidance.true_cfg - (1 - family.unguided_scale)
        if family.classifier_free
        else guidance.embedded,
        "guidance_scale_2": guidance.true_cfg_2,
        "true_cfg_scale": None if family.classifier_free or guidance.true_cfg <= 1 else guidance.true_cfg,
        "num_frames": job.size.frames if family.draws_video else None,
        "image_path": given.get("image_path"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _embedded(request: Request, chosen: Defaults) -> tuple[Guidance, str | None]:
    """`guidance_scale` is fed to the model; `true_cfg_scale` is that of a negative branch, which is asked for."""
    negative = request.negative_prompt
    true_cfg = request.given.get("true_cfg_scale", 1.0 if negative is None else chosen.true_cfg_scale)
    if "guidance_scale_2" in request.given:
        raise UserError(f"guidance_scale_2={request.given['guidance_scale_2']}: this model has one denoiser")
    if true_cfg > 1 and negative is None:
        raise UserError(f"true_cfg_scale={true_cfg}: needs a negative_prompt (it may be empty)")
    if true_cfg <= 1 and negative is not None:
        raise UserError("negative_prompt: has no effect without true_cfg_scale above 1")
    return Guidance(chosen.guidance_scale, true_cfg), negative


def _classifier_free(request: Request, chosen: Defaults, unguided: float) -> tuple[Guidance, str | None]:
    """`guidance_scale` is that of a negative branch, of an empty prompt where none is given."""
    if "true_cfg_scale" in request.given:
        raise UserError(f"true_cfg_scale={request.given['true_cfg_scale']}: this model's is called guidance_scale")
    scale = unguided if chosen.guidance_scale is None else chosen.guidance_scale
    if scale > unguided:
        return Guidance(None, scale + (1 - unguided), chosen.guidance_scale_2), request.negative_prompt or ""
    without = f"has no effect with guidance_scale={scale:g}; expected above {unguided:g}"
    if request.negative_prompt is not None:
        raise UserError(f"negative_prompt: {without}")
    if "guidance_scale_2" in request.given:
        raise UserError(f"guidance_scale_2: {without}")
    return Guidance(None), None


def _seeds(params: SamplingParams, prompts: int) -> tuple[int, ...]:
    """Of every result. The first seed counts on over all of them; seeds of the prompts count on over theirs."""
    n, given = params.num_outputs_per_prompt, params.seed or [DEFAULT_SEED]
    if len(given) == 1:
        return tuple(given[0] + i for i in range(prompts * n))
    if len(given) != prompts:
        raise UserError(
            f"seed={' '.join(map(str, given))}: {len(given)} for {prompts} prompts; expected 1 or {prompts}"
        )
    return tuple(first + i for first in given for i in range(n))


def _prompts(params: SamplingParams) -> tuple[str, ...]:
    prompts = list(params.prompt or [])
    if params.prompt_path is not None:
        try:
            lines = Path(params.prompt_path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"prompt_path={params.prompt_path}: not readable: {e}") from e
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("prompt: none given; use --prompt, --prompt-path or the key `prompt` of a config file")
    return tuple(prompts)
