"""Linear layers whose weights are codes. They stand where a `models.layers.Linear` stood, and take what it takes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.activation import activation
from sgl_diffusion.kernels.gemm import with_swiglu
from sgl_diffusion.kernels.gemm_fp8 import gemm_fp8
from sgl_diffusion.kernels.gemm_int8 import gemm_int8
from sgl_diffusion.kernels.gemm_mx import gemm_mx, native_microscaling
from sgl_diffusion.kernels.gemm_w4 import gemm_w4, gemm_w8
from sgl_diffusion.kernels.low_rank import quantize_low_rank
from sgl_diffusion.kernels.microscaling import MxFormat, quantize_mx
from sgl_diffusion.kernels.quantize import SCALE_BLOCK, Format, quantize_rows
from sgl_diffusion.models.layers import Codes, read_by
from sgl_diffusion.runtime.quantization.weight import QuantizedWeight

INT8_GROUP = 32  # columns: the least that a product of int8 codes takes


class QuantizedLinear(nn.Module):
    """A linear layer over a `QuantizedWeight`, whose tensors are its parameters, by their names.

    Attributes:
        reads: the format in which a norm before it may hand it its input as `Codes`; None where it takes numbers.
    """

    weight = None  # codes are in its place: encoders of transformers look for its dtype
    reads: Format | None = None

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.kind, self.weight_only = weight.kind, weight.weight_only
        self.out_features, self.in_features = weight.shape
        self.names = tuple(weight.tensors)
        for name, tensor in weight.tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = bias

    @property
    def quantized(self) -> QuantizedWeight:
        """The weights, which a LoRA or a report needs as numbers."""
        tensors = {name: getattr(self, name).data for name in self.names}
        return QuantizedWeight(self.kind, **tensors, weight_only=self.weight_only)

    @property
    @abstractmethod
    def product(self) -> str:
        """What multiplies here, for the report."""


class EightBitLinear(QuantizedLinear):
    """Codes by codes: fp8, fp8_block and int8. Without fp8 products (sm_80), fp8 codes are decoded by the kernel."""

    codes: Tensor
    scale: Tensor
    input_scale: Tensor

    @property
    def multiplies_codes(self) -> bool:
        if self.weight_only:
            return False
        return self.kind == "int8" or _gpu(self.codes) != "sm_80"

    @property
    def reads(self) -> Format | None:  # type: ignore[override]
        return cast(Format, self.kind) if self.multiplies_codes else None

    @property
    def calibrated_scale(self) -> Tensor | None:
        """Of all activations, where codes of them are read."""
        return self.input_scale if "input_scale" in self.names and self.multiplies_codes else None

    @property
    def writes(self) -> frozenset[Format]:
        """Formats of codes that its epilogue can leave: `out` and `tail` may be `Codes`."""
        if not self.multiplies_codes:
            return frozenset()
        return frozenset({"int8"}) if self.kind == "int8" else frozenset({"fp8", "fp8_block"})

    def code_place(self, shape: tuple[int, ...], like: Tensor | Codes) -> Codes | None:
        """For its input, as codes whose scales whoever writes a part of their columns can know."""
        if not self.multiplies_codes or (self.kind != "fp8_block" and self.calibrated_scale is None):
            return None
        scale = self.calibrated_scale
        if scale is None:
            scale = self.codes.new_empty((*shape[:-1], -(-shape[-1] // SCALE_BLOCK)), dtype=torch.float32)
        return Codes(self.codes.new_empty(shape, dtype=self.codes.dtype), scale, like.dtype)

    def forward(self, x: Tensor | Codes, **epilogue: Any) -> Any:
        """Arguments and result as of `models.layers.Linear`, but that the last result may be a place for codes."""
        for name in ("out", "tail"):
            if isinstance(place := epilogue.get(name), Codes):
                epilogue |= {name: place.values, "code_scale": place.scale}
        if isinstance(x, Tensor):
            if not self.multiplies_codes:
                return gemm_fp8(x.contiguous(), None, self.codes, self.scale, self.bias, dtype=x.dtype, **epilogue)
            x = Codes(*quantize_rows(x.contiguous(), cast(Format, self.kind), scale=self.calibrated_scale), x.dtype)
        values, scale = x.values.contiguous(), x.scale.contiguous()
        multiply = gemm_int8 if self.kind == "int8" else gemm_fp8
        return multiply(values, scale, self.codes, self.scale, self.bias, dtype=x.dtype, **epilogue)

    @property
    def product(self) -> str:
        if self.kind == "int8":
            return "gemm_int8"
        return "gemm_fp8" if self.multiplies_codes else "gemm_fp8, weights decoded"


class GroupedLinear(QuantizedLinear):
    """Weights of 4 or 8 bits in groups, decoded while a kernel multiplies; with a low-rank branch, if there is one.

    What has such a branch was made for activations of few bits (SVDQuant): there they are int8, by the pass that
    computes the branch's first product, where the codes allow it.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__(weight, bias)
        columns = weight.shape[1] // weight.scale.shape[1]
        self.int8_activations = (
            weight.kind == "w4" and weight.down_RK is not None and weight.table is None and columns >= INT8_GROUP
        )

    def forward(self, x: Tensor, **epilogue: Any) -> Any:
        """Arguments and result as of `models.layers.Linear`."""
        w, x, multiply = self.quantized, x.contiguous(), gemm_w4 if self.kind == "w4" else gemm_w8
        how = {"offset_NG": w.offset, **epilogue}
        if self.kind == "w4":
            how["table"] = w.table
        if w.down_RK is None:
            return multiply(x, w.codes, w.scale, self.bias, smooth_K=w.smooth_K, **how)
        if not self.int8_activations:
            low_MR = quantize_low_rank(x, w.down_RK)
            return multiply(x, w.codes, w.scale, self.bias, smooth_K=w.smooth_K, low_MR=low_MR, up_NR=w.up_NR, **how)
        codes, scale, low_MR = quantize_low_rank(x, w.down_RK, smooth_K=w.smooth_K, format="int8")
        how |= {"low_MR": low_MR, "up_NR": w.up_NR, "x_scale": scale, "dtype": x.dtype}
        return gemm_w4(codes, w.codes, w.scale, self.bias, **how)

    @property
    def product(self) -> str:
        name = "gemm_w4" if self.kind == "w4" else "gemm_w8"
        return f"{name} with int8 activations and a low-rank branch" if self.int8_activations else name


