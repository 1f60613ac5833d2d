"""What the tests of readers of quantised checkpoints have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sgl_diffusion.runtime.quantization.stored import QuantizedCheckpoint, StoredLayer
from sgl_diffusion.runtime.quantization.weight import QuantizedWeight


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise with rows of very different sizes, so that a scale in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    sizes = torch.exp2(3 * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator))
    return (noise * sizes).to(dtype)


def saved(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[Path]:
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        path,
        dict(metadata or {}),
    )
    return [path]


def read_layer(layer: StoredLayer) -> QuantizedWeight:
    """A layer's weight, whose shapes were known from headers alone."""
    weight, told = layer.read(), layer.shapes()
    assert (told.kind, told.shape) == (weight.kind, weight.shape)
    assert {n: (t.shape, t.dtype) for n, t in told.tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in weight.tensors.items()
    }
    assert all(t.is_meta for t in told.tensors.values()) and all(t.is_contiguous() for t in weight.tensors.values())
    return weight


def numbers(found: QuantizedCheckpoint | None, layer: str) -> Tensor:
    """What a layer's codes stand for, in fp32."""
    assert found is not None
    return read_layer(found.layers[layer]).dequantized(torch.float32)
