"""Attention backends. Each gives its reasons for refusing a case; a dispatcher picks one and remembers which.

Where the user says nothing, `attention_order.json` does: for every architecture the exact backends, fastest first, by
head dim, bytes of an element and number of keys. `sglang bench tune --op attention_order` times them and rewrites it.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgl_diffusion.kernels.attention import MAX_HEAD_DIM, MIN_HEAD_DIM, attention
from sgl_diffusion.kernels.attention_8bit import VALUES, Values, attention_fp8, attention_int8
from sgl_diffusion.kernels.launch import architecture
from sgl_diffusion.kernels.quantize import quantize_heads
from sgl_diffusion.models.family import AttentionFn
from sgl_diffusion.runtime.errors import UserError

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """What a backend has to be able to run. `head_dim` and `keys` are None while they are not known yet.

    Attributes:
        lse: each query's log-sum-exp is asked for as well, by which attentions over different keys become one.
        settings: those of `attention_backend_config`, read.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int | None = None
    keys: int | None = None  # that every query attends to
    lse: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def not_on_a_gpu(self) -> list[str]:
        return [] if self.device.type == "cuda" else [f"needs an NVIDIA GPU, the device is {self.device}"]

    def not_half(self) -> list[str]:
        return [] if self.dtype in HALF else [f"runs in bf16 or fp16, not {str(self.dtype).removeprefix('torch.')}"]

    def without_fp8(self) -> list[str]:
        old = self.device.type == "cuda" and architecture() == "sm_80"
        return ["fp8 needs a GPU of sm_89 or later"] if old else []

    def head_dim_outside(self, lowest: int, highest: int) -> list[str]:
        fits = self.head_dim is None or lowest <= self.head_dim <= highest
        return [] if fits else [f"head dim {self.head_dim} is outside of {lowest} to {highest}"]


Setting = type[bool] | tuple[str, ...]
"""What a setting may be: true or false, or one of some words."""


class Backend(Protocol):
    name: str
    settings: Mapping[str, Setting]
    """What `attention_backend_config` may hold: keyword arguments of `run`."""

    def reasons(self, case: Case) -> list[str]:
        """Why this backend cannot run the case; empty if it can."""

    @property
    def run(self) -> Callable[..., Any]:
        """`run(q_BLHK, k_BLHK, v_BLHK, *, out=None, return_lse=False, **settings)` -> out_BLHK; with `return_lse`,
        (out_BLHK, lse_BHL): natural logarithms of the softmax sums, contiguous and in fp32. Those of `OURS` take a
        `code_scale`."""


Result = Tensor | tuple[Tensor, Tensor]
"""What an attention returns, without and with log-sum-exps."""


class TorchSdpa:
    """`torch.nn.functional.scaled_dot_product_attention`, which chooses cuDNN, Flash or its own kernels."""

    name = "torch_sdpa"
    settings: Mapping[str, Setting] = {}

    def reasons(self, case: Case) -> list[str]:
        return []

    def run(
        self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None, return_lse: bool = False
    ) -> Result:
        if not return_lse:
            return attention(q_BLHK, k_BLHK, v_BLHK, out=out, impl="torch")
        fused = _fused_with_lse(*(x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK)))
        if fused is None:
            return attention(q_BLHK, k_BLHK, v_BLHK, out=out, return_lse=True, impl="torch")
        return _placed(fused[0].transpose(1, 2), out), fused[1].contiguous()


def _fused_with_lse(q_BHQK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor) -> tuple[Tensor, Tensor] | None:
    """What PyTorch's fused kernels compute, whose log-sum-exps its public function drops; None if none takes this."""
    aten, Q, K = torch.ops.aten, *q_BHQK.shape[2:]
    if not q_BHQK.is_cuda:  # shapes alone, too: no kernel holds a matrix of all scores
        return aten._scaled_dot_product_flash_attention_for_cpu(q_BHQK, k_BHSK, v_BHSK)  # type: ignore[no-any-return]
    asked = torch.backends.cuda.SDPAParams(q_BHQK, k_BHSK, v_BHSK, None, 0.0, False, False)
    if K % 8 == 0 and torch.backends.cuda.can_use_flash_attention(asked):
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q_BHQK, k_BHSK, v_BHSK)
        return out, lse
    if K % 8 == 0 and torch.backends.cuda.can_use_efficient_attention(asked):
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q_BHQK, k_BHSK, v_BHSK, None, True)
        return out, lse[..., :Q]  # filled up to a multiple of 32
    return None


