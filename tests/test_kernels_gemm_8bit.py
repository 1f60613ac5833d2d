"""Products of 8-bit codes with their epilogues, in each form, against formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, cases, check
from test_kernels_gemm import gemm_formula
from test_kernels_norm import quantize_formula
from torch import Tensor

from sgl_diffusion.kernels import gemm_8bit, gemm_fp8, gemm_int8, launch
from sgl_diffusion.kernels.launch import Impl, forced_tile
from sgl_diffusion.kernels.op import Case, rel_l2
from sgl_diffusion.kernels.quantize import Format, quantize_rows

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")

FP8 = torch.float8_e4m3fn
TILES = {
    "pointer": {"form": "pointer", "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2},
    "tma": {"form": "tma", "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2},
}
if DEVICE == "cuda":
    COMPILED = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
    TILES = {name: {**tile, **COMPILED} for name, tile in TILES.items()}
FORMS = ("reference", *TILES)


def impl_of(form: str) -> Impl:
    return "torch" if form == "reference" else "triton"


def forced(op: str, form: str, **other: int) -> Any:
    return forced_tile(op, TILES.get(form, {"form": "blas"}) | other)


def gemm_8bit_formula(
    x_MK: Tensor, x_scale: Tensor | None, weight_NK: Tensor, weight_scale: Tensor,
    code_scale: Tensor | None = None, **epilogue: Any,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """Every code is made the number it stands for."""
    if code_scale is not None:
        numbers = gemm_8bit_formula(x_MK, x_scale, weight_NK, weight_scale, **epilogue)
        *head, coded = numbers if isinstance(numbers, tuple) else (numbers,)
        kind = "int8" if weight_NK.dtype == torch.int8 else "fp8" if code_scale.ndim == 1 else "fp8_block"
        codes, scales = quantize_formula(coded, kind, None if kind == "fp8_block" else code_scale[0])
        return (*head, codes, scales if kind == "fp8_block" else code_scale)
    x, weight = x_MK.double(), weight_NK.double()
    N, K = weight.shape
    if weight_scale.ndim == 1:
        weight = weight * weight_scale[:, None]
        if x_scale is not None:
            x = x * (x_scale if x_scale.shape == (1,) else x_scale[..., None])
    else:
        rows, columns = torch.arange(N, device=x.device) // 128, torch.arange(K, device=x.device) // 128
        weight = weight * weight_scale[rows][:, columns]
        if x_scale is not None:
            x = x * x_scale[..., columns]
    return gemm_formula(x, weight, **epilogue)


FORMULAS = {"gemm_fp8": gemm_8bit_formula, "gemm_int8": gemm_8bit_formula}


@pytest.mark.parametrize("case", [*cases([gemm_fp8.OP, gemm_int8.OP])], ids=lambda c: f"{c.op.name}-{c}")
@pytest.mark.parametrize("form", FORMS)
def test_matches_the_formula(case: Case, form: str) -> None:
    wide = {"BLOCK_N": 128 if case.size.get("swiglu_from") is None else 256}  # a tile's results are a block of codes
    with forced(case.op.name, form, **(wide if case.size.get("coded") == "fp8_block" else {})):
        check(case, impl_of(form), gemm_8bit_formula)


def operands(format: str, rows: tuple[int, ...], K: int, N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales as their producers make them."""
    kind: Format = "fp8" if format == "fp8" else "int8"
    x, x_scale = quantize_rows(torch.randn(*rows, K, device=DEVICE), kind)
    weight, weight_scale = quantize_rows(torch.randn(N, K, device=DEVICE), kind)
    return x, x_scale, weight, weight_scale


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_what_an_epilogue_may_leave_out(format: str, form: str) -> None:
    """No bias, no gate, one gate for all rows, a gate for every row; `out` is the residual, or a new tensor."""
    gemm = gemm_fp8.gemm_fp8 if format == "fp8" else gemm_int8.gemm_int8
    codes = operands(format, (2, 9), 32, 32)
    residual = torch.randn(2, 9, 32, device=DEVICE)
    with forced(f"gemm_{format}", form):
        for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)):
            got = gemm(*codes, dtype=dtype, impl=impl_of(form))
            assert got.dtype == dtype and rel_l2(got, gemm_8bit_formula(*codes)) < limit  # type: ignore[arg-type]
        for gate in (None, *(torch.randn(groups, 32, device=DEVICE) for groups in (1, 2, 18))):
            stream = residual.clone()
            assert gemm(*codes, gate=gate, residual=stream, out=stream, impl=impl_of(form)) is stream
            want = gemm_8bit_formula(*codes, gate=gate, residual=residual)
            assert isinstance(want, Tensor) and rel_l2(stream, want) < 2e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize("head", [0, 16, 48])
