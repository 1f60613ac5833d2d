"""What `--quantization` names: how weights of a checkpoint become codes while they are loaded.

fp8, fp8_block, int8, svdquant and, on GPUs with instructions for it, mxfp8 and nvfp4 multiply codes by codes, of
activations as they come; int4 decodes weights and multiplies in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sgl_diffusion.kernels.microscaling import quantize_mx
from sgl_diffusion.kernels.quantize import LARGEST
from sgl_diffusion.runtime.quantization.weight import BLOCK, QuantizedWeight

GROUP = 64  # columns with one scale in int4 and svdquant
RANK = 32  # of the branch of svdquant
POWER_ITERATIONS = 4  # of the randomised SVD: its error is below that of the codes after two


def eight_bit(weight_NK: Tensor, kind: str) -> QuantizedWeight:
    """A scale for every output: the largest code stands for the largest weight of its row."""
    wide = weight_NK.float()
    scale_N = _scale(wide.abs().amax(1), LARGEST[kind])
    codes = wide / scale_N[:, None]
    if kind == "int8":
        return QuantizedWeight("int8", codes.round_().to(torch.int8), scale_N)
    return QuantizedWeight("fp8", codes.to(torch.float8_e4m3fn), scale_N)


def fp8_blocks(weight_NK: Tensor) -> QuantizedWeight:
    """A scale for every 128 x 128 weights (DeepSeek-V3: arXiv 2412.19437, section 3.3); edges have smaller blocks."""
    N, K = weight_NK.shape
    n, k = -(-N // BLOCK), -(-K // BLOCK)
    wide = weight_NK.new_zeros(n * BLOCK, k * BLOCK, dtype=torch.float32)
    wide[:N, :K] = weight_NK
    blocks = wide.view(n, BLOCK, k, BLOCK)
    scale = _scale(blocks.abs().amax((1, 3)), LARGEST["fp8"])
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(n * BLOCK, k * BLOCK)[:N, :K]
    return QuantizedWeight("fp8_block", codes.contiguous(), scale)


def int4(weight_NK: Tensor) -> QuantizedWeight:
    """Symmetric groups of 64 columns, whose weight of the largest magnitude is code -8: all 16 codes are in use, as in
    GGUF's Q4_0.
    """
    N, K = weight_NK.shape
    groups = weight_NK.float().view(N, K // GROUP, GROUP)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scale = torch.where(largest == 0, 1.0, largest / -8)
    codes = (groups / scale).round_().clamp_(-8, 7).add_(8).to(torch.uint8).view(N, K)
    return QuantizedWeight("w4", codes[:, ::2] | codes[:, 1::2] << 4, scale.squeeze(2))


def svdquant(weight_NK: Tensor) -> QuantizedWeight:
    """A branch of rank 32 takes what singular vectors hold of the weight's outliers, and int4 the rest (SVDQuant: Li et
    al. 2024, arXiv 2411.05007; without its calibration).
    """
    wide = weight_NK.float()
    up_NR, down_RK = leading(wide, RANK)
    # the branch as it will be multiplied: its rounding is made up for by the codes
    up_NR, down_RK = up_NR.to(weight_NK.dtype), down_RK.to(weight_NK.dtype)
    rest = int4(wide - up_NR.float() @ down_RK.float())
    return QuantizedWeight("w4", rest.codes, rest.scale, down_RK=down_RK, up_NR=up_NR)


def leading(weight_NK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(N, R) and (R, K), whose product is about the best of that rank: a randomised SVD (Halko et al. 2011, arXiv
    0909.4061) from a fixed seed.
    """
    N, K = weight_NK.shape
    generator = torch.Generator(weight_NK.device if not weight_NK.is_meta else "cpu").manual_seed(0)
    size = (K, min(2 * rank, N, K))
    sketch = (
        weight_NK.new_empty(size)
        if weight_NK.is_meta
        else torch.randn(size, generator=generator, device=weight_NK.device)
    )
    basis = torch.linalg.qr(weight_NK @ sketch).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(weight_NK @ torch.linalg.qr(weight_NK.mT @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.mT @ weight_NK, full_matrices=False)
    root = s[:rank].sqrt()
    return (basis @ u[:, :rank]) * root, (root[:, None] * v[:rank]).contiguous()


def mxfp8(weight_NK: Tensor) -> QuantizedWeight:
    codes, scale = quantize_mx(weight_NK, "mxfp8", impl="torch")
    return QuantizedWeight("mxfp8", codes, scale)


def nvfp4(weight_NK: Tensor) -> QuantizedWeight:
    """The global scale makes the largest of all scales the largest number of e4m3."""
    whole = _scale(weight_NK.float().abs().amax().view(1), 6.0 * LARGEST["fp8"])
    codes, scale = quantize_mx(weight_NK, "nvfp4", global_scale=whole, impl="torch")
    return QuantizedWeight("nvfp4", codes, scale, global_scale=whole.expand(len(weight_NK)).contiguous())


def _scale(largest: Tensor, code: float) -> Tensor:
    return torch.where(largest > 0, largest / code, 1.0)


# -- with what activations were seen --------------------------------------------------


def with_fixed_scale(weight_NK: Tensor, largest_K: Tensor, kind: str) -> QuantizedWeight:
    """Activations of every token get the scale of the largest that was seen."""
    return replace(eight_bit(weight_NK, kind), input_scale=_scale(largest_K.float().amax().view(1), LARGEST[kind]))


def smoothed(weight_NK: Tensor, largest_K: Tensor, quantize: Callable[[Tensor], QuantizedWeight]) -> QuantizedWeight:
    """Of inputs divided by s, whose columns of the weight are multiplied by it: where a channel's inputs are large, its
    column counts for more when scales are chosen. s is the root of the largest input over the largest weight
    (SmoothQuant: Xiao et al. 2022, arXiv 2211.10438, equation 4 with alpha = 0.5).
    """
    largest_weight_K = weight_NK.float().abs().amax(0)
    known = (largest_K > 0) & (largest_weight_K > 0)
    smooth_K = torch.where(known, (largest_K.float() / largest_weight_K).sqrt(), 1.0).to(weight_NK.dtype)
    weight = quantize((weight_NK.float() * smooth_K.float()).to(weight_NK.dtype))
    if weight.down_RK is None:
        return replace(weight, smooth_K=smooth_K)
    down_RK = (weight.down_RK.float() / smooth_K.float()).to(weight_NK.dtype)  # it reads inputs as they are
    return replace(weight, smooth_K=smooth_K, down_RK=down_RK)


@dataclass(frozen=True)
class Tolerance:
    """What a scheme may cost; `sglang verify` measures it.

    Attributes:
        weights: largest relative L2 error of a layer's weights.
        rows: the same of the weights of one output, in which a wrong scale shows however large the layer is.
        outputs: the same of a layer's outputs, on the inputs that it gets in a model in full.
        latents: the same of the final latents of the embedded model's scenes.
        points: of 100, by which fewer of the embedded model's scenes may be right.
    """

    weights: float
    rows: float
    outputs: float
    latents: float
    points: float


@dataclass(frozen=True)
class Scheme:
    """A way to quantise.

    Attributes:
        quantize: weights (N, K) in any float dtype, or their shape alone ("meta"), to codes.
        calibrated: the same with the largest magnitude that was seen of each of the K inputs; None where scales of
            activations are their own in any case.
        columns, rows: of which a layer's inputs, and outputs, have to be a multiple.
        tolerance: up to 2.1 times the worst that the embedded model shows on a CPU (docs/quantization.md), where
            activations of mxfp8 and nvfp4 are numbers; on some GPUs they are codes. Rows are a bound against mistakes.
    """

    name: str
    quantize: Callable[[Tensor], QuantizedWeight]
    calibrated: Callable[[Tensor, Tensor], QuantizedWeight] | None
    columns: int
    rows: int
    tolerance: Tolerance


SCHEMES: Mapping[str, Scheme] = {
    s.name: s
    for s in (
        Scheme(
            "fp8", partial(eight_bit, kind="fp8"), partial(with_fixed_scale, kind="fp8"), 16, 16,
            Tolerance(0.03, 0.1, 0.055, 0.05, 2),
        ),
        Scheme("fp8_block", fp8_blocks, None, 16, 16, Tolerance(0.03, 0.1, 0.055, 0.05, 2)),
        Scheme(
            "int8", partial(eight_bit, kind="int8"), partial(with_fixed_scale, kind="int8"), 16, 16,
            Tolerance(0.012, 0.1, 0.03, 0.02, 2),
        ),
        Scheme(
            "int4", int4, partial(smoothed, quantize=int4), GROUP, 16,
            Tolerance(0.11, 0.3, 0.14, 0.14, 5),
        ),
        Scheme(
            "svdquant", svdquant, partial(smoothed, quantize=svdquant), GROUP, 16, Tolerance(0.1, 0.3, 0.11, 0.14, 2),
        ),
        Scheme("mxfp8", mxfp8, None, 32, 16, Tolerance(0.035, 0.15, 0.06, 0.05, 2)),
        Scheme("nvfp4", nvfp4, None, 16, 16, Tolerance(0.11, 0.3, 0.2, 0.16, 5)),
    )
}  # fmt: skip
