"""What holds for every operation of the catalog; each kernel file has a test of its own beside this one."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from kernel_checks import DEVICE
from torch import Tensor

from sgl_diffusion.bench import kernels
from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.catalog import OPS, markdown_table
from sgl_diffusion.kernels.launch import architecture, tile_row, tile_table
from sgl_diffusion.kernels.op import rel_l2
from sgl_diffusion.kernels.rope import rope

TESTS = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("repaired_interpreter", "poisoned_memory")
each_op = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)


def test_every_op_is_compared_with_a_formula() -> None:
    checked: set[str] = set()
    for path in TESTS.glob("test_kernels_*.py"):
        checked |= set(importlib.import_module(path.stem).FORMULAS)
    assert checked == set(OPS)


@each_op
def test_same_inputs_give_the_same_bits(op: Any) -> None:
    case = next(op.cases(op.tiny[-1:]))
    first = [x.clone() for x in op.run(case.inputs(DEVICE), "triton")]
    second = op.run(case.inputs(DEVICE), "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@each_op
def test_kernel_reference_and_eager_sequence_agree(op: Any) -> None:
    """In fp32: what the benchmark times side by side is the same thing."""
    for size in op.tiny:
        inputs = [op.inputs(DEVICE, op.dtypes[0], **size) for _ in range(3)]
        try:
            ours = op.run(inputs[0], "triton")
        except launch.Unsupported:  # by this GPU
            continue
        reference = op.run(inputs[1], "torch")
        eager = op.collect(op.eager(**inputs[2]), inputs[2])
        for a, b in zip(ours, reference, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert rel_l2(a, b) <= 2 * op.tolerance[a.dtype], size
        for b, c in zip(reference, eager, strict=False):  # eager PyTorch gives no log-sum beside attention
            assert rel_l2(c, b) <= 8 * op.tolerance[b.dtype], f"the eager sequence is another at {size}"


@each_op
def test_eager_sequences_are_right_enough_to_be_timed(op: Any) -> None:
    """In half precision, which the benchmark times: a wrong answer would not be."""
    for case in op.cases(op.tiny):
        error, right = kernels.worst(case, "cpu", "eager")
        assert right, f"{case}: {error:.1e}"


@each_op
def test_traffic_and_work_are_counted(op: Any) -> None:
    """Every tensor is moved once, or a few times where it is read again; strided ones only in part."""
    inputs = op.inputs("cpu", torch.float32, **op.cpu[0])
    tensors = [*_flat([*inputs.values()]), *op.run(inputs, "torch")]
    total = sum(x.numel() * x.element_size() for x in tensors)
    assert total / 4 < op.bytes(inputs) < 4 * total
    assert op.flops is None or op.flops(inputs) > 1e8


def _flat(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [x for value in values for x in _flat(value)] if isinstance(values, tuple | list) else []


def test_the_docs_list_the_catalog() -> None:
    assert markdown_table() in (TESTS.parent / "docs" / "kernels.md").read_text()


# -- dispatch ---------------------------------------------------------------------


def test_auto_runs_the_reference_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table = torch.randn(1, 3, 2, 16), torch.randn(3, 8)
    assert torch.equal(rope(x, table, table), rope(x, table, table, impl="torch"))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    rope(x, table, table)
    with pytest.raises(ValueError, match="impl='triton': the tensors are on the CPU"):
        rope(x, table, table, impl="triton")
    with pytest.raises(ValueError, match="impl='cuda': expected auto, triton or torch"):
        rope(x, table, table, impl="cuda")  # type: ignore[arg-type]


def test_shapes_alone_stand_for_a_gpu() -> None:
    x = torch.empty(1, device="meta")
    assert launch.runs_triton("auto", x) and not launch.runs_triton("torch", x)


# -- tiles ------------------------------------------------------------------------


def test_a_gpu_without_a_table_uses_its_nearest_kin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)

    def table_of(capability: int) -> str:
        class Driver:
            def get_current_target(self) -> Any:
                return triton.backends.compiler.GPUTarget("cuda", capability, 32)

        monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
        return architecture()

    kin = {80: "sm_80", 86: "sm_89", 89: "sm_89", 90: "sm_90", 100: "sm_100", 103: "sm_100", 120: "sm_89"}
    assert {capability: table_of(capability) for capability in kin} == kin
    with pytest.raises(RuntimeError, match="sm_75: the kernels need"):
        table_of(75)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "interpreter"])
def test_tables_cover_the_catalog(arch: str) -> None:
    assert set(tile_table(arch)) == set(OPS)
    for head_dim in (16, 32, 64, 128):
        for itemsize in (2, 4):
            number, values = tile_row(arch, "attention", head_dim=head_dim, itemsize=itemsize, bulk=0)
            assert values["BLOCK_Q"] >= 16
            wider = tile_row(arch, "attention", head_dim=128, itemsize=itemsize, bulk=0)[0]
            assert number <= wider