def test_a_swiglu_behind_any_head(head: int, format: str, form: str) -> None:
    """No bias; new results, and codes of a known scale."""
    gemm = gemm_fp8.gemm_fp8 if format == "fp8" else gemm_int8.gemm_int8
    codes, width = operands(format, (2, 9), 32, head + 160), 80
    tail = torch.full((2, 9, width), torch.nan, device=DEVICE) if head else None
    want = gemm_8bit_formula(*codes, tail=tail, swiglu_from=head)
    with forced(f"gemm_{format}", form):
        got = gemm(*codes, swiglu_from=head, tail=tail, dtype=torch.float32, impl=impl_of(form))
        scale = torch.full((1,), 0.5, device=DEVICE)
        place = torch.empty(2, 9, width, dtype=codes[0].dtype, device=DEVICE)
        where = {"tail": place} if head else {"out": place}
        gemm(*codes, swiglu_from=head, **where, code_scale=scale, dtype=torch.float32, impl=impl_of(form))
    got, want = (got, want) if head else ((got,), (want,))  # type: ignore[assignment]
    assert all(rel_l2(*pair) < 2e-6 for pair in zip(got, want, strict=True))
    exact, _ = quantize_formula(want[-1], "int8" if format == "int8" else "fp8", scale[0])
    assert rel_l2(place, exact) < (2e-3 if format == "int8" else 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["pointer", "tma"])
@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_a_swiglu_in_the_epilogue_is_rounded_once(format: str, form: str, dtype: torch.dtype) -> None:
    """As far from the truth as the truth rounded; a second rounding, of gates or of values, adds a quarter at least."""
    gemm = gemm_fp8.gemm_fp8 if format == "fp8" else gemm_int8.gemm_int8
    codes = operands(format, (2, 20), 32, 96)
    with forced(f"gemm_{format}", form):
        got = gemm(*codes, swiglu_from=0, dtype=dtype, impl="triton")
    want = gemm_8bit_formula(*codes, swiglu_from=0)
    assert isinstance(want, Tensor) and got.dtype == dtype
    assert rel_l2(got, want) < 1.01 * rel_l2(want.to(dtype), want)


