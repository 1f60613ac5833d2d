"""The autoencoders of pictures, by the `_class_name` of their `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sgl_diffusion.models.autoencoders.flux2 import AutoencoderKLFlux2, Flux2VaeConfig
from sgl_diffusion.models.autoencoders.kl import AutoencoderKL, VaeConfig
from sgl_diffusion.models.autoencoders.tiny import AutoencoderTiny, TinyConfig
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import AttentionFn

CLASSES: Mapping[str, tuple[Callable[[Mapping[str, Any]], Any], Callable[..., nn.Module]]] = {
    "AutoencoderKL": (VaeConfig.read, AutoencoderKL),
    "AutoencoderKLFlux2": (Flux2VaeConfig.read, AutoencoderKLFlux2),
    "AutoencoderTiny": (TinyConfig.read, AutoencoderTiny),
}


def build_autoencoder(
    raw: Mapping[str, Any], attention: AttentionFn, options: Mapping[str, Any], allowed: Mapping[str, int | None]
) -> nn.Module:
    """The autoencoder that a config names, without weights.

    Args:
        options: as of `AutoencoderKL`.
        allowed: class names -> channels of the latents that a denoiser draws, None where they may be any.
    Raises:
        ConfigError: another class, other channels, or a config that is not understood.
    """
    name = str(raw.get("_class_name"))
    if name not in allowed:
        raise ConfigError(f"config key _class_name={name!r}: expected one of {', '.join(allowed)}")
    read, cls = CLASSES[name]
    config = read(raw)
    if allowed[name] not in (None, config.latent_channels):
        raise ConfigError(f"config key latent_channels={config.latent_channels}: this model draws {allowed[name]}")
    return cls(config, attention, **options)
