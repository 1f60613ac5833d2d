"""The receipt of a run: what was asked for, what took effect, what it cost. Torch is imported only where it is asked.

The top-level keys up to `meta` are those of SGLang's perf dump, so that its tools can read ours.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import uuid
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from sgl_diffusion.runtime.errors import RunFailure, UserError

if TYPE_CHECKING:
    import torch

MIB = 1024 * 1024
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StageTime(BaseModel):
    name: str
    duration_ms: Milliseconds


class StepTime(BaseModel):
    step: int
    duration_ms: Milliseconds


class MemoryCheckpoint(BaseModel):
    """MiB; device numbers are 0 on a CPU."""

    allocated_mb: float = 0.0
    reserved_mb: float = 0.0
    peak_allocated_mb: float = 0.0
    peak_reserved_mb: float = 0.0
    peak_host_mb: float = 0.0


class Failure(BaseModel):
    type: str
    message: str


class DeviceLimits(BaseModel):
    """Measured on the device of the run."""

    copy_gb_per_s: float
    matmul_tflop_per_s: dict[str, float]  # by dtype


class ClassWork(BaseModel):
    """What the operations of a class compute and move."""

    flops: int
    bytes: int


class StageAccount(BaseModel):
    """A stage's work, and its time beside the shortest this device could take: all arithmetic, or all traffic."""

    name: str
    classes: dict[str, ClassWork]
    bound_ms: Milliseconds
    bound_by: Literal["compute", "memory"]
    measured_ms: Milliseconds

    @property
    def share(self) -> float:
        """Of the bound: 1 is as fast as can be."""
        return self.bound_ms / self.measured_ms if self.measured_ms else 0.0


class Loss(BaseModel):
    """Time beyond the bound."""

    where: str
    ms: Milliseconds


class Accounting(BaseModel):
    """What the work of a run bounds its time to, and where the largest losses are."""

    limits: DeviceLimits
    stages: list[StageAccount]
    largest_losses: list[Loss]


class ComponentMemory(BaseModel):
    """Weights of a component: all of them, what of them is on the device while it works, and where the host has them:
    in memory that is locked or is not, or in their files alone.
    """

    dtype: str
    residency: str
    weights_mb: float
    device_mb: float
    host: Literal["pinned", "pageable", "mapped"] | None


class StageMemory(BaseModel):
    """The most device memory that a stage needs.

    `measured_mb` is the allocator's peak on a GPU; on a CPU the weights and the tensors counted, without the scratch
    that libraries take inside of an operation; None where nothing was measured.
    """

    name: str
    weights_mb: float
    activations_mb: float
    predicted_mb: float
    measured_mb: float | None = None


class MemoryReport(BaseModel):
    """Memory as predicted from configs, beside what was measured. MiB.

    `graphs_mb` is what captured steps keep for themselves; it is beside the peak, which the allocator counts. Offloaded
    weights are in host memory that is locked (`pinned`) or is not (`pageable`), or in their files alone (`mapped`).
    `chosen` is what performance_mode decided, as no flag did, and by which numbers.
    """

    components: dict[str, ComponentMemory]
    stages: list[StageMemory]
    workspace_mb: float
    graphs_mb: float
    peak_mb: float
    measured_peak_mb: float | None
    pinned_host_mb: float
    pageable_host_mb: float
    mapped_host_mb: float
    available_mb: float | None
    decode: Literal["whole", "tiles"]
    chosen: dict[str, Any]


class ComponentLoad(BaseModel):
    """How a component's weights came to where they live.

    `read`, `convert` and `upload` are times of all reader threads together and of the device's copy stream. They
    overlap: their sum may be more than the time that has passed, `wall_ms`.
    """

    weights: Literal["read", "mapped", "dummy"]  # mapped: they stay in their files until they are needed
    layers_left_out: int = 0  # of a language model, whose last layers nobody reads
    wall_ms: Milliseconds
    bytes_read: int = 0
    read_ms: Milliseconds = 0.0
    convert_ms: Milliseconds = 0.0
    upload_ms: Milliseconds = 0.0

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def gb_per_s(self) -> float:
        """Of the time that has passed."""
        return self.bytes_read / 1e6 / self.wall_ms if self.wall_ms else 0.0

    def split(self) -> dict[str, float]:
        """Milliseconds of what is done to weights."""
        return {"read": self.read_ms, "convert": self.convert_ms, "upload": self.upload_ms}


class LoadReport(BaseModel):
    """What it took to be ready for requests; the total is that of everything, the warm-up included."""

    wall_ms: Milliseconds
    warm_up_ms: Milliseconds
    readers: int
    components: dict[str, ComponentLoad]

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def total(self) -> ComponentLoad | None:
        """Of all components whose weights were read, one after another."""
        read = [c for c in self.components.values() if c.weights == "read"]
        numbers = [n for n in ComponentLoad.model_fields if n not in ("weights", "layers_left_out")]
        return ComponentLoad(weights="read", **{n: sum(getattr(c, n) for c in read) for n in numbers}) if read else None

    def summary(self) -> str:
        """One line for a person."""
        told = f"load {_ms(self.wall_ms)}"
        if self.warm_up_ms:
            told += f", of it warm-up {_ms(self.warm_up_ms)}"
        if (total := self.total) is None:
            return told
        split = ", ".join(f"{part} {_ms(ms)}" for part, ms in total.split().items())
        told += f", {total.bytes_read / 1e9:.2f} GB at {total.gb_per_s:.2f} GB/s"
        return f"{told} ({split}: of {self.readers} threads, which overlap)"


