"""What compiled kernels consist of, by the tools in Triton's wheel."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from triton import knobs

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class MachineCode:
    """Of one kernel. `stack` is in bytes of stack and local memory a thread."""

    registers: int
    stack: int
    instructions: Counter[str]


def disassemble(cubins: Sequence[bytes], capability: int) -> list[MachineCode]:
    """Kernels of one architecture, one in each cubin. All at once: the disassembler takes longer to start than to read
    a kernel.
    """
    if not cubins:
        return []
    programs = [_program(cubin) for cubin in cubins]
    starts = list(accumulate(map(len, programs), initial=0))
    told = _told_of(b"".join(programs), knobs.nvidia.nvdisasm.path, "-b", _name(capability), "-ndf")
    instructions: list[Counter[str]] = [Counter() for _ in cubins]
    for address, name in _INSTRUCTION.findall(told):
        instructions[bisect_right(starts, int(address, 16)) - 1][name] += 1
    return [MachineCode(*_usage(cubin), found) for cubin, found in zip(cubins, instructions, strict=True)]


def _name(capability: int) -> str:
    """Of the architecture that Triton compiles for: with what later ones do not have, where there is such a thing."""
    return f"SM{capability}" + ("a" if capability >= 90 else "")


def _program(cubin: bytes) -> bytes:
    """The instructions: section `.text.<kernel>` of an ELF file (System V ABI, chapter 4: ELF-64 object files)."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, headers + size * i) for i in range(count)]
    names = sections[names_at][4]
    (program,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length, *_ in sections
        if cubin.startswith(b".text.", names + name)
    )
    return program


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers, bytes of stack and local memory."""
    usage = _told_of(cubin, knobs.nvidia.cuobjdump.path, "-res-usage")
    found = _USAGE.search(usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage said nothing about registers: {usage.strip()!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _told_of(code: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
