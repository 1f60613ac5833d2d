"""Checkpoints with 8-bit codes and scales beside them: ModelOpt's exports, and those of `quant_method: fp8`.

Both are written here by the rules of the packages (nvidia-modelopt 0.47, `torch/export`; transformers,
`integrations/finegrained_fp8.py`): ModelOpt needs packages that nothing else here does, transformers a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stored_layers import drawn, numbers, read_layer, saved
from torch import Tensor

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers import finegrained_fp8, modelopt

N, K = 192, 256
WEIGHT = drawn(N, K)
LAYER = "transformer_blocks.0.attn.to_q"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def stored(**tensors: Tensor) -> dict[str, Tensor]:
    plain = {f"{LAYER}.bias": torch.ones(N), "proj_out.weight": WEIGHT}
    return {f"{LAYER}.{name}": tensor for name, tensor in tensors.items()} | plain


def e4m3(scale: Tensor) -> Tensor:
    return (WEIGHT / scale).to(torch.float8_e4m3fn)


def nvfp4() -> dict[str, Tensor]:
    """The even column in the lower bits; scales of blocks times one of all."""
    whole = WEIGHT.abs().amax() / (448 * 6)
    blocks = WEIGHT.view(N, K // 16, 16)
    scale = (blocks.abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
    nearest = (blocks[..., None] / (scale.float() * whole)[..., None, None] - E2M1).abs().argmin(3).view(N, K)
    codes = nearest.to(torch.uint8)
    return {
        "weight": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": scale, "weight_scale_2": whole,
        "input_scale": torch.tensor(0.01),
    }  # fmt: skip


def of_nvfp4(tensors: dict[str, Tensor]) -> Tensor:
    codes = torch.stack([tensors["weight"] & 0xF, tensors["weight"] >> 4], 2).view(N, K).int()
    scale = tensors["weight_scale"].float().repeat_interleave(16, 1)
    return (E2M1[codes].double() * scale * tensors["weight_scale_2"]).float()


ONE_SCALE = WEIGHT.abs().amax() / 448
ROW_SCALES = WEIGHT.abs().amax(1) / 448
EXPONENTS = WEIGHT.view(N, K // 32, 32).abs().amax(2).log2().floor().sub(8)
FP8 = {"weight": e4m3(ONE_SCALE), "weight_scale": ONE_SCALE, "input_scale": torch.tensor(0.5)}
ROWS = {"weight": e4m3(ROW_SCALES[:, None]), "weight_scale": ROW_SCALES}
MXFP8 = {
    "weight": e4m3(EXPONENTS.exp2().repeat_interleave(32, 1)), "weight_scale": EXPONENTS.add(127).to(torch.uint8)
}  # fmt: skip


def exported(algorithm: str, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["proj_out"], **fields}


@pytest.mark.parametrize(
    ("algorithm", "tensors", "kind", "want"),
    [
        ("FP8", FP8, "fp8", FP8["weight"].float() * ONE_SCALE),
        ("FP8_PER_CHANNEL_PER_TOKEN", ROWS, "fp8", ROWS["weight"].float() * ROW_SCALES[:, None]),
        ("NVFP4", nvfp4(), "nvfp4", of_nvfp4(nvfp4())),
        ("MXFP8", MXFP8, "mxfp8", MXFP8["weight"].float() * EXPONENTS.exp2().repeat_interleave(32, 1)),
    ],
)
def test_modelopt(algorithm: str, tensors: dict[str, Tensor], kind: str, want: Tensor, tmp_path: Path) -> None:
    """The same bits, but for NVFP4, where products with two scales are rounded in between."""
    found = modelopt.read(saved(tmp_path, stored(**tensors)), exported(algorithm))
    assert found is not None and found.format.startswith(f"ModelOpt {algorithm}")
    assert found.layers.keys() == {LAYER} and found.tensors.keys() == {f"{LAYER}.bias", "proj_out.weight"}
    weight = read_layer(found.layers[LAYER])
    assert weight.kind == kind and (weight.input_scale is not None) == (algorithm == "FP8")
    torch.testing.assert_close(numbers(found, LAYER), want, rtol=2**-22 if kind == "nvfp4" else 0, atol=0)


def test_modelopt_says_what_it_does_another_way(tmp_path: Path) -> None:
    files = saved(tmp_path, stored(**nvfp4()))
    layers = {LAYER: {"quant_algo": "NVFP4"}, "other": {"quant_algo": "FP8"}}
    for config, format in [
        (exported("NVFP4"), "ModelOpt NVFP4 (activations with a scale for each row in place of the calibrated one)"),
        (
            exported("W4A16_NVFP4"),
            "ModelOpt W4A16_NVFP4 (activations in 4 bits where the GPU has instructions for it)",
        ),
        (
            exported("MIXED_PRECISION", quantized_layers=layers),
            "ModelOpt FP8, NVFP4 (activations with a scale for each row in place of the calibrated one)",
        ),
    ]:
        assert (found := modelopt.read(files, config)) is not None and found.format == format


def test_what_is_refused_of_modelopt(tmp_path: Path) -> None:
    smooth = {**nvfp4(), "pre_quant_scale": torch.ones(K)}
    transposed = {**ROWS, "weight_scale": torch.ones(1, N)}
    for tensors, config, told in [
        (FP8, {"quant_method": "modelopt", "quant_type": "FP8"}, "no quant_algo; weights that diffusers saved"),
        (FP8, exported("W4A8_AWQ"), "quant_algo=W4A8_AWQ; expected FP8, FP8_PER_CHANNEL"),
        (
            FP8,
            exported("MIXED_PRECISION", quantized_layers={LAYER: {"quant_algo": "NVFP4_SVD"}}),
            "quant_algo=NVFP4_SVD; expected",
        ),
        (smooth, exported("NVFP4"), f"{LAYER} has pre_quant_scale; expected weight, weight_scale"),
        (transposed, exported("FP8"), r"weight_scale is float32 of shape \(1, 192\); expected float32 or bfloat16"),
        ({**FP8, "weight": FP8["weight"][None]}, exported("FP8"), "weight has 3 dimensions; only linear layers"),
        ({**nvfp4(), "weight_scale": torch.ones(N, 16)}, exported("NVFP4"), "expected float8_e4m3fn of shape"),
    ]:
        with pytest.raises(UserError, match=told):
            modelopt.read(saved(tmp_path, stored(**tensors)), config)
    assert modelopt.read([tmp_path / "none"], {"quant_method": "torchao"}) is None


# -- quant_method: fp8 -----------------------------------------------------------------

BLOCKS = torch.zeros(256, K).index_copy(0, torch.arange(N), WEIGHT).view(2, 128, 2, 128).abs().amax((1, 3)) / 448
WIDE = BLOCKS.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)
FINEGRAINED = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}


def test_blocks_of_128_rows_and_columns(tmp_path: Path) -> None:
    """The last block has half as many rows."""
    tensors = stored(weight=e4m3(WIDE), weight_scale_inv=BLOCKS)
    found = finegrained_fp8.read(saved(tmp_path, tensors), FINEGRAINED)
    assert found is not None and found.format == "fp8 (dynamic activations)"
    assert found.tensors.keys() == {f"{LAYER}.bias", "proj_out.weight"}
    assert read_layer(found.layers[LAYER]).kind == "fp8_block"
    assert torch.equal(numbers(found, LAYER), e4m3(WIDE).float() * WIDE)


def test_whole_layers_with_calibrated_activations(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    found = finegrained_fp8.read(saved(tmp_path, stored(**FP8)), config)
    assert found is not None and found.format == "fp8 (static activations)"
    weight = read_layer(found.layers[LAYER])
    assert weight.kind == "fp8" and weight.input_scale is not None and weight.input_scale.item() == 0.5
    assert torch.equal(numbers(found, LAYER), FP8["weight"].float() * ONE_SCALE)


def test_what_is_refused_of_fp8(tmp_path: Path) -> None:
    blocks = {"weight": e4m3(WIDE), "weight_scale_inv": BLOCKS}
    for tensors, change, told in [
        (blocks, {"weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\]; expected None or \[128, 128\]"),
        ({**blocks, "activation_scale": torch.ones(1)}, {}, "calibrated activations beside scales of blocks"),
        (blocks, {"fmt": "e5m2"}, "fmt=e5m2; expected e4m3"),
        (blocks, {"scale_fmt": "ue8m0"}, "scale_fmt=ue8m0; expected float"),
        ({**blocks, "weight_scale_inv": torch.ones(4, 2)}, {}, r"of shape \(4, 2\); expected .* of shape \(2, 2\)"),
    ]:
        with pytest.raises(UserError, match=told):
            finegrained_fp8.read(saved(tmp_path, stored(**tensors)), FINEGRAINED | change)
    assert finegrained_fp8.read([tmp_path / "none"], {}) is None
