"""Tensors of safetensors files -> memory, by several threads, in bounded host memory.

A tensor of the host that has the file's dtype is read in place. All others pass through a staging buffer: one on the
host is converted out of it by the thread that read it; one on a device is uploaded as the bytes are and converted
there. Between reading and uploading, a ring of locked buffers lets both go on at the same time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.trace import Stopwatch

if TYPE_CHECKING:
    from sgl_diffusion.runtime.offload import DeviceStreams

READERS = 4  # one thread copies 5 to 10 GB/s out of the page cache: four come near the host's memory or a GPU's link
STAGING = 8 * 1024**2  # bytes of a buffer: 150 us of a GPU's link, far above the 10 us it takes to issue a copy
RING = 2 * READERS  # buffers of an upload: one is filled while another is on its way

CPU = torch.device("cpu")

# safetensors' names of the dtypes that PyTorch has
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. Nothing of it is read before it is asked for."""

    file: safe_open
    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file

    def mapped(self) -> Tensor:
        """A view of the mapped file, whose pages are read when they are touched."""
        tensor: Tensor = self.file.get_tensor(self.name)  # type: ignore[no-untyped-call]
        return tensor


def stored_tensors(path: Path) -> list[Stored]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        UserError: a corrupt file, or a dtype that PyTorch does not have.
    """
    try:
        # checks the header: its size, the dtypes, and offsets that cover the file without gap or overlap
        file = safe_open(path, framework="pt")
        with path.open("rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(size))
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a readable safetensors file: {str(e).splitlines()[0]}") from e
    header.pop("__metadata__", None)
    if unknown := {entry["dtype"] for entry in header.values()} - DTYPES.keys():
        raise UserError(f"{path}: weights of dtype {min(unknown)}; expected one of {', '.join(DTYPES)}")
    found = [
        Stored(file, path, name, DTYPES[e["dtype"]], tuple(e["shape"]), 8 + size + e["data_offsets"][0])
        for name, e in header.items()
    ]
    return sorted(found, key=lambda stored: stored.start)


@dataclass(frozen=True)
class Run:
    """Rows (dim 0) or columns (dim 1) of a stored tensor, from one on: as many as what they are read into has."""

    stored: Stored
    dim: int = 0
    first: int = 0


# -- work for one reader --------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Elements of a stored tensor that fit into a staging buffer, and where they go.

    Attributes:
        start: byte in the file.
        into: contiguous, of one dimension; or some columns of a matrix.
        columns: of the stored matrix, where not all are wanted: its rows are read whole, and cut on their way.
    """

    stored: Stored
    start: int
    into: Tensor
    columns: slice | None = None

    @property
    def size(self) -> int:
        """Bytes in the file."""
        elements = self.into.numel() if self.columns is None else len(self.into) * self.stored.shape[1]
        return elements * self.stored.dtype.itemsize

    @property
    def as_stored(self) -> bool:
        """Whether bytes go as they are."""
        return self.into.dtype == self.stored.dtype and self.columns is None

    @property
    def in_place(self) -> bool:
        return self.into.device == CPU and self.as_stored

    def wanted(self, staged: Tensor) -> Tensor:
        """What of the file's bytes goes into the tensor, in the file's dtype."""
        read = staged.view(self.stored.dtype)
        return read if self.columns is None else read.view(len(self.into), -1)[:, self.columns]


def parts(run: Run, into: Tensor) -> Iterator[Part]:
    """Those of a tensor whose shape has been checked, in order."""
    stored, itemsize = run.stored, run.stored.dtype.itemsize
    row = math.prod(stored.shape[1:]) * itemsize
    if run.dim == 0:
        flat, step, start = into.view(-1), STAGING // itemsize, stored.start + run.first * row
        for first in range(0, len(flat), step):
            yield Part(stored, start + first * itemsize, flat[first : first + step])
        return
    step, columns = STAGING // row, slice(run.first, run.first + into.shape[1])
    for first in range(0, len(into), step):
        yield Part(stored, stored.start + first * row, into[first : first + step], columns)


def read_bytes(path: Path, start: int, into: Tensor) -> None:
    """Fills host memory from a file.

    Raises:
        UserError: the system cannot read it, or the file has become shorter.
    """
    destination: Any = into.view(torch.uint8).numpy()
    left = memoryview(destination)
    try:
        with path.open("rb", buffering=0) as file:
            while left:
                if not (count := os.preadv(file.fileno(), [left], start)):
                    raise UserError(f"{path}: ends before byte {start}, which its header promises")
                start, left = start + count, left[count:]
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from e


