"""MXFP8 and NVFP4: their quantiser, and products with weights in them, against formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, cases, check
from test_kernels_gemm import gemm_formula
from torch import Tensor

from sgl_diffusion.kernels import gemm_mx as gemm_file
from sgl_diffusion.kernels import launch, microscaling
from sgl_diffusion.kernels.gemm_mx import gemm_mx, native_microscaling
from sgl_diffusion.kernels.launch import Impl
from sgl_diffusion.kernels.microscaling import MxFormat, dequantize_mx, quantize_mx, quantize_mx_reference
from sgl_diffusion.kernels.op import Case, noise, rel_l2

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")

# magnitudes in the order of their codes
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def nearest(x: Tensor, magnitudes: Tensor) -> Tensor:
    """Codes without their sign, one number at a time: ties go to the even code, what is too large to the last."""
    codes = []
    for a in x.abs().flatten().tolist():
        distances = (magnitudes - a).abs()
        near = (distances == distances.min()).nonzero().flatten().tolist()
        codes.append(min(near, key=lambda code: code % 2))
    return torch.tensor(codes, device=x.device).view(x.shape)


def quantize_formula(x: Tensor, format: str, global_scale: Tensor | None = None) -> tuple[Tensor, ...]:
    e4m3, e2m1 = E4M3.to(x.device), E2M1.to(x.device)
    blocks = x.unflatten(-1, (-1, 32 if format == "mxfp8" else 16))
    amax = blocks.abs().amax(-1)
    if format == "mxfp8":
        exponent = torch.floor(torch.log2(amax)).clamp(-119, 127) - 8  # of zeros as of the least
        scaled = blocks * 2 ** -exponent[..., None]
        return (e4m3[nearest(scaled, e4m3)] * scaled.sign()).flatten(-2), exponent + 127
    row_scale = amax.amax(-1) / (6 * 448)
    row_scale = torch.where(row_scale > 0, row_scale, 1.0)
    whole = row_scale[..., None] if global_scale is None else global_scale
    scale = e4m3[nearest(amax / (6 * whole), e4m3)]
    step = torch.where(scale > 0, scale * whole, torch.inf)
    scaled = blocks / step[..., None]
    code = (nearest(scaled, e2m1) + 8 * (scaled < 0)).flatten(-2)
    codes = code[..., ::2] + 16 * code[..., 1::2]
    return (codes, scale, row_scale) if global_scale is None else (codes, scale)


def numbers(codes: Tensor, scales: Tensor, format: str, global_scale: Tensor | None = None) -> Tensor:
    """What codes stand for, column by column, in float64."""
    block, columns = (32, []) if format == "mxfp8" else (16, [])
    for k in range(scales.shape[-1] * block):
        scale = scales[..., k // block].double()
        if format == "mxfp8":
            columns.append(codes[..., k].double() * 2 ** (scale - 127))
        else:
            code = codes[..., k // 2].long() >> (4 * (k % 2)) & 15
            columns.append(torch.cat([E2M1, -E2M1]).to(codes.device)[code] * scale)
    values = torch.stack(columns, dim=-1)
    return values if global_scale is None else values * global_scale.double()[..., None]


def gemm_mx_formula(
    x_MK: Tensor, weight_codes: Tensor, weight_scales: Tensor, bias_N: Tensor | None = None, *, format: str,
    weight_global_scale: Tensor | None = None, x_scales: Tensor | None = None, x_global_scale: Tensor | None = None,
    **epilogue: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    x = x_MK if x_scales is None else numbers(x_MK, x_scales, format, x_global_scale)
    weight_NK = numbers(weight_codes, weight_scales, format, weight_global_scale)
    return gemm_formula(x.double(), weight_NK, bias_N, **epilogue)


FORMULAS: dict[str, Callable[..., Any]] = {"quantize_mx": quantize_formula, "gemm_mx": gemm_mx_formula}


def random(*shape: int, seed: int = 0) -> Tensor:
    return noise(shape, torch.float32, DEVICE, seed)


def runs_here(scaled: bool) -> None:
    if scaled and not native_microscaling():
        pytest.skip("this GPU has no instruction for products of two microscaled operands")


@pytest.mark.parametrize("case", [*cases([microscaling.OP, gemm_file.OP])], ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_matches_the_formula(case: Case, impl: Impl) -> None:
    runs_here(impl == "triton" and case.size.get("scaled", False))
    check(case, impl, FORMULAS[case.op.name])


# -- codes ------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("format", ["mxfp8", "nvfp4"])
def test_every_code_and_every_tie(format: MxFormat, impl: Impl) -> None:
    """Codes come back as they are, midpoints of neighbours go to the even one, and larger numbers saturate."""
    magnitudes, block = (E4M3, 32) if format == "mxfp8" else (E2M1, 16)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    x = torch.cat([magnitudes, middles, torch.tensor([0.999, 1.04, 1.1], dtype=torch.float64) * magnitudes[-1]])
    x = torch.cat([x, -x])
    # the first number of a block sets its scale: 2^0, or for nvfp4, by the global one, 1
    x = torch.nn.functional.pad(x, (0, -len(x) % (block - 1))).view(-1, block - 1)
    x = torch.cat([torch.full((len(x), 1), magnitudes[-1]), x], dim=1).flatten()[None].to(DEVICE)
    global_scale = None
    if format == "nvfp4":
        x, global_scale = x.clamp(-6, 6), torch.ones(1, device=DEVICE)
    results = quantize_mx(x.float(), format, global_scale=global_scale, impl=impl)
    for got, want in zip(results, quantize_formula(x, format, global_scale), strict=True):
        assert torch.equal(got.double(), want.double())
    values = dequantize_mx(*results, format, global_scale)
    assert torch.equal(values.double().abs().unique(), magnitudes.to(DEVICE))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_the_ends_of_the_range(impl: Impl) -> None:
    """Zeros, subnormal numbers and the largest of fp32; a calibrated scale that is too small."""
    x = torch.zeros(4, 32, device=DEVICE)
    x[1, 0], x[2, 3], x[3, 7] = 2.0**-140, -3e38, 2.0**-100
    codes, scales = quantize_mx(x, "mxfp8", impl=impl)
    assert scales.flatten().tolist() == [0, 0, 127 + 127 - 8, 127 - 100 - 8]
    assert rel_l2(dequantize_mx(codes, scales, "mxfp8")[2:], x[2:]) < 0.04 and not codes[0].float().any()
    small = torch.full((1,), 1e-3, device=DEVICE)
    codes, scales = quantize_mx(torch.full((1, 16), -9.0, device=DEVICE), "nvfp4", global_scale=small, impl=impl)
    assert scales.item() == 448 and dequantize_mx(codes, scales, "nvfp4", small).unique().item() == pytest.approx(
        -2.688
    )
    codes, scales, row_scale = quantize_mx(x[:1], "nvfp4", impl=impl)
    assert row_scale.item() == 1 and not scales.float().any() and not codes.any()


@pytest.mark.parametrize("format", ["mxfp8", "nvfp4"])
def test_decoding_is_exact(format: MxFormat) -> None:
    """Every code under many scales, in bf16 and fp16 too: what a GPU multiplies is what the codes stand for."""
    codes = torch.arange(256, dtype=torch.uint8)
    if format == "mxfp8":
        scales = torch.arange(121, 134, dtype=torch.uint8)
        codes = codes[codes & 0x7F != 0x7F].view(torch.float8_e4m3fn)
        codes = torch.cat([codes, codes[:2]]).view(8, 32)
    else:
        scales = torch.arange(1, 127, 3, dtype=torch.uint8).view(torch.float8_e4m3fn)
        codes = codes.view(32, 8)
    scales, codes = (
        t.to(DEVICE) for t in (scales.repeat_interleave(len(codes))[:, None], codes.repeat(len(scales), 1))
    )
    want = numbers(codes, scales, format)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantize_mx(codes, scales, format, dtype=dtype).double(), want)
    some = slice(None, None, 7)
    codes, scales = codes[some].clone(), scales[some].clone()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        identity = torch.eye(want.shape[1], device=DEVICE).to(dtype)
        got = gemm_mx(identity, codes, scales, format=format, impl="triton")
        assert torch.equal(got.mT.double(), want[some])


def test_scales_of_bytes_nothing_makes() -> None:
    """The least exponent is a number, the last byte is NaN, as the standard has it."""
    codes = torch.ones(3, 32, device=DEVICE).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0], [1], [255]], dtype=torch.uint8, device=DEVICE)
    x = torch.full((1, 32), 2.0**25, device=DEVICE)
    for impl in ("triton", "torch"):
        first, second, last = gemm_mx(x, codes, scales, format="mxfp8", impl=impl)[0].tolist()  # type: ignore[arg-type]
        assert (first, second, last != last) == (2.0**-97, 2.0**-96, True)


# -- products ---------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True], ids=["decoded", "scaled"])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_what_an_epilogue_may_leave_out(impl: Impl, scaled: bool) -> None:
    """No bias, no gate, one gate for all rows or for every one; `out` is the residual; every kind of global scale."""
    runs_here(impl == "triton" and scaled)
    whole = torch.full((1,), 3.0 / 448, device=DEVICE)
    x = random(2, 9, 64)
    codes, scales = quantize_mx_reference(random(32, 64, seed=1), "nvfp4", global_scale=whole)
    each = torch.linspace(0.1, 2, 32, device=DEVICE)  # projections with scales of their own
    given: dict[str, Any] = {"format": "nvfp4"}
    for weight_scale, x_scale in ((None, None), (whole, whole), (each, None)):
        activations = x
        if scaled:
            activations, x_scales, *own = quantize_mx_reference(x, "nvfp4", global_scale=x_scale)
            given |= {"x_scales": x_scales, "x_global_scale": own[0] if own else x_scale}
        given["weight_global_scale"] = weight_scale
        got = gemm_mx(activations, codes, scales, **given, dtype=torch.float32, impl=impl)
        assert rel_l2(got, gemm_mx_formula(activations, codes, scales, **given)) < 2e-6
    residual = random(2, 9, 32, seed=2)
    for gate in (None, *(random(groups, 32, seed=3) for groups in (1, 2, 18))):
        stream = residual.clone()
        got = gemm_mx(activations, codes, scales, **given, gate=gate, residual=stream, out=stream, impl=impl)
        want = gemm_mx_formula(activations, codes, scales, **given, gate=gate, residual=residual)
        assert got is stream and rel_l2(got, want) < 2e-6


@pytest.mark.parametrize("scaled", [False, True], ids=["decoded", "scaled"])
def test_only_the_slice_asked_for_is_written(scaled: bool) -> None:
    runs_here(scaled)
    codes, scales = quantize_mx_reference(random(48, 32, seed=1), "mxfp8")
    x, x_scales = random(1, 20, 32), None
    if scaled:
        x, x_scales = quantize_mx_reference(x, "mxfp8")
    buffer = torch.full((1, 20, 80), 7.0, device=DEVICE)
    head, tail = gemm_mx(
        x, codes, scales, format="mxfp8", x_scales=x_scales,
        gelu_from=16, out=buffer[..., 8:24], tail=buffer[..., 32:64], impl="triton",
    )  # fmt: skip
    assert head.data_ptr() == buffer[..., 8:].data_ptr() and tail.data_ptr() == buffer[..., 32:].data_ptr()
    untouched = torch.ones(80, dtype=torch.bool, device=DEVICE)
    untouched[8:24] = untouched[32:64] = False
    assert (buffer[..., untouched] == 7).all() and (buffer[..., ~untouched] != 7).all()


def test_the_dtype_of_a_result() -> None:
    codes, scales = quantize_mx_reference(random(32, 64), "mxfp8")
    x = random(3, 64, seed=1)
    x_codes, x_scales = quantize_mx_reference(x, "mxfp8")
    of_codes = {"format": "mxfp8", "x_scales": x_scales}
    assert gemm_mx(x.half(), codes, scales, format="mxfp8").dtype == torch.float16
    assert gemm_mx(x_codes, codes, scales, **of_codes).dtype == torch.bfloat16
    assert gemm_mx(x_codes, codes, scales, **of_codes, dtype=torch.float16).dtype == torch.float16
    assert gemm_mx(x_codes, codes, scales, **of_codes, out=x.new_empty(3, 32)).dtype == torch.float32


def test_a_product_of_codes_is_refused_where_no_gpu_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = quantize_mx_reference(random(32, 64), "mxfp8")
    tile = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "GROUP_M": 2}
    message = "x_scales: products of two microscaled operands need a GPU of sm_100"
    for arch in ("sm_80", "sm_89", "sm_90"):
        monkeypatch.setattr(launch, "architecture", lambda arch=arch: arch)
        assert not native_microscaling()
        with pytest.raises(launch.Unsupported, match=message), launch.forced_tile("gemm_mx", tile):
            gemm_mx(codes, codes, scales, format="mxfp8", x_scales=scales, impl="triton")
    monkeypatch.setattr(launch, "architecture", lambda: "sm_100")
    assert native_microscaling()


x3, weight = noise((2, 3, 64), torch.float32, "cpu"), noise((8, 64), torch.float32, "cpu", 1)
mx_codes, mx_scales = quantize_mx_reference(weight, "mxfp8")
nv_codes, nv_scales, nv_rows = quantize_mx_reference(weight, "nvfp4")


def mx(x: Tensor = x3, codes: Tensor = mx_codes, scales: Tensor = mx_scales, **options: Any) -> object:
    return gemm_mx(x, codes, scales, **{"format": "mxfp8", **options})


def nv(x: Tensor = x3, codes: Tensor = nv_codes, scales: Tensor = nv_scales, **options: Any) -> object:
    return gemm_mx(x, codes, scales, **{"format": "nvfp4", **options})


def columns(count: int) -> dict[str, Tensor]:
    """Codes times codes, of fewer columns."""
    codes, scales = nv_codes[:, : count // 2].contiguous(), nv_scales[:, : count // 16].contiguous()
    return {"x": codes, "codes": codes, "scales": scales, "x_scales": scales}


MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: quantize_mx(x3, "mxfp4"), "format='mxfp4': expected mxfp8 or nvfp4"),  # type: ignore[arg-type]
    (
        lambda: quantize_mx(x3[..., :48], "mxfp8"),
        r"x: shape \(2, 3, 48\), expected a width .* multiple of 32 for mxfp8",
    ),
    (lambda: quantize_mx(x3.int(), "mxfp8"), "x: dtype int32, expected float32"),
    (lambda: quantize_mx(x3.mT.contiguous().mT, "mxfp8"), "x: last dimension has stride 3"),
    (lambda: quantize_mx(x3, "mxfp8", global_scale=torch.ones(1)), "global_scale: expected none for mxfp8"),
    (lambda: quantize_mx(x3, "nvfp4", global_scale=torch.ones(3)), r"global_scale: shape \(3,\), expected \(1,\)"),
    (lambda: mx(format="fp8"), "format='fp8': expected mxfp8 or nvfp4"),
    (lambda: mx(x3[..., :32]), r"x_MK: shape \(2, 3, 32\), expected \(2, 3, 64\)"),
    (lambda: mx(x3.mT.contiguous().mT), "x_MK: last dimension has stride 3"),
    (lambda: mx(codes=mx_codes[0]), r"weight_codes: shape \(64,\), expected 2 dimensions"),
    (lambda: mx(codes=mx_codes[:, :48]), "weight_codes: of 48 columns, expected a multiple of 32 for mxfp8"),
    (lambda: mx(codes=mx_codes.mT.contiguous().mT), "weight_codes: strides .* expected contiguous"),
    (lambda: mx(scales=mx_scales[:, :1]), r"weight_scales: shape \(8, 1\), expected \(8, 2\)"),
    (lambda: mx(codes=mx_codes.view(torch.uint8)), "weight_codes: dtype uint8, expected float8_e4m3fn"),
    (lambda: nv(scales=nv_scales.view(torch.uint8)), "weight_scales: dtype uint8, expected float8_e4m3fn"),
    (lambda: nv(codes=nv_codes.to("meta")), "weight_codes: on meta, the other tensors are on cpu"),
    (lambda: nv(weight_global_scale=nv_rows[:3]), r"weight_global_scale: shape \(3,\), expected \(1,\) or \(8,\)"),
    (lambda: nv(weight_global_scale=nv_rows.half()), "weight_global_scale: dtype float16, expected float32"),
    (lambda: mx(weight_global_scale=nv_rows), "weight_global_scale: expected none for mxfp8"),
    (lambda: nv(x_global_scale=nv_rows), "x_global_scale: expected x_scales beside it"),
    (lambda: nv(dtype=torch.float16), "dtype=torch.float16: expected torch.float32, that of x_MK"),
    (lambda: nv(x_scales=nv_scales), r"x_MK: shape \(2, 3, 64\), expected \(2, 3, 32\)"),
    (lambda: nv(nv_codes, x_scales=nv_scales[:2]), r"x_scales: shape \(2, 4\), expected \(8, 4\)"),
    (lambda: nv(nv_codes, x_scales=nv_scales, dtype=torch.int8), "dtype=torch.int8: expected torch.float32"),
    (lambda: nv(**columns(48), impl="triton"), "rows do not start at multiples of 16 bytes; use x without x_scales"),
    (lambda: nv(gelu_from=8), "gelu_from=8: expected 0 to 7"),
    (lambda: nv(out=x3.new_empty(2, 3, 8).half()), "out: dtype float16, expected float32"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
