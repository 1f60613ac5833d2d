"""`AutoencoderKLFlux2`: an `AutoencoderKL` whose latents are normalised by the statistics of a batch norm.

The norm is over channels of 2x2 patches of the latent: the tokens that FLUX.2 draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgl_diffusion.models.autoencoders.kl import AutoencoderKL, VaeConfig
from sgl_diffusion.models.config import ConfigError, demand, read_config
from sgl_diffusion.models.family import AttentionFn

# B batch  I tokens of 2x2 latents  C channels of a token
PATCH = (2, 2)


@dataclass(frozen=True)
class Flux2VaeConfig(VaeConfig):
    """`vae/config.json`. The channels' statistics take the place of a scaling factor."""

    scaling_factor: float = 1.0
    batch_norm_eps: float = 1e-4
    patch_size: tuple[int, ...] = PATCH
    decoder_block_out_channels: tuple[int, ...] | None = None

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Flux2VaeConfig:
        unused = {
            "force_upcast": "a hint for fp16; --vae-precision decides",
            "batch_norm_momentum": "how fast the statistics followed in training",
        }
        config = read_config(cls, raw, ignored=unused)
        n = len(config.block_out_channels)
        demand(
            config,
            act_fn="silu",
            down_block_types=("DownEncoderBlock2D",) * n,
            up_block_types=("UpDecoderBlock2D",) * n,
            patch_size=PATCH,
            scaling_factor=1.0,
            shift_factor=0.0,
            latents_mean=None,
            latents_std=None,
        )
        if len(config.decoder_widths) != n:
            given = list(config.decoder_widths)
            raise ConfigError(
                f"config key decoder_block_out_channels={given}: expected {n} of them, as block_out_channels"
            )
        return config

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        return self.decoder_block_out_channels or self.block_out_channels


class Statistics(nn.Module):
    """Mean and variance of every channel of a token, of a batch norm that has no weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.running_mean = nn.Parameter(torch.zeros(channels))
        self.running_var = nn.Parameter(torch.ones(channels))


class AutoencoderKLFlux2(AutoencoderKL):
    """Arguments as of `AutoencoderKL`."""

    config: Flux2VaeConfig

    def __init__(self, config: Flux2VaeConfig, attention: AttentionFn, **options: Any) -> None:
        super().__init__(config, attention, **options)
        self.bn = Statistics(config.latent_channels * PATCH[0] * PATCH[1])

    def unused_weights(self) -> tuple[str, ...]:
        return (*super().unused_weights(), "bn.num_batches_tracked")

    def normalise(self, tokens_BIC: Tensor) -> Tensor:
        """What a denoiser sees, of the latents that `encode` gives."""
        mean_C, std_C = self._statistics(tokens_BIC.dtype)
        return (tokens_BIC - mean_C) / std_C

    def denormalise(self, tokens_BIC: Tensor) -> Tensor:
        """The latents that `decode` takes, of what a denoiser drew."""
        mean_C, std_C = self._statistics(tokens_BIC.dtype)
        return tokens_BIC * std_C + mean_C

    def _statistics(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        std_C = torch.sqrt(self.bn.running_var + self.config.batch_norm_eps)
        return self.bn.running_mean.to(dtype), std_C.to(dtype)
