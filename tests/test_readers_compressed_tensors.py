"""Checkpoints that the compressed-tensors package writes, and what it says they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from stored_layers import drawn, numbers, read_layer, saved
from torch import Tensor

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers import compressed_tensors as reader

N, K = 192, 256
WEIGHT = drawn(N, K)
LAYER = "blocks.0.attn1.to_q"


def groups(columns: int) -> Tensor:
    return WEIGHT.unflatten(1, (-1, columns))


def scales(preset: str) -> dict[str, Tensor]:
    """What a calibration finds: scales, and zero points where the scheme is not symmetric."""
    match preset:
        case "FP8":
            return {"weight_scale": WEIGHT.abs().amax().reshape(1) / 448, "input_scale": torch.tensor([0.25])}
        case "FP8_DYNAMIC":
            return {"weight_scale": WEIGHT.abs().amax(1, keepdim=True) / 448}
        case "FP8_BLOCK":
            padded = torch.zeros(256, 256).index_copy(0, torch.arange(N), WEIGHT)
            return {"weight_scale": padded.view(2, 128, 2, 128).abs().amax((1, 3)) / 448}
        case "W8A8":
            return {"weight_scale": WEIGHT.abs().amax(1, keepdim=True) / 127}
        case "W4A16" | "W8A16":
            largest = 7 if preset == "W4A16" else 127
            return {"weight_scale": (groups(128).abs().amax(2) / largest).to(torch.bfloat16)}
        case "W4A16_ASYM":
            low, high = groups(128).amin(2), groups(128).amax(2)
            scale = ((high - low) / 15).to(torch.bfloat16)
            zero = (-8 - low / scale.float()).round().clamp(-8, 7).to(torch.int8)
            return {"weight_scale": scale, "weight_zero_point": zero}
        case "NVFP4":
            whole = 448 * 6 / WEIGHT.abs().amax().reshape(1)
            blocks = (groups(16).abs().amax(2) / 6 * whole).to(torch.float8_e4m3fn).float()
            return {"weight_scale": blocks, "weight_global_scale": whole, "input_global_scale": torch.tensor([100.0])}
        case "MXFP8":
            return {"weight_scale": torch.exp2(torch.floor(torch.log2(groups(32).abs().amax(2))) - 8)}
    raise AssertionError(preset)


PRESETS = {  # -> format, our kind, what is told beside the format
    "FP8": ("float-quantized", "fp8", ""),
    "FP8_DYNAMIC": ("float-quantized", "fp8", ""),
    "FP8_BLOCK": ("float-quantized", "fp8_block", ""),
    "W8A8": ("int-quantized", "int8", ""),
    "W4A16": ("pack-quantized", "w4", ""),
    "W4A16_ASYM": ("pack-quantized", "w4", ""),
    "W8A16": ("pack-quantized", "w8", ""),
    "NVFP4": ("nvfp4-pack-quantized", "nvfp4", ", activations with one scale for each row"),
    "MXFP8": ("mxfp8-quantized", "mxfp8", ""),
}


def written(preset: str) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """A layer in the package's format, the config of the checkpoint, and the weight that the package makes of it."""
    scheme = QuantizationScheme(
        targets=["Linear"], **preset_name_to_scheme(preset, ["Linear"]).model_dump(exclude={"targets"})
    )
    compressor, found = BaseCompressor.get_value_from_registry(PRESETS[preset][0]), scales(preset)
    kept = {name: found.pop(name) for name in list(found) if name.startswith("input_")}
    tensors = compressor.compress({"weight": WEIGHT, **found}, scheme)
    if preset == "NVFP4":  # of which `decompress` makes bf16
        codes = unpack_fp4_from_uint8(tensors["weight_packed"], N, K, torch.float32)
        scale, whole = tensors["weight_scale"].float(), tensors["weight_global_scale"]
        numbers = dequantize(codes, scale, args=scheme.weights, dtype=torch.float32, global_scale=whole)
    else:
        numbers = compressor.decompress(tensors, scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors", "format": PRESETS[preset][0], "quantization_status": "compressed",
        "config_groups": {"group_0": scheme.model_dump(mode="json")}, "ignore": ["proj_out"],
    }  # fmt: skip
    stored = {f"{LAYER}.{name}": t for name, t in {**tensors, **kept}.items()}
    return stored | {f"{LAYER}.bias": torch.ones(N), "proj_out.weight": WEIGHT}, config, numbers


