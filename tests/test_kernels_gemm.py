"""The GEMM with its epilogues, in each of its forms, against formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, cases, check
from torch import Tensor

from sgl_diffusion.kernels import gemm as module
from sgl_diffusion.kernels.activation import activation
from sgl_diffusion.kernels.gemm import gemm
from sgl_diffusion.kernels.launch import Impl, forced_tile, rehearsing
from sgl_diffusion.kernels.op import Case, rel_l2

pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")

TILES = {
    "blas": {"form": "blas"},
    "pointer": {"form": "pointer", "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 2},
    "tma": {"form": "tma", "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2},
}
COMPILED = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
if DEVICE == "cuda":
    TILES = {name: tile if name == "blas" else {**tile, **COMPILED} for name, tile in TILES.items()}


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gemm_formula(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, gelu_from: int | None = None,
    tail: Tensor | None = None, gate: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None,
    swiglu_from: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    y = torch.einsum("...k,nk->...n", x_MK, weight_NK)
    if bias_N is not None:
        y = y + bias_N
    if gelu_from is not None:
        y = torch.cat([y[..., :gelu_from], gelu(y[..., gelu_from:])], dim=-1)
    if swiglu_from is not None:
        gates, values = y[..., swiglu_from:].chunk(2, dim=-1)
        y = torch.cat([y[..., :swiglu_from], gates / (1 + torch.exp(-gates)) * values], dim=-1)
    if gate is not None:
        rows = y.shape[:-1].numel()
        y = y * gate.repeat_interleave(rows // gate.shape[0], dim=0).view(y.shape)
    if residual is not None:
        y = y + residual
    first = gelu_from if swiglu_from is None else swiglu_from
    return y if tail is None else (y[..., :first], y[..., first:])


FORMULAS = {"gemm": gemm_formula}


@pytest.mark.parametrize("case", [*cases([module.OP])], ids=str)
@pytest.mark.parametrize("form", ["reference", *TILES])
def test_matches_the_formula(case: Case, form: str) -> None:
    with forced_tile("gemm", TILES.get(form, {})):
        check(case, "torch" if form == "reference" else "triton", gemm_formula)


@pytest.mark.parametrize("form", ["reference", *TILES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_epilogue_may_leave_out(form: str, dtype: torch.dtype) -> None:
    """No bias, no gate, one gate for all rows, a gate for every row, a wider gate; `out` is the residual."""
    x, weight = torch.randn(2, 9, 24, device=DEVICE).to(dtype), torch.randn(32, 24, device=DEVICE).to(dtype)
    residual = torch.randn(2, 9, 32, device=DEVICE).to(dtype)
    impl: Impl = "torch" if form == "reference" else "triton"
    limit = 2e-6 if dtype == torch.float32 else 3e-3
    with forced_tile("gemm", TILES.get(form, {})):
        assert rel_l2(gemm(x, weight, impl=impl), gemm_formula(x.double(), weight.double())) < limit
        gates = [None, *(torch.randn(groups, 32, device=DEVICE) for groups in (1, 2, 18))]
        for gate in gates:
            stream = residual.clone()
            got = gemm(x, weight, gate=gate, residual=stream, out=stream, impl=impl)
            assert got is stream
            exact = [t if t is None else t.double() for t in (gate, residual)]
            want = gemm_formula(x.double(), weight.double(), gate=exact[0], residual=exact[1])
            assert rel_l2(got, want) < limit


@pytest.mark.parametrize("form", ["reference", *TILES])
@pytest.mark.parametrize("width", [16, 24, 72])
@pytest.mark.parametrize("head", [0, 8, 32, 40])
def test_a_swiglu_of_any_width_behind_any_head(form: str, head: int, width: int) -> None:
    """Tiles of the head and of the products may both be ragged; no bias; new results."""
    x, weight = torch.randn(2, 19, 16, device=DEVICE), torch.randn(head + 2 * width, 16, device=DEVICE)
    tail = torch.full((2, 19, width), torch.nan, device=DEVICE) if head else None
    impl: Impl = "torch" if form == "reference" else "triton"
    with forced_tile("gemm", TILES.get(form, {})):
        got = gemm(x, weight, swiglu_from=head, tail=tail, impl=impl)  # type: ignore[call-overload]
    want = gemm_formula(x.double(), weight.double(), tail=tail, swiglu_from=head)
    if tail is None:
        assert got.shape == (2, 19, width) and rel_l2(got, want) < 2e-6  # type: ignore[arg-type]
    else:
        assert got[1] is tail and got[0].shape == (2, 19, head)
        assert all(rel_l2(*pair) < 2e-6 for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["pointer", "tma"])
def test_a_swiglu_in_the_epilogue_is_rounded_once(form: str, dtype: torch.dtype) -> None:
    """As far from the truth as the truth rounded; a second rounding, of gates or of values, adds a quarter at least."""
    x, weight, bias = (torch.randn(*s, device=DEVICE).to(dtype) for s in ((40, 32), (96, 32), (96,)))
    with forced_tile("gemm", TILES[form]):
        got = gemm(x, weight, bias, swiglu_from=0, impl="triton")
    want = gemm_formula(x.double(), weight.double(), bias.double(), swiglu_from=0)
    assert isinstance(want, Tensor) and rel_l2(got, want) < 1.01 * rel_l2(want.to(dtype), want)


def test_on_a_cpu_a_swiglu_has_the_bits_of_a_pass_after_the_product() -> None:
    x, weight, bias = (torch.randn(*s).bfloat16() for s in ((20, 16), (48, 16), (48,)))
    y, tail = gemm(x, weight, bias), x.new_empty(20, 12)
    assert torch.equal(gemm(x, weight, bias, swiglu_from=0), activation(y, "swiglu"))
    head, _ = gemm(x, weight, bias, swiglu_from=24, tail=tail)
    assert torch.equal(head, y[:, :24]) and torch.equal(tail, activation(y[:, 24:], "swiglu"))


@pytest.mark.parametrize("form", ["reference", *TILES])
@pytest.mark.parametrize("swiglu", [False, True])
def test_only_the_slice_asked_for_is_written(swiglu: bool, form: str) -> None:
    x, weight = torch.randn(1, 20, 16, device=DEVICE), torch.randn(80, 16, device=DEVICE)
    buffer = torch.full((1, 20, 80), 7.0, device=DEVICE)
    places: dict[str, Any] = {"out": buffer[..., 8:24], "tail": buffer[..., 32:64]}
    impl: Impl = "torch" if form == "reference" else "triton"
    with forced_tile("gemm", TILES.get(form, {})):
        if swiglu:
            head, tail = gemm(x, weight, swiglu_from=16, **places, impl=impl)
        else:
            head, tail = gemm(x, weight[:48], gelu_from=16, **places, impl=impl)
    assert head.data_ptr() == buffer[..., 8:].data_ptr() and tail.data_ptr() == buffer[..., 32:].data_ptr()
    untouched = torch.ones(80, dtype=torch.bool, device=DEVICE)
    untouched[8:24] = untouched[32:64] = False
    assert (buffer[..., untouched] == 7).all() and (buffer[..., ~untouched] != 7).all()


def test_a_wider_weight_gives_its_rows() -> None:
    """A projection of q, k and v may be run for k and v alone."""
    x, weight, bias = (torch.randn(*s, device=DEVICE) for s in ((20, 16), (48, 16), (48,)))
    for form, tile in TILES.items():
        with forced_tile("gemm", tile):
            got = gemm(x, weight[16:], bias[16:], impl="triton")
        assert rel_l2(got, gemm_formula(x.double(), weight.double(), bias.double())[:, 16:]) < 2e-6, form


def test_what_descriptors_cannot_address_goes_to_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(module, "launch_tma", fail)
    with forced_tile("gemm", TILES["tma"]):
        for x, weight in (
            (torch.ones(5, 17)[:, 1:], torch.ones(8, 16)),  # address
            (torch.ones(5, 18)[:, :16], torch.ones(8, 16)),  # row stride
            (torch.ones(5, 15), torch.ones(8, 15)),
        ):
            got = gemm(x.to(DEVICE), weight.to(DEVICE), impl="triton")
            assert (got == x.shape[1]).all()
        # of products there are half as many columns
        got = gemm(torch.zeros(5, 16, device=DEVICE), torch.ones(12, 16, device=DEVICE), swiglu_from=0, impl="triton")
        assert got.shape == (5, 6) and (got == 0).all()
        with pytest.raises(AssertionError, match="launched"):
            gemm(torch.ones(5, 16, device=DEVICE), torch.ones(8, 16, device=DEVICE), impl="triton")


def test_meta_tensors_have_the_shapes_of_results() -> None:
    x, weight = torch.empty(2, 3, 16, device="meta"), torch.empty(48, 16, device="meta")
    with forced_tile("gemm", TILES["blas"]):
        assert gemm(x, weight).shape == (2, 3, 48)
        tail = torch.empty(2, 3, 16, device="meta")
        assert gemm(x, weight, gelu_from=32, tail=tail)[0].shape == (2, 3, 32)
        with rehearsing("cpu"):
            assert gemm(x, weight, swiglu_from=16, tail=tail)[0].shape == (2, 3, 16)
            assert gemm(x, weight, swiglu_from=0).shape == (2, 3, 24)
        gate, residual = torch.empty(2, 48, device="meta"), torch.empty(2, 3, 48, device="meta")
        assert gemm(x, weight, gate=gate, residual=residual).shape == (2, 3, 48)


x3, w, b, r3, g = (torch.zeros(*s) for s in ((2, 3, 16), (32, 16), (32,), (2, 3, 32), (2, 32)))

MISTAKES: list[tuple[Callable[[], object], str]] = [
    (lambda: gemm(x3, w[0]), r"weight_NK: shape \(16,\), expected 2 dimensions"),
    (lambda: gemm(x3, w[:, :8]), r"x_MK: shape \(2, 3, 16\), expected \(2, 3, 8\)"),
    (lambda: gemm(x3, w.half()), "weight_NK: dtype float16, expected float32"),
    (lambda: gemm(x3, w.mT.contiguous().mT), "weight_NK: strides .* expected contiguous"),
    (lambda: gemm(x3.int(), w), "x_MK: dtype int32, expected float32, bfloat16, float16"),
    (lambda: gemm(x3, w.to("meta")), "weight_NK: on meta, the other tensors are on cpu"),
    (lambda: gemm(torch.zeros(2, 5, 16)[:, :3], w), "x_MK: strides .* expected rows evenly apart"),
    (lambda: gemm(x3.mT.contiguous().mT, w), "x_MK: last dimension has stride 3"),
    (lambda: gemm(x3, w, b[:5]), r"bias_N: shape \(5,\), expected \(32,\)"),
    (lambda: gemm(x3, w, b, gelu_from=32), "gelu_from=32: expected 0 to 31"),
    (lambda: gemm(x3, w, b, gelu_from=0, tail=r3), "gelu_from=0: expected 1 to 31"),
    (lambda: gemm(x3, w, b, gelu_from=8, tail=r3), r"tail: shape \(2, 3, 32\), expected \(2, 3, 24\)"),
    (lambda: gemm(x3, w, b, gelu_from=8, tail=r3[..., 8:].half()), "tail: dtype float16, expected float32"),
    (lambda: gemm(x3, w, b, gelu_from=8, out=r3[..., :8]), r"out: shape \(2, 3, 8\), expected \(2, 3, 32\)"),
    (lambda: gemm(x3, w, b, gelu_from=0, residual=r3), "residual: expected none beside gelu_from"),
    (lambda: gemm(x3, w, b, swiglu_from=0, gelu_from=0), "swiglu_from=0: expected none beside gelu_from=0"),
    (lambda: gemm(x3, w, b, swiglu_from=32), "swiglu_from=32: expected 0 to 31"),
    (lambda: gemm(x3, w, b, swiglu_from=-2), "swiglu_from=-2: expected 0 to 31"),
    (lambda: gemm(x3, w, b, swiglu_from=0, tail=r3), "swiglu_from=0: expected 1 to 31, the first column of tail"),
    (lambda: gemm(x3, w, b, swiglu_from=8), "swiglu_from=8: expected 0, or a tail, where the products go"),
    (
        lambda: gemm(x3, w, b, swiglu_from=7, tail=r3[..., :12]),
        "swiglu_from=7: 25 columns from there on, expected as many gates as values",
    ),
    (lambda: gemm(x3, w, b, swiglu_from=8, tail=r3[..., 8:]), r"tail: shape \(2, 3, 24\), expected \(2, 3, 12\)"),
    (lambda: gemm(x3, w, b, swiglu_from=0, out=r3), r"out: shape \(2, 3, 32\), expected \(2, 3, 16\)"),
    (lambda: gemm(x3, w, b, swiglu_from=0, residual=r3), "residual: expected none beside swiglu_from"),
    (lambda: gemm(x3, w, b, gate=g), "gate: expected a residual beside it"),
    (lambda: gemm(x3, w, b, gate=g[:, :8], residual=r3), r"gate: shape \(2, 8\), expected \(G, 32\)"),
    (lambda: gemm(x3, w, b, gate=torch.zeros(4, 32), residual=r3), "gate: .* G divides the 6 rows of x_MK"),
    (lambda: gemm(x3, w, b, residual=r3[:, :1]), r"residual: shape \(2, 1, 32\), expected \(2, 3, 32\)"),
    (lambda: gemm(x3, w, b, out=r3.mT.contiguous().mT), "out: last dimension has stride 3"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_named(mistake: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