@dataclass
class Buffer:
    """Staging memory on the host, and beside it on the device where dtypes are converted."""

    host: Tensor
    scratch: Tensor | None = None
    uploaded: Any = None  # event: what was in the buffer has left it

    def wait(self) -> None:
        if self.uploaded is not None:
            self.uploaded.synchronize()
            self.uploaded = None


@dataclass
class LoadTimes:
    """Milliseconds of all readers together, and of the device's copy stream; they overlap."""

    bytes_read: int = 0
    read_ms: float = 0.0
    convert_ms: float = 0.0
    upload_ms: float = 0.0


@dataclass
class Loader:
    """Readers and their buffers, for one component.

    Args:
        streams: of the device that the tensors are on; without, they are filled by the readers themselves.
    """

    streams: DeviceStreams | None = None
    times: LoadTimes = field(default_factory=LoadTimes)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        self._unpin: Callable[[], None] | None = None
        self._ring: SimpleQueue[Buffer] = SimpleQueue()
        self._buffers: list[Buffer] = []
        self._watches: list[Stopwatch] = []
        self._sizes: list[int] = []  # bytes of every part that was read

    def __enter__(self) -> Self:
        count = READERS if self.streams is None else RING
        host = torch.empty(count * STAGING, dtype=torch.uint8)  # takes no memory before it is written to
        if self.streams is not None:
            try:
                self._unpin = self.streams.pin(host)
            except RuntimeError as e:
                told = str(e).splitlines()[0]
                raise RunFailure(f"the system does not lock {host.numel()} bytes to load through: {told}") from e
        self._buffers = [Buffer(host[i * STAGING : (i + 1) * STAGING]) for i in range(count)]
        for buffer in self._buffers:
            self._ring.put(buffer)
        return self

    def __exit__(self, *failure: object) -> None:
        """Waits for the uploads, gives the buffers back and adds up the times."""
        self._pool.shutdown(cancel_futures=True)
        for buffer in self._buffers:
            buffer.wait()
        if self._unpin is not None:
            self._unpin()
        self.times.bytes_read = sum(self._sizes)
        for span in (span for watch in self._watches for span in watch.finish()):
            name = f"{span.name}_ms"
            setattr(self.times, name, getattr(self.times, name) + span.duration_ms)

    def load(self, pairs: Sequence[tuple[Run, Tensor]]) -> None:
        """Fills tensors from files. Uploads may still be under way after it, but what the device computes from
        then on is in order behind them. Several threads may call it.

        Raises:
            UserError: a file cannot be read to its end.
        """
        # memory that the device gives out may still be in use by what it was asked to compute before
        ready = None if self.streams is None else self.streams.computed()
        work = [part for run, into in pairs for part in parts(run, into)]
        jobs = [self._pool.submit(self._move, part, ready) for part in work]
        for uploaded in [job.result() for job in jobs]:
            if self.streams is not None and uploaded is not None:
                self.streams.compute_waits(uploaded)

    def _move(self, part: Part, ready: Any) -> Any:
        """A reader's work; the event of its upload's end."""
        watch = Stopwatch(CPU)
        self._watches.append(watch)
        self._sizes.append(part.size)
        if self.streams is None and part.in_place:
            with watch.span("read"):
                read_bytes(part.stored.path, part.start, part.into)
            return None
        buffer = self._ring.get()
        try:
            buffer.wait()
            staged = buffer.host[: part.size]
            with watch.span("read"):
                read_bytes(part.stored.path, part.start, staged)
            if self.streams is None:
                with watch.span("convert"):
                    part.into.copy_(part.wanted(staged))
            else:
                if buffer.scratch is None and not part.as_stored:
                    buffer.scratch = self.streams.allocate(STAGING)
                buffer.uploaded = self.streams.copy(partial(self._upload, part, staged, buffer.scratch), [ready])
            return buffer.uploaded
        finally:
            self._ring.put(buffer)

    def _upload(self, part: Part, staged: Tensor, scratch: Tensor | None) -> None:
        """The bytes travel as they are: PyTorch would convert them on the host."""
        watch = Stopwatch(part.into.device)
        self._watches.append(watch)
        if part.as_stored:
            with watch.span("upload"):
                part.into.copy_(part.wanted(staged), non_blocking=True)
            return
        assert scratch is not None
        arrived = scratch[: part.size]
        with watch.span("upload"):
            arrived.copy_(staged, non_blocking=True)
        with watch.span("convert"):
            part.into.copy_(part.wanted(arrived))
