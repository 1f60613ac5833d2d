"""`Flux2Pipeline` (dev) and `Flux2KleinPipeline`: pictures from text, and from given pictures beside it.

Tensors of a condition, by name:

- `encoder_hidden_states` (B, T, joint_attention_dim): of the text encoder, padding included.
- `latent_condition` (B, J, C): tokens of given pictures, one picture after the other; normalised, as the state is.
- `condition_ids` (B, J, 4): their places, see `references.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from PIL.Image import Image
from torch import Tensor, nn

from sgl_diffusion.kernels.embedding import unpatchify
from sgl_diffusion.models.autoencoders.catalog import build_autoencoder
from sgl_diffusion.models.autoencoders.flux2 import PATCH, AutoencoderKLFlux2
from sgl_diffusion.models.autoencoders.kl import Decode
from sgl_diffusion.models.config import ConfigError, demand, read_config
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
from sgl_diffusion.models.flux2.presets import DEV, DEV_PRESETS, KLEIN, KLEIN_BASE, KLEIN_PRESETS
from sgl_diffusion.models.flux2.references import TOKEN_PIXELS, fitting, places, prepared
from sgl_diffusion.models.flux2.text import MISTRAL_LAYERS, QWEN_LAYERS, mistral_states, qwen_states
from sgl_diffusion.models.flux2.transformer import AXES, Flux2Config, Flux2Transformer

TIMESTEPS = 1000  # the transformer sees sigma in thousandths
MAX_TEXT = 512  # tokens of a prompt, its template included
EXAMPLE_PICTURE = 1024  # tokens


class Flux2:
    """`Flux2Pipeline`: guidance is fed to the transformer, text comes from Mistral Small 3."""

    draws_video = classifier_free = keeps_norm = exact_tiles = False
    language_models: Mapping[str, Read] = {"text_encoder": Read(MISTRAL_LAYERS[-1])}
    unguided_scale = 1.0
    distilled: Distilled | None = None
    read_text: Callable[..., Tensor] = staticmethod(mistral_states)

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = parts
        self.transformer: Flux2Transformer = parts["transformer"]
        self.vae: Any = parts["vae"]

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
        return DEV_PRESETS

    @classmethod
    def build(
        cls,
        component: str,
        config: Mapping[str, Any],
        attention: AttentionFn,
        options: Mapping[str, Any],
        split: Split = ONE_RANK,
    ) -> nn.Module:
        if component == "transformer":
            return Flux2Transformer(Flux2Config.read(config), attention, split)
        allowed = dict.fromkeys(("AutoencoderKLFlux2", "AutoencoderTiny"), 32)
        vae: Any = build_autoencoder(config, attention, options, allowed)
        if (side := vae.config.downsampling * PATCH[0]) != TOKEN_PIXELS:
            raise ConfigError(f"a token would cover {side} pixels per side; expected {TOKEN_PIXELS}")
        return cast(nn.Module, vae)

    @classmethod
    def encodes_pictures(cls, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        return True

    @classmethod
    def attention_heads(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        return Flux2Config.read(configs["transformer"]).num_attention_heads

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        return DEV if Flux2Config.read(configs["transformer"]).guidance_embeds else replace(DEV, guidance_scale=None)

    def check(self, size: Size, guidance: Guidance, max_sequence_length: int, pictures: int) -> None:
        """Any number of pictures is taken."""
        if size.frames != 1:
            raise ValueError(f"num_frames={size.frames}: this model draws pictures")
        for name, pixels in (("height", size.height), ("width", size.width)):
            check_step(name, pixels, TOKEN_PIXELS)
        if max_sequence_length > MAX_TEXT:
            raise ValueError(f"max_sequence_length={max_sequence_length}: at most {MAX_TEXT}")
        if guidance.embedded is not None and not (self.classifier_free or self.transformer.config.guidance_embeds):
            raise ValueError(
                f"guidance_scale={guidance.embedded}: this checkpoint has no guidance embedding; leave it out"
            )

    def fitting_size(self, pictures: Sequence[Image], defaults: Defaults) -> tuple[int, int]:
        """That of the first picture. Raises ValueError for one that cannot be taken."""
        return [fitting(picture) for picture in pictures][0]

    # -- what a model is told ---------------------------------------------------------

    def encode(
        self, prompt: str, max_sequence_length: int, pictures: Sequence[Image] = (), execute: Execute = eager
    ) -> Condition:
        p, read = self.parts, type(self).read_text
        hidden = read(p["tokenizer"], p["text_encoder"], prompt, max_sequence_length, execute)
        return Condition({"encoder_hidden_states": hidden})

    def encode_pictures(self, pictures: Sequence[Image], size: Size, execute: Execute = eager) -> Condition:
        weight = next(self.vae.parameters())
        tokens, at = [], []
        for number, picture in enumerate(pictures, start=1):
            latent, *_ = self.vae.encode(prepared(picture).to(weight.device, weight.dtype))
            rows, columns = latent.shape[2] // PATCH[0], latent.shape[3] // PATCH[1]
            # (C, row, y, column, x) -> (row, column, C, y, x)
            patches = latent.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
            tokens.append(self.normalise(patches.flatten(3).flatten(1, 2)))
            at.append(places(rows, columns, number))
        given_BJC = torch.cat(tokens, dim=1)
        return Condition({"latent_condition": given_BJC, "condition_ids": torch.cat(at)[None].to(given_BJC.device)})

    @classmethod
    def examples(cls, configs: Mapping[str, Mapping[str, Any]]) -> Sequence[Condition]:
        """Text alone, and one token less with a given picture."""
        config = Flux2Config.read(configs["transformer"])
        shape = (1, cls.defaults(configs).max_sequence_length, config.joint_attention_dim)
        hidden = torch.zeros(shape, dtype=torch.bfloat16)
        beside = {
            "latent_condition": torch.zeros(1, EXAMPLE_PICTURE, config.in_channels, dtype=torch.bfloat16),
            "condition_ids": torch.zeros(1, EXAMPLE_PICTURE, AXES, dtype=torch.int64),
        }
        alone = Condition({"encoder_hidden_states": hidden})
        return [alone, Condition({"encoder_hidden_states": hidden[:, 1:], **beside})]

    @classmethod
    def diffusers_inputs(
        cls, configs: Mapping[str, Mapping[str, Any]], condition: Condition, size: Size
    ) -> Mapping[str, Any]:
        config, hidden = Flux2Config.read(configs["transformer"]), condition.tensors["encoder_hidden_states"]
        rows, columns = _grid(size)
        given = condition.tensors.get("latent_condition", hidden.new_zeros(1, 0, config.in_channels))
        tokens = rows * columns + given.shape[1]
        return {
            "encoder_hidden_states": hidden,
            "hidden_states": torch.zeros(1, tokens, config.in_channels, dtype=torch.bfloat16),
            "timestep": torch.zeros(1, dtype=torch.bfloat16),
            "guidance": torch.zeros(1) if config.guidance_embeds else None,
            "img_ids": torch.zeros(1, tokens, AXES, dtype=torch.int64),
            "txt_ids": torch.zeros(1, hidden.shape[1], AXES, dtype=torch.int64),
        }

    # -- drawing ----------------------------------------------------------------------

    def image_tokens(self, size: Size) -> int:
        rows, columns = _grid(size)
        return rows * columns

    def noise_levels(self, steps: int) -> Sequence[float] | None:
        return None

    def dynamic_shift(self, size: Size, steps: int) -> float | None:
        return empirical_shift(self.image_tokens(size), steps)

    def noise(self, size: Size, generators: Sequence[torch.Generator]) -> Tensor:
        """(B, I, C), drawn channel by channel as diffusers does."""
        weight = self.transformer.proj_out.weight
        shape = (1, self.transformer.config.in_channels, *_grid(size))
        z = torch.cat([torch.randn(shape, generator=g, dtype=weight.dtype) for g in generators])
        return z.flatten(2).transpose(1, 2).contiguous().to(weight.device)

    def phases(self, timesteps: Sequence[float], guidance: Guidance) -> Sequence[Phase]:
        return [Phase("transformer", range(len(timesteps)), guidance.true_cfg)]

    def finished(self, x: Tensor, condition: Condition) -> Tensor:
        return x

    def predictor(
        self,
        condition: Condition,
        size: Size,
        guidance: Guidance,
        timesteps: Sequence[float],
        denoiser: str = "transformer",
    ) -> Predictor:
        model, given = self.transformer, condition.tensors
        text, at_BJ4 = given["encoder_hidden_states"], given.get("condition_ids")
        at_J4 = None if at_BJ4 is None else at_BJ4[0]  # the same for all of a batch
        request = model.prepare(text, places(*_grid(size)), given.get("latent_condition"), at_J4)
        # the roundings of diffusers, step by step: thousandths in the model's dtype, down and up again
        dtype = model.proj_out.weight.dtype
        t_S = torch.tensor(timesteps).to(dtype) / TIMESTEPS * TIMESTEPS
        strength = None
        if model.config.guidance_embeds:
            assert guidance.embedded is not None, "checkpoints with a guidance embedding have a default strength"
            strength = (torch.tensor([guidance.embedded]).to(dtype) * TIMESTEPS).to(text.device)
        return Predictor(model, (request,), model.modulate(t_S.to(text.device), strength))

    def decode(self, x: Tensor, size: Size, execute: Execute = eager) -> Iterator[Tensor]:
        z = unpatchify(self.denormalise(x), _grid(size), PATCH).to(self.vae.dtype)
        yield execute(Decode(self.vae, self.vae.tiling, self.vae.slicing), z)[0]

    def normalise(self, tokens_BIC: Tensor) -> Tensor:
        """Latents of a picture, as the transformer sees them. Those of a tiny autoencoder are so of themselves."""
        if isinstance(self.vae, AutoencoderKLFlux2):
            return self.vae.normalise(tokens_BIC)
        config = self.vae.config
        return (tokens_BIC - config.shift_factor) * config.scaling_factor

    def denormalise(self, tokens_BIC: Tensor) -> Tensor:
        if isinstance(self.vae, AutoencoderKLFlux2):
            return self.vae.denormalise(tokens_BIC)
        config = self.vae.config
        return tokens_BIC / config.scaling_factor + config.shift_factor


@dataclass(frozen=True)
class Settings:
    """Of klein's `model_index.json`."""

    is_distilled: bool = False


