"""A request with every default filled in, checked before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sgl_diffusion.models.family import Defaults, Family, Guidance, Size
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.schedulers import FlowMatchEuler

DEFAULT_SEED = 42


@dataclass(frozen=True)
class Request:
    """What to draw. `given` holds what the user or the checkpoint's `sampling_defaults.json` said about sampling.

    Picture `i` of a request has prompt `prompts[i // outputs_per_prompt]` and seed `seed + i`.
    """

    prompts: tuple[str, ...]
    negative_prompt: str | None
    outputs_per_prompt: int
    seed: int
    given: Mapping[str, Any]
    diffusers_kwargs: Mapping[str, Any]
    model: Mapping[str, Any]  # the server arguments that differ from their defaults: they change the picture too

    @property
    def count(self) -> int:
        return len(self.prompts) * self.outputs_per_prompt

    def prompt_of(self, index: int) -> str:
        return self.prompts[index // self.outputs_per_prompt]

    def seeds(self) -> list[int]:
        return [self.seed + i for i in range(self.count)]


# fields of SamplingParams that say how to sample, as opposed to what to draw and where to save it
SAMPLING_FIELDS = (
    "height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "true_cfg_scale",
    "max_sequence_length", "image_path",
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
        seed=DEFAULT_SEED if params.seed is None else params.seed,
        given=given,
        diffusers_kwargs=params.diffusers_kwargs,
        model=server.model_dump(exclude_defaults=True, exclude={"log_level"}) | {"model_path": server.model_path},
    )


def settle(
    request: Request, defaults: Defaults, family: Family, scheduler: FlowMatchEuler
) -> tuple[Size, Guidance, int, int]:
    """Size, guidance, steps and text length of a request to a native family; its weights are not touched.

    Raises:
        UserError: anything this family or checkpoint cannot honour.
    """
    for name in ("num_frames", "fps", "image_path"):
        if name in request.given:
            raise UserError(f"{name}={request.given[name]}: this model draws pictures from text alone")
    if request.diffusers_kwargs:
        raise UserError(f"diffusers_kwargs={dict(request.diffusers_kwargs)}: needs --backend diffusers")
    chosen = replace(defaults, **{k: v for k, v in request.given.items() if hasattr(defaults, k)})
    true_cfg = request.given.get("true_cfg_scale", 1.0)
    if true_cfg > 1 and request.negative_prompt is None:
        raise UserError(f"true_cfg_scale={true_cfg}: needs a negative_prompt (it may be empty)")
    if true_cfg <= 1 and request.negative_prompt is not None:
        raise UserError("negative_prompt: has no effect without true_cfg_scale above 1")
    size = Size(chosen.height, chosen.width)
    guidance = Guidance(chosen.guidance_scale, true_cfg)
    try:
        family.check(size, guidance, chosen.max_sequence_length)
        scheduler.sigmas(chosen.num_inference_steps, family.image_tokens(size))
    except ValueError as e:
        raise UserError(str(e)) from e
    return size, guidance, chosen.num_inference_steps, chosen.max_sequence_length


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