@pytest.mark.parametrize(("head", "width"), [(0, 64), (64, 128), (128, 192)])
@pytest.mark.parametrize("form", ["pointer", "tma"])
def test_halves_of_a_swiglu_that_share_a_block_of_scales_take_a_pass(
    monkeypatch: pytest.MonkeyPatch, form: str, head: int, width: int
) -> None:
    """Blocks of scales begin at the weight's first row: gates and values are whole blocks, or are not multiplied so."""
    fused: list[bool] = []
    launch_of_form = getattr(gemm_8bit, f"_launch_{form}")

    def noted(*args: Any, **constants: Any) -> None:
        fused.append(constants["SWIGLU"])
        launch_of_form(*args, **constants)

    monkeypatch.setattr(gemm_8bit, f"_launch_{form}", noted)
    N = head + 2 * width
    x, x_scale = quantize_rows(torch.randn(2, 9, 160, device=DEVICE), "fp8_block")
    weight = (torch.randn(N, 160, device=DEVICE) * 8).to(FP8)
    weight_scale = torch.rand(-(-N // 128), 2, device=DEVICE) / 100
    tail = torch.full((2, 9, width), torch.nan, device=DEVICE) if head else None
    how = {"swiglu_from": head, "tail": tail}
    with forced("gemm_fp8", form):
        got = gemm_fp8.gemm_fp8(x, x_scale, weight, weight_scale, **how, dtype=torch.float32, impl="triton")
    want = gemm_8bit_formula(x, x_scale, weight, weight_scale, **how)
    got, want = (got, want) if head else ((got,), (want,))
    assert fused == [False] and all(rel_l2(*pair) < 2e-6 for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("coded", ["fp8", "fp8_block"])
def test_without_a_tile_for_it_a_swiglu_is_a_pass(coded: str) -> None:
    """Codes come of numbers in the dtype that is asked for."""
    codes = operands("fp8", (2, 9), 32, 48 + 320)
    head, tail = torch.empty(2, 9, 48, device=DEVICE), torch.empty(2, 9, 160, dtype=FP8, device=DEVICE)
    scale = torch.empty(2, 9, 2, device=DEVICE) if coded == "fp8_block" else torch.full((1,), 0.5, device=DEVICE)
    with forced("gemm_fp8", "blas"):
        got = gemm_fp8.gemm_fp8(*codes, swiglu_from=48, out=head, tail=tail, code_scale=scale, impl="triton")
    want = gemm_8bit_formula(*codes, swiglu_from=48, tail=tail, code_scale=scale)
    assert got[0] is head and got[1] is tail
    assert rel_l2(head, want[0]) < 2e-6 and rel_l2(tail, want[1]) < 1e-2 and rel_l2(scale, want[2]) < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_only_the_slice_asked_for_is_written(format: str, form: str) -> None:
    gemm = gemm_fp8.gemm_fp8 if format == "fp8" else gemm_int8.gemm_int8
    buffer = torch.full((1, 20, 80), 7.0, device=DEVICE)
    places = {"out": buffer[..., 8:24], "tail": buffer[..., 32:64]}
    with forced(f"gemm_{format}", form):
        head, tail = gemm(*operands(format, (1, 20), 32, 48), gelu_from=16, **places, impl=impl_of(form))
    assert head is places["out"] and tail is places["tail"]
    untouched = torch.ones(80, dtype=torch.bool, device=DEVICE)
    untouched[8:24] = untouched[32:64] = False
    assert (buffer[..., untouched] == 7).all() and (buffer[..., ~untouched] != 7).all()


@pytest.mark.parametrize("form", [*FORMS, "without VNNI"])
def test_sums_of_int8_are_exact(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also small sums of terms that are beyond what fp32 holds on the way, where a CPU's own product would saturate."""
    if form == "without VNNI":
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    half, generator = 2000, torch.Generator().manual_seed(0)
    weight = torch.randint(64, 128, (64, 2 * half), generator=generator).to(torch.int8)
    weight[:, half:] *= -1
    weight[0] = -128
    x = torch.full((32, 2 * half), 127, dtype=torch.int8)
    x[0] = -128
    x, weight, one = x.to(DEVICE), weight.to(DEVICE), torch.ones(64, device=DEVICE)
    tile = TILES.get(form, {"form": "blas"}) | {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128}
    with forced_tile("gemm_int8", tile if DEVICE == "cpu" else TILES.get(form, tile)):
        impl = "triton" if form in TILES else "torch"
        got = gemm_int8.gemm_int8(x, one[:1], weight, one, dtype=torch.float32, impl=impl)
    want = x.double() @ weight.double().mT  # whole numbers below 2^53
    assert torch.equal(got, want.float())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", ["fp8", "fp8_block", "int8"])
def test_codes_of_producers_multiply_to_the_product(format: Format, form: str) -> None:
    """Three significant bits leave 4 % of error, seven 1 %."""
    x, weight = torch.randn(2, 9, 160, device=DEVICE), torch.randn(48, 160, device=DEVICE)
    codes, scale = quantize_rows(x, format)
    if format == "fp8_block":  # of 128 rows and 128 columns
        weight_codes, weight_scale = (weight * 100).to(FP8), torch.full((1, 2), 0.01, device=DEVICE)
    else:
        weight_codes, weight_scale = quantize_rows(weight, format)
    op, gemm = ("int8", gemm_int8.gemm_int8) if format == "int8" else ("fp8", gemm_fp8.gemm_fp8)
    with forced(f"gemm_{op}", form):
        got = gemm(codes, scale, weight_codes, weight_scale, dtype=torch.float32, impl=impl_of(form))
    error = rel_l2(got, x.double() @ weight.double().mT)
    assert error < (0.015 if format == "int8" else 0.045)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_every_fp8_weight_is_decoded(impl: Impl, dtype: torch.dtype) -> None:
    """All finite codes, subnormal ones too, by integer arithmetic: what a GPU without fp8 runs."""
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(FP8)
    weight = torch.where(codes.float().isnan(), torch.zeros_like(codes.float()), codes.float()).to(FP8)[:, None]
    weight = torch.cat([weight, torch.zeros(256, 31, device=DEVICE).to(FP8)], dim=1)
    x = torch.zeros(1, 32, dtype=dtype, device=DEVICE)
    x[0, 0] = 1
    one = torch.ones(256, device=DEVICE)
    with forced_tile("gemm_fp8", TILES["pointer"] | ({} if DEVICE == "cuda" else {"BLOCK_N": 128})):
        got = gemm_fp8.gemm_fp8(x, None, weight, one, dtype=torch.float32, impl=impl)
    assert torch.equal(got[0], weight[:, 0].float())


def test_sums_stay_on_tensor_cores_that_keep_all_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = operands("fp8", (2, 9), 96, 32)
    promoted: list[bool] = []
    launch_pointer = gemm_8bit._launch_pointer

    def noted(*args: Any, **constants: Any) -> None:
        promoted.append(constants["PROMOTE"])
        launch_pointer(*args, **constants)

    monkeypatch.setattr(gemm_8bit, "_launch_pointer", noted)
    for arch in ("sm_89", "sm_90", "sm_100"):
        monkeypatch.setattr(launch, "architecture", lambda arch=arch: arch)
        with forced("gemm_fp8", "pointer"):
            got = gemm_fp8.gemm_fp8(*codes, dtype=torch.float32, impl="triton")
        want = gemm_8bit_formula(*codes)
        assert isinstance(want, Tensor) and rel_l2(got, want) < 2e-6
    assert promoted == [True, True, False]


def test_fp8_codes_are_refused_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers multiply with fp8 weights everywhere."""
    monkeypatch.setattr(launch, "architecture", lambda: "sm_80")
    x, x_scale, weight, weight_scale = operands("fp8", (4,), 32, 16)
    with forced("gemm_fp8", "pointer"):
        with pytest.raises(launch.Unsupported, match="format='fp8': needs a GPU of sm_89 or later"):
            gemm_fp8.gemm_fp8(x, x_scale, weight, weight_scale, impl="triton")
        got = gemm_fp8.gemm_fp8(x.bfloat16(), None, weight, weight_scale, impl="triton")
    want = gemm_8bit_formula(x, None, weight, weight_scale)
    assert isinstance(want, Tensor) and rel_l2(got, want) < 3e-3


def test_what_descriptors_cannot_address_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **constants: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(gemm_8bit, "_launch_tma", fail)
    one = torch.ones(1, device=DEVICE)
    with forced("gemm_int8", "tma"):
        for x, N in (
            (torch.ones(5, 33)[:, 1:], 16),  # address
            (torch.ones(5, 36)[:, :32], 16),  # row stride
            (torch.ones(5, 24), 16),  # columns
            (torch.ones(5, 32), 8),
        ):
            codes, weight = x.to(torch.int8).to(DEVICE), torch.ones(N, x.shape[1], dtype=torch.int8, device=DEVICE)
            wide = torch.empty(5, x.stride(0), dtype=torch.int8, device=DEVICE)
            strided = wide.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(codes)
            got = gemm_int8.gemm_int8(strided, one, weight, one.expand(N).contiguous(), impl="triton")
            assert (got == x.shape[1]).all()
        with pytest.raises(AssertionError, match="launched"):
            gemm_int8.gemm_int8(*operands("int8", (5,), 32, 16), impl="triton")


def test_meta_tensors_have_the_shapes_of_results() -> None:
    x, weight = torch.empty(2, 3, 32, device="meta"), torch.empty(48, 32, device="meta")
    scale, weight_scale, tail = (torch.empty(*s, device="meta") for s in ((2, 3), (48,), (2, 3, 16)))
    for op, gemm, dtype in (("gemm_fp8", gemm_fp8.gemm_fp8, FP8), ("gemm_int8", gemm_int8.gemm_int8, torch.int8)):
        with forced(op, "reference"):
            codes: Any = (x.to(dtype), scale, weight.to(dtype), weight_scale)
            assert gemm(*codes).shape == (2, 3, 48)
            assert gemm(*codes, gelu_from=32, tail=tail.bfloat16())[0].shape == (2, 3, 32)
            with launch.rehearsing("cpu"):
                assert gemm(*codes, swiglu_from=16, tail=tail.bfloat16())[0].shape == (2, 3, 16)


fp8: Callable[..., Any] = gemm_fp8.gemm_fp8
int8: Callable[..., Any] = gemm_int8.gemm_int8
xs, ws, s3, sn, r3 = (torch.ones(*s) for s in ((2, 3, 160), (32, 160), (2, 3), (32,), (2, 3, 32)))
r8 = r3.to(FP8)
x8, w8, xi, wi = xs.to(FP8), ws.to(FP8), xs.to(torch.int8), ws.to(torch.int8)
blocks_x, blocks_w = torch.ones(2, 3, 2), torch.ones(1, 2)

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: fp8(x8, s3, w8.float(), sn), "weight_NK: dtype float32, expected float8_e4m3fn"),
    (lambda: fp8(xs, s3, w8, sn), "x_MK: dtype float32, expected float8_e4m3fn"),
    (lambda: fp8(x8, None, w8, sn), "x_MK: dtype float8_e4m3fn, expected float32, bfloat16, float16"),
    (lambda: int8(x8, s3, wi, sn), "x_MK: dtype float8_e4m3fn, expected int8"),
    (lambda: fp8(x8[..., :8], s3, w8, sn), r"x_MK: shape \(2, 3, 8\), expected \(2, 3, 160\)"),
    (lambda: fp8(x8, s3, w8[0], sn), r"weight_NK: shape \(160,\), expected 2 dimensions"),
    (lambda: fp8(x8, s3, w8[:, ::2], sn), "weight_NK: strides .* expected contiguous"),
    (lambda: int8(xi, s3, wi.to("meta"), sn), "weight_NK: on meta, the other tensors are on cpu"),
    (lambda: fp8(x8, s3.half(), w8, sn), "x_scale: dtype float16, expected float32"),
    (lambda: fp8(x8, s3[:1], w8, sn), r"x_scale: shape \(1, 3\), expected \(2, 3\)"),
    (lambda: fp8(x8, s3, w8, sn[:5]), r"weight_scale: shape \(5,\), expected \(32,\)"),
    (lambda: fp8(x8, blocks_x, w8, sn), r"x_scale: shape \(2, 3, 2\), expected \(2, 3\)"),
    (lambda: fp8(x8, s3, w8, blocks_w), r"x_scale: shape \(2, 3\), expected \(2, 3, 2\)"),
    (lambda: fp8(x8, blocks_x, w8, torch.ones(2, 2)), r"weight_scale: shape \(2, 2\), expected \(1, 2\)"),
    (lambda: int8(xi, blocks_x, wi, blocks_w), r"weight_scale: shape \(1, 2\), expected 1 dimensions"),
    (lambda: fp8(x8, s3, w8, sn, residual=r3), "residual: dtype float32, expected bfloat16"),
    (lambda: fp8(x8, s3, w8, sn, sn.half(), out=r3), "bias_N: dtype float16, expected float32"),
    (lambda: fp8(x8, s3, w8, sn, dtype=torch.float64), "dtype=torch.float64: expected float32, bfloat16, float16"),
    (lambda: int8(xi, s3, wi, sn, gelu_from=32), "gelu_from=32: expected 0 to 31"),
    (lambda: int8(xi, s3, wi, sn, gelu_from=0, swiglu_from=0), "swiglu_from=0: expected none beside gelu_from=0"),
    (lambda: fp8(x8, s3, w8, sn, swiglu_from=8), "swiglu_from=8: expected 0, or a tail, where the products go"),
    (
        lambda: fp8(x8, s3, w8, sn, swiglu_from=7, tail=r8[..., :12], code_scale=sn[:1]),
        "swiglu_from=7: 25 columns from there on, expected as many gates as values",
    ),
    (
        lambda: fp8(x8, s3, w8, sn, swiglu_from=0, out=r8, code_scale=sn[:1]),
        r"out: shape \(2, 3, 32\), expected \(2, 3, 16\)",
    ),
    (
        lambda: fp8(x8, s3, w8, sn, swiglu_from=0, out=r8[..., :16], code_scale=blocks_x),
        r"scale: shape \(2, 3, 2\), expected \(2, 3, 1\)",
    ),
    (
        lambda: fp8(x8, s3, w8, sn, swiglu_from=8, tail=r8[..., 8:], code_scale=sn[:1]),
        r"tail: shape \(2, 3, 24\), expected \(2, 3, 12\)",
    ),
    (lambda: fp8(x8, s3, w8, sn, code_scale=sn[:1]), "out: expected a place for codes beside code_scale"),
    (lambda: fp8(x8, s3, w8, sn, out=r3, code_scale=sn[:1]), "out: dtype float32, expected float8_e4m3fn"),
    (lambda: fp8(x8, s3, w8, sn, residual=r3, out=r8, code_scale=sn[:1]), "residual: expected none beside code_scale"),
    (lambda: fp8(x8, s3, w8, sn, out=r8[..., :8], code_scale=sn[:1]), r"out: shape \(2, 3, 8\), expected \(2, 3, 32\)"),
    (lambda: fp8(x8, s3, w8, sn, out=r8, code_scale=sn), r"scale: shape \(32,\), expected \(1,\)"),
    (lambda: fp8(x8, s3, w8, sn, out=r8, code_scale=blocks_x), r"scale: shape \(2, 3, 2\), expected \(2, 3, 1\)"),
    (lambda: fp8(x8, s3, w8, sn, tail=r8, code_scale=sn[:1]), "gelu_from=None: expected 1 to 31, the first column of"),
    (
        lambda: fp8(x8, s3, w8, sn, gelu_from=16, tail=r8[..., 16:], code_scale=blocks_x[..., :1]),
        "gelu_from=16: expected a multiple of 128, where a block of codes begins",
    ),
    (lambda: int8(xi, s3, wi, sn, out=r8, code_scale=sn[:1]), "out: dtype float8_e4m3fn, expected int8"),
    (
        lambda: int8(torch.ones(1, 131072).to(torch.int8), sn[:1], torch.ones(1, 131072).to(torch.int8), sn[:1]),
        "weight_NK: 131072 columns, expected at most 131071, whose sums int32 holds",
    ),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
