"""What is done before a model is called ready, so that nothing compiles, captures or tunes while a user waits.

Throw-away pictures of the declared sizes take every path that a request takes. For all other sizes, kernels are
compiled from shapes alone. A launch is specialised by dtypes, by the model's widths, by the tile its table gives for
the shape, and by which sizes 16 divides. The first two are the checkpoint's; pictures of a few sizes, even and odd, go
through all of the rest, so that whatever size is asked for later finds its kernels compiled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from sgl_diffusion.kernels.launch import compiling_only
from sgl_diffusion.models.family import Condition, Defaults, Family, Guidance, Size
from sgl_diffusion.runtime.args import OutputOptions, SamplingParams, ServerArgs
from sgl_diffusion.runtime.batch import predictor_of
from sgl_diffusion.runtime.blueprint import Blueprint
from sgl_diffusion.runtime.denoise import State, integrate
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.rehearsal import fewest_pictures
from sgl_diffusion.runtime.request import schedule_of

BATCHES = ((1, False), (2, True))  # with and without guidance
DECODED_FRAMES = 9  # a clip's first chunk, its second, and one that is as all further ones


def throw_away_requests(args: ServerArgs, like: SamplingParams) -> list[SamplingParams]:
    """One for every resolution to warm up, which is that of `like` where none was declared; the rest is as in `like`.

    Raises:
        UserError: settings of a warm-up that is not asked for.
    """
    if not args.warmup:
        for field in ("warmup_steps", "warmup_resolutions"):
            if value := getattr(args, field):
                told = " ".join(value) if isinstance(value, list) else value
                raise UserError(f"{field}={told}: has no effect without warmup")
        return []
    sizes = [dict(zip(("width", "height"), map(int, r.split("x")), strict=True)) for r in args.warmup_resolutions]
    leaving_nothing = OutputOptions(save_output=False).model_dump()
    short: dict[str, Any] = {"num_inference_steps": args.warmup_steps or 1, **leaving_nothing}
    return [like.model_copy(update=short | size) for size in sizes or [{}]]


def compile_kernels(blueprint: Blueprint) -> None:
    """Compiles what requests of any size launch, for Triton's current target."""
    parts = blueprint.shape_only_parts(blueprint.attention_on(torch.device("cuda")))
    with compiling_only():
        with torch.device("meta"):
            examples = blueprint.family.examples(blueprint.configs)
        for size, (batch, guided), condition in product(generic_sizes(blueprint, parts), BATCHES, examples):
            launch_all(blueprint, parts, size, [condition] * batch, guided=guided)
        if blueprint.plan.vae_sp:
            return
        parts["vae"].tiling = True
        decode(blueprint, parts, Size(blueprint.defaults.height, blueprint.defaults.width, DECODED_FRAMES), 1)


@torch.no_grad()
def launch_all(
    blueprint: Blueprint, parts: Mapping[str, Any], size: Size, conditions: Sequence[Condition], *, guided: bool
) -> None:
    """What a request launches, on shapes alone: a step and a decode, but for those that go to tiles."""
    family, defaults, batch = blueprint.family_of(parts), blueprint.defaults, len(conditions)
    x = family.noise(size, [torch.Generator()] * batch)
    guidance = Guidance(defaults.guidance_scale)
    schedule = schedule_of(family, blueprint.sampler(), size, defaults.num_inference_steps)
    state = State.start(x, schedule)
    noise = [x] * schedule.noises
    for phase in family.phases(schedule.timesteps, guidance):
        timesteps = schedule.timesteps[phase.steps.start : phase.steps.stop]
        predictor = predictor_of(family, conditions, size, guidance, timesteps, phase.denoiser)
        against = predictor if guided else None
        next(integrate(state, schedule, phase.steps, predictor, against, noise=noise, keeps_norm=family.keeps_norm))
    if not blueprint.plan.tiles(size):
        decode(blueprint, parts, replace(size, frames=min(size.frames, DECODED_FRAMES)), batch)


@torch.no_grad()
def decode(blueprint: Blueprint, parts: Mapping[str, Any], size: Size, batch: int) -> None:
    """What a decode launches, on shapes alone."""
    family = blueprint.family_of(parts)
    size = size if family.draws_video else replace(size, frames=1)
    for chunk in family.decode(family.noise(size, [torch.Generator()] * batch), size):
        del chunk


def generic_sizes(blueprint: Blueprint, parts: Mapping[str, Any]) -> list[Size]:
    """The default size, smaller and larger ones, and of each neighbours whose rows or columns 2 does not divide."""
    family, default = blueprint.family_of(parts), blueprint.defaults
    step = size_step(family, default)
    sizes = []
    for factor in (1 / 16, 1 / 4, 1 / 2, 1.0, 2.0):
        height, width = (max(1, round(side * factor / step)) * step for side in (default.height, default.width))
        sizes += [Size(h, w, default.num_frames) for h in (height, height | step) for w in (width, width | step)]
    return sizes


def size_step(family: Family, defaults: Defaults) -> int:
    """What sides are multiples of, in pixels."""

    def takes(side: int) -> bool:
        size = Size(side, side, defaults.num_frames)
        with suppress(ValueError):
            fewest_pictures(family, size, Guidance(defaults.guidance_scale), defaults.max_sequence_length)
            return True
        return False

    return next(side for side in (8, 16, 32, 64, 128) if takes(side))
