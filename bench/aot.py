"""`sglang bench aot`: compiles every kernel for GPUs that are not here, and rejects what would run badly or not at all.

Each launcher of the catalog runs on shape-only ("meta") tensors of production sizes, while Triton believes it is on the
target and stops after compiling: what is inspected is exactly what a launch there would use.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from sgl_diffusion.bench.absent import GPUS, Gpu, absent
from sgl_diffusion.bench.disassembly import MachineCode, disassemble
from sgl_diffusion.bench.tables import noted_rows
from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.catalog import OPS
from sgl_diffusion.kernels.op import Case, Op
from sgl_diffusion.runtime.errors import UserError

# fp16 compiles to the same code as bf16 but for one letter
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TENSOR_MEMORY_COLUMNS = 512  # of an sm_100 SM
REGISTERS = 65536  # of an SM, on every architecture here
NARROW_SCALARS = 4  # single values a program may read in words of 2 bytes: a weight, a bias


@dataclass
class Row:
    """One compiled kernel.

    Memory in bytes; `stack` and `spills` are per thread. `loads` counts load instructions by bits of a word, those of
    the bulk copy engine as "TMA". `skipped` says why a case does not run on the architecture.
    """

    arch: str
    op: str
    case: str
    kernel: str = ""
    tile: str = ""
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    warps: int = 0
    occupancy: float = 0.0
    tensor_core: str = ""
    loads: str = ""
    skipped: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass
class Compiled:
    kernel: str
    code: CompiledKernel
    log: str  # of the assembler


def compile_case(case: Case, gpu: Gpu) -> tuple[list[Compiled], dict[int, launch.Tile]]:
    """Runs a launcher on `gpu`, so to speak: kernels not compiled before, and the rows of the tile table it used.

    Raises:
        launch.Unsupported: the launcher refuses the case on this architecture.
    """
    run = JITFunction.run
    compiled: list[Compiled] = []

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            code = run(self, *args, grid=grid, warmup=True, **options)
        if log.getvalue():  # a kernel from the cache has nothing to say
            compiled.append(Compiled(self.__name__, code, log.getvalue()))

    with (
        absent(gpu),
        mock.patch.object(JITFunction, "run", compile_instead),
        noted_rows(case.op.name) as rows,
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
    ):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # the log comes with a fresh compile only
        case.op.run(case.inputs("meta"), "triton")
    return compiled, rows


# -- inspection -------------------------------------------------------------------

_PRODUCT = re.compile(r"tt\.dot .*: tensor<(?:\d+x)+(\w+)>")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def inspect(arch: str, case: Case, compiled: Compiled, machine: MachineCode, form: str, allowed_local: int) -> Row:
    """Resources of a kernel and what is wrong with it. `allowed_local` bytes may spill, if its tile says so."""
    gpu, code = GPUS[arch], compiled.code
    registers, stack, instructions = machine.registers, machine.stack, machine.instructions
    names = {name.partition(".")[0] for name in instructions}
    loads, stores = _widths(instructions, ("LDG", "LDGSTS")), _widths(instructions, ("STG",))
    shared, warps = code.metadata.shared, code.metadata.num_warps
    blocks = _blocks_per_sm(gpu, registers, shared, warps)
    row = Row(
        arch, case.op.name, str(case), compiled.kernel, _tile_of(code), registers, stack,
        max((int(a) + int(b) for a, b in _SPILLS.findall(compiled.log)), default=0), shared, warps,
        occupancy=blocks * warps / gpu.warps_per_sm,
        tensor_core=" ".join(sorted(name for name in names if name.endswith("MMA"))),
        loads=" ".join(f"{width}:{count}" for width, count in loads.items()),
    )  # fmt: skip
    problem = row.problems.append
    if max(stack, row.spills) > allowed_local:
        problem(f"spills: {stack} bytes of stack, {row.spills} bytes moved a thread, {allowed_local} allowed")
    if shared > gpu.shared_per_block:
        problem(f"shared memory {shared} is above {gpu.shared_per_block}")
    elif blocks < 1:
        problem("no block fits an SM")
    if (columns := getattr(code.metadata, "tmem_size", 0) or 0) > TENSOR_MEMORY_COLUMNS:
        problem(f"tensor memory {columns} columns is above {TENSOR_MEMORY_COLUMNS}")
    if not stores:
        problem("empty: nothing is stored")
    if "serialized" in compiled.log:
        problem("the assembler serialised wgmma")
    half = case.dtype in launch.HALF_DTYPES
    for multiplied, wanted in gpu.tensor_core.items():
        if multiplied in _products_of(code.asm["ttir"]) and not any(re.fullmatch(wanted, name) for name in names):
            problem(f"no {wanted} instruction for products of {multiplied}")
    if form in ("tma", "ws") and "TMA" not in loads:
        problem(f"form {form} without the bulk copy engine")
    if form == "ws" and "USETMAXREG" not in names:
        problem("form ws without warp specialisation")
    if half and not case.op.narrow_loads:
        if not {"TMA", "128", "64"} & set(loads) or loads.get("16", 0) > NARROW_SCALARS:
            problem(f"narrow loads: {row.loads} by bits")
        if stores.get("16", 0) > NARROW_SCALARS:
            problem(f"narrow stores: {stores['16']} of 16 bits")
    return row


def _products_of(ttir: str) -> set[str]:
    """What a kernel multiplies: types of operands, and "scaled" for blocks with scales."""
    return {*_PRODUCT.findall(ttir), *(["scaled"] if "tt.dot_scaled" in ttir else [])}


def _widths(instructions: Counter[str], kinds: tuple[str, ...]) -> dict[str, int]:
    """Instructions by bits of a word; the bulk copy engine's as "TMA"."""
    widths: Counter[str] = Counter()
    for instruction, count in instructions.items():
        name, *modifiers = instruction.split(".")
        if name in kinds:
            bits = [m.lstrip("US") for m in modifiers if m.lstrip("US") in ("128", "64", "16", "8")]
            widths[bits[-1] if bits else "32"] += count
        elif name == f"UTMA{kinds[0]}":
            widths["TMA"] += count
    return {width: widths[width] for width in ("TMA", "128", "64", "32", "16", "8") if widths[width]}


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