@pytest.mark.parametrize("preset", PRESETS)
def test_what_the_package_writes(preset: str, tmp_path: Path) -> None:
    """Scales in bf16 lose nothing in fp32, where the package rounds to bf16 after each step. Of NVFP4 it divides by a
    global scale, and here a reciprocal multiplies: that is within two roundings of fp32.
    """
    tensors, config, want = written(preset)
    found = reader.read(saved(tmp_path, tensors), config)
    format, kind, notes = PRESETS[preset]
    assert found is not None and found.format == f"compressed-tensors ({format}{notes})"
    assert found.layers.keys() == {LAYER} and found.tensors.keys() == {f"{LAYER}.bias", "proj_out.weight"}
    weight, got = read_layer(found.layers[LAYER]), numbers(found, LAYER)
    assert weight.kind == kind
    assert (weight.input_scale is not None) == (preset == "FP8")
    if preset == "NVFP4":
        torch.testing.assert_close(got, want.float(), rtol=2**-22, atol=0)
    else:
        assert torch.equal(got.to(want.dtype), want)


def test_layers_have_the_scheme_of_their_group(tmp_path: Path) -> None:
    """A name comes before a pattern, and that before a class."""
    tensors, config, _ = written("FP8_DYNAMIC")
    calibrated = config["config_groups"]["group_0"]
    whole = {**calibrated["input_activations"], "strategy": "tensor"}
    for targets, note in ((["re:.*to_q"], True), ([LAYER], True), (["re:.*to_k"], False)):
        other = {**calibrated, "targets": targets, "input_activations": whole}
        found = reader.read(saved(tmp_path, tensors), {**config, "config_groups": {"a": calibrated, "b": other}})
        assert found is not None and ("one scale for each row" in found.format) == note


def test_what_is_run_in_another_way_is_told(tmp_path: Path) -> None:
    tensors, config, _ = written("W4A16")
    config["config_groups"]["group_0"]["input_activations"] = {"strategy": "token", "num_bits": 8}
    found = reader.read(saved(tmp_path, tensors), config)
    assert found is not None and found.format.endswith(", run with activations that are not quantised)")


def test_weights_alone_are_decoded(tmp_path: Path) -> None:
    tensors, config, _ = written("FP8_DYNAMIC")
    assert not any(layer.read().weight_only for layer in reader.read(saved(tmp_path, tensors), config).layers.values())
    config["config_groups"]["group_0"]["input_activations"] = None
    found = reader.read(saved(tmp_path, tensors), config)
    assert found is not None and all(layer.read().weight_only for layer in found.layers.values())
    tensors, config, _ = written("W8A8")
    config["config_groups"]["group_0"]["input_activations"] = None
    found = reader.read(saved(tmp_path, tensors), config)
    assert found is not None and read_layer(found.layers[LAYER]).kind == "w8"


def test_what_is_refused(tmp_path: Path) -> None:
    def refused(
        told: str, preset: str = "FP8_DYNAMIC", tensors: dict[str, Tensor] | None = None, **change: Any
    ) -> None:
        stored, config, _ = written(preset)
        group = change.pop("group", {})
        config["config_groups"] = {"group_0": config["config_groups"]["group_0"] | group}
        with pytest.raises(UserError, match=told):
            reader.read(saved(tmp_path, stored | (tensors or {})), config | change)

    refused("quantization_status=frozen; expected compressed", quantization_status="frozen")
    refused("transform_config is given; expected none", transform_config={"config_groups": {}})
    refused(
        "format=mxfp4-pack-quantized; expected one of float-quantized",
        format="mxfp4-pack-quantized",
        group={"format": None},
    )
    refused("input_activations.symmetric=false", group={"input_activations": {"symmetric": False}})
    refused("no group of config_groups targets it", group={"targets": ["re:.*to_k"]})
    refused("config_groups.group_0 says nothing of weights", group={"weights": None})
    refused("its columns are in another order", "W4A16", {f"{LAYER}.weight_g_idx": torch.zeros(K, dtype=torch.int32)})
    refused(
        r"weight_scale is float32 of shape \(1, 192\); expected", tensors={f"{LAYER}.weight_scale": torch.ones(1, N)}
    )
    refused("1 scales for 256 columns|3 scales for 256 columns", "W4A16", {f"{LAYER}.weight_scale": torch.ones(N, 3)})
    assert reader.read([tmp_path / "none.safetensors"], {"quant_method": "fp8"}) is None
