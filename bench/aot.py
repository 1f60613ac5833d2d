"""Compiles every kernel for GPUs that are not here, and rejects code that would run badly or not at all.

    python -m sgl_diffusion.bench.aot [--arch sm_90] [--op attention] [--json report.json]

Each launcher of the catalog runs on shape-only ("meta") tensors of production sizes, while Triton believes it is on the
target and stops after compiling: what is inspected is exactly what a launch there would use. Exit code 1 on a problem.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.catalog import OPS
from sgl_diffusion.kernels.op import Case, Op

DTYPES = (
    torch.bfloat16,
    torch.float32,
)  # fp16 compiles to the same code as bf16 but for one letter
TENSOR_MEMORY_COLUMNS = 512  # of an sm_100 SM
REGISTERS = 65536  # of an SM, on every architecture here


@dataclass(frozen=True)
class Gpu:
    """What an architecture can hold (CUDA programming guide, "Technical Specifications per Compute Capability")."""

    capability: int
    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int
    tensor_core: str  # the instruction a half-precision product becomes


GPUS = {
    "sm_80": Gpu(80, 166912, 167936, 64, 32, "HMMA"),
    "sm_89": Gpu(89, 101376, 102400, 48, 24, "HMMA"),
    "sm_90": Gpu(90, 232448, 233472, 64, 32, "HGMMA"),
    "sm_100": Gpu(100, 232448, 233472, 64, 32, "UTCHMMA"),
}


@dataclass
class Row:
    """One compiled kernel. Memory in bytes; `local` is per thread and means spilled registers."""

    arch: str
    op: str
    case: str
    kernel: str
    tile: str
    registers: int
    local: int
    shared: int
    warps: int
    occupancy: float
    tensor_core: str
    problems: list[str] = field(default_factory=list)


class Absent:
    """Stands in for the driver of an absent GPU; each architecture is a device with a code cache of its own."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@dataclass
class Compiled:
    kernel: str
    code: CompiledKernel
    log: str  # of the assembler


def compile_case(case: Case, gpu: Gpu) -> tuple[list[Compiled], set[int]]:
    """Runs a launcher on `gpu`, so to speak: kernels not compiled before, and the rows of the tile table it used."""
    run, tile_row = JITFunction.run, launch.tile_row
    compiled: list[Compiled] = []
    tiles: set[int] = set()

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            code = run(self, *args, grid=grid, warmup=True, **options)
        if log.getvalue():  # a kernel from the cache has nothing to say
            compiled.append(Compiled(self.__name__, code, log.getvalue()))

    def noted_tile_row(arch: str, op: str, **size: int) -> tuple[int, dict[str, int]]:
        number, values = tile_row(arch, op, **size)
        tiles.add(number)
        return number, values

    triton.runtime.driver.set_active(Absent(gpu.capability))
    JITFunction.run, launch.tile_row = compile_instead, noted_tile_row
    try:
        with knobs.nvidia.scope(), knobs.compilation.scope():
            knobs.nvidia.dump_ptxas_log = True
            knobs.compilation.always_compile = True  # the log comes with a fresh compile only
            case.op.run(case.inputs("meta"), "triton")
    finally:
        JITFunction.run, launch.tile_row = run, tile_row
    return compiled, tiles


# -- inspection -------------------------------------------------------------------

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


