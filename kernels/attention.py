"""out = softmax(q k^T * scale) v over the keys a query may see, per head, in fp32 with a running maximum.

Shapes: q_BQHK, k_BSGK, v_BSGK -> out_BQHK and, if asked for, lse_BHQ = log(sum(exp(q k^T * scale))). The launcher
writes L for both lengths; they may differ. G divides H: each head of k and v serves H / G consecutive heads of q.
Why: the score matrix never leaves the chip (Dao 2023, FlashAttention-2), and the result goes into a
slice of the output projection's input, so that [attention, MLP] is never concatenated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sgl_diffusion.kernels import launch
from sgl_diffusion.kernels.attention_forms import pointer_kernel, tma_kernel, two_tiles_kernel, ws_kernel
from sgl_diffusion.kernels.attention_reference import Visible, attention_reference, eager_attention
from sgl_diffusion.kernels.op import Inputs, Op, inside, noise, poisoned
from sgl_diffusion.kernels.quantize import DTYPES, SCALE_BLOCK, Format, code_format, require_fp8, some_scale

# B batch  Q query tokens  S key tokens  H heads  G heads of k and v  K head dim
# of the Triton kernels: a tensor core's depth, and what registers hold
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128

# fp32 as three tf32 products on tensor cores: as good, and "ieee" spills registers on every tile
FP32_PRODUCT = "tf32x3"

Form = Literal["pointer", "tma", "ws", "two_tiles"]
# what a form needs of `bulk_copies`
BULK_COPIES: Mapping[Form, int] = {"pointer": 0, "ws": 1, "tma": 2, "two_tiles": 2}
BULK_ALIGNMENT = 16  # bytes, of addresses and strides
MAX_BLOCK_S = 128  # keys of a tile


ALL = Visible()


# -- the launcher -----------------------------------------------------------------


@overload
def attention(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = ..., code_scale: Tensor | None = ...,
    scale: float | None = ..., causal: bool = ..., key_mask_BS: Tensor | None = ..., cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ..., max_seqlen_q: int | None = ..., return_lse: Literal[False] = ...,
    impl: launch.Impl = ...,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, *, out: Tensor | None = ..., code_scale: Tensor | None = ...,
    scale: float | None = ..., causal: bool = ..., key_mask_BS: Tensor | None = ..., cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ..., max_seqlen_q: int | None = ..., return_lse: Literal[True],
    impl: launch.Impl = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor,
    *, out: Tensor | None = None, code_scale: Tensor | None = None, scale: float | None = None,
    causal: bool = False, key_mask_BS: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, return_lse: bool = False,
    impl: launch.Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention. Returns `out`, or a new tensor like q; a query that sees no key gets 0.

    Args:
        q_BLHK, k_BLHK, v_BLHK: one dtype, any strides but a contiguous last dimension; k and v may
            be of another length than q, and have fewer heads, as long as those divide the heads of q.
        out: shape and dtype of q; may be a slice of a wider buffer.
        code_scale: fp32; `out` is 8-bit codes beside it. (1,) is the scale of all of them, to which they saturate;
            (B, L, H), of e4m3 and a head dim of 128, is where those of heads go, with a contiguous last dimension.
        scale: of the scores, above 0; None is 1 / sqrt(K).
        causal: query i sees keys 0..i, also where the lengths differ (the mask's diagonal starts top-left).
        key_mask_BS: bool, True where a key is seen; for padding.
        cu_seqlens_q, cu_seqlens_k: for sequences of different lengths packed into one sample, (1, total, H, K):
            int32, where each begins, and the totals. A query sees the keys of its own sequence.
        max_seqlen_q: of the packed sequences, at least the longest's length of q; longer ones would be cut.
        return_lse: returns (out, lse_BHL): the logarithm of each query's softmax sum, in fp32; -inf without keys.
    Raises:
        ValueError: a shape, dtype, device or stride that does not fit; no keys; for Triton, a head
            dim outside 16..128.
    """
    visible = Visible(causal, key_mask_BS, cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
    check_tensors(q_BLHK, k_BLHK, v_BLHK, out, code_scale)
    _check_visible(q_BLHK, k_BLHK, visible)
    B, Q, H, K = q_BLHK.shape
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale}: expected a number above 0")
    if not launch.runs_triton(impl, q_BLHK):
        return attention_reference(
            q_BLHK, k_BLHK, v_BLHK, out=out, code_scale=code_scale, scale=scale, return_lse=return_lse,
            **visible._asdict(),
        )  # fmt: skip
    if not MIN_HEAD_DIM <= K <= MAX_HEAD_DIM:
        raise ValueError(f"q_BLHK: head dim {K}, the kernel takes {MIN_HEAD_DIM}..{MAX_HEAD_DIM}; use impl='torch'")
    if code_scale is not None and out is not None:
        require_fp8(code_format(out, code_scale))
    if out is None:
        out = q_BLHK.new_empty(B, Q, H, K)
    lse = q_BLHK.new_empty(B, H, Q, dtype=torch.float32) if return_lse else None
    if q_BLHK.numel():
        scale_log2 = (K**-0.5 if scale is None else scale) * math.log2(math.e)
        with launch.on_device(q_BLHK):
            _launch(q_BLHK, k_BLHK, v_BLHK, out, code_scale, lse, visible, scale_log2)
    return out if lse is None else (out, lse)


