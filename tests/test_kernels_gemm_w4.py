"""Products with weights of 4 and 8 bits in groups, in each of their forms, against formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, cases, check
from torch import Tensor

from sgl_diffusion.kernels import gemm_w4 as module
from sgl_diffusion.kernels.gemm_w4 import gemm_w4, gemm_w8
from sgl_diffusion.kernels.grouped import dequantize
from sgl_diffusion.kernels.launch import Impl, forced_tile
from sgl_diffusion.kernels.op import Case, noise, rel_l2

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")

TILES: dict[str, dict[str, Any]] = {
    "pointer": {"form": "pointer", "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "GROUP_M": 2},
    "tma": {"form": "tma", "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "GROUP_M": 2},
    "dequantize": {"form": "dequantize", "BLOCK_N": 16, "BLOCK_K": 64},
}
PRODUCTS = ("pointer", "tma")
if DEVICE == "cuda":
    for form in PRODUCTS:
        TILES[form] |= {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def weight_formula(
    codes: Tensor, scale_NG: Tensor, offset_NG: Tensor | None = None, table: Tensor | None = None
) -> Tensor:
    """Column by column, in float64."""
    bits = 4 if codes.dtype == torch.uint8 else 8
    K = codes.shape[1] * 8 // bits
    columns = []
    for k in range(K):
        code = codes[:, k].long() if bits == 8 else codes[:, k // 2].long() >> (4 * (k % 2)) & 15
        zero = 8 if bits == 4 and offset_NG is None else 0
        value = (code - zero).double() if table is None else table.double()[code]
        g = k * scale_NG.shape[1] // K
        columns.append(scale_NG[:, g].double() * value + (0 if offset_NG is None else offset_NG[:, g].double()))
    return torch.stack(columns, dim=1)


def formula(
    x_MK: Tensor, codes: Tensor, scale_NG: Tensor, bias_N: Tensor | None = None,
    offset_NG: Tensor | None = None, table: Tensor | None = None, x_scale: Tensor | None = None,
    smooth_K: Tensor | None = None, low_MR: Tensor | None = None, up_NR: Tensor | None = None,
    gelu_from: int | None = None, swiglu_from: int | None = None, tail: Tensor | None = None,
    gate: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    x = x_MK.double() if smooth_K is None else x_MK / smooth_K
    y = torch.einsum("...k,nk->...n", x, weight_formula(codes, scale_NG, offset_NG, table))
    if x_scale is not None:
        y = y * x_scale[..., None]
    if low_MR is not None and up_NR is not None:
        y = y + torch.einsum("...r,nr->...n", low_MR, up_NR)
    y = y if bias_N is None else y + bias_N
    if gelu_from is not None:
        u = y[..., gelu_from:]
        u = u / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
        y = torch.cat([y[..., :gelu_from], u], dim=-1)
    if swiglu_from is not None:
        gates, values = y[..., swiglu_from:].chunk(2, dim=-1)
        y = torch.cat([y[..., :swiglu_from], gates / (1 + torch.exp(-gates)) * values], dim=-1)
    if gate is not None:
        y = y * gate.repeat_interleave(y.shape[:-1].numel() // gate.shape[0], dim=0).view(y.shape)
    y = y if residual is None else y + residual
    first = gelu_from if swiglu_from is None else swiglu_from
    return y if tail is None else (y[..., :first], y[..., first:])


FORMULAS = {"gemm_w4": formula, "gemm_w8": formula}


@pytest.mark.parametrize("case", [*cases([module.W4, module.W8])], ids=str)
@pytest.mark.parametrize("form", ["reference", *TILES])
def test_matches_the_formula(case: Case, form: str) -> None:
    with forced_tile(case.op.name, TILES.get(form, {})):
        check(case, "torch" if form == "reference" else "triton", formula)


def weight(N: int, K: int, group: int, bits: int = 4, scale: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Codes, all of them, and scales."""
    generator = torch.Generator().manual_seed(N * K + group)
    lowest, highest = (0, 256) if bits == 4 else (-128, 128)
    codes = torch.randint(lowest, highest, (N, K * bits // 8), generator=generator)
    codes = codes.to(torch.uint8 if bits == 4 else torch.int8)
    return codes.to(DEVICE), (torch.rand(N, K // group, generator=generator) / 4).to(scale).to(DEVICE)


@pytest.mark.parametrize("form", TILES)
@pytest.mark.parametrize(
    ("group", "scale"), [*zip((16, 32, 64, 128), SCALES, strict=True), *product((192,), SCALES)], ids=str
)
def test_every_group_and_kind_of_scale(group: int, scale: torch.dtype, form: str) -> None:
    """192 columns are a whole row; where groups are of 16 or 32, a row ends within a tile."""
    K = max(3 * group, 96) if group < 192 else group
    x = noise((3, K), torch.float32, DEVICE)
    for bits, gemm in ((4, gemm_w4), (8, gemm_w8)):
        codes, scale_NG = weight(20, K, group, bits, scale)
        with forced_tile(gemm.__name__, TILES[form]):
            assert rel_l2(gemm(x, codes, scale_NG, impl="triton"), formula(x, codes, scale_NG)) < 2e-6


@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("form", ["reference", *PRODUCTS])
def test_codes_by_codes_are_exact(group: int, offset: bool, form: str) -> None:
    """With scales that are powers of two nothing is rounded, and fp32 holds the result."""
    codes, _ = weight(20, 96, group)
    scale_NG = torch.tensor([0.5, 2.0], device=DEVICE).repeat(20, 2)[:, : 96 // group].contiguous()
    x = torch.randint(-127, 128, (18, 96), generator=torch.Generator().manual_seed(1)).to(torch.int8).to(DEVICE)
    x_scale = torch.full((18,), 0.25, device=DEVICE)
    offset_NG = scale_NG * 4 if offset else None
    want = formula(x, codes, scale_NG, offset_NG=offset_NG, x_scale=x_scale)
    impl: Impl = "torch" if form == "reference" else "triton"
    with forced_tile("gemm_w4", {**TILES.get(form, {}), "BLOCK_K": 128}):
        got = gemm_w4(x, codes, scale_NG, offset_NG=offset_NG, x_scale=x_scale, dtype=torch.float32, impl=impl)
    assert torch.equal(got.double(), want)


@pytest.mark.parametrize("form", ["reference", *TILES])
def test_what_may_be_left_out_and_where_results_go(form: str) -> None:
    """No bias, no gate, one gate for all rows; `out` is the residual; only the slice asked for is written."""
    impl: Impl = "torch" if form == "reference" else "triton"
    codes, scale_NG = weight(48, 32, 32)
    x = noise((2, 9, 32), torch.float32, DEVICE)
    stream = noise((2, 9, 48), torch.float32, DEVICE, 1)
    buffer = torch.full((2, 9, 80), 7.0, device=DEVICE)
    with forced_tile("gemm_w4", TILES.get(form, {})):
        assert rel_l2(gemm_w4(x, codes, scale_NG, impl=impl), formula(x, codes, scale_NG)) < 2e-6
        for gate in (None, noise((1, 48), torch.float32, DEVICE, 2)):
            want = formula(x, codes, scale_NG, gate=gate, residual=stream)
            inside = stream.clone()
            assert gemm_w4(x, codes, scale_NG, gate=gate, residual=inside, out=inside, impl=impl) is inside
            assert rel_l2(inside, want) < 2e-6
        gemm_w4(x, codes, scale_NG, gelu_from=16, out=buffer[..., 8:24], tail=buffer[..., 32:64], impl=impl)
    untouched = torch.ones(80, dtype=torch.bool, device=DEVICE)
    untouched[8:24] = untouched[32:64] = False
    assert (buffer[..., untouched] == 7).all() and (buffer[..., ~untouched] != 7).all()


@pytest.mark.parametrize("form", ["reference", *TILES])
@pytest.mark.parametrize("rank", [16, 96, 128])
def test_every_rank_of_the_branch(rank: int, form: str) -> None:
    codes, scale_NG = weight(20, 32, 32)
    x, low, up = (noise(shape, torch.float32, DEVICE, i) for i, shape in enumerate(((9, 32), (9, rank), (20, rank))))
    with forced_tile("gemm_w4", TILES.get(form, {})):
        got = gemm_w4(x, codes, scale_NG, low_MR=low, up_NR=up, impl="torch" if form == "reference" else "triton")
    assert rel_l2(got, formula(x, codes, scale_NG, low_MR=low.double(), up_NR=up.double())) < 2e-6


@pytest.mark.parametrize("kind", ["number", "code"])
def test_a_program_takes_several_tiles(kind: str) -> None:
    """Of 5 x 4 here, the last of which are not whole, and whose order turns within the programs."""
    codes, scale_NG = weight(56, 96, 32)
    x, x_scale = noise((70, 96), torch.float32, DEVICE), None
    if kind == "code":
        x, x_scale = (x * 40).to(torch.int8), noise((70,), torch.float32, DEVICE, 1).abs()
    low, up = noise((70, 32), torch.float32, DEVICE, 2), noise((56, 32), torch.float32, DEVICE, 3)
    tail = torch.empty(70, 36, device=DEVICE)
    with forced_tile("gemm_w4", TILES["tma"]):
        got = gemm_w4(
            x, codes, scale_NG, x_scale=x_scale, low_MR=low, up_NR=up, gelu_from=20, tail=tail, dtype=torch.float32,
            impl="triton",
        )  # fmt: skip
    exact = formula(
        x, codes, scale_NG, x_scale=x_scale, low_MR=low.double(), up_NR=up.double(), gelu_from=20, tail=tail
    )
    for part, want in zip(got, exact, strict=True):
        assert rel_l2(part, want) < 2e-6


def test_what_descriptors_cannot_address_goes_by_pointers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results are those of that form, to the bit."""

    def fail(*args: object) -> None:
        raise AssertionError("launched")

    def product(form: str, K: int = 64, N: int = 24, start: int = 0, rank: int = 0) -> Tensor:
        """x starts at a column of wider rows."""
        codes, scale_NG = weight(N, K, K)
        x = noise((20, K + 8), torch.float32, DEVICE)[:, start : start + K]
        low = noise((20, rank + 1), torch.float32, DEVICE, 1)[:, :rank] if rank else None
        up = noise((N, rank), torch.float32, DEVICE, 2) if rank else None
        with forced_tile("gemm_w4", TILES[form]):
            return gemm_w4(x, codes, scale_NG, low_MR=low, up_NR=up, impl="triton")

    monkeypatch.setattr(module, "launch_tma", fail)
    # rows of codes, rows of the result, the address of x, rows of the branch
    for case in ({"K": 48}, {"N": 23}, {"start": 1}, {"rank": 16}):
        assert torch.equal(product("tma", **case), product("pointer", **case))
    with pytest.raises(AssertionError, match="launched"):
        product("tma")


@pytest.mark.parametrize(("bits", "kind"), [(4, "signed"), (4, "offset"), (4, "table"), (8, "signed"), (8, "offset")])
def test_weights_are_those_of_float64(bits: int, kind: str) -> None:
    codes, scale_NG = weight(7, 64, 32, bits, torch.bfloat16)
    offset = noise((7, 2), torch.float16, DEVICE) if kind == "offset" else None
    table = noise((16,), torch.float32, DEVICE) if kind == "table" else None
    smooth = noise((64,), torch.float32, DEVICE).exp()
    exact = weight_formula(codes, scale_NG, offset, table)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        got = dequantize(codes, scale_NG, offset_NG=offset, table=table, dtype=dtype)
        assert torch.equal(got, exact.to(dtype))
    smoothed = dequantize(codes, scale_NG, offset_NG=offset, table=table, smooth_K=smooth, dtype=torch.float64)
    assert torch.equal(smoothed, exact / smooth)


def test_long_weights_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale_NG = weight(7, 64, 32)
    whole = dequantize(codes, scale_NG, dtype=torch.float32)
    monkeypatch.setattr("sgl_diffusion.kernels.grouped.DECODED_AT_ONCE", 3 * 64)
    assert torch.equal(dequantize(codes, scale_NG, dtype=torch.float32), whole)


def test_meta_tensors_have_the_shapes_of_results() -> None:
    x, x8 = torch.empty(2, 3, 64, device="meta"), torch.empty(2, 3, 64, dtype=torch.int8, device="meta")
    codes, scale_NG = torch.empty(48, 32, dtype=torch.uint8, device="meta"), torch.empty(48, 2, device="meta")
    with forced_tile("gemm_w4", TILES["dequantize"]):
        tail = torch.empty(2, 3, 16, device="meta")
        assert gemm_w4(x, codes, scale_NG, gelu_from=32, tail=tail, impl="torch")[0].shape == (2, 3, 32)
        x_scale = torch.empty(2, 3, device="meta")
        got = gemm_w4(x8, codes, scale_NG, x_scale=x_scale, dtype=torch.bfloat16, impl="torch")
        assert got.shape == (2, 3, 48) and got.dtype == torch.bfloat16


x, c, s, r = torch.zeros(2, 3, 64), torch.zeros(32, 32, dtype=torch.uint8), torch.zeros(32, 2), torch.zeros(2, 3, 32)
c8, x8, x8s = torch.zeros(32, 64, dtype=torch.int8), torch.zeros(2, 3, 64, dtype=torch.int8), torch.zeros(2, 3)
t16, f32 = torch.zeros(16), torch.float32

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: gemm_w4(x, c[0], s), r"codes: shape \(32,\), expected 2 dimensions"),
    (lambda: gemm_w4(x, c8, s), "codes: dtype int8, expected uint8"),
    (lambda: gemm_w8(x, c, s), "codes: dtype uint8, expected int8"),
    (lambda: gemm_w4(x, c.to("meta"), s), "codes: on meta, the other tensors are on cpu"),
    (lambda: gemm_w4(x, c.mT.contiguous().mT, s), "codes: strides .* expected contiguous"),
    (lambda: gemm_w4(x, c, s[:, :1].repeat(1, 8)), r"scale_NG: shape \(32, 8\), expected \(32, G\) with groups of 16,"),
    (lambda: gemm_w4(x, c, s[:16]), r"scale_NG: shape \(16, 2\), expected \(32, G\)"),
    (lambda: gemm_w4(x, c, s.double()), "scale_NG: dtype float64, expected float32, bfloat16, float16"),
    (lambda: gemm_w4(x, c, s.to(torch.float8_e4m3fn).to("meta")), "scale_NG: on meta, the other tensors are on cpu"),
    (lambda: gemm_w4(x[..., :32], c, s), r"x_MK: shape \(2, 3, 32\), expected \(2, 3, 64\)"),
    (lambda: gemm_w4(x.int(), c, s), "x_MK: dtype int32, expected float32, bfloat16, float16"),
    (lambda: gemm_w4(x, c, s, dtype=torch.float16), "x_MK: dtype float32, expected float16"),
    (lambda: gemm_w4(x.mT.contiguous().mT, c, s), "x_MK: last dimension has stride 3"),
    (lambda: gemm_w4(x, c, s, offset_NG=s[:, :1]), r"offset_NG: shape \(32, 1\), expected \(32, 2\)"),
    (lambda: gemm_w4(x, c, s, offset_NG=s, table=t16), "offset_NG: expected none beside table"),
    (lambda: gemm_w4(x, c, s, table=t16.half()), "table: dtype float16, expected float32"),
    (lambda: gemm_w4(x, c, s, table=t16[:8]), r"table: shape \(8,\), expected \(16,\)"),
    (lambda: gemm_w4(x, c, s, smooth_K=t16), r"smooth_K: shape \(16,\), expected \(64,\)"),
    (lambda: gemm_w4(x, c, s, low_MR=r), "low_MR, up_NR: expected both or none"),
    (lambda: gemm_w4(x, c, s, low_MR=r[..., :24], up_NR=r[0, :, :24]), "low_MR: rank 24, expected a multiple of 16"),
    (lambda: gemm_w4(x, c, s, low_MR=r, up_NR=r[0]), r"up_NR: shape \(3, 32\), expected \(32, 32\)"),
    (lambda: gemm_w4(x, c, s, low_MR=r.half(), up_NR=torch.zeros(32, 32)), "low_MR: dtype float16, expected float32"),
    (lambda: gemm_w4(x, c, s, x_scale=x8s, dtype=f32), "x_MK: dtype float32, expected int8"),
    (lambda: gemm_w4(x8, c, s, dtype=f32), "x_MK: dtype int8, expected float32, bfloat16, float16"),
    (lambda: gemm_w4(x8, c, s, x_scale=x8s), "dtype=None: expected that of the result"),
    (lambda: gemm_w4(x8, c, s, x_scale=x8s, dtype=torch.int8), "dtype=torch.int8: expected torch.float32"),
    (lambda: gemm_w4(x8, c, s, x_scale=x8s[0], dtype=f32), r"x_scale: shape \(3,\), expected \(2, 3\)"),
    (lambda: gemm_w4(x8, c, s, x_scale=x8s, dtype=f32, table=t16), "table: expected none beside x_scale"),
    (lambda: gemm_w4(x8, c, s, x_scale=x8s, dtype=f32, smooth_K=t16), "smooth_K: expected none beside x_scale"),
    (lambda: gemm_w4(x8, c, s.repeat(1, 2), x_scale=x8s, dtype=f32), "scale_NG: groups of 16 columns, expected 32"),
    (lambda: gemm_w4(x8, c, s, x_scale=x8s, dtype=torch.half, out=r), "out: dtype float32, expected float16"),
    (lambda: gemm_w4(x, c, s, gate=s.mT), "gate: expected a residual beside it"),
    (lambda: dequantize(c8.int(), s, dtype=f32), "codes: dtype torch.int32, expected torch.uint8 or torch.int8"),
    (lambda: dequantize(c, s[0], dtype=f32), r"scale_NG: shape \(2,\), expected 2 dimensions"),
    (lambda: gemm_w8(x, c8, s, gelu_from=32), "gelu_from=32: expected 0 to 31"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
