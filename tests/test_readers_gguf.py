"""GGUF files against the package of the format: it writes them, and its numpy code says what the weights are."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from stored_layers import read_layer

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers import gguf as reader
from sgl_diffusion.runtime.quantization.readers.gguf_blocks import BLOCKS

N, K = 5, 512  # two blocks of the widest types


def rows_of(type: Type) -> np.ndarray:
    """A quantised matrix: by the package where it quantises to that type; or of random bytes, with fp16 numbers from
    far below the smallest normal one up, which has every code and every scale in every place.
    """
    random = np.random.default_rng(type.value)
    try:
        return quantize(random.standard_normal((N, K), dtype=np.float32) * 0.02, type)
    except NotImplementedError:
        rows = random.integers(0, 256, quant_shape_to_byte_shape((N, K), type), dtype=np.uint8)
    blocks = rows.reshape(N, -1, BLOCKS[type.name][0])
    for start in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(
        type.name, (0,)
    ):
        number = 10.0 ** random.uniform(-6, 0, (*blocks.shape[:2], 1))
        blocks[..., start : start + 2] = number.astype(np.float16).view(np.uint8)
    return rows


def write(path: Path, tensors: dict[str, tuple[Type, np.ndarray]], **shapes: tuple[int, ...]) -> Path:
    writer = gguf.GGUFWriter(path, "flux")
    for name, shape in shapes.items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, (type, array) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", BLOCKS)
def test_weights_are_those_of_the_package(name: str, tmp_path: Path) -> None:
    rows = rows_of(Type[name])
    path = write(tmp_path / "model.gguf", {"block.linear.weight": (Type[name], rows)})
    found = reader.read([path], {})
    assert found is not None and found.format == f"GGUF ({name})" and not found.tensors
    weight = read_layer(found.layers["block.linear"])
    expected = torch.from_numpy(dequantize(rows, Type[name]))
    assert weight.shape == (N, K)
    got = weight.dequantized(torch.float32)
    if weight.offset is None:
        assert torch.equal(got, expected)
    else:  # the package rounds the product and the sum, here the sum alone is rounded
        offset = weight.offset.float().repeat_interleave(K // weight.offset.shape[1], 1)
        assert ((got - expected).abs() <= 2**-24 * (2 * offset.abs() + 2 * expected.abs())).all()


@pytest.mark.parametrize(("name", "size"), [("Q8_0", 1.0625), ("Q4_K", 0.75), ("Q4_0", 0.5625), ("Q6_K", 1.25)])
def test_bytes_of_a_weight_are_those_of_the_docstring(name: str, size: float, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", {"a.weight": (Type[name], rows_of(Type[name]))})
    found = reader.read([path], {})
    assert found is not None and found.layers["a"].shapes().nbytes == N * K * size


def test_plain_tensors_keep_their_dtypes_and_shapes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    bias, table = random.standard_normal(7, dtype=np.float32), random.standard_normal((3, 8)).astype(np.float16)
    patch = random.standard_normal((2, 3, 1, 2, 2), dtype=np.float32)
    path = write(
        tmp_path / "model.gguf",
        {
            "bias": (Type.F32, bias),
            "table": (Type.F16, table),
            "half": (Type.BF16, quantize(bias[None, :6], Type.BF16)),
            "patch": (Type.F32, patch.reshape(-1)),
        },
        patch=patch.shape,
    )
    found = reader.read([path], {})
    assert found is not None and found.format == "GGUF (not quantised)" and not found.layers
    expected = {
        "bias": torch.from_numpy(bias),
        "table": torch.from_numpy(table),
        "half": torch.from_numpy(bias[None, :6]).bfloat16(),
        "patch": torch.from_numpy(patch),
    }
    assert found.tensors.keys() == expected.keys()
    for name, tensor in found.tensors.items():
        read = tensor.mapped()
        assert (tensor.shape, tensor.dtype) == (tuple(read.shape), read.dtype), name
        assert read.dtype == expected[name].dtype and torch.equal(read, expected[name]), name


def test_what_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    ternary = quantize(np.zeros((2, 256), dtype=np.float32), Type.TQ1_0)
    with pytest.raises(UserError, match=r"odd.gguf: a.weight is of type TQ1_0; expected one of F64, .*Q4_K"):
        reader.read([write(tmp_path / "odd.gguf", {"a.weight": (Type.TQ1_0, ternary)})], {})
    with pytest.raises(UserError, match=r"table is of type Q8_0; only weights of linear layers"):
        reader.read([write(tmp_path / "table.gguf", {"table": (Type.Q8_0, rows_of(Type.Q8_0))})], {})


def test_corrupt_files_are_refused_and_others_left_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", {"a.weight": (Type.Q8_0, rows_of(Type.Q8_0))})
    short = tmp_path / "short.gguf"
    short.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"short.gguf: not a readable GGUF file"):
        reader.read([short], {})
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert reader.read([other], {}) is None
