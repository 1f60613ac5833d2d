"""Wan denoisers that begin with a picture through the Triton kernels: what a GPU runs equals what a CPU runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE
from torch import Tensor
from wan_models import TIMESTEPS, condition, native, noise, save

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.op import rel_l2
from sgl_diffusion.models.family import Condition, Guidance, Size

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")
BATCH, SIZE = 2, Size(64, 32, 5)


@torch.no_grad()
def velocity(folder: Path, variant: str, dtype: torch.dtype) -> Tensor:
    """Of two samples at the second of two steps."""
    family = native(folder, dtype)
    family.denoisers["transformer"].to(DEVICE)
    given = condition(variant, SIZE, BATCH).tensors
    given = {**given, "encoder_hidden_states": given["encoder_hidden_states"][:, :5]}
    on_device = Condition({name: tensor.to(DEVICE) for name, tensor in given.items()})
    predict = family.predictor(on_device, SIZE, Guidance(None), TIMESTEPS[:2])
    return predict(noise(family, SIZE, BATCH), 1)


# in fp32, sines of angles up to 800: one rounding of the angle is 6e-8 of it
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["flf2v", "ti2v-from-a-picture"])
def test_kernels_and_references_give_the_same_velocity(
    variant: str, dtype: torch.dtype, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, variant, "2x32")
    monkeypatch.setattr(launch, "runs_triton", lambda impl, x: False)
    want = velocity(folder, variant, dtype)
    ran: list[str] = []
    tile = launch.tile
    monkeypatch.setattr(launch, "runs_triton", lambda impl, x: True)
    monkeypatch.setattr(launch, "tile", lambda op, **size: ran.append(op) or tile(op, **size))
    got = velocity(folder, variant, dtype)
    assert {"norm", "residual_norm", "qk_norm_rope", "attention", "gemm", "modulation", "patchify"} <= set(ran)
    assert torch.isfinite(want).all() and float(want.float().std()) > 0.1
    assert rel_l2(got, want) < limit
