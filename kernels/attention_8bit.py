"""attention(q, k, v) with products of 8-bit numbers: softmax(q k^T * scale) v, nearly.

Shapes: q_BQHK, k_BSGK, v_BSGK in half precision -> out_BQHK and, if asked for, lse_BHQ. The launchers write L for both
lengths; they may differ. G divides H, as in `attention`.
Why: tensor cores multiply 8-bit numbers twice as fast as 16-bit ones, and attention over many tokens is all products.

    attention_int8   q k^T in int8; v and the weights as they are ("half"), or as with fp8 (SageAttention: Zhang et al.
                     2024, arXiv 2410.02367; SageAttention2: Zhang et al. 2024, arXiv 2411.10958)
    attention_fp8    q k^T and the product with v in e4m3

Every query has a scale of its own, which costs what one for a tile would; keys of a tile share one, and a channel of v
has one for all tokens. Weights times 2^8 are e4m3 as they are. k goes without its mean over the tokens (`smooth_k`):
that shifts all scores of a query alike, which no weight notices, and takes away what makes channels of k large.
Log-sums get it back.

Relative L2 error and cosine against attention in float64, 128 queries and 512 keys of 2 heads of 128 channels in bf16,
run by Triton's interpreter, which adds in fp32 where tensor cores of sm_89 and sm_90 have fewer bits:

                 q, k, v standard normal    and 8 more in a channel of k    or that channel 8 times as large
    int8, half   0.011  0.99994             0.011  0.99994                  0.047  0.9989
    int8, fp8    0.037  0.9993              0.037  0.9993                   0.058  0.9983
    fp8          0.052  0.9987              0.052  0.9987                   0.060  0.9982

Without smooth_k, 8 more in a channel of k costs "int8, half" 0.025, and log-sums of "fp8" are off by up to 0.09 instead
of 0.014.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.attention import (
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
    check_tensors,
    code_strides_of,
    has_head_scales,
    result_places,
)
from sgl_diffusion.kernels.attention_8bit_forms import attend_kernel, quantize_kernel, statistics_kernel
from sgl_diffusion.kernels.attention_reference import attention_reference, eager_attention, placed
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned
from sgl_diffusion.kernels.quantize import DTYPES, LARGEST, Format, code_format, require_fp8

# B batch  Q query tokens  S key tokens  H heads  G heads of k and v  K head dim  P parts of the tokens

Scores = Literal["int8", "fp8"]
Values = Literal["half", "fp8"]
VALUES: tuple[Values, ...] = ("half", "fp8")
MIN_DEPTH = 32  # of an 8-bit product on tensor cores
PARTS = 16  # of the tokens, whose means are added: enough programs for a GPU, few enough to be read by each tile
PART_ROWS = 32  # tokens that a program holds at once
KEYS_PER_SCALE = 64  # of the reference; a kernel's are those of its tile


class Tolerance(NamedTuple):
    """Against attention in float64: the largest relative L2 error, and the smallest cosine."""

    rel_l2: float
    cosine: float


# by the formats of scores and of values
TOLERANCES: Mapping[tuple[Scores, Values], Tolerance] = {
    ("int8", "half"): Tolerance(1.5e-2, 0.9999),
    ("int8", "fp8"): Tolerance(4.5e-2, 0.999),
    ("fp8", "fp8"): Tolerance(6e-2, 0.998),
}
LSE_REL_L2 = 5e-3
# with a channel of k 8 times as large as the others, whatever the format
OUTLIER_TOLERANCE = Tolerance(7e-2, 0.9975)


class Codes(NamedTuple):
    """What the attention kernel reads.

    q and k: channels filled up to a power of two, k's tokens to whole tiles. v: codes with channels before tokens, or
    the values themselves. v_scale: only with codes. mean_score: each query's score with the mean key, or None.
    """

    q_BHQK: Tensor
    k_BGSK: Tensor
    v: Tensor
    q_scale_BHQ: Tensor
    k_scale_BGT: Tensor
    v_scale_BGK: Tensor | None
    mean_score_BHQ: Tensor | None


# -- the launchers ----------------------------------------------------------------


def attention_int8(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor,
    *, out: Tensor | None = None, code_scale: Tensor | None = None, scale: float | None = None, pv: Values = "half",
    smooth_k: bool = True, return_lse: bool = False, impl: launch.Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention whose scores are int8 products. Returns `out`, or a new tensor like q.

    Args:
        q_BLHK, k_BLHK, v_BLHK: bf16 or fp16, for the reference also fp32; one dtype, any strides but a contiguous last
            dimension; k and v may be of another length than q, and have fewer heads, as long as those divide its heads.
        out: shape and dtype of q; may be a slice of a wider buffer.
        code_scale: as of `attention`.
        scale: of the scores, above 0; None is 1 / sqrt(K).
        pv: the product with v in the dtype of v ("half") or in e4m3 ("fp8", from sm_89 on).
        smooth_k: k without its mean over the tokens.
        return_lse: returns (out, lse_BHL): the logarithm of each query's softmax sum, in fp32.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; no keys; a `pv` that does not exist; for
            Triton, fp32, or a head dim outside 16..128.
        launch.Unsupported: pv="fp8" before sm_89.
    """
    if pv not in VALUES:
        raise ValueError(f"pv={pv!r}: expected {' or '.join(VALUES)}")
    return _attention("int8", q_BLHK, k_BLHK, v_BLHK, out, code_scale, scale, pv, smooth_k, return_lse, impl)