def form_for(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, visible: Visible = ALL) -> tuple[Form, launch.Tile]:
    """The form a launch takes and its tile, from the table; "pointer" if the table asks for what cannot be done."""
    block_k = triton.next_power_of_2(q_BLHK.shape[-1])
    bulk = bulk_copies(q_BLHK, k_BLHK, v_BLHK, visible)
    tile = launch.tile("attention", head_dim=block_k, itemsize=q_BLHK.element_size(), bulk=bulk)
    form: Form = tile.pop("form", "pointer")
    return (form if bulk >= BULK_COPIES[form] else "pointer"), tile


def bulk_copies(q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, visible: Visible = ALL) -> int:
    """What the bulk copy engine of sm_90 and later can fetch: 0 nothing, 1 tiles of one head, 2 tiles of a matrix.

    1: every query sees every key of its sample (no mask, not causal, not packed), and addresses and strides are
    multiples of 16 bytes. 2: besides, q, k and v are each a matrix of tokens by channels of all heads, the head dim is
    a power of two, and no tile of keys runs from one sample into the next.
    """
    tensors = (q_BLHK, k_BLHK, v_BLHK)
    B, S, _, K = k_BLHK.shape
    if visible != ALL or not all(map(_aligned, tensors)):
        return 0
    whole = B == 1 or S % MAX_BLOCK_S == 0
    return 2 if whole and triton.next_power_of_2(K) == K and all(map(_is_matrix, tensors)) else 1


def _aligned(x_BLHK: Tensor) -> bool:
    """For the copy engine, at the start of every token, head and sample."""
    strides = [x_BLHK.stride(1), *(x_BLHK.stride(i) for i in (0, 2) if x_BLHK.shape[i] > 1)]
    return all(at % BULK_ALIGNMENT == 0 for at in (x_BLHK.data_ptr(), *(s * x_BLHK.element_size() for s in strides)))


