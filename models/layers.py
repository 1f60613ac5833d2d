"""Parts that several families share. Parameter names follow the diffusers classes named in each docstring."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgl_diffusion.kernels.gemm import gemm
from sgl_diffusion.kernels.norm import norm
from sgl_diffusion.kernels.residual import gate_residual, residual_norm


class Linear(nn.Linear):
    """A linear layer with what may follow it in one launch; arguments and result as of `kernels.gemm`."""

    def forward(self, x: Tensor, **epilogue: Any) -> Any:  # type: ignore[override]
        # rows of several samples, cut from a longer sequence, are not evenly apart
        return gemm(x.contiguous(), self.weight, self.bias, **epilogue)


class Residual:
    """A residual stream (..., D), and a branch that is added where the next norm reads it: one pass instead of two.

    Norms are LayerNorms without weights, modulated: LayerNorm(x) * (1 + scale) + shift.
    """

    def __init__(self, x: Tensor, branch: Tensor | None = None, gate: Tensor | None = None) -> None:
        self.x, self.branch, self.gate = x, branch, gate

    def add(self, branch: Tensor, gate: Tensor) -> None:
        """x + gate * branch, from the next norm on."""
        assert self.branch is None, "the last branch has not been added yet"
        self.branch, self.gate = branch, gate

    def norm(self, scale: Tensor, shift: Tensor, group: Tensor | None = None) -> Tensor:
        """Scale, shift and gate are (G, D), one for every group of rows; see `kernels.norm`."""
        if self.branch is None:
            return norm(self.x, kind="layer", scale=scale, shift=shift, group=group)
        branch, gate, self.branch, self.gate = self.branch, self.gate, None, None
        return residual_norm(self.x, branch, gate, kind="layer", scale=scale, shift=shift, group=group)

    def total(self, group: Tensor | None = None) -> Tensor:
        """The stream with all its branches."""
        if self.branch is None:
            return self.x
        return gate_residual(self.x, self.branch, self.gate, group=group, out=self.x)

    def after(self, token: int) -> Residual:
        """The tokens of every sample (B, L, D) from there on."""
        return Residual(self.x[:, token:], None if self.branch is None else self.branch[:, token:], self.gate)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between them (`TimestepEmbedding` of diffusers)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class RMSNormWeight(nn.Module):
    """Holds the weight of an RMSNorm that is computed inside a fused kernel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


def rotary_table(positions_L: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (L, width/2) in fp32 of one rotary axis, angles computed in float64.

    Source: RoFormer (Su et al. 2021); `get_1d_rotary_pos_embed` of diffusers without its repeats.
    """
    ladder = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions_L.device) / width)
    angle = positions_L.double()[:, None] * ladder[None]
    return angle.cos().float(), angle.sin().float()
