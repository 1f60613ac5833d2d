"""Checkpoints with torchao's tensors. Where torchao is installed it writes them and says what they stand for; it is not
among the packages of the tests, for it makes every import of diffusers and transformers take seconds longer. Without it
files are written by its rules (torchao 0.18, `prototype/safetensors`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_layers import drawn, numbers, read_layer, saved
from torch import Tensor

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers import torchao as reader

CONFIG = {"quant_method": "torchao"}
N, K = 96, 128
WEIGHT = drawn(N, K, dtype=torch.bfloat16)
BIAS = drawn(N, seed=1, dtype=torch.bfloat16)


def flattened(kind: str, tensors: dict[str, Tensor], **data: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A layer "block.to_q" as torchao's `flatten_tensor_state_dict` leaves it, with a bias and a tensor of the root."""
    stored = {f"block.to_q._weight_{name}": t for name, t in tensors.items()}
    described = {"_type": kind, "_data": data, "_tensor_data_names": list(tensors)}
    names = {"block.to_q.weight": described, "block.to_q.bias": {"_type": "Tensor"}, "table": {"_type": "Tensor"}}
    metadata = {name: json.dumps(value) for name, value in names.items()} | {"tensor_names": json.dumps([*names])}
    return {**stored, "block.to_q.bias": BIAS, "table": torch.ones(1, 2, N)}, metadata


def wrapped(type: str, data: Any) -> dict[str, Any]:
    return {"_type": type, "_data": data}


