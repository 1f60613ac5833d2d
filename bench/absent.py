"""GPUs that are not here: what they can hold, and a driver that lets Triton compile for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    tensor_core: Mapping[str, str]  # the instructions, as a pattern, that products become, by what is multiplied


def _products(half: str, int8: str, fp8: str, scaled: str) -> dict[str, str]:
    """scaled: of blocks with scales of their own, in fp8 or fp4, which Triton widens before sm_100."""
    return {"bf16": half, "f16": half, "i8": int8, "f8E4M3FN": fp8, "scaled": scaled}


MMA = _products("HMMA", "IMMA", "QMMA", "HMMA")
GPUS = {
    "sm_80": Gpu(80, 166912, 167936, 64, 32, MMA),
    "sm_89": Gpu(89, 101376, 102400, 48, 24, MMA),
    "sm_90": Gpu(90, 232448, 233472, 64, 32, _products("HGMMA", "IGMMA", "QGMMA", "HGMMA")),
    # Triton 3.6 multiplies int8 there as on the GPUs before
    "sm_100": Gpu(100, 232448, 233472, 64, 32, _products("UTCHMMA", "UTCIMMA|IMMA", "UTCQMMA", "UTC[OQ]MMA")),
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