def inspect(arch: str, case: Case, compiled: Compiled, allowed_local: int = 0) -> Row:
    """Resources of a kernel and what is wrong with it. `allowed_local` bytes may spill, if its tile says so."""
    gpu, code = GPUS[arch], compiled.code
    registers, local, sass = _disassemble(code.asm["cubin"])
    instructions = set(_INSTRUCTION.findall(sass))
    shared, warps = code.metadata.shared, code.metadata.num_warps
    blocks = _blocks_per_sm(gpu, registers, shared, warps)
    row = Row(
        arch, case.op.name, str(case), compiled.kernel, _tile_of(code), registers, local, shared, warps,
        occupancy=blocks * warps / gpu.warps_per_sm,
        tensor_core=" ".join(sorted(i for i in instructions if i.endswith("MMA"))),
    )  # fmt: skip
    if local > allowed_local:
        row.problems.append(f"spills: {local} bytes of local memory a thread, {allowed_local} allowed")
    if shared > gpu.shared_per_block:
        row.problems.append(f"shared memory {shared} is above {gpu.shared_per_block}")
    elif blocks < 1:
        row.problems.append("no block fits an SM")
    if (getattr(code.metadata, "tmem_size", 0) or 0) > TENSOR_MEMORY_COLUMNS:
        row.problems.append(f"tensor memory {code.metadata.tmem_size} columns is above {TENSOR_MEMORY_COLUMNS}")
    if not {"STG", "UTMASTG"} & instructions:
        row.problems.append("empty: nothing is stored")
    if "serialized" in compiled.log:
        row.problems.append("the assembler serialised wgmma")
    half_product = case.op.flops is not None and case.dtype in launch.HALF_DTYPES
    if half_product and gpu.tensor_core not in instructions:
        row.problems.append(f"no {gpu.tensor_core} instruction")
    return row


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of local memory and instructions, by the tools in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        sass = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage said nothing about registers: {usage.strip()!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, sass


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _blocks_per_sm(gpu: Gpu, registers: int, shared: int, warps: int) -> int:
    registers_per_warp = -(-registers * 32 // 256) * 256  # allocated 256 at a time
    return min(
        REGISTERS // (registers_per_warp * warps),
        gpu.shared_per_sm // (shared + 1024),  # 1 KB of every block is the system's
        gpu.warps_per_sm // warps,
        gpu.blocks_per_sm,
    )


def _tile_of(code: CompiledKernel) -> str:
    names = code.src.fn.arg_names
    constants = {names[at[0]]: value for at, value in code.src.constants.items() if len(at) == 1}
    return " ".join(f"{name}={value}" for name, value in constants.items() if name.isupper())


# -- report -----------------------------------------------------------------------


def check(arch: str, ops: list[Op]) -> Iterator[Row]:
    """Compiles the ops at every production size; an extra row names tiles that no size uses."""
    for op in ops:
        table = launch.tile_table(arch)[op.name]
        unused = set(range(len(table)))
        for case in op.cases(op.production):
            if case.dtype not in DTYPES:
                continue
            compiled, tiles = compile_case(case, GPUS[arch])
            unused -= tiles
            allowed = max((table[number].get("local_bytes", 0) for number in tiles), default=0)
            yield from (inspect(arch, case, c, allowed) for c in compiled)
        if unused:
            rows = ", ".join(map(str, sorted(unused)))
            problem = f"tuned/{arch}.json: no production size uses row {rows}"
            yield Row(arch, op.name, "", "", "", 0, 0, 0, 0, 0.0, "", [problem])


def show(row: Row) -> None:
    resources = f"{row.registers:4d} {row.local:5d} {row.shared:7d} {row.warps:5d} {row.occupancy:5.0%}"
    print(
        f"{row.arch:7}{row.kernel:24}{row.case:32}{resources} {row.tensor_core:14} {row.tile}",
        flush=True,
    )
    for problem in row.problems:
        print(f"        PROBLEM {row.op}: {problem}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sgl_diffusion.bench.aot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--arch", action="append", choices=GPUS, help="architecture; may be repeated (default: all)")
    parser.add_argument("--op", action="append", choices=OPS, help="operation; may be repeated (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the report there as well")
    args = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    print(f"triton {triton.__version__}")
    print(f"{'arch':7}{'kernel':24}{'case':32} regs local  shared warps   occ {'tensor core':14} tile")
    rows = []
    for arch in args.arch or GPUS:
        for row in check(arch, [OPS[name] for name in args.op or OPS]):
            show(row)
            rows.append(row)
    bad = [row for row in rows if row.problems]
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"triton": triton.__version__, "rows": [asdict(row) for row in rows]},
                file,
                indent=1,
            )
    print(f"{len(rows)} kernels, {len(bad)} with problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
