"""`WanPipeline` and `WanImageToVideoPipeline`: clips from a prompt, from a first frame, or from a first and a last.

Tensors of a condition, by name:

- `encoder_hidden_states` (B, T, text_dim): of the text encoder, zeros after the prompt's end.
- `encoder_hidden_states_image` (B, tokens, image_dim): of the image encoder, for models that look at it (`image_dim`):
  257 tokens of the first picture and, for a model of first and last frame, 257 more of the last.
- `latent_condition`: (B, 4 + C, F, Y, X), masks and latents, for models with channels for them; (B, C, 1, Y, X), the
  first frame's latents, for Wan2.2 TI2V if it begins with a picture. Normalised, as the state is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from sgl_diffusion.models.autoencoders.wan import FRAMES_PER_LATENT, AutoencoderKLWan, WanVaeConfig
from sgl_diffusion.models.config import read_config
from sgl_diffusion.models.family import (
    ONE_RANK,
    SETTINGS,
    AttentionFn,
    Condition,
    Defaults,
    Distilled,
    Execute,
    Guidance,
    Phase,
    Predictor,
    Preset,
    Read,
    Size,
    Split,
    check_step,
    eager,
)
from sgl_diffusion.models.pictures import fit
from sgl_diffusion.models.text import umt5_hidden, vision_hidden
from sgl_diffusion.models.wan.presets import DISTILLED, PRESETS, WAN21_480P
from sgl_diffusion.models.wan.transformer import PATCH, WanConfig, WanTransformer, hold_first_frame

DENOISERS = ("transformer", "transformer_2")  # of much noise, and of little where there are two
TIMESTEPS = 1000  # of all noise
PIXELS = {16: 8, 48: 16}  # that one latent covers per side, by channels: of the two published autoencoders
MAX_TEXT = 512  # tokens of a prompt
IMAGE_TOKENS = 257  # of a picture in the image encoder


@dataclass(frozen=True)
class Settings:
    """Of `model_index.json`."""

    boundary_ratio: float | None = None  # `transformer` takes timesteps from this share of all on, the second the rest
    expand_timesteps: bool = False  # one for every token


class Wan:
    """One denoiser or two; parts that a checkpoint lacks are None or not there."""

    draws_video = classifier_free = exact_tiles = True
    language_models: Mapping[str, Read] = {}
    unguided_scale, keeps_norm = 1.0, False
    distilled: Distilled | None = None

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = parts
        self.denoisers: dict[str, WanTransformer] = {key: parts[key] for key in DENOISERS if parts.get(key) is not None}
        self.config = next(iter(self.denoisers.values())).config
        self.vae: AutoencoderKLWan = parts.get("vae")  # type: ignore[assignment] # missing where a denoiser is counted
        self.settings = read_config(Settings, parts.get(SETTINGS, {}))

    @classmethod
    def components(cls) -> Mapping[str, str]:
        return {
            **dict.fromkeys(DENOISERS, "denoiser"),
            "vae": "vae",
            "text_encoder": "text_encoder",
            "tokenizer": "tokenizer",
            "image_encoder": "image_encoder",
            "image_processor": "image_processor",
            "scheduler": "scheduler",
        }

    @classmethod
    def optional(cls) -> frozenset[str]:
        """The second denoiser is Wan2.2 A14B's; Wan2.1 looks at pictures through an encoder."""
        return frozenset({"transformer_2", "image_encoder", "image_processor"})

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
        split: Split = ONE_RANK,
    ) -> nn.Module:
        if component == "vae":
            return AutoencoderKLWan(WanVaeConfig.read(config), attention, **options)
        return WanTransformer(WanConfig.read(config), attention, split)

    @classmethod
    def encodes_pictures(cls, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        beside = WanConfig.read(configs["transformer"]).condition_channels > 0
        return beside or read_config(Settings, configs.get(SETTINGS, {})).expand_timesteps

    @classmethod
    def attention_heads(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        return min(config.num_attention_heads for config in _denoisers(configs).values())

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        """Those of the published checkpoint with the same denoisers; of several, of the one with the same scheduler:
        models of larger clips shift their noise levels more.
        """
        own, shift = _denoisers(configs), configs.get("scheduler", {}).get("flow_shift")
        same = [preset for preset in PRESETS.values() if _denoisers(preset.components) == own]
        same.sort(key=lambda preset: preset.components["scheduler"]["flow_shift"] != shift)
        return same[0].defaults if same else WAN21_480P

    @classmethod
    def examples(cls, configs: Mapping[str, Mapping[str, Any]]) -> Sequence[Condition]:
        """A picture's latents are of one pixel: they are good for every size."""
        config = WanConfig.read(configs["transformer"])
        shapes = {"encoder_hidden_states": (1, cls.defaults(configs).max_sequence_length, config.text_dim)}
        if config.image_dim is not None:
            shapes["encoder_hidden_states_image"] = (1, config.pos_embed_seq_len or IMAGE_TOKENS, config.image_dim)
        tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        if config.condition_channels:
            tensors["latent_condition"] = torch.zeros(1, config.condition_channels, 1, 1, 1)
        return [Condition(tensors)]

    @classmethod
    def diffusers_inputs(
        cls, configs: Mapping[str, Mapping[str, Any]], condition: Condition, size: Size
    ) -> Mapping[str, Any]:
        """In a pipeline for Wan2.2 TI2V every token has a timestep, whether or not there is a picture."""
        config, given = WanConfig.read(configs["transformer"]), condition.tensors
        C, *latent_size = _latent_shape(config, size)
        tokens = math.prod(latent_size) // math.prod(PATCH)
        images = given.get("encoder_hidden_states_image")
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

    def check(self, size: Size, guidance: Guidance, max_sequence_length: int, pictures: int) -> None:
        side = PIXELS[self.config.state_channels] * PATCH[1]
        check_step("height", size.height, side)
        check_step("width", size.width, side)
        check_step("num_frames", size.frames, FRAMES_PER_LATENT, first=1)
        if max_sequence_length > MAX_TEXT:
            raise ValueError(f"max_sequence_length={max_sequence_length}: at most {MAX_TEXT}")
        if guidance.true_cfg_2 is not None and len(self.denoisers) == 1:
            raise ValueError(f"guidance_scale_2={guidance.true_cfg_2}: this checkpoint has one denoiser")
        taken = self._pictures()
        if pictures not in taken:
            *some, last = map(str, taken)
            expected = f"{', '.join(some)} or {last}" if some else last
            raise ValueError(f"image_path: {pictures} given; this checkpoint takes {expected}")

    def _pictures(self) -> Sequence[int]:
        """How many may be given: a first frame, or a first and a last."""
        if not self.config.condition_channels:
            return (0, 1) if self.settings.expand_timesteps else (0,)
        if self.config.image_dim is None:
            return (1, 2)
        return (2,) if self.config.pos_embed_seq_len else (1,)

    def fitting_size(self, pictures: Sequence[Image], defaults: Defaults) -> tuple[int, int]:
        """Whatever the pictures' proportions, as in diffusers."""
        return defaults.height, defaults.width

    def encode(
        self, prompt: str, max_sequence_length: int, pictures: Sequence[Image] = (), execute: Execute = eager
    ) -> Condition:
        p = self.parts
        hidden = umt5_hidden(p["tokenizer"], p["text_encoder"], prompt, max_sequence_length, execute)
        return Condition({"encoder_hidden_states": hidden})

    def encode_pictures(self, pictures: Sequence[Image], size: Size, execute: Execute = eager) -> Condition:
        """The first frame, and the last if there are two."""
        tensors, weight = {}, self.vae.decoder.conv_in.weight
        if self.config.image_dim is not None:
            seen = vision_hidden(self.parts["image_processor"], self.parts["image_encoder"], pictures, execute)
            tensors["encoder_hidden_states_image"] = seen.flatten(0, 1)[None]
        frames = 1 if self.settings.expand_timesteps else size.frames
        clip = torch.zeros(1, 3, frames, size.height, size.width)
        given = torch.zeros(frames)
        for place, picture in zip((0, -1), pictures, strict=False):
            clip[:, :, place], given[place] = fit(picture, size.height, size.width), 1
        mean, _ = self.vae.encode(clip.to(weight.device, weight.dtype))
        latents = self.vae.normalise(mean.float())
        if not self.settings.expand_timesteps:
            # a mask of each of the frames that a latent one stands for; the first stands for one frame, four times
            mask_T4 = torch.cat([given[:1].expand(FRAMES_PER_LATENT - 1), given]).unflatten(0, (-1, FRAMES_PER_LATENT))
            mask = mask_T4.T[None, :, :, None, None].expand(-1, -1, -1, *latents.shape[3:])
            latents = torch.cat([mask.to(latents.device), latents], dim=1)
        return Condition({**tensors, "latent_condition": latents})

    def image_tokens(self, size: Size) -> int:
        return math.prod(_latent_shape(self.config, size)[1:]) // math.prod(PATCH)

    def noise_levels(self, steps: int) -> Sequence[float] | None:
        return None

    def dynamic_shift(self, size: Size, steps: int) -> float | None:
        return None

    def phases(self, timesteps: Sequence[float], guidance: Guidance) -> Sequence[Phase]:
        ratio = self.settings.boundary_ratio
        boundary = -math.inf if ratio is None else ratio * TIMESTEPS
        scales = (guidance.true_cfg, guidance.true_cfg if guidance.true_cfg_2 is None else guidance.true_cfg_2)
        phases, start = [], 0
        for noisy, run in groupby(timesteps, key=lambda t: t >= boundary):
            which, stop = 0 if noisy else 1, start + len(list(run))
            phases.append(Phase(DENOISERS[which], range(start, stop), scales[which]))
            start = stop
        return phases

    def finished(self, x: Tensor, condition: Condition) -> Tensor:
        """A given first frame is as it was given."""
        latents = condition.tensors.get("latent_condition")
        if latents is None or self.config.condition_channels:
            return x
        return hold_first_frame(x, latents)

    def decode(self, x: Tensor, size: Size, execute: Execute = eager) -> Iterator[Tensor]:
        """Chunk by chunk. A batch in slices comes as a whole, and so does a clip in tiles and slices: tile after tile,
        without remembering what all of them need of the chunk before.
        """
        z = self.vae.denormalise(x.to(self.vae.decoder.conv_in.weight.dtype))
        if self.vae.slicing and (len(z) > 1 or self.vae.tiling):
            yield self.vae.decode(z)
        else:
            yield from self.vae.decode_chunks(z)

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
        request = model.prepare(
            text, given.get("encoder_hidden_states_image"), latents, _latent_shape(model.config, size)
        )
        t_SG = torch.tensor(timesteps, dtype=torch.float32)[:, None]
        if request.first_BC1YX is not None:
            t_SG = torch.cat([torch.zeros_like(t_SG), t_SG], dim=1)  # a given frame has no noise at any step
        return Predictor(model, (request,), model.modulate(t_SG.to(text.device)))


class DistilledWan(Wan):
    """`WanDMDPipeline` (FastVideo's FastWan): three steps without guidance, whatever its scheduler's config says."""

    distilled = Distilled(timesteps=(1000, 757, 522), shift=8.0)

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        return DISTILLED

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        return replace(super().defaults(configs), num_inference_steps=len(cls.distilled.timesteps), guidance_scale=1.0)

    def check(self, size: Size, guidance: Guidance, max_sequence_length: int, pictures: int) -> None:
        super().check(size, guidance, max_sequence_length, pictures)
        if guidance.true_cfg != 1:
            raise ValueError(f"guidance_scale={guidance.true_cfg:g}: this model was distilled without; expected 1")


def _denoisers(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, WanConfig]:
    return {key: WanConfig.read(configs[key]) for key in DENOISERS if configs.get(key)}


def _latent_shape(config: WanConfig, size: Size) -> tuple[int, ...]:
    """(C, F, Y, X). The first frame has a latent frame to itself."""
    frames, pixels = (size.frames - 1) // FRAMES_PER_LATENT + 1, PIXELS[config.state_channels]
    return config.state_channels, frames, size.height // pixels, size.width // pixels