class MicroscaledLinear(QuantizedLinear):
    """mxfp8 and nvfp4: codes by codes where the GPU has instructions for it, else decoded while a kernel multiplies."""

    codes: Tensor
    scale: Tensor

    def forward(self, x: Tensor, **epilogue: Any) -> Any:
        """Arguments and result as of `models.layers.Linear`."""
        if "swiglu_from" in epilogue:  # the kernel has no such epilogue
            return with_swiglu(self(x), activation, **epilogue)
        w, x, format = self.quantized, x.contiguous(), cast(MxFormat, self.kind)
        how = {"format": format, "weight_global_scale": w.global_scale, **epilogue}
        if not self.weight_only and _gpu(x) and native_microscaling():
            codes, x_scales, *of_rows = quantize_mx(x, format)
            how |= {"x_scales": x_scales, "x_global_scale": of_rows[0] if of_rows else None, "dtype": x.dtype}
            return gemm_mx(codes, w.codes, w.scale, self.bias, **how)
        return gemm_mx(x, w.codes, w.scale, self.bias, **how)

    @property
    def product(self) -> str:
        if self.weight_only:
            return "gemm_mx, weights decoded"
        native = _gpu(self.codes) and native_microscaling()
        return "gemm_mx" if native else "gemm_mx, weights decoded (this device has no microscaled products)"


def _gpu(x: Tensor) -> str | None:
    """The architecture that a launch with x is compiled for; None where there is none."""
    if not launch.runs_triton("auto", x):
        return None
    try:
        return launch.architecture()
    except RuntimeError:
        if x.is_meta:  # counted on a machine without a GPU
            return None
        raise


LAYERS: Mapping[str, type[QuantizedLinear]] = {
    **dict.fromkeys(("fp8", "fp8_block", "int8"), EightBitLinear),
    **dict.fromkeys(("w4", "w8"), GroupedLinear),
    **dict.fromkeys(("mxfp8", "nvfp4"), MicroscaledLinear),
}


class SideBySide(nn.Module):
    """Layers over one input whose outputs lie side by side: what a model packs in one layer, kept in several ways."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.in_features = cast(int, parts[0].in_features)
        self.out_features = sum(cast(int, part.out_features) for part in parts)

    @property
    def reads(self) -> Format | None:
        return read_by(*self.parts)

    def forward(
        self, x: Tensor | Codes, *, gelu_from: int | None = None, swiglu_from: int | None = None,
        tail: Tensor | None = None, gate: Tensor | None = None, residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Arguments and result as of `models.layers.Linear`."""
        if swiglu_from is not None:  # gates and their values may be of different layers
            return with_swiglu(self(x), activation, swiglu_from, tail, out)
        head = self.out_features if tail is None else cast(int, gelu_from)
        out = x.new_empty(*x.shape[:-1], head) if out is None else out
        start = 0
        for part in self.parts:
            stop = start + cast(int, part.out_features)
            activated = None if gelu_from is None or gelu_from >= stop else max(gelu_from - start, 0)
            if tail is not None and start >= head:
                part(x, gelu_from=0, out=tail[..., start - head : stop - head])
            elif tail is not None and stop > head:
                part(x, gelu_from=activated, tail=tail[..., : stop - head], out=out[..., start:head])
            else:
                own = {
                    name: t[..., start:stop] for name, t in (("gate", gate), ("residual", residual)) if t is not None
                }
                part(x, gelu_from=activated, out=out[..., start:stop], **own)
            start = stop
        return out if tail is None else (out, tail)