def _placed(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


class Cudnn:
    """cuDNN's fused attention, through PyTorch."""

    name = "cudnn"
    settings: Mapping[str, Setting] = {}

    def reasons(self, case: Case) -> list[str]:
        why = case.not_on_a_gpu() + case.not_half() + case.head_dim_outside(8, 128)
        if case.head_dim is not None and case.head_dim % 8:
            why.append(f"head dim {case.head_dim} is not a multiple of 8")
        if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
            why.append("PyTorch has no cuDNN here")
        return why

    def run(
        self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None, return_lse: bool = False
    ) -> Result:
        q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLHK, v_BLHK))
        if return_lse:
            result, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
            # PyTorch versions differ in whether a last dimension of 1 follows
            return _placed(result.transpose(1, 2), out), lse.reshape(q.shape[:3])
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            result = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return _placed(result.transpose(1, 2), out)


class Triton:
    """Our flash attention kernel."""

    name = "triton"
    settings: Mapping[str, Setting] = {}

    def reasons(self, case: Case) -> list[str]:
        return case.not_on_a_gpu() + case.head_dim_outside(MIN_HEAD_DIM, MAX_HEAD_DIM)

    def run(
        self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None,
        code_scale: Tensor | None = None, return_lse: bool = False,
    ) -> Result:  # fmt: skip
        if return_lse:
            return attention(q_BLHK, k_BLHK, v_BLHK, out=out, code_scale=code_scale, return_lse=True, impl="triton")
        return attention(q_BLHK, k_BLHK, v_BLHK, out=out, code_scale=code_scale, impl="triton")


class TritonInt8:
    """Our attention with scores from products of int8 numbers, as SageAttention has them; not exact."""

    name = "triton_int8"
    settings: Mapping[str, Setting] = {"pv": VALUES, "smooth_k": bool}

    def reasons(self, case: Case) -> list[str]:
        why = case.not_on_a_gpu() + case.not_half() + case.head_dim_outside(MIN_HEAD_DIM, MAX_HEAD_DIM)
        return why + (case.without_fp8() if case.settings.get("pv") == "fp8" else [])

    def run(
        self,
        q_BLHK: Tensor,
        k_BLHK: Tensor,
        v_BLHK: Tensor,
        *,
        out: Tensor | None = None,
        code_scale: Tensor | None = None,
        return_lse: bool = False,
        pv: Values = "half",
        smooth_k: bool = True,
    ) -> Result:
        return attention_int8(
            q_BLHK, k_BLHK, v_BLHK, out=out, code_scale=code_scale, pv=pv, smooth_k=smooth_k, return_lse=return_lse,
            impl="triton",
        )  # fmt: skip


class TritonFp8:
    """Our attention with both products in fp8; not exact."""

    name = "triton_fp8"
    settings: Mapping[str, Setting] = {"smooth_k": bool}

    def reasons(self, case: Case) -> list[str]:
        why = case.not_on_a_gpu() + case.not_half() + case.head_dim_outside(MIN_HEAD_DIM, MAX_HEAD_DIM)
        return why + case.without_fp8()

    def run(
        self,
        q_BLHK: Tensor,
        k_BLHK: Tensor,
        v_BLHK: Tensor,
        *,
        out: Tensor | None = None,
        code_scale: Tensor | None = None,
        return_lse: bool = False,
        smooth_k: bool = True,
    ) -> Result:
        return attention_fp8(
            q_BLHK,
            k_BLHK,
            v_BLHK,
            out=out,
            code_scale=code_scale,
            smooth_k=smooth_k,
            return_lse=return_lse,
            impl="triton",
        )


class FlashAttention:
    """The `flash-attn` package (Dao 2023)."""

    name = "fa"
    settings: Mapping[str, Setting] = {}

    def reasons(self, case: Case) -> list[str]:
        why = case.not_on_a_gpu() + case.not_half() + case.head_dim_outside(8, 256)
        if importlib.util.find_spec("flash_attn") is None:
            why.append("the package flash-attn is not installed (pip install 'sgl-diffusion[flash-attn]')")
        return why

    def run(
        self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None, return_lse: bool = False
    ) -> Result:
        from flash_attn import flash_attn_func

        if not return_lse:
            return _placed(flash_attn_func(q_BLHK, k_BLHK, v_BLHK), out)
        result, lse, _ = flash_attn_func(q_BLHK, k_BLHK, v_BLHK, return_attn_probs=True)
        return _placed(result, out), lse.contiguous()