def float8(**data: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    scale = WEIGHT.float().abs().amax(1, keepdim=True) / 448
    tensors = {"qdata": (WEIGHT.float() / scale).to(torch.float8_e4m3fn), "scale": scale}
    return flattened("Float8Tensor", tensors, **{"block_size": [1, K], "act_quant_kwargs": None} | data)


def int8(columns: int = K, **data: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    groups = WEIGHT.float().view(N, K // columns, columns)
    scale = groups.abs().amax(2, keepdim=True) / 127
    codes = (groups / scale).round().to(torch.int8).view(N, K)
    tensors = {"zero_point": torch.zeros(N, K // columns, dtype=torch.int8), "qdata": codes, "scale": scale.squeeze(2)}
    return flattened("Int8Tensor", tensors, **{"block_size": [1, columns], "act_quant_kwargs": None} | data)


def int4() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Offsets are floats, and what they are added to is -8 to 7; scales are transposed."""
    groups = WEIGHT.float().view(N, K // 32, 32)
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low) / 15
    zero = (low + 8 * scale).T.to(torch.bfloat16).contiguous()
    signed = ((groups - low[..., None]) / scale[..., None]).round().sub(8).to(torch.int8).view(N, K)
    packed = (signed[:, ::2] & 0xF) | (signed[:, 1::2] << 4)
    tensors = {"qdata": packed, "scale": scale.T.to(torch.bfloat16).contiguous(), "zero_point": zero}
    bfloat16 = wrapped("torch.dtype", "bfloat16")
    return flattened("Int4Tensor", tensors, block_size=[1, 32], shape=[N, K], activation_dtype=bfloat16)


ROWS = wrapped("QuantizeTensorToFloat8Kwargs", {"granularity": wrapped("PerRow", {"dim": -1})})
TENSOR = wrapped("QuantizeTensorToFloat8Kwargs", {"granularity": wrapped("PerTensor", {})})
INT8_ROWS = {"granularity": wrapped("PerRow", {"dim": -1}), "mapping_type": wrapped("MappingType", "SYMMETRIC")}


@pytest.mark.parametrize(
    ("written", "kind", "format"),
    [
        (float8(), "fp8", "float8 weights only"),
        (float8(act_quant_kwargs=ROWS), "fp8", "float8 with 8-bit activations"),
        (float8(act_quant_kwargs=TENSOR), "fp8", "float8 with activations of one scale, run with one for each row"),
        (int8(), "w8", "int8 weights only"),
        (int8(32), "w8", "int8 weights only"),
        (
            int8(act_quant_kwargs=wrapped("QuantizeTensorToInt8Kwargs", INT8_ROWS)),
            "int8",
            "int8 with 8-bit activations",
        ),
    ],
)
def test_codes_times_scales(written: Any, kind: str, format: str, tmp_path: Path) -> None:
    """One product in fp32: the same bits."""
    tensors, metadata = written
    found = reader.read(saved(tmp_path, tensors, metadata), CONFIG)
    assert found is not None and found.format == f"torchao ({format})"
    assert found.tensors.keys() == {"block.to_q.bias", "table"} and found.layers.keys() == {"block.to_q"}
    assert read_layer(found.layers["block.to_q"]).kind == kind
    scale = tensors["block.to_q._weight_scale"]
    wide = scale.repeat_interleave(K // scale.shape[1], 1)
    assert torch.equal(numbers(found, "block.to_q"), tensors["block.to_q._weight_qdata"].float() * wide)


def test_int4_has_floats_for_zero_points(tmp_path: Path) -> None:
    """Of scales and offsets in bf16: sums are exact in fp32 but for the last rounding, which both have."""
    tensors, metadata = int4()
    found = reader.read(saved(tmp_path, tensors, metadata), CONFIG)
    assert found is not None and read_layer(found.layers["block.to_q"]).kind == "w4"
    packed = tensors["block.to_q._weight_qdata"]
    signed = torch.stack([packed << 4 >> 4, packed >> 4], dim=2).view(N, K)
    scale, zero = (
        tensors[f"block.to_q._weight_{n}"].double().T.repeat_interleave(32, 1) for n in ("scale", "zero_point")
    )
    got = numbers(found, "block.to_q")
    assert torch.equal(got, (signed * scale + zero).float())
    assert (got - WEIGHT.float()).norm() < 0.1 * WEIGHT.float().norm()


def test_shards_tell_of_each_others_tensors(tmp_path: Path) -> None:
    tensors, metadata = int8()
    (tmp_path / "1").mkdir(), (tmp_path / "2").mkdir()
    halves = [dict([item for item in tensors.items() if ("scale" in item[0]) == first]) for first in (True, False)]
    files = [path for n, half in enumerate(halves) for path in saved(tmp_path / str(n + 1), half, metadata)]
    assert torch.equal(numbers(reader.read(files, CONFIG), "block.to_q"), numbers_of(tmp_path, tensors, metadata))
    with pytest.raises(UserError, match=r"weight block\.to_q\._weight_(qdata|zero_point) is missing"):
        reader.read(files[:1], CONFIG)


def numbers_of(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Tensor:
    return numbers(reader.read(saved(folder, tensors, metadata), CONFIG), "block.to_q")


def test_what_is_refused(tmp_path: Path) -> None:
    smooth = int8()
    smooth[0]["block.to_q._weight_act_pre_scale"] = torch.ones(K)
    described = json.loads(smooth[1]["block.to_q.weight"])
    described["_tensor_data_names"].append("act_pre_scale")
    smooth[1]["block.to_q.weight"] = json.dumps(described)
    asymmetric = INT8_ROWS | {"mapping_type": wrapped("MappingType", "ASYMMETRIC")}
    for (tensors, metadata), told in [
        (smooth, "Int8Tensor with act_pre_scale; expected qdata, scale, zero_point, act_quant_scale"),
        (int8(act_quant_kwargs=wrapped("", asymmetric)), "ASYMMETRIC activations; expected SYMMETRIC"),
        (float8(block_size=[1, 64]), r"scales of \[1, 64\]; expected of rows, of the tensor or of 128 x 128"),
        (
            flattened("Int4TilePackedTo4dTensor", {"qdata": WEIGHT}),
            "its weight is of Int4TilePackedTo4dTensor; expected",
        ),
    ]:
        with pytest.raises(UserError, match=told):
            reader.read(saved(tmp_path, tensors, metadata), CONFIG)
    with pytest.raises(UserError, match="its metadata has no tensor_names; torchao wrote it before 0.16"):
        reader.read(saved(tmp_path, {"a.weight": WEIGHT}), CONFIG)
    with pytest.raises(UserError, match=r"model\.bin: a pickle, which can run code"):
        reader.read([tmp_path / "model.bin"], CONFIG)


def test_other_files_are_left_to_others(tmp_path: Path) -> None:
    assert reader.read(saved(tmp_path, {"a.weight": WEIGHT}), {}) is None
    assert reader.read([tmp_path / "model.gguf"], {}) is None


@pytest.mark.parametrize(
    "config", ["float8", "float8 dynamic", "float8 blocks", "int8", "int8 groups", "int8 dynamic", "int4"]
)
def test_what_torchao_writes(config: str, tmp_path: Path) -> None:
    """And what its tensors say they are in fp32: the same bits."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao writes its own checkpoints")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization.granularity import PerBlock, PerGroup, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs

    weight = drawn(256, K, dtype=torch.bfloat16)
    blocks, group = PerBlock([128, 128]), PerGroup(32)
    dynamic = {
        "float8 dynamic": (PerRow(), QuantizeTensorToFloat8Kwargs(granularity=PerRow())),
        "float8 blocks": (blocks, QuantizeTensorToFloat8Kwargs(granularity=blocks)),
        "int8 dynamic": (PerRow(), QuantizeTensorToInt8Kwargs(granularity=PerRow())),
    }
    configs = {
        "float8": torchao.Float8WeightOnlyConfig(), "int8": torchao.Int8WeightOnlyConfig(),
        "int8 groups": torchao.Int8WeightOnlyConfig(granularity=group),
        "int4": torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group),
    }  # fmt: skip
    if config in dynamic:  # which torchao's configurations want a GPU for
        tensor = torchao.Float8Tensor if config.startswith("float8") else torchao.Int8Tensor
        quantised = tensor.from_hp(weight, granularity=dynamic[config][0], act_quant_kwargs=dynamic[config][1])
    else:
        layer = torch.nn.Linear(K, 256, bias=False, dtype=torch.bfloat16)
        layer.weight.data = weight
        torchao.quantize_(layer, configs[config])
        quantised = layer.weight.data
    tensors, metadata = flatten_tensor_state_dict({"block.to_q.weight": quantised, "table": torch.ones(1, 2, N)})
    found = reader.read(saved(tmp_path, tensors, metadata), CONFIG)
    want = dequantised(quantised)
    assert torch.equal(numbers(found, "block.to_q"), want)


def dequantised(quantised: Any) -> Tensor:
    """In fp32; a tensor without a choice of dtype rounds to its own unless it is another."""
    if type(quantised).__name__ == "IntxUnpackedToInt8Tensor":
        scale, zero = (t.float().repeat_interleave(32, 1) for t in (quantised.scale, quantised.zero_point))
        rounded = ((quantised.qdata.float() - zero) * scale).to(torch.bfloat16)
        assert torch.equal(rounded, quantised.dequantize())
        return (quantised.qdata.float() - zero) * scale
    return quantised.dequantize(torch.float32)
