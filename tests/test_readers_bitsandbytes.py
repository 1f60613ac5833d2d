"""Checkpoints of bitsandbytes, written by its own functions where it is installed (125 MB, not in any extra) and in any
case by the rules of its format, as its `QuantState.as_dict` has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from stored_layers import numbers
from torch import Tensor

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers import bitsandbytes as reader

N, K, BLOCK, NESTED_BLOCK = 6, 256, 64, 16
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def json_tensor(value: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def four_bit(name: str, *, nested: bool, **changed: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a layer with random codes, and the weights they stand for."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (N, K), generator=generator)
    table = torch.linspace(-1, 1, 16)
    largest = torch.rand(N * K // BLOCK, generator=generator) + 0.5
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [N, K]} | changed
    tensors = {
        "weight": (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).view(-1, 1),
        "weight.absmax": largest,
        "weight.quant_map": table,
    }
    if nested:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.75}
        nested_table = torch.rand(256, generator=generator) - 0.5
        of_blocks = torch.rand(-(-len(largest) // NESTED_BLOCK), generator=generator)
        of_largest = torch.randint(0, 256, largest.shape, generator=generator)
        largest = nested_table[of_largest] * of_blocks.repeat_interleave(NESTED_BLOCK)[: len(largest)] + 0.75
        tensors |= {
            "weight.absmax": of_largest.to(torch.uint8),
            "weight.nested_absmax": of_blocks,
            "weight.nested_quant_map": nested_table,
        }
    tensors["weight.quant_state.bitsandbytes__nf4"] = json_tensor(state)
    weight = (table[codes].view(-1, BLOCK) * largest[:, None]).view(N, K)
    return {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}, weight


def test_four_bits_by_the_rules_of_the_format(tmp_path: Path) -> None:
    once, expected = four_bit("blocks.0.once", nested=False)
    twice, expected_of_twice = four_bit("blocks.0.twice", nested=True)
    plain = {"blocks.0.once.bias": torch.ones(N), "norm.weight": torch.ones(3, dtype=torch.bfloat16)}
    # a `bnb_4bit_quant_storage` of two bytes
    twice["blocks.0.twice.weight"] = twice["blocks.0.twice.weight"].view(-1, 2).view(torch.bfloat16)
    save_file(once | twice | plain, path := tmp_path / "model.safetensors")
    found = reader.read([path], CONFIG)
    assert found is not None and found.format == "bitsandbytes (NF4)"
    assert found.layers.keys() == {"blocks.0.once", "blocks.0.twice"}
    assert torch.equal(numbers(found, "blocks.0.once"), expected)
    assert torch.equal(numbers(found, "blocks.0.twice"), expected_of_twice)
    assert {name: t.dtype for name, t in found.tensors.items()} == {name: t.dtype for name, t in plain.items()}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("type", ["nf4", "fp4"])
def test_four_bits_of_the_package(type: str, compressed: bool, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(16, 1024, generator=torch.Generator().manual_seed(2))  # 256 blocks: two levels of scales
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=type, compress_statistics=compressed)
    tensors = {f"to_q.weight.{leaf}": tensor for leaf, tensor in state.as_dict(packed=True).items()}
    save_file(tensors | {"to_q.weight": packed}, path := tmp_path / "model.safetensors")
    found = reader.read([path], CONFIG)
    assert found is not None and found.format == f"bitsandbytes ({type.upper()})" and not found.tensors
    assert torch.equal(numbers(found, "to_q"), functional.dequantize_4bit(packed, state))


def test_int8_of_the_package(tmp_path: Path) -> None:
    """Its two factors of a scale are multiplied with each other first, not one after the other with the code: that is
    a rounding more, or less.
    """
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3), dtype=torch.float16)
    codes, largest, _ = functional.int8_vectorwise_quant(weight)
    save_file(int8_layer(codes, largest), path := tmp_path / "model.safetensors")
    found = reader.read([path], {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert found is not None and not found.tensors
    got = numbers(found, "to_q")
    torch.testing.assert_close(got, functional.int8_vectorwise_dequant(codes, largest), rtol=2**-22, atol=0)


def int8_layer(codes: Tensor, largest: Tensor, order: int = 0) -> dict[str, Tensor]:
    return {"to_q.weight": codes, "to_q.SCB": largest, "to_q.weight_format": torch.tensor(order, dtype=torch.uint8)}


def test_int8_by_the_rules_of_the_format(tmp_path: Path) -> None:
    codes = torch.randint(-127, 128, (N, K), generator=torch.Generator().manual_seed(4)).to(torch.int8)
    largest = torch.arange(1.0, N + 1)
    save_file(int8_layer(codes, largest) | {"to_q.bias": torch.ones(N)}, path := tmp_path / "model.safetensors")
    found = reader.read([path], {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert found is not None and found.tensors.keys() == {"to_q.bias"}
    assert found.format == "bitsandbytes (int8, run without splitting off outliers of the activations)"
    assert torch.equal(numbers(found, "to_q"), codes * (largest / 127)[:, None])


def test_what_does_not_fit_is_refused_and_others_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(four_bit("to_q", nested=False, shape=[N * K // 32, 32])[0], path)
    with pytest.raises(UserError, match=r"to_q.weight has shape \(48, 32\) and blocks of 64; expected blocks of 16, "):
        reader.read([path], CONFIG)
    broken = four_bit("to_q", nested=True)[0]
    del broken["to_q.weight.nested_absmax"]
    save_file(broken, path)
    with pytest.raises(UserError, match=r"to_q has no weight.nested_absmax"):
        reader.read([path], CONFIG)
    save_file(int8_layer(torch.zeros(2, 2, dtype=torch.int8), torch.ones(2), order=2), path)
    with pytest.raises(UserError, match=r"to_q.weight is in the order of format 2; expected 0"):
        reader.read([path], CONFIG)
    save_file({"to_q.weight": torch.ones(2, 2)}, path)
    assert reader.read([path], CONFIG) is None
    save_file(four_bit("to_q", nested=False)[0], path)
    assert reader.read([path], {"quant_method": "torchao"}) is None
