"""A request rehearsed: its stages as the pipeline runs them, on tensors that are shapes alone.

Whatever it makes is followed until nothing holds it any more, so that a prediction follows the code that runs, and no
formula has to be kept in step with it. Where weights live changes nothing here: one rehearsal serves every offload.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sgl_diffusion.kernels.launch import rehearsing
from sgl_diffusion.models.family import ENCODERS, Condition, Defaults, Execute, Family, Guidance, Size, Tensors, eager
from sgl_diffusion.models.text import HashTokenizer, PromptTooLong
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.batch import Neighbours, encode, finished
from sgl_diffusion.runtime.blueprint import Blueprint
from sgl_diffusion.runtime.denoise import State, integrate
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.graphs import Graphs
from sgl_diffusion.runtime.live_bytes import LiveBytes
from sgl_diffusion.runtime.pixels import quantised
from sgl_diffusion.runtime.request import Job, Request, guided_by_default, schedule_of
from sgl_diffusion.runtime.schedulers import Schedule
from sgl_diffusion.runtime.tape import Tapes

Branches = Sequence[Sequence[Condition]]


@dataclass(frozen=True)
class Workload:
    """What of a request its memory depends on."""

    prompts: int
    outputs_per_prompt: int
    negative: bool
    size: Size
    guidance: Guidance = field(compare=False)
    schedule: Schedule
    text_length: int
    decode_only: bool  # the latents are there already
    seen: tuple[tuple[int, int], ...] = ()  # sizes of given pictures

    @property
    def pictures(self) -> int:
        return self.prompts * self.outputs_per_prompt

    @classmethod
    def of(cls, job: Job, *, decode_only: bool = False) -> Workload:
        return cls(
            prompts=len(job.request.prompts),
            outputs_per_prompt=job.request.outputs_per_prompt,
            negative=job.negative_prompt is not None,
            size=job.size,
            guidance=job.guidance,
            schedule=job.schedule,
            text_length=job.text_length,
            seen=tuple(picture.size for picture in job.pictures),
            decode_only=decode_only,
        )


class FusedAttention(TorchFunctionMode):
    """PyTorch's attention on shapes alone as its fused kernels do it: a result with heads last and fp32 log-sums.

    Without this, shapes would go through a matrix of all scores.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, _, v = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        # computed as far as a tape can tell, which takes no notice of memory that is only allocated
        log_sums = q.new_zeros(q.shape[:-1], dtype=torch.float32)
        out = q.new_zeros(*q.transpose(-3, -2).shape[:-1], v.shape[-1]).transpose(-3, -2)
        del log_sums
        return out


class OneStep:
    """Executes the first of equal steps. Those after it are a pure function of the same shapes, whose arguments the
    loop holds until it has their results: they rise as high above where they begin, and leave tensors of those shapes.
    """

    def __init__(self, live: LiveBytes) -> None:
        self.live = live
        self.rise: int | None = None
        self.left: list[tuple[torch.Size, torch.dtype]] = []

    def __call__(self, step: Callable[..., Any], *arguments: Tensors) -> tuple[Tensor, ...]:
        live, began = self.live, self.live.now
        if self.rise is not None:
            live.peak = max(live.peak, began + self.rise)
            return tuple(torch.empty(shape, dtype=dtype, device=live.device_type) for shape, dtype in self.left)
        before, live.peak = live.peak, began
        results = eager(step, *arguments)
        self.rise, live.peak = live.peak - began, max(before, live.peak)
        self.left = [(x.shape, x.dtype) for x in results]
        return results


