"""Whole denoisers through the Triton kernels: what a GPU runs equals what a CPU runs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.kernels.op import rel_l2
from sgl_diffusion.models.catalog import FAMILIES
from sgl_diffusion.models.family import Condition, Guidance, Size

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")
ALL = dict(FAMILIES)
# denoisers of other pipelines
for same in ("WanImageToVideoPipeline", "WanDMDPipeline", "QwenImageEditPipeline", "Flux2KleinPipeline"):
    ALL.pop(same)

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "FluxPipeline": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "axes_dims_rope": [8, 12, 12],
        "guidance_embeds": True,
    },
    "Flux2Pipeline": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": [4, 8, 12, 8],
    },
    "QwenImagePipeline": {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": [8, 12, 12],
    },
    "QwenImageEditPlusPipeline": {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": [8, 12, 12],
        "zero_cond_t": True,
    },
    "WanPipeline": {
        "in_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "text_dim": 24,
        "freq_dim": 64,
        "ffn_dim": 96,
    },
    "ZImagePipeline": {
        "in_channels": 16,
        "dim": 32,
        "n_layers": 0,  # the refiners have the same blocks, with modulation and without
        "n_refiner_layers": 1,
        "n_heads": 1,
        "n_kv_heads": 1,
        "cap_feat_dim": 24,
        "axes_dims": [8, 12, 12],
    },
}
CONDITIONS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "FluxPipeline": {"pooled_projections": (16,), "encoder_hidden_states": (5, 24)},
    "Flux2Pipeline": {"encoder_hidden_states": (5, 24), "latent_condition": (4, 16), "condition_ids": (4, 4)},
    "QwenImagePipeline": {"encoder_hidden_states": (5, 24)},
    "QwenImageEditPlusPipeline": {"encoder_hidden_states": (5, 24), "latent_condition_0": (2, 3, 16)},
    "WanPipeline": {"encoder_hidden_states": (5, 24)},
    "ZImagePipeline": {"cap_feats": (5, 24)},
}
SIZES = {
    "FluxPipeline": Size(48, 32),
    "Flux2Pipeline": Size(48, 32),
    "QwenImagePipeline": Size(48, 32),
    "QwenImageEditPlusPipeline": Size(48, 32),
    "WanPipeline": Size(48, 32, 5),
    "ZImagePipeline": Size(48, 32),
}
BATCH = 2


def velocity(name: str, dtype: torch.dtype) -> Tensor:
    """Of two samples at the second of two steps, from seeded weights."""
    module, _, cls = ALL[name].partition(":")
    family = getattr(importlib.import_module(module), cls)
    torch.manual_seed(0)
    denoiser = family.build("transformer", CONFIGS[name], attention, {})
    for parameter in denoiser.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    denoiser.to(DEVICE, dtype).requires_grad_(False)
    vae = SimpleNamespace(config=SimpleNamespace(downsampling=8))
    pipeline = family({"transformer": denoiser, "vae": vae})
    condition = Condition({k: torch.randn(BATCH, *shape).to(DEVICE) for k, shape in CONDITIONS[name].items()})
    x = pipeline.noise(SIZES[name], [torch.Generator().manual_seed(i) for i in range(BATCH)])
    predict = pipeline.predictor(condition, SIZES[name], Guidance(0.1), [1000.0, 600.0], "transformer")
    result: Tensor = predict(x, 1)
    return result


@pytest.mark.parametrize("name", ALL)
# in fp32, sines of angles up to 600: one rounding of the angle is 6e-8 of it
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_kernels_and_references_give_the_same_velocity(
    name: str, dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "runs_triton", lambda impl, x: False)
    want = velocity(name, dtype)
    ran: list[str] = []
    tile = launch.tile
    monkeypatch.setattr(launch, "runs_triton", lambda impl, x: True)
    monkeypatch.setattr(launch, "tile", lambda op, **size: ran.append(op) or tile(op, **size))
    got = velocity(name, dtype)
    assert {"norm", "residual_norm", "qk_norm_rope", "attention", "gemm", "modulation"} <= set(ran)
    assert torch.isfinite(want).all() and float(want.float().std()) > 0.1
    assert rel_l2(got, want) < limit
