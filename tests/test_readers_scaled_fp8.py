"""ComfyUI's files, written here by the rules of comfy-kitchen (0.2.40, `backends/eager/quantization.py` and
`float_utils.py`): its install is 190 MB.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_layers import drawn, numbers, read_layer, saved
from torch import Tensor

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers import scaled_fp8 as reader

N, K = 192, 320  # of one and a half tiles of rows
WEIGHT = drawn(N, K)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
SCALE = WEIGHT.abs().amax() / 448
CODES = (WEIGHT / SCALE).to(torch.float8_e4m3fn)


def described(**fields: Any) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def in_tiles(scales: Tensor) -> Tensor:
    """cuBLAS' order of the scales of blocks, one by one: tiles of 128 x 4, whose row r is the run r % 32 of four, and
    there the one r // 32.
    """
    rows, columns = scales.shape
    down, across = math.ceil(rows / 128), math.ceil(columns / 4)
    flat = torch.zeros(down * across * 512, dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            tile = r // 128 * across + c // 4
            flat[512 * tile + 16 * (r % 128 % 32) + 4 * (r % 128 // 32) + c % 4] = scales.view(torch.uint8)[r, c]
    return flat.view(down * 128, across * 4)


def nvfp4() -> tuple[dict[str, Tensor], Tensor]:
    """The even column in the upper bits; and the weight."""
    whole = WEIGHT.abs().amax() / (448 * 6)
    blocks = WEIGHT.view(N, K // 16, 16)
    scale = (blocks.abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
    step = (scale.float() * whole)[..., None]
    codes = (blocks[..., None] / step[..., None] - E2M1).abs().argmin(3)
    packed = codes.to(torch.uint8).view(N, K)
    tensors = {
        "weight": packed[:, ::2] << 4 | packed[:, 1::2], "weight_scale": in_tiles(scale).view(torch.float8_e4m3fn),
        "weight_scale_2": whole, "comfy_quant": described(format="nvfp4"),
    }  # fmt: skip
    return tensors, (E2M1[codes].double() * scale.double()[..., None] * whole).float().view(N, K)


def mxfp8() -> tuple[dict[str, Tensor], Tensor]:
    exponents = WEIGHT.view(N, K // 32, 32).abs().amax(2).log2().floor().sub(8)
    wide = exponents.exp2().repeat_interleave(32, 1)
    codes = (WEIGHT / wide).to(torch.float8_e4m3fn)
    scale = in_tiles(exponents.add(127).to(torch.uint8))
    return {"weight": codes, "weight_scale": scale, "comfy_quant": described(format="mxfp8")}, codes.float() * wide


def int8() -> tuple[dict[str, Tensor], Tensor]:
    scale = WEIGHT.abs().amax(1, keepdim=True) / 127
    codes = (WEIGHT / scale).round().to(torch.int8)
    return {
        "weight": codes, "weight_scale": scale, "comfy_quant": described(format="int8_tensorwise")
    }, codes * scale  # fmt: skip


def layer(**tensors: Tensor) -> dict[str, Tensor]:
    return {f"blocks.0.q.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_marker_and_a_scale_for_every_layer(prefix: str, tmp_path: Path) -> None:
    """The same bits. A calibrated scale of 1 is none."""
    tensors = layer(weight=CODES, scale_weight=SCALE, scale_input=torch.tensor(0.5), bias=torch.ones(N))
    tensors |= {"head.weight": CODES, "head.scale_weight": SCALE, "head.scale_input": torch.tensor(1.0)}
    tensors |= {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn), "norm.weight": torch.ones(N)}
    other = {"vae.decoder.weight": torch.ones(3)} if prefix else {}
    found = reader.read(saved(tmp_path, {prefix + name: t for name, t in tensors.items()} | other), {})
    assert found is not None and found.format == "ComfyUI (float8_e4m3fn)"
    assert found.layers.keys() == {"blocks.0.q", "head"} and found.tensors.keys() == {"blocks.0.q.bias", "norm.weight"}
    assert torch.equal(numbers(found, "blocks.0.q"), CODES.float() * SCALE)
    weight, uncalibrated = read_layer(found.layers["blocks.0.q"]), read_layer(found.layers["head"])
    assert weight.kind == "fp8" and weight.input_scale is not None and weight.input_scale.item() == 0.5
    assert uncalibrated.input_scale is None


def test_weights_in_float8_without_scales(tmp_path: Path) -> None:
    """Convolutions and vectors are left as they are."""
    plain = {"patch.weight": CODES.view(N, 80, 2, 2), "norm.weight": CODES[0], "norm.bias": torch.ones(N)}
    found = reader.read(saved(tmp_path, layer(weight=CODES) | plain), {})
    assert found is not None and found.format == "ComfyUI (float8_e4m3fn without scales)"
    assert found.layers.keys() == {"blocks.0.q"} and found.tensors.keys() == plain.keys()
    assert torch.equal(numbers(found, "blocks.0.q"), CODES.float())


@pytest.mark.parametrize(
    ("kind", "format", "written"),
    [("nvfp4", "nvfp4", nvfp4()), ("mxfp8", "mxfp8", mxfp8()), ("int8", "int8_tensorwise", int8())],
)
def test_layers_that_say_what_they_are(kind: str, format: str, written: Any, tmp_path: Path) -> None:
    """The same bits, but for nvfp4, where products with two scales are rounded in between."""
    tensors, want = written
    found = reader.read(saved(tmp_path, layer(**tensors)), {})
    assert found is not None and found.format == f"ComfyUI ({format})" and not found.tensors
    assert read_layer(found.layers["blocks.0.q"]).kind == kind
    torch.testing.assert_close(numbers(found, "blocks.0.q"), want, rtol=2**-22 if kind == "nvfp4" else 0, atol=0)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_metadata_says_what_layers_are(prefix: str, tmp_path: Path) -> None:
    """With names as in the file or without the prefix. Codes may be bytes."""
    for named in {prefix, ""}:
        own = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        metadata = {"_quantization_metadata": json.dumps({"layers": {f"{named}blocks.0.q": own}})}
        tensors = layer(weight=CODES.view(torch.uint8), weight_scale=SCALE)
        found = reader.read(saved(tmp_path, {prefix + name: t for name, t in tensors.items()}, metadata), {})
        assert found is not None and found.format == "ComfyUI (float8_e4m3fn)"
        assert found.layers["blocks.0.q"].read().weight_only
        assert torch.equal(numbers(found, "blocks.0.q"), CODES.float() * SCALE)


def test_what_is_refused(tmp_path: Path) -> None:
    rotated = described(format="int8_tensorwise", convrot=True, convrot_groupsize=64)
    for change, told in [
        ({**int8()[0], "comfy_quant": rotated}, "int8_tensorwise with convrot: its columns are rotated"),
        ({**int8()[0], "comfy_quant": described(format="svdquant_w4a4")}, "format svdquant_w4a4; expected one of"),
        ({**int8()[0], "weight_scale": torch.ones(1, N)}, r"weight_scale is float32 of shape \(1, 192\)"),
        ({**nvfp4()[0], "weight_scale": torch.ones(N, K // 16)}, "weight_scale is float32 of shape"),
        ({"comfy_quant": described(format="nvfp4")}, "is of format nvfp4, but has no weight"),
        ({"weight": CODES.to(torch.float8_e5m2), "scale_weight": SCALE}, "weight is float8_e5m2 of shape"),
    ]:
        with pytest.raises(UserError, match=told):
            reader.read(saved(tmp_path, layer(**change)), {})


def test_other_files_are_left_to_others(tmp_path: Path) -> None:
    assert reader.read(saved(tmp_path, layer(weight=WEIGHT)), {}) is None
    assert reader.read(saved(tmp_path, layer(weight=CODES)), {"quant_method": "fp8"}) is None
    assert reader.read([tmp_path / "model.gguf"], {}) is None