class Flux2Klein(Flux2):
    """`Flux2KleinPipeline`: text comes from Qwen3; guided by a negative branch, unless distilled to few steps."""

    classifier_free = True
    language_models: Mapping[str, Read] = {"text_encoder": Read(QWEN_LAYERS[-1])}
    read_text = staticmethod(qwen_states)

    def __init__(self, parts: Mapping[str, Any]) -> None:
        super().__init__(parts)
        self.settings = read_config(Settings, parts.get(SETTINGS, {}))

    @classmethod
    def presets(cls) -> Mapping[str, Preset]:
        return KLEIN_PRESETS

    @classmethod
    def build(
        cls,
        component: str,
        config: Mapping[str, Any],
        attention: AttentionFn,
        options: Mapping[str, Any],
        split: Split = ONE_RANK,
    ) -> nn.Module:
        module = super().build(component, config, attention, options, split)
        if isinstance(module, Flux2Transformer):
            demand(module.config, guidance_embeds=False)
        return module

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        return KLEIN if read_config(Settings, configs.get(SETTINGS, {})).is_distilled else KLEIN_BASE

    def check(self, size: Size, guidance: Guidance, max_sequence_length: int, pictures: int) -> None:
        super().check(size, guidance, max_sequence_length, pictures)
        if self.settings.is_distilled and guidance.true_cfg != 1:
            raise ValueError(f"guidance_scale={guidance.true_cfg:g}: this model was distilled without; expected 1")


def empirical_shift(tokens: int, steps: int) -> float:
    """How much noise levels are shifted (mu), linear in the tokens: by one line for 10 steps, by another for 200 and
    for large pictures, and in between for other numbers of steps.

    Source: `compute_empirical_mu` of diffusers, whose figures these are.
    """
    of_10 = 8.73809524e-05 * tokens + 1.89833333
    of_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return of_200
    slope = (of_200 - of_10) / 190.0
    return slope * steps + (of_200 - 200.0 * slope)


def _grid(size: Size) -> tuple[int, int]:
    """Rows and columns of tokens."""
    return size.height // TOKEN_PIXELS, size.width // TOKEN_PIXELS
