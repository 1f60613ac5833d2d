"""By what a weight was multiplied, as every GEMM tells whoever asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import DEVICE
from torch import Tensor

from sgl_diffusion.kernels.gemm import gemm
from sgl_diffusion.kernels.gemm_fp8 import gemm_fp8
from sgl_diffusion.kernels.gemm_int8 import gemm_int8
from sgl_diffusion.kernels.gemm_mx import gemm_mx
from sgl_diffusion.kernels.gemm_w4 import gemm_w4
from sgl_diffusion.kernels.launch import Products, Tile, forced_tile, noting
from sgl_diffusion.kernels.microscaling import quantize_mx
from sgl_diffusion.kernels.op import noise

pytestmark = pytest.mark.usefixtures("repaired_interpreter")

M, N, K = 20, 64, 32
POINTER: Tile = {"form": "pointer", "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 2}
TMA: Tile = {**POINTER, "form": "tma", "BLOCK_N": 32}
BLAS: Tile = {"form": "blas"}
if DEVICE == "cuda":
    POINTER, TMA = ({**tile, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32} for tile in (POINTER, TMA))

x, weight_NK = noise((M, K), torch.float32, DEVICE), noise((N, K), torch.float32, DEVICE, 1)
shifted = noise((M, K + 1), torch.float32, DEVICE)[:, 1:]  # rows that the bulk copy engine cannot address
row_scale, column_scale = torch.ones(M, device=DEVICE), torch.ones(N, device=DEVICE)
block_scale = torch.ones(1, 1, device=DEVICE)
fp8 = [t.to(torch.float8_e4m3fn) for t in (x, weight_NK)]
int8 = [(t * 40).to(torch.int8) for t in (x, weight_NK)]
group_scale = torch.ones(N, 1, device=DEVICE)
mx_codes, mx_scales = quantize_mx(weight_NK, "mxfp8")[:2]
x_codes, x_scales = quantize_mx(x, "mxfp8")[:2]


def product(name: str, impl: Any) -> Tensor:
    match name:
        case "gemm":
            return gemm(x, weight_NK, impl=impl)
        case "gemm, shifted":
            return gemm(shifted, weight_NK, impl=impl)
        case "gemm_fp8":
            return gemm_fp8(fp8[0], row_scale, fp8[1], column_scale, impl=impl)
        case "gemm_fp8, in blocks":
            return gemm_fp8(fp8[0], row_scale[:, None], fp8[1], block_scale, impl=impl)
        case "gemm_int8":
            return gemm_int8(int8[0], row_scale, int8[1], column_scale, impl=impl)
        case "gemm_w4":
            return gemm_w4(x, weight_NK[:, : K // 2].to(torch.uint8), group_scale, impl=impl)
        case "gemm_mx":
            return gemm_mx(x, mx_codes, mx_scales, format="mxfp8", impl=impl)
        case "gemm_mx, codes":
            return gemm_mx(x_codes, mx_codes, mx_scales, format="mxfp8", x_scales=x_scales, impl=impl)
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "tile", "form"),
    [
        ("gemm", BLAS, "blas"),
        ("gemm", POINTER, "pointer"),
        ("gemm", TMA, "tma"),
        ("gemm, shifted", TMA, "blas"),
        ("gemm_fp8", POINTER, "pointer"),
        ("gemm_fp8", TMA, "tma"),
        ("gemm_fp8", BLAS, "blas" if DEVICE == "cuda" else "torch"),
        ("gemm_fp8, in blocks", BLAS, "torch"),
        ("gemm_int8", TMA, "tma"),
        ("gemm_w4", {**POINTER, "BLOCK_K": 32}, "pointer"),
        ("gemm_w4", {"form": "dequantize", "BLOCK_N": 16, "BLOCK_K": 32}, "dequantize"),
        ("gemm_mx", {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 2}, "pointer"),
        ("gemm_mx, codes", {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 2}, "dot_scaled"),
    ],
)
def test_the_form_that_ran_is_told(name: str, tile: Tile, form: str) -> None:
    products: Products = {}
    op = name.partition(",")[0]
    with noting(products), forced_tile(op, tile):
        product(name, "triton")
    assert products == {op: {form: {f"{N}x{K}"}}}


@pytest.mark.parametrize("name", ["gemm", "gemm_fp8", "gemm_w4", "gemm_mx"])
def test_pytorchs_own_products_are_told_as_such(name: str) -> None:
    products: Products = {}
    with noting(products):
        product(name, "torch")
        gemm(x, weight_NK[:16].contiguous(), impl="torch")
    product("gemm_int8", "torch")  # nobody asks
    assert products[name]["torch"] >= {f"{N}x{K}"} and products["gemm"]["torch"] >= {f"16x{K}"}
    assert set(products) == {name, "gemm"}
