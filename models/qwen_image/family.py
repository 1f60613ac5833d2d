"""`QwenImagePipeline`, `QwenImageEditPipeline` and `QwenImageEditPlusPipeline`: pictures drawn, and pictures edited.

Tensors of a condition, by name:

- `encoder_hidden_states` (B, T, C): of the language model, which sees the pictures that are edited. As long as it is.
- `latent_condition_<n>` (B, rows, columns, C): latents of the n-th picture, packed 2 x 2 into tokens as the state is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from sgl_diffusion.kernels.embedding import patchify, unpatchify
from sgl_diffusion.models.autoencoders.wan import AutoencoderKLWan, WanVaeConfig
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import (
    ONE_RANK,
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
from sgl_diffusion.models.layers import Sequenced
from sgl_diffusion.models.pictures import area_size, fit
from sgl_diffusion.models.qwen_image import presets
from sgl_diffusion.models.qwen_image.text import EDITING, EDITING_SEVERAL, Template, drawing_states, editing_states
from sgl_diffusion.models.qwen_image.transformer import (
    PATCH,
    TIMESTEPS,
    Grid,
    QwenImageConfig,
    QwenImageTransformer,
)
from sgl_diffusion.models.qwen_image.vision import MAX_ASPECT, Patches, ProcessorConfig

PIXELS = 8  # that one latent covers per side
TOKEN = PIXELS * PATCH  # pixels a token covers per side
SIDE = 32  # sides of given pictures are multiples of it
MAX_TEXT = 1024  # tokens of a prompt
EXAMPLE_TEXTS = (128, 121)  # tokens of prompts: a number that 16 divides, and another


@dataclass(frozen=True)
class Decode:
    """A pure function of latents, equal for one autoencoder and way to decode: it can be captured."""

    vae: AutoencoderKLWan
    tiling: bool
    slicing: bool

    def __call__(self, z_BCYX: Tensor) -> tuple[Tensor]:
        """A picture is a clip of one frame."""
        return (self.vae.decode(z_BCYX[:, :, None])[:, :, 0],)


class QwenImage:
    """`QwenImagePipeline`; latents are packed 2 x 2 into tokens."""

    draws_video = classifier_free = False
    language_models: Mapping[str, Read] = {"text_encoder": Read()}
    keeps_norm = exact_tiles = True
    unguided_scale = 1.0
    distilled: Distilled | None = None

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = parts
        self.transformer: QwenImageTransformer = parts["transformer"]

    @property
    def vae(self) -> AutoencoderKLWan:
        vae: AutoencoderKLWan = self.parts["vae"]
        return vae

    @classmethod
    def components(cls) -> Mapping[str, str]:
        return {
            "transformer": "denoiser",
            "vae": "vae",
            "text_encoder": "text_encoder",
            "tokenizer": "tokenizer",
            "scheduler": "scheduler",
        }

    @classmethod
    def optional(cls) -> frozenset[str]:
        return frozenset()

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        return presets.DRAWING_PRESETS

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
            return AutoencoderKLWan(_vae_config(config), attention, **options)
        if component == "processor":
            return Patches(ProcessorConfig.read(config))
        return QwenImageTransformer(QwenImageConfig.read(config), attention, split)

    @classmethod
    def encodes_pictures(cls, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        return False

    @classmethod
    def attention_heads(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        return QwenImageConfig.read(configs["transformer"]).num_attention_heads

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        return presets.DRAWING

    @classmethod
    def examples(cls, configs: Mapping[str, Mapping[str, Any]]) -> Sequence[Condition]:
        return [_example(configs, tokens) for tokens in EXAMPLE_TEXTS]

    @classmethod
    def diffusers_inputs(
        cls, configs: Mapping[str, Mapping[str, Any]], condition: Condition, size: Size
    ) -> Mapping[str, Any]:
        grids = [_grid(size), *map(_grid_of, _given(condition))]
        shape = (1, sum(map(math.prod, grids)), configs["transformer"]["in_channels"])
        return {
            "encoder_hidden_states": condition.tensors["encoder_hidden_states"],
            "hidden_states": torch.zeros(shape, dtype=torch.bfloat16),
            "timestep": torch.zeros(1, dtype=torch.bfloat16),
            "img_shapes": [[(1, *grid) for grid in grids]],
        }

    # -- a request --

    def check(self, size: Size, guidance: Guidance, max_sequence_length: int, pictures: int) -> None:
        self._check_pictures(pictures)
        if size.frames != 1:
            raise ValueError(f"num_frames={size.frames}: this model draws pictures")
        for name, pixels in (("height", size.height), ("width", size.width)):
            check_step(name, pixels, TOKEN)
        if max_sequence_length > MAX_TEXT:
            raise ValueError(f"max_sequence_length={max_sequence_length}: at most {MAX_TEXT}")
        if guidance.embedded not in (None, 0.0, 1.0):
            raise ValueError(
                f"guidance_scale={guidance.embedded}: this checkpoint has no guidance embedding; "
                "leave it out, or use negative_prompt with true_cfg_scale"
            )

    def _check_pictures(self, pictures: int) -> None:
        if pictures:
            raise ValueError(f"image_path: {pictures} given; this model draws from text alone")

    def fitting_size(self, pictures: Sequence[Image], defaults: Defaults) -> tuple[int, int]:
        return defaults.height, defaults.width

    def encode(
        self, prompt: str, max_sequence_length: int, pictures: Sequence[Image] = (), execute: Execute = eager
    ) -> Condition:
        p = self.parts
        states = drawing_states(p["tokenizer"], p["text_encoder"], prompt, max_sequence_length, execute)
        return Condition({"encoder_hidden_states": states})

    def image_tokens(self, size: Size) -> int:
        return math.prod(_grid(size))

    def noise_levels(self, steps: int) -> Sequence[float] | None:
        return None

    def dynamic_shift(self, size: Size, steps: int) -> float | None:
        return None

    def noise(self, size: Size, generators: Sequence[torch.Generator]) -> Tensor:
        weight, (rows, columns) = self.transformer.proj_out.weight, _grid(size)
        shape = (1, self.transformer.config.in_channels // PATCH**2, PATCH * rows, PATCH * columns)
        z = torch.cat([torch.randn(shape, generator=g, dtype=weight.dtype) for g in generators])
        return patchify(z, (PATCH, PATCH)).to(weight.device)

    def phases(self, timesteps: Sequence[float], guidance: Guidance) -> Sequence[Phase]:
        return [Phase("transformer", range(len(timesteps)), guidance.true_cfg)]

    def predictor(
        self,
        condition: Condition,
        size: Size,
        guidance: Guidance,
        timesteps: Sequence[float],
        denoiser: str = "transformer",
    ) -> Predictor:
        """Every token of the condition is a token of a prompt: there is no mask for the end of a shorter one."""
        model, text = self.transformer, condition.tensors["encoder_hidden_states"]
        dtype, device = model.proj_out.weight.dtype, text.device
        B, T = text.shape[:2]
        pictures, given = _given(condition), None
        streams = [T, self.image_tokens(size)]
        if pictures:
            given = torch.cat([tokens.flatten(1, 2) for tokens in pictures], dim=1).to(dtype)
            streams.append(given.shape[1])
        sequence = Sequenced.over(model.split, *streams)
        given = None if given is None else given[:, sequence.own[2]]
        context = model.read(text[:, sequence.own[0]].to(dtype))
        rotary = model.rotary(sequence, [_grid(size), *map(_grid_of, pictures)], device)
        rows = model.rows(B, sequence, device)
        # the roundings of diffusers, step by step: thousandths in the model's dtype, and down again
        t_S = torch.tensor(timesteps).to(dtype) / TIMESTEPS
        modulations = model.modulate(t_S.to(device), given=given is not None)
        return Predictor(model, (context, given, rows, rotary), modulations)

    def finished(self, x: Tensor, condition: Condition) -> Tensor:
        return x

    def decode(self, x: Tensor, size: Size, execute: Execute = eager) -> Iterator[Tensor]:
        vae = self.vae
        z = unpatchify(x, _grid(size), (PATCH, PATCH)).to(vae.decoder.conv_in.weight.dtype)
        z = vae.denormalise(z[:, :, None])[:, :, 0]
        yield execute(Decode(vae, vae.tiling, vae.slicing), z)[0]


class QwenImageEdit(QwenImage):
    """`QwenImageEditPipeline`: the language model and the denoiser look at one picture."""

    template: Template = EDITING
    seen_area = kept_area = 1024 * 1024  # pixels of given pictures: for the language model, and for the denoiser

    @classmethod
    def components(cls) -> Mapping[str, str]:
        return {**super().components(), "processor": "processor"}

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        return presets.EDITING_PRESETS

    @classmethod
    def encodes_pictures(cls, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        return True

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        return presets.EDITING

    @classmethod
    def examples(cls, configs: Mapping[str, Mapping[str, Any]]) -> Sequence[Condition]:
        """A square picture, and texts that 16 divides and does not. Lengths of pictures are as those of results."""
        side = math.isqrt(cls.kept_area) // TOKEN
        tokens = math.ceil((_seen_tokens(configs, cls.seen_area) + EXAMPLE_TEXTS[0]) / 16) * 16
        given = torch.zeros(1, side, side, configs["transformer"]["in_channels"], dtype=torch.bfloat16)
        return [_example(configs, T) | Condition({"latent_condition_0": given}) for T in (tokens, tokens + 1)]

    def _check_pictures(self, pictures: int) -> None:
        if pictures != 1:
            raise ValueError(f"image_path: {pictures} given; this checkpoint edits 1")

    def fitting_size(self, pictures: Sequence[Image], defaults: Defaults) -> tuple[int, int]:
        """The proportions of the last picture, and about the area at which the denoiser is given it."""
        for picture in pictures:
            height, width = area_size(picture, self.seen_area, SIDE)
            if max(height, width) > MAX_ASPECT * min(height, width):
                told = f"a picture of {picture.width}x{picture.height}"
                raise ValueError(f"image_path: {told}; at most {MAX_ASPECT} times as long as wide")
        return area_size(pictures[-1], self.kept_area, SIDE)

    def encode(
        self, prompt: str, max_sequence_length: int, pictures: Sequence[Image] = (), execute: Execute = eager
    ) -> Condition:
        p, seen = self.parts, [_resized(picture, self.seen_area) for picture in pictures]
        states = editing_states(
            p["tokenizer"], p["text_encoder"], p["processor"], self.template, prompt, seen, max_sequence_length
        )
        return Condition({"encoder_hidden_states": states})

    def encode_pictures(self, pictures: Sequence[Image], size: Size, execute: Execute = eager) -> Condition:
        """Whatever the size of the result."""
        weight, tensors = self.vae.decoder.conv_in.weight, {}
        for i, picture in enumerate(pictures):
            pixels = fit(picture, *area_size(picture, self.kept_area, SIDE))[:, :, None]
            mean, _ = self.vae.encode(pixels.to(weight.device, weight.dtype))
            latents = self.vae.normalise(mean.float())[:, :, 0]
            rows = latents.shape[2] // PATCH
            tensors[f"latent_condition_{i}"] = patchify(latents, (PATCH, PATCH)).unflatten(1, (rows, -1))
        return Condition(tensors)


class QwenImageEditPlus(QwenImageEdit):
    """`QwenImageEditPlusPipeline`: several pictures, of which the language model sees small copies."""

    template = EDITING_SEVERAL
    seen_area = 384 * 384

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        return presets.EDITING_SEVERAL_PRESETS

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        return presets.EDITING_SEVERAL

    def _check_pictures(self, pictures: int) -> None:
        if not pictures:
            raise ValueError("image_path: none given; this checkpoint edits pictures")


def _grid(size: Size) -> Grid:
    """Rows and columns of image tokens."""
    return size.height // TOKEN, size.width // TOKEN


def _grid_of(tokens: Tensor) -> Grid:
    """Of a given picture's (B, rows, columns, C)."""
    return tokens.shape[1], tokens.shape[2]