def check(arch: str, ops: list[Op], dtypes: Collection[torch.dtype]) -> Iterator[Row]:
    """Compiles the ops at every production size with the tiles of the table.

    With all dtypes, an extra row names tiles that no size uses.
    """
    for op in ops:
        table = launch.tile_table(arch)[op.name]
        unused = set(range(len(table)))
        made: list[tuple[Case, Compiled, str, int]] = []
        for size in op.production:
            for case in (Case(op, size, dtype) for dtype in op.dtypes if dtype in dtypes):
                try:
                    compiled, rows = compile_case(case, GPUS[arch])
                except launch.Unsupported as e:
                    yield Row(arch, op.name, str(case), skipped=str(e))
                    continue
                unused -= set(rows)
                form = next((tile["form"] for tile in rows.values() if "form" in tile), "")
                allowed = max((table[number].get("local_bytes", 0) for number in rows), default=0)
                made += [(case, c, form, allowed) for c in compiled]
        machines = disassemble([c.code.asm["cubin"] for _, c, _, _ in made], GPUS[arch].capability)
        for (case, c, form, allowed), machine in zip(made, machines, strict=True):
            yield inspect(arch, case, c, machine, form, allowed)
        if unused and len(dtypes) == len(DTYPES):
            numbers = ", ".join(map(str, sorted(unused)))
            yield Row(arch, op.name, "", problems=[f"tuned/{arch}.json: no production size uses row {numbers}"])


HEADER = f"{'arch':7}{'kernel':26}{'regs':>5}{'stack':>6}{'spills':>7}{'shared':>8}{'warps':>6}{'occ':>5}  "


def show(row: Row) -> None:
    if row.kernel:
        numbers = f"{row.registers:5d}{row.stack:6d}{row.spills:7d}{row.shared:8d}{row.warps:6d}{row.occupancy:5.0%}"
        kernel = row.kernel.strip("_").removesuffix("_kernel")
        made_of = f"{row.tensor_core:16}{row.loads:22} {row.case}  {row.tile}"
        print(f"{row.arch:7}{kernel:26}{numbers}  {made_of}", flush=True)
    if row.skipped:
        print(f"{row.arch:7}{row.op:26} {row.case}: does not run here: {row.skipped}")
    for problem in row.problems:
        print(f"        PROBLEM {row.op} {row.case}: {problem}", flush=True)


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Exit code 1 on a problem."""
    parser.add_argument("--arch", action="append", choices=GPUS, help="architecture; may be repeated (default: all)")
    parser.add_argument("--op", action="append", choices=OPS, help="operation; may be repeated (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the tensors (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the report there as well")
    args = parser.parse_args(argv)
    if knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    dtypes = [DTYPES[args.dtype]] if args.dtype else [*DTYPES.values()]
    print(f"triton {triton.__version__}")
    print(f"{HEADER}{'mma':16}{'loads by bits':22} case  tile")
    rows = []
    for arch in args.arch or GPUS:
        for row in check(arch, [OPS[name] for name in args.op or OPS], dtypes):
            show(row)
            rows.append(row)
    bad = [row for row in rows if row.problems]
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"triton": triton.__version__, "rows": [asdict(row) for row in rows]}, file, indent=1)
    print(f"{sum(bool(row.kernel) for row in rows)} kernels, {len(bad)} with problems")
    return 1 if bad else 0