class Rehearsal:
    """Rehearses requests to one model, every one of them once, and what several of them have in common once.

    Args:
        taped: steps run from a tape, as they do on a CPU. A GPU's graph takes memory beside the allocator's count, but
            a tape holds tensors, which are followed.
        granularity: bytes that every tensor's memory is a multiple of.
    """

    def __init__(self, blueprint: Blueprint, args: ServerArgs, *, taped: bool, granularity: int) -> None:
        self.blueprint, self.plan = blueprint, blueprint.plan
        self.taped, self.granularity, self.dummy = taped, granularity, args.load_format == "dummy"
        self._encoded: dict[Hashable, tuple[int, list[list[Condition]]]] = {}
        self._drawn: dict[Hashable, tuple[dict[str, int], int]] = {}
        self._decoded: dict[Hashable, tuple[int, int]] = {}

    @cached_property
    def parts(self) -> dict[str, Any]:
        """Components as shapes alone; tokenizers that need no file."""
        configs, kinds = self.blueprint.configs, self.blueprint.kinds
        tokenizers = {key: HashTokenizer.beside(key, configs) for key, kind in kinds.items() if kind == "tokenizer"}
        parts = self.blueprint.shape_only_parts(self.blueprint.attention_on(self.plan.device))
        for key, part in parts.items():
            if kinds[key] in ENCODERS and self.plan.dtypes[key] == torch.float16 and not self.dummy:
                _keep_in_fp32(part)
        return {**tokenizers, **parts}

    @cached_property
    def family(self) -> Family:
        return self.blueprint.family_of(self.parts)

    def workload(self, request: Request, *, decode_only: bool = False) -> Workload:
        """Of a request to a model that may not be loaded yet. Raises UserError if the model cannot honour it."""
        return Workload.of(self.blueprint.settle(request, self.parts), decode_only=decode_only)

    def usual_workload(self, defaults: Defaults) -> Workload:
        """Of one result by these defaults, from as few given pictures as there have to be."""
        family = self.family
        size = Size(defaults.height, defaults.width, defaults.num_frames)
        free = guided_by_default(family, defaults)
        guidance = Guidance(None if family.classifier_free else defaults.guidance_scale)
        return Workload(
            prompts=1,
            outputs_per_prompt=1,
            negative=free,
            size=size,
            guidance=guidance,
            schedule=schedule_of(family, self.blueprint.sampler(), size, defaults.num_inference_steps),
            text_length=defaults.max_sequence_length,
            decode_only=False,
            seen=((size.width, size.height),) * fewest_pictures(family, size, guidance, defaults.max_sequence_length),
        )

    def conditions(self, work: Workload) -> Branches:
        """What every result is told, branch by branch, of prompts as long as may be."""
        with torch.inference_mode(), rehearsing(self.plan.device.type), FusedAttention():
            _, branches = self._encode(work)
            return self._look(work, branches)[1] if work.seen else branches

    def activations(self, work: Workload, tiling: bool) -> Mapping[str, int]:
        """Bytes of each stage beside the weights, what earlier stages left included."""
        with torch.inference_mode(), rehearsing(self.plan.device.type), FusedAttention():
            latents, rise = self._decode(work.size, work.pictures, tiling)
            before, left = ({}, latents) if work.decode_only else self._draw(work, tiling and bool(work.seen))
        return before | {"decoding": left + rise}

    def _draw(self, work: Workload, tiling: bool) -> tuple[dict[str, int], int]:
        """Peaks of the stages before a decode, and what is left to it: the latents, and what a tape keeps.

        Args:
            tiling: given pictures are encoded in tiles.
        """
        key = work, tiling
        if key not in self._drawn:
            live, encoding, branches = self._live(), *self._encode(work)
            peaks = {"text_encoding": encoding}
            if work.seen:
                self.parts["vae"].tiling, self.parts["vae"].slicing = tiling, self.plan.vae_slicing
                peaks["picture_encoding"], branches = self._look(work, branches)
            peaks["latent_preparation"], peaks["denoising"], left = self._denoise(work, branches, live)
            self._drawn[key] = peaks, left
        return self._drawn[key]

    def _encode(self, work: Workload) -> tuple[int, list[list[Condition]]]:
        """The peak and the encoded prompts, which do not depend on the result's size. They are as long as may be."""
        key = work.prompts, work.outputs_per_prompt, work.negative, work.text_length, work.seen
        if key not in self._encoded:
            self._encoded[key] = self._encode_longest(work)
        return self._encoded[key]

    def _encode_longest(self, work: Workload) -> tuple[int, list[list[Condition]]]:
        live = self._live()
        for words in range(work.text_length, -1, -1):  # families may have tokens of their own around a prompt's
            longest = " ".join(["word"] * words)
            texts = [longest] * work.prompts, longest if work.negative else None
            try:
                with live.rising():
                    branches = encode(self.family, *texts, work.outputs_per_prompt, work.text_length, _blank(work.seen))
                return live.peak, branches
            except PromptTooLong as e:
                too_long = e
        raise UserError(str(too_long))

    def _look(self, work: Workload, branches: Branches) -> tuple[int, list[list[Condition]]]:
        """The peak of the given pictures' encoding, and the conditions with what it gives."""
        live = self._live()
        with live.rising():
            given = _like(branches)
            seen = self.family.encode_pictures(_blank(work.seen), work.size)
        return live.peak, [[condition | seen for condition in branch] for branch in given]

    def _denoise(self, work: Workload, branches: Branches, live: LiveBytes) -> tuple[int, int, int]:
        """Peaks of the preparation and of the loop, and what stays: the final latents, and what tapes keep."""
        mesh, family = self.blueprint.mesh, self.family
        own = mesh.dp.own(work.pictures)
        generators = [torch.Generator()] * (own.stop - own.start)
        preparing = denoising = 0
        taped, neighbours = Graphs(Tapes()), Neighbours()
        with live.rising():
            given = [branch[own] for branch in _like(branches)]
            state = State.start(family.noise(work.size, generators), work.schedule)
            noise = [family.noise(work.size, generators) for _ in range(work.schedule.noises)]
        for phase in family.phases(work.schedule.timesteps, work.guidance):
            execute: Execute = taped if self.taped else OneStep(live)
            with live.rising():
                timesteps = work.schedule.timesteps[phase.steps.start : phase.steps.stop]
                positive, *negative = [
                    neighbours.predictor(
                        family, state.x, conditions, work.size, work.guidance, timesteps, phase.denoiser
                    )
                    for conditions in (given if mesh.cfg.size == 1 else given[:1])
                ]
            preparing = max(preparing, live.peak)
            with live.rising():
                against = negative[0] if negative else None
                loop = integrate(
                    state, work.schedule, phase.steps, positive, against, phase.scale, noise, execute,
                    keeps_norm=family.keeps_norm, gather=mesh.cfg.all_gather if mesh.cfg.size > 1 else None,
                )  # fmt: skip
                for _ in phase.steps[:2]:  # the second holds what the first left; so do those that follow
                    state = next(loop).state
            denoising = max(denoising, live.peak)
            del loop, positive, negative, against
        with live:
            x = finished(family, state.x, given[0])
        del given, state, noise
        left = live.now
        del x, taped  # not before they are counted
        return preparing, denoising, left

    def _decode(self, size: Size, pictures: int, tiling: bool) -> tuple[int, int]:
        """Bytes of the latents, and how far their decode rises above what is there when it begins."""
        key = size, pictures, tiling
        if key not in self._decoded:
            live, vae = self._live(), self.parts["vae"]
            vae.tiling, vae.slicing = tiling, self.plan.vae_slicing
            with live.rising():
                x = self.family.noise(size, [torch.Generator()] * pictures)
            latents = live.now
            with live.rising():
                chunks = self.family.decode(x, size)
                if not vae.slicing:
                    chunks = Neighbours().decode(self.family, x, size, eager, tiling=tiling)
                for chunk in chunks:
                    quantised(chunk)
                    del chunk
            self._decoded[key] = latents, live.peak - latents
        return self._decoded[key]

    def _live(self) -> LiveBytes:
        return LiveBytes("meta", self.granularity)


def fewest_pictures(family: Family, size: Size, guidance: Guidance, text_length: int) -> int:
    """How many have to be given. Raises ValueError if the checkpoint takes no such request."""
    try:
        family.check(size, guidance, text_length, 0)
    except ValueError:
        for given in (1, 2):
            with suppress(ValueError):
                family.check(size, guidance, text_length, given)
                return given
        raise
    return 0


def _blank(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    return [Image.new("RGB", size) for size in sizes]


def _like(branches: Branches) -> list[list[Condition]]:
    """New tensors of the same shapes. Results that share a condition go on sharing one."""
    each = {id(condition): condition for branch in branches for condition in branch}
    new = {at: Condition({k: torch.empty_like(v) for k, v in c.tensors.items()}) for at, c in each.items()}
    return [[new[id(condition)] for condition in branch] for branch in branches]


def _keep_in_fp32(encoder: Any) -> None:
    """What transformers does as it reads a checkpoint in fp16: layers that would overflow stay wide."""
    kept = encoder._keep_in_fp32_modules or ()
    for name, module in encoder.named_modules():
        if name.rpartition(".")[2] in kept:
            module.float()