def _given(condition: Condition) -> list[Tensor]:
    """Tokens of the given pictures in their order."""
    return [tensor for name, tensor in condition.tensors.items() if name.startswith("latent_condition")]


def _resized(picture: Image, area: int) -> Image:
    height, width = area_size(picture, area, SIDE)
    return picture.resize((width, height), Resampling.LANCZOS)


def _example(configs: Mapping[str, Mapping[str, Any]], tokens: int) -> Condition:
    """A prompt is as long as it is, not padded to a fixed length."""
    shape = (1, tokens, configs["transformer"]["joint_attention_dim"])
    return Condition({"encoder_hidden_states": torch.zeros(shape, dtype=torch.bfloat16)})


def _seen_tokens(configs: Mapping[str, Mapping[str, Any]], area: int) -> int:
    """Of a square picture in the language model."""
    patches, side = Patches(ProcessorConfig.read(configs["processor"])), math.isqrt(area)
    tokens_side = patches.config.patch_size * patches.config.merge_size
    return math.prod(patches.fitting(side, side)) // tokens_side**2


def _vae_config(raw: Mapping[str, Any]) -> WanVaeConfig:
    """Of `AutoencoderKLQwenImage`, a Wan autoencoder of pictures. Its `input_channels` are 4 in models with layers."""
    config = dict(raw)
    if (channels := config.pop("input_channels", 3)) != 3:
        raise ConfigError(f"config key input_channels={channels} is not supported natively; only 3 is")
    return WanVaeConfig.read(config)
