"""Attention backends. Each gives its reasons for refusing a case; a dispatcher picks one and remembers which."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.runtime.errors import UserError

TRITON_HEAD_DIMS = range(16, 129)


@dataclass(frozen=True)
class Case:
    """What a backend has to be able to run. `head_dim` is None while it is not known yet."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int | None = None


class Backend(Protocol):
    name: str

    def reasons(self, case: Case) -> list[str]:
        """Why this backend cannot run the case; empty if it can."""

    def run(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None) -> Tensor: ...


class TorchSdpa:
    """`torch.nn.functional.scaled_dot_product_attention`, which chooses cuDNN, Flash or its own kernels."""

    name = "torch_sdpa"

    def reasons(self, case: Case) -> list[str]:
        return []

    def run(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None) -> Tensor:
        return attention(q_BLHK, k_BLHK, v_BLHK, out=out, impl="torch")


class Triton:
    """Our flash attention kernel."""

    name = "triton"

    def reasons(self, case: Case) -> list[str]:
        why = [] if case.device.type == "cuda" else [f"needs an NVIDIA GPU, the device is {case.device}"]
        if case.head_dim is not None and case.head_dim not in TRITON_HEAD_DIMS:
            limits = f"{TRITON_HEAD_DIMS[0]} to {TRITON_HEAD_DIMS[-1]}"
            why.append(f"head dim {case.head_dim} is outside of {limits}")
        return why

    def run(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None) -> Tensor:
        return attention(q_BLHK, k_BLHK, v_BLHK, out=out, impl="triton")


class FlashAttention:
    """The `flash-attn` package (Dao 2023)."""

    name = "fa"

    def reasons(self, case: Case) -> list[str]:
        why = [] if case.device.type == "cuda" else [f"needs an NVIDIA GPU, the device is {case.device}"]
        if case.dtype not in (torch.bfloat16, torch.float16):
            why.append(f"runs in bf16 or fp16, not {str(case.dtype).removeprefix('torch.')}")
        if importlib.util.find_spec("flash_attn") is None:
            why.append("the package flash-attn is not installed (pip install 'sgl-diffusion[flash-attn]')")
        if case.head_dim is not None and case.head_dim > 256:
            why.append(f"head dim {case.head_dim} is above 256")
        return why

    def run(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None) -> Tensor:
        from flash_attn import flash_attn_func

        result: Tensor = flash_attn_func(q_BLHK, k_BLHK, v_BLHK)
        return result if out is None else out.copy_(result)


BACKENDS: Mapping[str, Backend] = {b.name: b for b in (TorchSdpa(), Triton(), FlashAttention())}
# tried in this order where the user says nothing; torch first until the kernel is measured faster on a GPU
PREFERENCE = ("torch_sdpa", "triton", "fa")


class Attention:
    """The attention callable of one component. `used` tells what ran, for the report.

    Args:
        component: key in `model_index.json`, for messages.
        requested: a backend's name, or None for the first of `PREFERENCE` that does not refuse.
    Raises:
        UserError: the requested backend does not exist or refuses the case, with its reasons.
    """

    def __init__(self, component: str, requested: str | None, device: torch.device, dtype: torch.dtype) -> None:
        self.component, self.requested = component, requested
        self.device, self.dtype = device, dtype
        self.used: str | None = None
        self._by_head_dim: dict[int, Backend] = {}
        _pick(component, requested, Case(device, dtype))

    def __call__(self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None) -> Tensor:
        head_dim = q_BLHK.shape[-1]
        backend = self._by_head_dim.get(head_dim)
        if backend is None:
            backend = _pick(self.component, self.requested, Case(self.device, self.dtype, head_dim))
            self._by_head_dim[head_dim] = backend
            self.used = backend.name
        return backend.run(q_BLHK, k_BLHK, v_BLHK, out=out)


def _pick(component: str, requested: str | None, case: Case) -> Backend:
    if requested is not None and requested not in BACKENDS:
        raise UserError(f"attention backend {requested!r} of {component}: expected one of {', '.join(BACKENDS)}")
    refused = {}
    for name in PREFERENCE if requested is None else (requested,):
        if not (why := BACKENDS[name].reasons(case)):
            return BACKENDS[name]
        refused[name] = "; ".join(why)
    reasons = ", ".join(f"{name}: {why}" for name, why in refused.items())
    raise UserError(f"no attention backend for {component}: {reasons}")
