"""`ZImagePipeline`: pictures from a prompt.

The one tensor of a condition is `cap_feats` (B, T, cap_feat_dim): what the language model has before its last layer, of
the prompt in the form of a chat. A prompt is as long as it is.

Other checkpoints than the published ones draw in many steps with guidance, unless their schedule is that of the model
that was distilled to few: the transformers are of one shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from sgl_diffusion.models.autoencoders.kl import AutoencoderKL, Decode, VaeConfig
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
from sgl_diffusion.models.text import chat_ids, language_states
from sgl_diffusion.models.z_image.presets import FEW_STEPS, MANY_STEPS, PRESETS
from sgl_diffusion.models.z_image.transformer import PATCH, ZImageConfig, ZImageTransformer

TIMESTEPS = 1000
EXAMPLE_TOKENS = (64, 37)  # of prompts; 16 does not divide the second


class ZImage:
    """`guidance_scale` g as the pipeline counts it: positive + g * (positive - negative)."""

    draws_video = keeps_norm = exact_tiles = False
    language_models: Mapping[str, Read] = {"text_encoder": Read(-1)}
    classifier_free = True
    unguided_scale = 0.0
    distilled: Distilled | None = None

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self.parts = parts
        self.transformer: ZImageTransformer = parts["transformer"]
        self.vae: AutoencoderKL = parts["vae"]
        self.patch = PATCH * self.vae.config.downsampling  # pixels a token covers per side

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
        if component == "transformer":
            return ZImageTransformer(ZImageConfig.read(config), attention, split)
        return AutoencoderKL(VaeConfig.read(config), attention, **options)

    @classmethod
    def encodes_pictures(cls, configs: Mapping[str, Mapping[str, Any]]) -> bool:
        return False

    @classmethod
    def attention_heads(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        return ZImageConfig.read(configs["transformer"]).head_shape[0]

    @classmethod
    def defaults(cls, configs: Mapping[str, Mapping[str, Any]]) -> Defaults:
        few = PRESETS["Tongyi-MAI/Z-Image-Turbo"].components["scheduler"]
        scheduler = configs["scheduler"]
        same = all(scheduler.get(key) == few[key] for key in ("shift", "use_dynamic_shifting"))
        return FEW_STEPS if same else MANY_STEPS

    @classmethod
    def examples(cls, configs: Mapping[str, Mapping[str, Any]]) -> Sequence[Condition]:
        width = configs["transformer"]["cap_feat_dim"]
        return [Condition({"cap_feats": torch.zeros(1, T, width, dtype=torch.bfloat16)}) for T in EXAMPLE_TOKENS]

    @classmethod
    def diffusers_inputs(
        cls, configs: Mapping[str, Mapping[str, Any]], condition: Condition, size: Size
    ) -> Mapping[str, Any]:
        pixels = VaeConfig.read(configs["vae"]).downsampling
        shape = (configs["transformer"]["in_channels"], 1, size.height // pixels, size.width // pixels)
        return {
            "x": [torch.zeros(shape, dtype=torch.bfloat16)],
            "t": torch.zeros(1),
            "cap_feats": list(condition.tensors["cap_feats"]),
        }

    def check(self, size: Size, guidance: Guidance, max_sequence_length: int, pictures: int) -> None:
        if pictures:
            raise ValueError(f"image_path: {pictures} given; this model draws from text alone")
        if size.frames != 1:
            raise ValueError(f"num_frames={size.frames}: this model draws pictures")
        config = self.transformer.config
        _, rows, columns = config.axes_lens
        for name, pixels, places in (("height", size.height, rows), ("width", size.width, columns)):
            check_step(name, pixels, self.patch)
            if pixels > places * self.patch:
                raise ValueError(f"{name}={pixels}: at most {places * self.patch}")
        if max_sequence_length > config.longest_text:
            raise ValueError(f"max_sequence_length={max_sequence_length}: at most {config.longest_text}")

    def fitting_size(self, pictures: Sequence[Image], defaults: Defaults) -> tuple[int, int]:
        return defaults.height, defaults.width

    def encode(
        self, prompt: str, max_sequence_length: int, pictures: Sequence[Image] = (), execute: Execute = eager
    ) -> Condition:
        """A causal model does not see the padding behind a prompt: left out, nothing changes."""
        ids = chat_ids(self.parts["tokenizer"], prompt, max_sequence_length, enable_thinking=True)
        return Condition({"cap_feats": language_states(self.parts["text_encoder"], ids, (-1,), execute)})

    def image_tokens(self, size: Size) -> int:
        return (size.height // self.patch) * (size.width // self.patch)

    def noise_levels(self, steps: int) -> Sequence[float] | None:
        """Evenly apart in fp32, whose last bits the fastest sines of a timestep's embedding show."""
        return torch.linspace(1.0, 1 / steps, steps, device="cpu").tolist()

    def dynamic_shift(self, size: Size, steps: int) -> float | None:
        return None

    def noise(self, size: Size, generators: Sequence[torch.Generator]) -> Tensor:
        """Latents (B, C, Y, X), fp32 in a model of any dtype, as in diffusers."""
        pixels = self.vae.config.downsampling
        shape = (1, self.transformer.config.in_channels, size.height // pixels, size.width // pixels)
        x = torch.cat([torch.randn(shape, generator=g, dtype=torch.float32) for g in generators])
        return x.to(self.transformer.x_pad_token.device)

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
        model, text = self.transformer, condition.tensors["cap_feats"]
        rows, columns = size.height // self.patch, size.width // self.patch
        request = model.prepare(text.to(model.x_pad_token.dtype), rows, columns)
        # the model counts from all noise to none
        t_S = (TIMESTEPS - torch.tensor(timesteps, dtype=torch.float32)) / TIMESTEPS
        return Predictor(model, (request,), model.modulate(t_S.to(text.device)))

    def finished(self, x: Tensor, condition: Condition) -> Tensor:
        return x

    def decode(self, x: Tensor, size: Size, execute: Execute = eager) -> Iterator[Tensor]:
        config = self.vae.config
        z = x.to(self.vae.decoder.conv_in.weight.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
        yield execute(Decode(self.vae, self.vae.tiling, self.vae.slicing), z)[0]