class Range(BaseModel):
    """Of the samples taken during a run."""

    min: float
    median: float
    max: float


class Report(BaseModel):
    """A run. Durations in milliseconds; stages in order; `effective["ignored"]` is empty or the run is at fault."""

    model_config = ConfigDict(extra="forbid")

    timestamp: str
    request_id: str
    commit_hash: str | None
    tag: str
    total_duration_ms: Milliseconds
    steps: list[StageTime]
    denoise_steps_ms: list[StepTime]
    memory_checkpoints: dict[str, MemoryCheckpoint]
    meta: dict[str, Any]
    effective: dict[str, Any]
    versions: dict[str, str | None]
    outputs: list[str]
    error: Failure | None
    accounting: Accounting | None = None  # of native runs whose report is written to a file
    telemetry: dict[str, Range] | None = None  # clocks, power, memory of the GPU, for the same runs
    load: LoadReport | None = None  # of native runs: how the model became ready, before the first of its requests
    memory: MemoryReport | None = None  # of native runs: on a GPU all, on a CPU those with a limit or a count

    @property
    def median_step_ms(self) -> float | None:
        times = [s.duration_ms for s in self.denoise_steps_ms]
        return statistics.median(times) if times else None

    def write(self, path: Path) -> None:
        """Writes JSON in one go: a reader sees the whole file or none.

        Raises:
            RunFailure: the disk does not take the file.
        """
        part = path.with_name(f".{uuid.uuid4().hex}.json")
        try:
            part.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as e:
            raise RunFailure(f"{path} cannot be written: {e.strerror}") from e
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Report:
        """Raises UserError if the file is missing or not a report."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as e:
            raise UserError(f"{path}: cannot be read: {e.strerror}") from e
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(str(p) for p in first["loc"]) or "the file"
            raise UserError(f"{path}: not a perf dump: {where}: {first['msg']}") from e

    def summary(self) -> str:
        """A few lines for a person."""
        e = self.effective
        stages = "  ".join(f"{s.name} {_ms(s.duration_ms)}" for s in self.steps)
        lines = [f"total {_ms(self.total_duration_ms)}  ({stages})"]
        if self.median_step_ms is not None:
            lines.append(f"{len(self.denoise_steps_ms)} steps, median {_ms(self.median_step_ms)}")
        if "backend" in e:
            lines.append(f"backend {e['backend']} ({e.get('backend_reason')}) on {e.get('device')}")
        for name in ("attention", "precision"):
            if name in e:
                lines.append(f"{name} " + ", ".join(f"{k}={v}" for k, v in e[name].items()))
        for key, q in e.get("quantization", {}).items():
            products = ", ".join(f"{n} by {product}" for product, n in q["products"].items())
            sizes = f"{q['weights_mb']:,.1f} MiB instead of {q['in_full_mb']:,.1f} MiB"
            layers = f"{products}, {sum(q['kept'].values())} kept"
            lines.append(f"quantization {key}={q['format']}: layers: {layers}; {sizes}")
        if by_op := e.get("products"):
            lines.append("products " + "; ".join(f"{op} by {', '.join(by)}" for op, by in by_op.items()))
        if self.load is not None:
            lines.append(self.load.summary())
        if self.memory is not None:
            measured = self.memory.measured_peak_mb
            told = "" if measured is None else f", measured {measured:,.1f} MiB"
            lines.append(f"memory predicted {self.memory.peak_mb:,.1f} MiB{told}")
        if e.get("ignored"):
            lines.append("ignored " + ", ".join(map(str, e["ignored"])))
        if self.error is not None:
            lines.append(f"failed: {self.error.type}: {self.error.message}")
        return "\n".join(lines)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.1f} ms"


def memory_checkpoint(device: torch.device) -> MemoryCheckpoint:
    """Memory now, and its peaks since the process began."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type != "cuda":
        return MemoryCheckpoint(peak_host_mb=host)
    import torch

    return MemoryCheckpoint(
        allocated_mb=torch.cuda.memory_allocated(device) / MIB,
        reserved_mb=torch.cuda.memory_reserved(device) / MIB,
        peak_allocated_mb=torch.cuda.max_memory_allocated(device) / MIB,
        peak_reserved_mb=torch.cuda.max_memory_reserved(device) / MIB,
        peak_host_mb=host,
    )


def versions(device: torch.device) -> dict[str, str | None]:
    """What ran: packages, Python, and the device by name."""
    return dict(_versions(device))


@cache  # it takes longer to read than a small step
def _versions(device: torch.device) -> dict[str, str | None]:
    import torch

    found: dict[str, str | None] = {}
    for package in ("sgl-diffusion", "torch", "triton", "diffusers", "transformers"):
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            found[package.replace("-", "_")] = None
    found["python"] = platform.python_version()
    found["cuda"] = torch.version.cuda
    is_gpu = device.type == "cuda"
    found["driver"] = _driver() if is_gpu else None
    found["device"] = torch.cuda.get_device_name(device) if is_gpu else _processor()
    return found


def _processor() -> str:
    """The CPU's name; the platform module knows only its architecture on Linux."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor() or platform.machine()


def _driver() -> str:
    import pynvml

    pynvml.nvmlInit()
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


@cache
def commit_hash() -> str | None:
    """The commit of the checkout this file belongs to, None for an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except OSError:
        return None
    return done.stdout.strip() or None
