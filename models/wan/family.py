"""`WanPipeline` and `WanImageToVideoPipeline`, as far as the denoisers go.

Tensors of a condition, by name:

- `encoder_hidden_states` (B, T, text_dim): of the text encoder, zeros after the prompt's end.
- `image_embeds` (B, tokens, image_dim): of the image encoder, for models that look at it (`image_dim`): 257 tokens of
  the first picture and, for a model of first and last frame, 257 more of the last.
- `latent_condition`: (B, 4 + C, F, Y, X), masks and latents, for models with channels for them; (B, C, 1, Y, X), the
  first frame's latents, for Wan2.2 TI2V if it begins with a picture. Normalised, as the state is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.models.autoencoders.wan import FRAMES_PER_LATENT, AutoencoderKLWan, WanVaeConfig
from sgl_diffusion.models.family import AttentionFn, Condition, Defaults, Guidance, Predictor, Preset, Size
from sgl_diffusion.models.wan.presets import PRESETS, WAN21_480P
from sgl_diffusion.models.wan.transformer import PATCH, WanConfig, WanTransformer

DENOISERS = ("transformer", "transformer_2")  # of much noise, and of little where there are two
TIMESTEPS = 1000  # of all noise
PIXELS = {16: 8, 48: 16}  # that one latent covers per side, by channels: of the two published autoencoders
IMAGE_TOKENS = 257  # of a picture in the image encoder


def phases(timesteps: Sequence[float], boundary_ratio: float | None) -> list[tuple[str, range]]:
    """Which denoiser takes which steps, in order.

    Args:
        timesteps: in thousandths, of all steps.
        boundary_ratio: of `model_index.json`: `transformer` takes timesteps from this share of all on, `transformer_2`
            those below it; None where there is one denoiser.
    """
    boundary = -math.inf if boundary_ratio is None else boundary_ratio * TIMESTEPS
    runs, start = [], 0
    for noisy, run in groupby(timesteps, key=lambda t: t >= boundary):
        stop = start + len(list(run))
        runs.append((DENOISERS[0 if noisy else 1], range(start, stop)))
        start = stop
    return runs


class Wan:
    """One denoiser or two; parts that a checkpoint lacks are None."""

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.denoisers: dict[str, WanTransformer] = {key: parts[key] for key in DENOISERS if parts.get(key) is not None}

    @classmethod
    def components(cls) -> Mapping[str, str]:
        """The second denoiser is Wan2.2 A14B's alone."""
        return dict.fromkeys(DENOISERS, "denoiser")

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        return PRESETS

    @classmethod
    def build(
        cls,
        component: str,
        config: Mapping[str, Any],
        attention: AttentionFn,
        options: Mapping[str, Any],
    ) -> nn.Module:
        if component == "vae":
            return AutoencoderKLWan(WanVaeConfig.read(config), attention, **options)
        return WanTransformer(WanConfig.read(config), attention)

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        """Those of the first published checkpoint with the same denoisers."""
        own = _denoisers(configs)
        same = (preset.defaults for preset in PRESETS.values() if _denoisers(preset.components) == own)
        return next(same, WAN21_480P)

    @classmethod
    def example(cls, configs: Mapping[str, Mapping[str, Any]]) -> Condition:
        """A picture's latents are of one pixel: they are good for every size."""
        config = WanConfig.read(configs["transformer"])
        shapes = {"encoder_hidden_states": (1, cls.defaults(configs).max_sequence_length, config.text_dim)}
        if config.image_dim is not None:
            shapes["image_embeds"] = (1, config.pos_embed_seq_len or IMAGE_TOKENS, config.image_dim)
        tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        if config.condition_channels:
            tensors["latent_condition"] = torch.zeros(1, config.condition_channels, 1, 1, 1)
        return Condition(tensors)

    @classmethod
    def diffusers_inputs(
        cls, configs: Mapping[str, Mapping[str, Any]], condition: Condition, size: Size
    ) -> Mapping[str, Any]:
        """In a pipeline for Wan2.2 TI2V every token has a timestep, whether or not there is a picture."""
        config, given = WanConfig.read(configs["transformer"]), condition.tensors
        C, *latent_size = _latent_shape(config, size)
        tokens = math.prod(latent_size) // math.prod(PATCH)
        images = given.get("image_embeds")
        if images is not None and config.pos_embed_seq_len:
            images = images.unflatten(1, (2, -1)).flatten(0, 1)  # first and last frame are two of the batch
        return {
            "hidden_states": torch.zeros(1, config.in_channels, *latent_size, dtype=torch.bfloat16),
            "timestep": torch.zeros(1, tokens) if C == 48 else torch.zeros(1, dtype=torch.int64),
            "encoder_hidden_states": given["encoder_hidden_states"],
            "encoder_hidden_states_image": images,
        }

    def noise(self, size: Size, generators: Sequence[torch.Generator]) -> Tensor:
        """fp32 in a model of any dtype, as in diffusers."""
        model = next(iter(self.denoisers.values()))
        shape = (1, *_latent_shape(model.config, size))
        x = torch.cat([torch.randn(shape, generator=g, dtype=torch.float32) for g in generators])
        return x.to(model.proj_out.weight.device)

    def predictor(
        self,
        condition: Condition,
        size: Size,
        guidance: Guidance,
        timesteps: Sequence[float],
        denoiser: str = "transformer",
    ) -> Predictor:
        """Of one of the denoisers, for its own steps.

        Args:
            condition: see the top of this file.
            guidance: nothing is fed to the model.
            timesteps: in thousandths, of these steps alone.
        """
        model, given = self.denoisers[denoiser], condition.tensors
        text, latents = given["encoder_hidden_states"], given.get("latent_condition")
        request = model.prepare(text, given.get("image_embeds"), latents, _latent_shape(model.config, size))
        t_SG = torch.tensor(timesteps, dtype=torch.float32)[:, None]
        if request.first_BC1YX is not None:
            t_SG = torch.cat([torch.zeros_like(t_SG), t_SG], dim=1)  # a given frame has no noise at any step
        return Predictor(model, (request,), model.modulate(t_SG.to(text.device)))


def _denoisers(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, WanConfig]:
    return {key: WanConfig.read(configs[key]) for key in DENOISERS if configs.get(key)}


def _latent_shape(config: WanConfig, size: Size) -> tuple[int, ...]:
    """(C, F, Y, X). The first frame has a latent frame to itself."""
    frames, pixels = (size.frames - 1) // FRAMES_PER_LATENT + 1, PIXELS[config.state_channels]
    return config.state_channels, frames, size.height // pixels, size.width // pixels