def _is_matrix(x_BLHK: Tensor) -> bool:
    """Rows are tokens, evenly apart over all samples, and columns the channels of all heads."""
    B, L, H, K = x_BLHK.shape
    evenly = B == 1 or x_BLHK.stride(0) == L * x_BLHK.stride(1)
    return evenly and (H - 1) * x_BLHK.stride(2) + K <= x_BLHK.stride(1)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, code_scale: Tensor | None, lse: Tensor | None, visible: Visible,
    scale_log2: float,
) -> None:  # fmt: skip
    form, tile = form_for(q, k, v, visible)
    (B, Q, H, K), (S, G) = q.shape, k.shape[1:3]
    lse_strides = (0, 0) if lse is None else lse.stride()[:2]
    code_strides = code_strides_of(code_scale)
    sizes = (Q, S, H, H // G, K, scale_log2)
    constants: dict[str, Any] = {
        "BLOCK_K": triton.next_power_of_2(K), "PRECISION": FP32_PRODUCT, "HEAD_SCALES": has_head_scales(code_scale),
        "enable_fp_fusion": True, **tile,
    }  # fmt: skip
    if form == "pointer":
        starts_q, starts_k, mask = visible.cu_seqlens_q, visible.cu_seqlens_k, visible.key_mask_BS
        # fp32, so that keys two by two load in 8 bytes, and a mask costs an addition
        bias = None if mask is None else torch.where(mask, 0.0, -math.inf).contiguous()
        if starts_q is not None:
            B, Q = len(starts_q) - 1, visible.max_seqlen_q or Q
        pointer_kernel[(triton.cdiv(Q, tile["BLOCK_Q"]), B * H)](
            q, k, v, out, code_scale, lse, bias, starts_q, starts_k,
            *(stride for x in (q, k, v, out) for stride in (x.stride(0) if starts_q is None else 0, *x.stride()[1:3])),
            *(code_strides if starts_q is None else (0, code_strides[1])),
            *(lse_strides if starts_q is None else (0, lse_strides[1])), *sizes,
            PADDED=constants["BLOCK_K"] != K, CAUSAL=visible.causal,
            # a second copy of the loop's body, for the tail alone, spills registers here
            ONE_LOOP=visible.causal or q.element_size() == 4, **constants,
        )  # fmt: skip
        return
    constants["RAGGED"] = S % tile["BLOCK_S"] != 0
    if form == "ws":
        triton.set_allocator(_scratch)
        ws_kernel[(triton.cdiv(Q, tile["BLOCK_Q"]), B * H)](
            q, k, v, out, code_scale, lse, *(stride for x in (q, k, v, out) for stride in x.stride()[:3]),
            *code_strides, *lse_strides,
            *sizes, **constants,
        )  # fmt: skip
        return
    kernel, queries = (tma_kernel, 1) if form == "tma" else (two_tiles_kernel, 2)
    kernel[(triton.cdiv(Q, queries * tile["BLOCK_Q"]), B * H)](
        _matrix(q, tile["BLOCK_Q"]), _matrix(k, tile["BLOCK_S"]), _matrix(v, tile["BLOCK_S"]), out, code_scale,
        lse, q.stride(2), k.stride(2), v.stride(2), *out.stride()[:3], *code_strides, *lse_strides,
        *sizes, **constants,
    )  # fmt: skip


def _matrix(x_BLHK: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` tokens of one head."""
    B, L, H, K = x_BLHK.shape
    return TensorDescriptor(x_BLHK, [B * L, (H - 1) * x_BLHK.stride(2) + K], [x_BLHK.stride(1), 1], [rows, K])


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for descriptors made in a kernel; PyTorch's blocks are aligned well enough."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


# -- arguments --------------------------------------------------------------------


def has_head_scales(code_scale: Tensor | None) -> bool:
    return code_scale is not None and code_scale.ndim > 1


def code_strides_of(code_scale: Tensor | None) -> tuple[int, int]:
    """Between samples and tokens."""
    return (0, 0) if code_scale is None or code_scale.ndim == 1 else (code_scale.stride(0), code_scale.stride(1))


def check_tensors(
    q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor, out: Tensor | None, code_scale: Tensor | None = None
) -> None:
    launch.check_float(q_BLHK, q_BLHK=q_BLHK, k_BLHK=k_BLHK, v_BLHK=v_BLHK)
    launch.check_ndim(4, q_BLHK=q_BLHK, k_BLHK=k_BLHK)
    B, Q, H, K = q_BLHK.shape
    S, G = k_BLHK.shape[1:3]
    if S == 0:
        raise ValueError(f"k_BLHK: shape {tuple(k_BLHK.shape)}, expected at least one key")
    if G == 0 or H % G:
        raise ValueError(f"k_BLHK: {G} heads, expected a divisor of the {H} heads of q_BLHK")
    launch.check_shape((B, S, G, K), k_BLHK=k_BLHK, v_BLHK=v_BLHK)
    launch.check_dtype(q_BLHK.dtype, k_BLHK=k_BLHK, v_BLHK=v_BLHK)
    launch.check_last_dim(q_BLHK=q_BLHK, k_BLHK=k_BLHK, v_BLHK=v_BLHK)
    if code_scale is not None:
        if out is None:
            raise ValueError("out: expected a place for codes beside code_scale")
        launch.check_device(q_BLHK, code_scale=code_scale, out=out)
        launch.check_dtype(torch.float32, code_scale=code_scale)
        launch.check_last_dim(code_scale=code_scale)
        blocks = has_head_scales(code_scale)
        if blocks and K != SCALE_BLOCK:
            raise ValueError(f"code_scale: expected one, as heads are of {K} channels and not {SCALE_BLOCK}")
        launch.check_shape((B, Q, H) if blocks else (1,), code_scale=code_scale)
        if blocks or out.dtype != torch.int8:
            launch.check_dtype(torch.float8_e4m3fn, out=out)
    if out is not None:
        launch.check_device(q_BLHK, out=out)
        launch.check_shape((B, Q, H, K), out=out)
        launch.check_last_dim(out=out)
        if code_scale is None:
            launch.check_dtype(q_BLHK.dtype, out=out)


def _check_visible(q_BLHK: Tensor, k_BLHK: Tensor, visible: Visible) -> None:
    _, mask, starts_q, starts_k, longest = visible
    B, S = k_BLHK.shape[:2]
    for name, x in {"key_mask_BS": mask, "cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}.items():
        if x is not None and x.device != q_BLHK.device:
            raise ValueError(f"{name}: on {x.device}, the other tensors are on {q_BLHK.device}")
    if mask is not None:
        launch.check_dtype(torch.bool, key_mask_BS=mask)
        launch.check_shape((B, S), key_mask_BS=mask)
    if starts_q is None or starts_k is None or longest is None:
        if not (starts_q is None and starts_k is None and longest is None):
            raise ValueError("cu_seqlens_q, cu_seqlens_k, max_seqlen_q: expected all three, or none")
        return
    if mask is not None:
        raise ValueError("key_mask_BS: expected None beside cu_seqlens_q; leave keys out of the packed sequence")
    if B != 1:
        raise ValueError(f"q_BLHK: shape {tuple(q_BLHK.shape)}, expected one sample, (1, total, H, K)")
    launch.check_ndim(1, cu_seqlens_q=starts_q)
    launch.check_shape(tuple(starts_q.shape), cu_seqlens_k=starts_k)
    launch.check_dtype(torch.int32, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
    launch.check_contiguous(cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)
    if longest < 1:
        raise ValueError(f"max_seqlen_q={longest}: expected at least 1")
    if len(starts_q) < 2:
        raise ValueError(f"cu_seqlens_q: shape {tuple(starts_q.shape)}, expected one more than there are sequences")


# -- cases ------------------------------------------------------------------------


def _inputs(
    device: str, dtype: torch.dtype, B: int, Q: int, S: int, H: int, K: int, G: int | None = None,
    masked: bool = False, packed: tuple[tuple[int, ...], ...] = (), coded: Format | None = None, **options: bool,
) -> Inputs:  # fmt: skip
    """G: heads of k and v, by default H. packed: lengths of the sequences in q and in k."""
    G = G or H
    longer, wider = poisoned((B, S + 3, G, K), dtype, device), poisoned((B, S, G, 2 * K), dtype, device)
    inputs: Inputs = {
        "q_BLHK": noise((B, Q, H, K), dtype, device),
        "k_BLHK": inside(longer, noise((B, S, G, K), dtype, device, 1), slice(0, S), slice(None), slice(None)),
        "v_BLHK": inside(wider, noise((B, S, G, K), dtype, device, 2), slice(0, K)),
        **result_places(device, dtype, B, Q, H, K, coded),
        **options,
    }
    if masked:
        inputs["key_mask_BS"] = noise((B, S), torch.float32, device, 3) > -0.5
        inputs["key_mask_BS"][:, 0] = True
    if packed:
        starts = [torch.tensor([0, *lengths]).cumsum(0).int().to(device) for lengths in packed]
        inputs |= {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "max_seqlen_q": max(packed[0])}
    return inputs


def result_places(
    device: str, dtype: torch.dtype, B: int, Q: int, H: int, K: int, coded: Format | None
) -> dict[str, Tensor | None]:
    """Slices of wider buffers, for numbers or codes."""
    if coded is None:
        wide, code_scale = poisoned((B, Q, 5 * H * K), dtype, device), None
    else:
        wide = torch.zeros((B, Q, 5 * H * K), dtype=DTYPES[coded], device=device)
        code_scale = some_scale(device, coded, 1)
        if coded == "fp8_block":
            code_scale = poisoned((B, Q, 2 * H), torch.float32, device)[..., H:]
    return {"out": wide[..., : H * K].unflatten(-1, (H, K)), "code_scale": code_scale}


def _flops(i: Inputs) -> int:
    """Two products over every pair of a query and a key it sees, masked keys included."""
    H, K = i["q_BLHK"].shape[2:]
    lengths = [(i["q_BLHK"].shape[1], i["k_BLHK"].shape[1])] * len(i["q_BLHK"])
    if "cu_seqlens_q" in i:
        lengths = list(zip(*(i[name].diff().tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")), strict=True))
    pairs = 0
    for Q, S in lengths:
        above_diagonal = min(Q, S) * (2 * S - min(Q, S) - 1) // 2
        pairs += Q * S - (above_diagonal if i.get("causal") else 0)
    return 4 * H * K * pairs


OP = Op(
    name="attention",
    formula="softmax(q k^T * scale) v",
    replaces="scaled_dot_product_attention, cat",
    launch=attention,
    reference=attention_reference,
    eager=eager_attention,
    inputs=_inputs,
    tiny=(
        {"B": 1, "Q": 1, "S": 1, "H": 1, "K": 16},
        {"B": 2, "Q": 20, "S": 20, "H": 2, "K": 64},
        {"B": 1, "Q": 17, "S": 40, "H": 1, "K": 48},
        {"B": 1, "Q": 33, "S": 32, "H": 2, "G": 1, "K": 128, "return_lse": True},
        {"B": 1, "Q": 40, "S": 33, "H": 2, "K": 16, "causal": True, "return_lse": True},
        {"B": 2, "Q": 17, "S": 40, "H": 1, "K": 96, "masked": True, "causal": True, "return_lse": True},
        {"B": 1, "Q": 41, "S": 59, "H": 2, "G": 1, "K": 16, "packed": ((17, 1, 23), (40, 18, 1)), "return_lse": True},
        {"B": 1, "Q": 37, "S": 37, "H": 1, "K": 32, "packed": ((20, 17), (20, 17)), "causal": True},
        {"B": 2, "Q": 33, "S": 32, "H": 3, "K": 128, "coded": "fp8_block"},
        {"B": 1, "Q": 37, "S": 37, "H": 2, "K": 128, "packed": ((20, 17), (20, 17)), "coded": "fp8_block"},
        {"B": 2, "Q": 33, "S": 20, "H": 2, "K": 64, "coded": "int8"},
        {"B": 1, "Q": 17, "S": 40, "H": 1, "K": 48, "coded": "fp8"},
    ),
    production=(
        {"B": 1, "Q": 4608, "S": 4608, "H": 24, "K": 128},
        {"B": 1, "Q": 4608, "S": 4608, "H": 24, "K": 128, "coded": "fp8_block"},
        {"B": 1, "Q": 4608, "S": 4608, "H": 24, "K": 128, "coded": "fp8"},
        {"B": 1, "Q": 4096, "S": 4096, "H": 24, "K": 64},
        {"B": 2, "Q": 4096, "S": 512, "H": 12, "K": 128},
        {"B": 1, "Q": 1000, "S": 1000, "H": 8, "K": 80},
        {"B": 1, "Q": 8190, "S": 8190, "H": 10, "K": 128, "return_lse": True},
        {"B": 2, "Q": 512, "S": 512, "H": 32, "G": 8, "K": 128, "masked": True, "causal": True},
        {"B": 1, "Q": 8448, "S": 8448, "H": 24, "K": 128, "packed": ((4160, 4288), (4160, 4288))},
        {"B": 2, "Q": 77, "S": 77, "H": 12, "K": 64, "causal": True},
    ),
    cpu=({"B": 1, "Q": 1024, "S": 1024, "H": 12, "K": 64},),
    forms=(
        {"form": "ws", "BLOCK_Q": 128, "BLOCK_S": 128, "STAGES": 2, "num_warps": 4},
        {"form": "two_tiles", "BLOCK_Q": 64, "BLOCK_S": 64, "STAGES": 2, "num_warps": 4},
        {"form": "tma", "BLOCK_Q": 128, "BLOCK_S": 128, "STAGES": 2, "num_warps": 8},
    ),
    bytes=lambda i: 2 * i["q_BLHK"].nbytes + i["k_BLHK"].nbytes + i["v_BLHK"].nbytes,
    flops=_flops,
    # the weights are rounded to the dtype of v before the second product, which moves some codes by one
    tolerance={
        torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4,
        torch.float8_e4m3fn: 2e-2, torch.int8: 1e-2,
    },
)
