"""Every family's denoiser on ranks that share its tokens predicts what it predicts on one, to 1e-5 of the std."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from sgl_diffusion.models.family import ONE_RANK, Condition, Guidance, Size, Split
from sgl_diffusion.models.flux import Flux1
from sgl_diffusion.models.flux2 import Flux2, Flux2Klein
from sgl_diffusion.models.qwen_image import QwenImage
from sgl_diffusion.models.wan import Wan
from sgl_diffusion.models.z_image import ZImage
from sgl_diffusion.runtime.attention import Attention
from sgl_diffusion.runtime.parallel.layout import Layout
from sgl_diffusion.runtime.parallel.mesh import Mesh
from sgl_diffusion.runtime.parallel.usp import Usp

CPU = torch.device("cpu")
LAYOUTS = {2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2)]}  # ulysses, ring
TIMESTEPS = [900.0, 300.0]
# as far as a state's shape depends on it
VAE = SimpleNamespace(config=SimpleNamespace(downsampling=8, spatial=8, temporal=4, z_dim=16, latent_channels=8))
WIDTH = 24  # of what text encoders give
FLUX = {
    "in_channels": 64, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 5,
    "joint_attention_dim": WIDTH, "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip
FLUX2 = {
    "in_channels": 32, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
    "joint_attention_dim": WIDTH, "axes_dims_rope": [4, 4, 4, 4], "guidance_embeds": False,
}  # fmt: skip
QWEN = {
    "in_channels": 64, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 5,
    "joint_attention_dim": WIDTH, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip
WAN = {
    "num_attention_heads": 5, "attention_head_dim": 24, "in_channels": 16, "text_dim": WIDTH, "freq_dim": 32,
    "ffn_dim": 64, "num_layers": 2,
}  # fmt: skip
Z_IMAGE = {
    "in_channels": 16, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4,
    "cap_feat_dim": WIDTH, "axes_dims": [4, 6, 6],
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A tiny denoiser, a request to it, and the shapes of the condition's tensors, without the batch."""

    family: Any
    config: Mapping[str, Any]
    size: Size
    condition: Mapping[str, tuple[int, ...]]
    batch: int = 1
    embedded: float | None = None


def texts(tokens: int, **others: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"encoder_hidden_states": (tokens, WIDTH), **others}


CLIP = Size(32, 48, 9)  # 3 x 2 x 3 tokens
MODELS = {
    # 6 x 5 image tokens and 7 of text
    "flux": Model(Flux1, FLUX, Size(96, 80), texts(7, pooled_projections=(16,)), embedded=3.5),
    # fewer tokens of text than four ranks: all of them have it whole
    "flux, short text": Model(Flux1, FLUX, Size(96, 80), texts(3, pooled_projections=(16,)), 2, 3.5),
    "flux2": Model(Flux2, FLUX2, Size(96, 80), texts(9)),
    "flux2 klein": Model(Flux2Klein, FLUX2, Size(96, 80), texts(9)),
    "qwen": Model(QwenImage, QWEN, Size(96, 80), texts(9), 2),
    "qwen, given pictures": Model(
        QwenImage, QWEN | {"zero_cond_t": True}, Size(96, 80),
        texts(9, latent_condition_0=(3, 5, 64), latent_condition_1=(2, 3, 64)), 2,
    ),
    "qwen, short text": Model(QwenImage, QWEN, Size(96, 80), texts(1, latent_condition_0=(3, 5, 64))),
    "wan": Model(Wan, WAN, CLIP, texts(7), 2),
    "wan, picture beside": Model(
        Wan, WAN | {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 120}, CLIP,
        texts(7, encoder_hidden_states_image=(5, 32), latent_condition=(20, 3, 4, 6)), 2,
    ),
    "wan, first frame": Model(
        Wan, WAN | {"in_channels": 48, "out_channels": 48}, Size(64, 96, 9),
        texts(7, latent_condition=(48, 1, 4, 6)), 2,
    ),
    # 30 image tokens and 7 of text, both filled up to 32
    "z_image": Model(ZImage, Z_IMAGE, Size(96, 80), {"cap_feats": (7, WIDTH)}, 2),
    # one image token and 31 that fill up: most ranks draw nothing
    "z_image, dot": Model(ZImage, Z_IMAGE, Size(16, 16), {"cap_feats": (45, WIDTH)}),
}  # fmt: skip


def with_noise(module: nn.Module) -> nn.Module:
    """Weights that keep what goes through them about as large as it is, the same on every rank."""
    draw = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=draw)
        norm = p.ndim == 1 and name.endswith("weight")
        p.data = 1 + 0.1 * noise if norm else noise * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


@torch.inference_mode()
def velocities(model: Model, split: Split) -> list[Tensor]:
    """Of one state at every step."""
    attention = Attention("transformer", None, CPU, torch.float32)
    module = with_noise(model.family.build("transformer", model.config, attention, {}, split=split))
    family = model.family({"transformer": module, "vae": VAE, "model_index": {}})
    draw = torch.Generator().manual_seed(1)
    condition = {
        name: torch.randn(model.batch, *shape, generator=draw) for name, shape in sorted(model.condition.items())
    }
    x = family.noise(model.size, [torch.Generator().manual_seed(i) for i in range(model.batch)])
    guidance = Guidance(model.embedded)
    predict = family.predictor(Condition(condition), model.size, guidance, TIMESTEPS, "transformer")
    return [predict(x, step) for step in range(len(TIMESTEPS))]


def equal_one_rank(layouts: Sequence[tuple[int, int]]) -> None:
    alone = {name: velocities(model, ONE_RANK) for name, model in MODELS.items()}
    for (ulysses, ring), (name, model) in product(layouts, MODELS.items()):
        usp = Usp.of(Mesh.join(Layout(ulysses=ulysses, ring=ring), CPU, 60.0))
        for got, want in zip(velocities(model, usp), alone[name], strict=True):
            assert got.shape == want.shape
            error = ((got - want).abs().max() / want.std()).item()
            assert error <= 1e-5, (name, ulysses, ring, error)
            everyone = usp.sp.all_gather(got.contiguous())
            assert all(torch.equal(other, got) for other in everyone), "all ranks hold the same bits"


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_denoisers_equal_one_rank(ranks: int) -> None:
    run_ranks(ranks, equal_one_rank, LAYOUTS[ranks])


def test_models_differ_from_step_to_step() -> None:
    """What is compared depends on what goes in: the text, the timestep and all attention are alive."""
    for name, model in MODELS.items():
        first, second = velocities(model, ONE_RANK)
        assert first.isfinite().all() and 0.01 < first.std() < 100, (name, first.std())
        assert (first - second).abs().max() > 1e-2 * first.std(), name
