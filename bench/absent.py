"""GPUs that are not here: what they can hold, and a driver that lets Triton compile for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget


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


class Driver:
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


@contextmanager
def absent(gpu: Gpu) -> Iterator[None]:
    """Inside the `with`, Triton believes it is on `gpu`; only compiling works."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver(gpu.capability))
    try:
        yield
    finally:
        triton.runtime.driver._active = before