class SageAttention:
    """The `sageattention` package: products of 8-bit numbers, not exact (Zhang et al. 2024)."""

    name = "sage_attn"
    settings: Mapping[str, Setting] = {"smooth_k": bool}

    def reasons(self, case: Case) -> list[str]:
        why = case.not_on_a_gpu() + case.not_half() + case.head_dim_outside(8, 128)
        if importlib.util.find_spec("sageattention") is None:
            why.append("the package sageattention is not installed (pip install sageattention)")
        elif case.lse and not why:
            from sageattention import sageattn

            if "return_lse" not in inspect.signature(sageattn).parameters:
                why.append("this version of sageattention gives no log-sum-exps, which a ring needs; use ulysses alone")
        return why

    def run(
        self,
        q_BLHK: Tensor,
        k_BLHK: Tensor,
        v_BLHK: Tensor,
        *,
        out: Tensor | None = None,
        return_lse: bool = False,
        smooth_k: bool = True,
    ) -> Result:
        from sageattention import sageattn

        how = {"tensor_layout": "NHD", "smooth_k": smooth_k}
        if not return_lse:
            return _placed(sageattn(q_BLHK, k_BLHK, v_BLHK, **how), out)
        result, lse = sageattn(q_BLHK, k_BLHK, v_BLHK, return_lse=True, **how)
        return _placed(result, out), lse.float().contiguous()


BACKENDS: Mapping[str, Backend] = {
    b.name: b for b in (TorchSdpa(), Triton(), TritonInt8(), TritonFp8(), Cudnn(), FlashAttention(), SageAttention())
}
EXACT = ("torch_sdpa", "triton", "cudnn", "fa")  # what `auto` may choose from
OURS = ("triton", "triton_int8", "triton_fp8")


def order_of(case: Case) -> Sequence[str]:
    """Names of exact backends, fastest first, for a case that is known whole."""
    arch = architecture() if case.device.type == "cuda" else "cpu"
    size = {"head_dim": case.head_dim or 0, "keys": case.keys or 0, "itemsize": case.dtype.itemsize}
    for row in order_table()[arch]["rows"]:
        if all(size[name] <= limit for name, limit in row.get("at_most", {}).items()):
            order: Sequence[str] = row["order"]
            return order
    raise ValueError(f"attention_order.json has no row for {size} on {arch}")


@functools.cache
def order_table() -> dict[str, Any]:
    """`attention_order.json`: architecture -> rows, of which the first that holds a size counts."""
    table: dict[str, Any] = json.loads(resources.files(__package__).joinpath("attention_order.json").read_text())
    return table