def attention_fp8(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor,
    *, out: Tensor | None = None, code_scale: Tensor | None = None, scale: float | None = None,
    smooth_k: bool = True, return_lse: bool = False, impl: launch.Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention whose products are both of e4m3 numbers; arguments and errors are those of `attention_int8`.

    Raises:
        launch.Unsupported: before sm_89.
    """
    return _attention("fp8", q_BLHK, k_BLHK, v_BLHK, out, code_scale, scale, "fp8", smooth_k, return_lse, impl)


def _attention(
    scores: Scores, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, code_scale: Tensor | None,
    scale: float | None, values: Values, smooth_k: bool, return_lse: bool, impl: launch.Impl,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    check_tensors(q, k, v, out, code_scale)
    B, Q, H, K = q.shape
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale}: expected a number above 0")
    if not launch.runs_triton(impl, q):
        return _reference(scores, q, k, v, out, code_scale, scale, values, smooth_k, return_lse)
    if q.dtype not in launch.HALF_DTYPES:
        raise ValueError(f"q_BLHK: dtype {q.dtype}, the kernel takes bfloat16 or float16; use impl='torch'")
    if not MIN_HEAD_DIM <= K <= MAX_HEAD_DIM:
        raise ValueError(f"q_BLHK: head dim {K}, the kernel takes {MIN_HEAD_DIM}..{MAX_HEAD_DIM}; use impl='torch'")
    if "fp8" in (scores, values) and launch.architecture() == "sm_80":
        raise launch.Unsupported(f"attention_{scores}: fp8 needs a GPU of sm_89 or later")
    if code_scale is not None and out is not None:
        require_fp8(code_format(out, code_scale))
    if out is None:
        out = q.new_empty(B, Q, H, K)
    lse = q.new_empty(B, H, Q, dtype=torch.float32) if return_lse else None
    if q.numel():
        block_k = max(MIN_DEPTH, triton.next_power_of_2(K))
        tile = launch.tile(f"attention_{scores}", head_dim=block_k, fp8_values=int(values == "fp8"))
        scale_log2 = (K**-0.5 if scale is None else scale) * math.log2(math.e)
        with launch.on_device(q):
            codes = _quantize(scores, q, k, v, values, smooth_k, return_lse, scale_log2, block_k, tile["BLOCK_S"])
            _attend(codes, q.shape, k.shape, out, code_scale, lse, block_k, tile)
    return out if lse is None else (out, lse)


def _quantize(
    scores: Scores, q: Tensor, k: Tensor, v: Tensor, values: Values, smooth_k: bool, return_lse: bool,
    scale_log2: float, block_k: int, block_s: int,
) -> Codes:  # fmt: skip
    (B, Q, H, K), (S, G) = q.shape, k.shape[1:3]
    tiles = triton.cdiv(S, block_s)
    fp32 = torch.float32
    k_sum = q.new_empty(B, G, PARTS, block_k, dtype=fp32) if smooth_k else None
    v_amax = q.new_empty(B, G, PARTS, block_k, dtype=fp32) if values == "fp8" else None
    codes = Codes(
        q.new_empty(B, H, Q, block_k, dtype=DTYPES[scores]),
        q.new_empty(B, G, tiles * block_s, block_k, dtype=DTYPES[scores]),
        v if v_amax is None else q.new_empty(B, G, block_k, tiles * block_s, dtype=DTYPES["fp8"]),
        q.new_empty(B, H, Q, dtype=fp32),
        q.new_empty(B, G, tiles, dtype=fp32),
        None if v_amax is None else q.new_empty(B, G, block_k, dtype=fp32),
        q.new_empty(B, H, Q, dtype=fp32) if smooth_k and return_lse else None,
    )
    if k_sum is not None or v_amax is not None:
        part = triton.cdiv(triton.cdiv(S, PARTS), PART_ROWS) * PART_ROWS
        statistics_kernel[(PARTS, B * G)](
            k, v, k_sum, v_amax, *k.stride()[:3], *v.stride()[:3], S, G, K, part,
            BLOCK_K=block_k, ROWS=PART_ROWS, PARTS=PARTS, enable_fp_fusion=True,
        )  # fmt: skip
    quantize_kernel[(triton.cdiv(max(Q, S), block_s), B * H, 2 if v_amax is None else 3)](
        q, k, v, k_sum, v_amax, codes.q_BHQK, codes.k_BGSK, None if v_amax is None else codes.v,
        codes.q_scale_BHQ, codes.k_scale_BGT, codes.v_scale_BGK, codes.mean_score_BHQ,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], Q, S, H, G, K, tiles * block_s, scale_log2,
        BLOCK_K=block_k, BLOCK_S=block_s, PARTS=PARTS, LARGEST=LARGEST[scores], INTEGER=scores == "int8",
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return codes


def _attend(
    codes: Codes, q_shape: torch.Size, k_shape: torch.Size, out: Tensor, code_scale: Tensor | None,
    lse: Tensor | None, block_k: int, tile: launch.Tile,
) -> None:  # fmt: skip
    (B, Q, H, K), (S, G) = q_shape, k_shape[1:3]
    attend_kernel[(triton.cdiv(Q, tile["BLOCK_Q"]), B * H)](
        codes.q_BHQK, codes.k_BGSK, codes.v, codes.q_scale_BHQ, codes.k_scale_BGT, codes.v_scale_BGK,
        codes.mean_score_BHQ, out, code_scale, lse, *codes.v.stride()[:3], *out.stride()[:3],
        *code_strides_of(code_scale),
        *((0, 0) if lse is None else lse.stride()[:2]), Q, S, H, H // G, K, codes.k_BGSK.shape[2],
        BLOCK_K=block_k, PADDED=block_k != K, INTEGER=codes.q_BHQK.dtype == torch.int8,
        FP8_VALUES=codes.v_scale_BGK is not None, HEAD_SCALES=has_head_scales(code_scale),
        enable_fp_fusion=True, **tile,
    )  # fmt: skip


# -- in PyTorch -------------------------------------------------------------------


def _reference(
    scores: Scores, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, code_scale: Tensor | None,
    scale: float | None, values: Values, smooth_k: bool, return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over the numbers that the codes stand for; the weights keep their precision."""
    dtype, shared = q.dtype, q.shape[2] // k.shape[2]
    q, k, v = map(launch.widen, (q, k, v))
    mean = k.mean(1, keepdim=True)
    if smooth_k:
        k = k - mean
    near_q = _rounded(q, q.abs().amax(-1, keepdim=True), scores)
    tiles = F.pad(k, (0, 0, 0, 0, 0, -k.shape[1] % KEYS_PER_SCALE)).unflatten(1, (-1, KEYS_PER_SCALE))
    near_k = _rounded(tiles, tiles.abs().amax((2, 4), keepdim=True), scores).flatten(1, 2)[:, : k.shape[1]]
    near_v = _rounded(v, v.abs().amax(1, keepdim=True), "fp8") if values == "fp8" else v
    result = attention_reference(near_q, near_k, near_v, scale=scale, return_lse=return_lse)
    result, lse = result if isinstance(result, tuple) else (result, None)
    out = result.to(dtype) if out is None else placed(result, out, code_scale)
    if lse is None:
        return out
    if smooth_k:
        scores_of_mean = (q * mean.repeat_interleave(shared, 2)).sum(-1).transpose(1, 2)
        lse = lse + scores_of_mean * (q.shape[-1] ** -0.5 if scale is None else scale)
    return out, lse


def _rounded(x: Tensor, amax: Tensor, format: Scores) -> Tensor:
    """x as its codes have it, whose largest stands for `amax`."""
    scale = torch.where(amax > 0, amax / LARGEST[format], 1.0)
    codes = x / scale
    return (codes.round() if format == "int8" else codes.to(DTYPES[format]).to(x.dtype)) * scale


def _int8_reference(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, out: Tensor | None = None, code_scale: Tensor | None = None,
    scale: float | None = None, pv: Values = "half", smooth_k: bool = True, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    return _reference("int8", q_BLHK, k_BLHK, v_BLHK, out, code_scale, scale, pv, smooth_k, return_lse)


def _fp8_reference(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, out: Tensor | None = None, code_scale: Tensor | None = None,
    scale: float | None = None, smooth_k: bool = True, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    return _reference("fp8", q_BLHK, k_BLHK, v_BLHK, out, code_scale, scale, "fp8", smooth_k, return_lse)


def _eager(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, out: Tensor, code_scale: Tensor | None, **how: Any
) -> Tensor:
    """As diffusers runs it, in the dtype of the inputs and without log-sums."""
    return eager_attention(q_BLHK, k_BLHK, v_BLHK, out, code_scale)


# -- cases ------------------------------------------------------------------------


def _inputs(
    device: str, dtype: torch.dtype, B: int, Q: int, S: int, H: int, K: int, G: int | None = None,
    outlier: float = 0.0, coded: Format | None = None, **how: Any,
) -> Inputs:  # fmt: skip
    """G: heads of k and v, by default H. outlier: what every token of one channel of k has more."""
    G = G or H
    k_BSGK = noise((B, S, G, K), dtype, device, 1)
    k_BSGK[..., K // 3] += outlier
    longer, wider = poisoned((B, S + 3, G, K), dtype, device), poisoned((B, S, G, 2 * K), dtype, device)
    return {
        "q_BLHK": noise((B, Q, H, K), dtype, device),
        "k_BLHK": inside(longer, k_BSGK, slice(0, S), slice(None), slice(None)),
        "v_BLHK": inside(wider, noise((B, S, G, K), dtype, device, 2), slice(0, K)),
        **result_places(device, dtype, B, Q, H, K, coded),
        **how,
    }


def _bytes(i: Inputs) -> int:
    """Codes are scratch, as a statistic is: q, k, v and out move once."""
    return 2 * i["q_BLHK"].nbytes + i["k_BLHK"].nbytes + i["v_BLHK"].nbytes


def _flops(i: Inputs) -> int:
    return 4 * i["q_BLHK"].numel() * i["k_BLHK"].shape[1]


def _tolerance(scores: Scores) -> dict[torch.dtype, float]:
    """Of results, the larger for either format of values, and of their codes; of log-sums, which are in fp32."""
    results = (*launch.HALF_DTYPES, torch.float8_e4m3fn)
    return dict.fromkeys(results, TOLERANCES[scores, "fp8"].rel_l2) | {torch.float32: LSE_REL_L2}


INT8_OP = Op(
    name="attention_int8",
    formula="softmax(q k^T * scale) v, scores of int8 codes of q and of k - mean(k), weights and v in half or e4m3",
    replaces="scaled_dot_product_attention",
    launch=attention_int8,
    reference=_int8_reference,
    eager=_eager,
    inputs=_inputs,
    tiny=(
        {"B": 1, "Q": 1, "S": 1, "H": 1, "K": 16},
        {"B": 2, "Q": 33, "S": 130, "H": 2, "G": 1, "K": 64, "outlier": 8.0},
        {"B": 1, "Q": 70, "S": 77, "H": 1, "K": 48, "pv": "fp8", "return_lse": True, "smooth_k": False},
        {"B": 1, "Q": 40, "S": 100, "H": 2, "K": 128, "pv": "fp8", "return_lse": True, "outlier": 8.0},
    ),
    production=(
        {"B": 1, "Q": 4608, "S": 4608, "H": 24, "K": 128},
        {"B": 1, "Q": 4608, "S": 4608, "H": 24, "K": 128, "pv": "fp8"},
        {"B": 1, "Q": 4608, "S": 4608, "H": 24, "K": 128, "coded": "fp8_block"},
        {"B": 1, "Q": 4096, "S": 4096, "H": 24, "K": 64, "return_lse": True},
    ),
    cpu=({"B": 1, "Q": 1024, "S": 1024, "H": 12, "K": 64},),
    forms=({"BLOCK_Q": 128, "BLOCK_S": 128, "STAGES": 2, "num_warps": 8},),
    bytes=_bytes,
    flops=_flops,
    dtypes=launch.HALF_DTYPES,
    tolerance=_tolerance("int8"),
)

FP8_OP = Op(
    name="attention_fp8",
    formula="softmax(q k^T * scale) v, of e4m3 codes of q, k - mean(k), the weights and v",
    replaces="scaled_dot_product_attention",
    launch=attention_fp8,
    reference=_fp8_reference,
    eager=_eager,
    inputs=_inputs,
    tiny=(
        {"B": 1, "Q": 1, "S": 1, "H": 1, "K": 16},
        {"B": 2, "Q": 33, "S": 130, "H": 2, "G": 1, "K": 64, "return_lse": True, "outlier": 8.0},
        {"B": 1, "Q": 70, "S": 77, "H": 1, "K": 48, "smooth_k": False},
    ),
    production=(
        {"B": 1, "Q": 4608, "S": 4608, "H": 24, "K": 128},
        {"B": 1, "Q": 4608, "S": 4608, "H": 24, "K": 128, "coded": "fp8_block"},
    ),
    cpu=({"B": 1, "Q": 1024, "S": 1024, "H": 12, "K": 64},),
    forms=({"BLOCK_Q": 128, "BLOCK_S": 128, "STAGES": 2, "num_warps": 8},),
    bytes=_bytes,
    flops=_flops,
    dtypes=launch.HALF_DTYPES,
    tolerance=_tolerance("fp8"),
)
