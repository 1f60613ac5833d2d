"""What the GPU's driver sees during a run: clocks, power, memory, temperature, by NVML. Torch-free."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from sgl_diffusion.runtime.report import MIB, Range

INTERVAL_S = 0.05


def _metrics(nvml: Any) -> dict[str, Callable[[Any], float]]:
    return {
        "sm_clock_mhz": lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        "power_w": lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        "memory_used_mb": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / MIB,
        "temperature_c": lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    }


class Telemetry:
    """Samples a GPU in a thread while its `with` block runs, and once at either end.

    Args:
        uuid: the GPU's, as NVML writes it: CUDA numbers devices in an order of its own.
    """

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.samples: dict[str, list[float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="telemetry", daemon=True)

    def __enter__(self) -> Telemetry:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._gpu = pynvml.nvmlDeviceGetHandleByUUID(self.uuid)
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
        self._nvml.nvmlShutdown()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        for name, read in _metrics(self._nvml).items():
            with suppress(self._nvml.NVMLError):  # a GPU without this sensor, or a slice of one
                value = float(read(self._gpu))
                self.samples.setdefault(name, []).append(value)

    def ranges(self) -> dict[str, Range]:
        """Lowest, median and highest of every metric that could be read."""
        return {
            name: Range(min=min(values), median=statistics.median(values), max=max(values))
            for name, values in self.samples.items()
        }