class Attention:
    """The attention callable of one component.

    Args:
        component: key in `model_index.json`, for messages.
        requested: a backend's name, or None for the fastest that does not refuse, by each call's shape.
        config: settings of the requested backend.
    Raises:
        UserError: the requested backend does not exist, refuses the case, with its reasons, or has no such setting.
    """

    def __init__(
        self,
        component: str,
        requested: str | None,
        device: torch.device,
        dtype: torch.dtype,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.component, self.requested = component, requested
        self.device, self.dtype = device, dtype
        self._chosen: dict[tuple[int, int, bool], Backend] = {}  # by head dim, keys and whether log-sum-exps are asked
        self._settings = settings_of(component, requested, config or {})
        if requested is not None:
            pick(component, requested, Case(device, dtype, settings=self._settings))

    def __call__(
        self, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None,
        code_scale: Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        """`out`, or a new tensor like q; with `return_lse`, (out_BLHK, lse_BHL), natural logarithms in fp32.

        Without a key, or a query, out is 0 and lse -inf. `code_scale` is as of `kernels.attention`, and no log-sums are
        asked for beside it; a backend that leaves no codes is followed by a pass that makes them.
        """
        if not (q_BLHK.numel() and k_BLHK.numel()):
            return _of_nothing(q_BLHK, out, code_scale, return_lse)
        shape = head_dim, keys, lse = q_BLHK.shape[-1], k_BLHK.shape[1], return_lse
        backend = self._chosen.get(shape)
        if backend is None:
            case = Case(self.device, self.dtype, head_dim, keys, lse, self._settings)
            backend = pick(self.component, self.requested, case)
            self._chosen[shape] = backend
        asked = {"return_lse": True} if return_lse else {}
        return _run(backend, q_BLHK, k_BLHK, v_BLHK, out, code_scale, **asked, **self._settings)

    @property
    def used(self) -> str | None:
        """What has run, for the report: a backend's name, or each with the numbers of keys it was taken for."""
        names = list(dict.fromkeys(backend.name for backend in self._chosen.values()))
        if len(names) < 2:
            return names[0] if names else None
        keys = {name: sorted({k for (_, k, _), b in self._chosen.items() if b.name == name}) for name in names}
        return "; ".join(f"{name} for {', '.join(map(str, keys[name]))} keys" for name in names)


def _run(
    backend: Backend, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, out: Tensor | None, code_scale: Tensor | None,
    **asked: Any,
) -> Any:  # fmt: skip
    """A backend, with the codes that it leaves or that are made of what it returns."""
    if code_scale is None:
        return backend.run(q_BLHK, k_BLHK, v_BLHK, out=out, **asked)
    assert out is not None, "codes have a place"
    if backend.name in OURS:
        return backend.run(q_BLHK, k_BLHK, v_BLHK, out=out, code_scale=code_scale, **asked)
    return quantize_heads(backend.run(q_BLHK, k_BLHK, v_BLHK, **asked), out, code_scale)


def _of_nothing(q_BLHK: Tensor, out: Tensor | None, code_scale: Tensor | None, return_lse: bool) -> Result:
    """Attention that no query, or no key, takes part in, which PyTorch's kernels for the CPU crash on."""
    if code_scale is not None:
        assert out is not None, "codes have a place"
        return quantize_heads(torch.zeros_like(q_BLHK), out, code_scale)
    out = torch.zeros_like(q_BLHK) if out is None else out.zero_()
    B, L, H, _ = q_BLHK.shape
    return (out, q_BLHK.new_full((B, H, L), -math.inf, dtype=torch.float32)) if return_lse else out


def shape_only_attention(
    component: str, requested: str | None, device: torch.device, config: Mapping[str, Any] | None = None
) -> AttentionFn:
    """Attention of tensors that are shapes alone and stand for this device's: our kernels where `Attention` would take
    them, else PyTorch's. Calls raise as `Attention` does.
    """

    def attend(
        q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = None,
        code_scale: Tensor | None = None, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        settings = settings_of(component, requested, config or {})
        case = Case(device, q_BLHK.dtype, q_BLHK.shape[-1], k_BLHK.shape[1], return_lse, settings)
        backend = pick(component, requested, case)
        if backend.name not in OURS:
            backend, settings = BACKENDS["torch_sdpa"], {}
        return _run(backend, q_BLHK, k_BLHK, v_BLHK, out, code_scale, return_lse=return_lse, **settings)

    return attend


def settings_of(component: str, requested: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Raises UserError for an unknown backend, and as `read_settings`."""
    return read_settings(None if requested is None else _named(component, requested), config)


def read_settings(backend: Backend | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """`attention_backend_config`, checked: text from `k=v` becomes what the setting is.

    Raises:
        UserError: no backend was asked for, or it has no such setting, or not with such a value.
    """
    if config and backend is None:
        raise UserError(f"attention_backend_config={dict(config)}: needs attention_backend to say whose it is")
    settings: dict[str, Any] = {}
    for name, value in config.items():
        assert backend is not None
        if name not in backend.settings:
            known = ", ".join(backend.settings) or "no settings"
            near = difflib.get_close_matches(name, backend.settings, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"attention_backend_config.{name}={value}: {backend.name} has {known}{hint}")
        values = backend.settings[name]
        if not isinstance(values, tuple):
            if value not in (True, False, "true", "false"):
                raise UserError(f"attention_backend_config.{name}={value}: expected true or false")
            value = value in (True, "true")
        elif value not in values:
            raise UserError(f"attention_backend_config.{name}={value}: expected {' or '.join(values)}")
        settings[name] = value
    return settings


def pick(component: str, requested: str | None, case: Case) -> Backend:
    """The requested backend, or the fastest that does not refuse the case.

    Raises:
        UserError: an unknown backend, or one that refuses, with its reasons.
    """
    backends = [BACKENDS[name] for name in order_of(case)] if requested is None else [_named(component, requested)]
    refused = {}
    for backend in backends:
        if not (why := backend.reasons(case)):
            return backend
        refused[backend.name] = "; ".join(why)
    reasons = ", ".join(f"{name}: {why}" for name, why in refused.items())
    raise UserError(f"no attention backend for {component}: {reasons}")


def _named(component: str, name: str) -> Backend:
    if name not in BACKENDS:
        raise UserError(f"attention backend {name!r} of {component}: expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
