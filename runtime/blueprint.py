"""What a native pipeline is built from: enough to count, to plan and to compile for it without its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import ENCODERS, ONE_RANK, SETTINGS, AttentionFn, Defaults, Family, Split
from sgl_diffusion.runtime.attention import shape_only_attention
from sgl_diffusion.runtime.encoders import dummy_encoder, read_processor
from sgl_diffusion.runtime.parallel.mesh import ONE, Mesh
from sgl_diffusion.runtime.parallel.rows import RankBands, check_rows
from sgl_diffusion.runtime.parallel.shares import check_shares
from sgl_diffusion.runtime.parallel.tensor import share_denoiser
from sgl_diffusion.runtime.parallel.usp import Usp
from sgl_diffusion.runtime.pictures import is_url
from sgl_diffusion.runtime.plan import Plan
from sgl_diffusion.runtime.quantization.component import Quantization
from sgl_diffusion.runtime.request import Job, Request, settle
from sgl_diffusion.runtime.schedulers import DMD, Sampler, read_scheduler

AT_WORK: Mapping[str, tuple[str, ...]] = {
    "text_encoding": ("text_encoder",),
    "picture_encoding": ("image_encoder", "vae"),
    "latent_preparation": ("denoiser",),
    "denoising": ("denoiser",),
    "decoding": ("vae",),
}
"""Stage of a request -> the kinds of components that compute in it."""


@dataclass(frozen=True)
class Blueprint:
    """A family with the configs and the plan of one checkpoint."""

    family: type[Family]
    configs: Mapping[str, Mapping[str, Any]]
    defaults: Defaults
    plan: Plan
    vae_options: Mapping[str, Any]
    mesh: Mesh = ONE  # of ranks that are not there, for plans
    quantization: Mapping[str, Quantization] = field(default_factory=dict)  # by component
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)  # of weights outside of the component's folder

    @property
    def kinds(self) -> Mapping[str, str]:
        return kinds_of(self.family, self.configs)

    @property
    def split(self) -> Split:
        """Of the denoisers' tokens."""
        return ONE_RANK if self.mesh.sp.size == 1 else Usp.of(self.mesh, self.plan.sp_communication)

    def module(self, key: str, attention: AttentionFn) -> nn.Module:
        """The native module of a component, of shapes alone ("meta"), in fp32 and not quantised.

        Raises:
            ConfigError: a config that is not understood, naming the component.
            UserError: weights that ranks cannot share.
        """
        options: dict[str, Any] = dict(self.vae_options) if self.kinds[key] == "vae" else {}
        if self.kinds[key] == "vae" and self.plan.vae_sp:
            options["bands"] = RankBands(self.mesh.world)
        try:
            with torch.device("meta"):
                module = self.family.build(key, self.configs[key], attention, options, self.split)
                if self.kinds[key] == "denoiser":
                    share_denoiser(key, module, self.mesh.tp)
                return module.eval().requires_grad_(False)
        except ConfigError as e:
            raise ConfigError(f"{key}: {e}") from e

    def processor(self, key: str) -> nn.Module:
        """A processor of the family's own. Raises as `module`."""
        return self.module(key, attention)

    def check(self, requests: Sequence[Request]) -> None:
        """Before anything is loaded.

        Raises:
            ConfigError: a component's config is not understood.
            UserError: a request cannot be honoured. Those with pictures that have to be fetched are not looked at: they
                are fetched when they are drawn from.
        """
        self.sampler()
        native = [key for key, kind in self.kinds.items() if kind in ("denoiser", "vae", "processor")]
        parts = {key: self.module(key, attention) for key in native}
        for request in requests:
            if not any(map(is_url, request.given.get("image_path", ()))):
                self.settle(request, parts)

    def settle(self, request: Request, parts: Mapping[str, Any]) -> Job:
        """What a request comes to. Of the parts by component, the family's own are enough; shapes alone will do.

        Raises:
            UserError: anything this family or checkpoint cannot honour, or has no part in for some ranks.
        """
        family = self.family_of(parts)
        job = settle(request, self.defaults, family, self.sampler())
        check_shares(self.plan.layout, job, family)
        if self.plan.vae_sp:
            check_rows(job.size.height // parts["vae"].config.downsampling, self.plan.layout.ranks)
        return job

    def sampler(self) -> Sampler:
        """Raises ConfigError for one that is not implemented."""
        if (few := self.family.distilled) is not None:
            return DMD(few.timesteps, few.shift)
        return read_scheduler(self.configs["scheduler"])

    def family_of(self, parts: Mapping[str, Any]) -> Family:
        """The family with its parts by component."""
        return self.family({**parts, SETTINGS: self.configs.get(SETTINGS, {})})

    def attention_on(self, device: torch.device) -> Callable[[str], AttentionFn]:
        """By component, the attention of shapes that stand for tensors on this device."""
        plan = self.plan
        return lambda key: shape_only_attention(key, plan.attention[key], device, plan.attention_config.get(key))

    def shape_only_parts(self, attention_of: Callable[[str], AttentionFn]) -> dict[str, Any]:
        """Denoisers, VAEs and encoders by component, of true size and dtype and without memory ("meta").

        Raises:
            UserError: layers that cannot be quantised as asked, or are not those of the quantised checkpoint.
        """
        parts: dict[str, Any] = {}
        planned = replace(self, mesh=Mesh.stand_in(self.mesh.layout))  # nothing is sent for shapes
        for key, kind in self.kinds.items():
            if kind in ("denoiser", "vae"):
                parts[key] = planned.module(key, attention_of(key)).to(self.plan.dtypes[key])
            elif kind in ENCODERS:
                encoder = dummy_encoder(
                    key,
                    self.configs[key],
                    torch.device("meta"),
                    self.plan.dtypes[key],
                    None,
                    planned.mesh.tp,
                    self.family.language_models.get(key),
                )
                parts[key] = encoder.eval()
            elif kind == "image_processor":
                parts[key] = read_processor(key, self.configs[key])
            elif kind == "processor":
                parts[key] = self.processor(key)
            if key in self.quantization:
                self.quantization[key].shapes(parts[key])
        return parts


def kinds_of(family: type[Family], configs: Mapping[str, Any]) -> dict[str, str]:
    """Kinds of the components that a checkpoint has, as `Family.components` calls them."""
    missing = family.optional() - configs.keys()
    return {key: kind for key, kind in family.components().items() if key not in missing}
