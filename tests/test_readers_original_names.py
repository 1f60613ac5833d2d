"""Names of the models' authors; diffusers' own conversion of single files says what they become."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from stored_layers import drawn, read_layer, saved
from torch import Tensor

from sgl_diffusion.models.family import OriginalNames
from sgl_diffusion.models.flux import FluxTransformer
from sgl_diffusion.models.wan.transformer import WanTransformer
from sgl_diffusion.runtime.quantization.readers import scaled_fp8
from sgl_diffusion.runtime.quantization.readers.original_names import renamed

D = 3072  # rows, which diffusers' conversion cuts by
K = 2


def linear(name: str, rows: int, tensors: dict[str, Tensor]) -> None:
    """A layer in e4m3 with a scale of every row, so that rows cannot be confused, and its bias."""
    weight = drawn(rows, K, seed=len(tensors))
    scale = weight.abs().amax(1, keepdim=True) / 448
    tensors |= {
        f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale,
        f"{name}.bias": drawn(rows, seed=len(tensors)),
    }  # fmt: skip


def flux_in_float8() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in ("img_in", "txt_in", "final_layer.linear"):
        linear(name, 64, tensors)
    for name in ("time_in", "vector_in", "guidance_in"):
        linear(f"{name}.in_layer", 64, tensors)
        linear(f"{name}.out_layer", 64, tensors)
    linear("final_layer.adaLN_modulation.1", 128, tensors)
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        for name, rows in {"mod.lin": 6 * 64, "attn.qkv": 3 * 64, "attn.proj": 64, "mlp.0": 256, "mlp.2": 64}.items():
            linear(f"{block}_{name}", rows, tensors)
        for name in ("query_norm", "key_norm"):
            tensors[f"{block}_attn.norm.{name}.scale"] = drawn(16, seed=len(tensors))
    for name, rows in {"linear1": 7 * D, "linear2": 64, "modulation.lin": 3 * 64}.items():
        linear(f"single_blocks.0.{name}", rows, tensors)
    for name in ("query_norm", "key_norm"):
        tensors[f"single_blocks.0.norm.{name}.scale"] = drawn(16, seed=len(tensors))
    return tensors


def wan_in_float8() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"patch_embedding.weight": drawn(64, 4, 1, 2, 2), "head.modulation": drawn(1, 2, 64)}
    tensors |= {"blocks.10.modulation": drawn(1, 6, 64, seed=1), "blocks.10.norm3.weight": drawn(64, seed=2)}
    for attention, names in {"self_attn": "q k v o", "cross_attn": "q k v o k_img v_img"}.items():
        for name in names.split():
            linear(f"blocks.10.{attention}.{name}", 64, tensors)
        for name in ("norm_q", "norm_k"):
            tensors[f"blocks.10.{attention}.{name}.weight"] = drawn(64, seed=len(tensors))
    tensors["blocks.10.cross_attn.norm_k_img.weight"] = drawn(64, seed=len(tensors))
    for name in ("blocks.10.ffn.0", "blocks.10.ffn.2", "head.head", "text_embedding.0", "text_embedding.2"):
        linear(name, 64, tensors)
    for name in ("time_embedding.0", "time_embedding.2", "time_projection.1", "img_emb.proj.1", "img_emb.proj.3"):
        linear(name, 64, tensors)
    for name in ("img_emb.proj.0.weight", "img_emb.proj.4.bias"):
        tensors[name] = drawn(64, seed=len(tensors))
    return tensors


def dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a file without codes would be."""
    return {
        name: tensor.float() * tensors[f"{name}_scale"] if f"{name}_scale" in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith("weight_scale")
    }


def ours(tensors: dict[str, Tensor], original: OriginalNames, folder: Path) -> dict[str, Tensor]:
    read = scaled_fp8.read(saved(folder, tensors), {})
    assert read is not None
    found = renamed(read, original)
    for name, tensor in found.tensors.items():
        assert (tensor.shape, tensor.dtype) == (tensor.mapped().shape, tensor.mapped().dtype), name
    layers = {f"{name}.weight": read_layer(layer).dequantized(torch.float32) for name, layer in found.layers.items()}
    assert renamed(found, original) == found  # names of diffusers stay
    return layers | {name: tensor.mapped() for name, tensor in found.tensors.items()}


def check(tensors: dict[str, Tensor], want: dict[str, Tensor], original: OriginalNames, folder: Path) -> None:
    got = ours(tensors, original, folder)
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_flux(tmp_path: Path) -> None:
    """Layers are cut in three or four, and the last modulation has its halves the other way round."""
    tensors = flux_in_float8()
    want = convert_flux_transformer_checkpoint_to_diffusers(dequantised(tensors))
    check(tensors, want, FluxTransformer.original_names, tmp_path)


def test_wan(tmp_path: Path) -> None:
    tensors = wan_in_float8()
    want = convert_wan_transformer_to_diffusers(dequantised(tensors))
    check(tensors, want, WanTransformer.original_names, tmp_path)
