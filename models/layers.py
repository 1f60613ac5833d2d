"""Parts that several families share. Parameter names follow the diffusers classes named in each docstring."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgl_diffusion.kernels.activation import activation
from sgl_diffusion.kernels.gemm import gemm
from sgl_diffusion.kernels.modulation import modulation
from sgl_diffusion.kernels.norm import norm
from sgl_diffusion.kernels.qk_norm_rope import Stream, qk_norm_rope
from sgl_diffusion.kernels.quantize import SCALE_BLOCK, Format, code_format, quantize_rows
from sgl_diffusion.kernels.residual import gate_residual, residual_norm
from sgl_diffusion.models.family import ONE_RANK, AttentionFn, Split, inputs, outputs

# B batch  T text tokens  I image tokens  L = T + I  R = B * L rows  H heads  K head dim  D = H * K width
# P = K / 2 rotary pairs  G groups of rows with one modulation
# M timesteps x batch  V modulation vectors
VECTORS_OF_A_SLICE = 12  # of modulation: as many weights as a small block has
ALL_FORMATS: tuple[Format, ...] = ("fp8_block", "fp8", "int8")  # `swiglu_at` and `attend_at` leave codes of any


class Linear(nn.Linear):
    """A linear layer with what may follow it in one launch; arguments and result as of `kernels.gemm`."""

    def forward(self, x: Tensor, **epilogue: Any) -> Any:  # type: ignore[override]
        # rows of several samples, cut from a longer sequence, are not evenly apart
        return gemm(x.contiguous(), self.weight, self.bias, **epilogue)


# -- what a quantised layer reads ----------------------------------------------------


@dataclass(frozen=True)
class Codes:
    """Rows as 8-bit codes, by the pass that made them; where a model hands rows on, they stand for a tensor.

    A place for codes, see `code_place`, may be what a layer writes to: its `out`, or `tail`.

    Attributes:
        values: (..., D), see `kernels.quantize`.
        scale: fp32 (...), or (..., D / 128); or (1,), one that was known before them.
        dtype: of the numbers they stand for, and of what a layer makes of them.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __getitem__(self, rows: slice | tuple[slice, ...]) -> Codes:
        return Codes(self.values[rows], self.scale if self.is_known else self.scale[rows], self.dtype)

    def view(self, batch: int, tokens: int, width: int) -> Codes:
        """Of rows (R, D), those of each sample."""
        scale = self.scale if self.is_known else self.scale.view(batch, tokens, *self.scale.shape[1:])
        return Codes(self.values.view(batch, tokens, width), scale, self.dtype)

    @property
    def is_known(self) -> bool:
        """Whether all have one scale, or there is but one row, for which that is the same."""
        return self.scale.shape == (1,)

    def new_empty(self, *shape: int) -> Tensor:
        return self.values.new_empty(*shape, dtype=self.dtype)

    def split(self, widths: Sequence[int], dim: int = -1) -> list[Codes]:
        """A place's parts, side by side; where blocks have scales, all but the last are whole blocks wide."""
        assert dim == -1, "codes are of rows"
        blocks = [-(-width // SCALE_BLOCK) for width in widths]
        scales = self.scale.split(blocks, dim=-1) if self.scale.ndim > 1 else [self.scale] * len(widths)
        return [Codes(*part, self.dtype) for part in zip(self.values.split(widths, dim=-1), scales, strict=True)]

    def take(self, x: Tensor) -> None:
        """A place's codes, of numbers that somebody wrote who had no codes."""
        quantize_rows(x, code_format(self.values, self.scale), scale=self.scale, out=self.values)


def read_by(*layers: nn.Module) -> Format | None:
    """The 8-bit format in which all these layers read their input, with scales of their own for every row; None if one
    of them does not.
    """
    formats = {None if scale_of(layer) is not None else getattr(layer, "reads", None) for layer in layers}
    return formats.pop() if len(formats) == 1 else None


def scale_of(layer: nn.Module) -> Tensor | None:
    """The one scale of all that the layer reads, if it was calibrated."""
    scale: Tensor | None = getattr(layer, "calibrated_scale", None)
    return scale


def codes_for(*layers: nn.Module) -> dict[str, Any]:
    """How a pass before these layers quantises what they all read, as arguments of its kernel. A calibrated scale is of
    one layer: several do not share it.
    """
    if len(layers) == 1 and (scale := scale_of(layers[0])) is not None:
        return {"quantize": layers[0].reads, "code_scale": scale}
    return {"quantize": read_by(*layers)}


def code_place(reader: nn.Module, like: Tensor | Codes, *widths: int, writes: Collection[Format]) -> Codes | None:
    """Where what comes before a layer leaves it its input as codes; None if they do not share such a format.

    A scale has to be known before the last column is: it is that of a block of columns, or of all that was ever seen.

    Args:
        reader: the layer whose input it is.
        like: rows of the same shape and dtype.
        widths: of the parts that lie side by side.
        writes: what the writer of the last part knows; the others may hand over numbers, see `Codes.take`.
    """
    make = getattr(reader, "code_place", None)
    place: Codes | None = None if make is None else make((*like.shape[:-1], sum(widths)), like)
    if place is None or code_format(place.values, place.scale) not in writes:
        return None
    whole_blocks = all(width % SCALE_BLOCK == 0 for width in widths[:-1])
    return place if whole_blocks or place.scale.ndim == 1 else None


def written_by(layer: nn.Module) -> Collection[Format]:
    """Formats of codes that the layer's epilogue can leave."""
    formats: Collection[Format] = getattr(layer, "writes", ())
    return formats


def for_layers(result: Any, dtype: torch.dtype) -> Any:
    """What a kernel returned that quantises if it is asked to: a tensor, or codes that stand for this dtype."""
    if not isinstance(result, tuple):
        return result
    values, scale = result
    return Codes(values, scale, dtype)


def swiglu(layer: nn.Module, x: Tensor | Codes, into: nn.Module) -> Any:
    """silu(a) * b of the halves a and b of what a layer makes of x, as the layer that follows reads it: by the first
    layer's epilogue, but where each token's codes have a scale, which no tile knows.
    """
    place = code_place(into, x, cast(int, layer.out_features) // 2, writes=written_by(layer))
    if place is not None:
        layer(x, swiglu_from=0, out=place)
        return place
    how = codes_for(into)
    if how["quantize"] is None:
        return layer(x, swiglu_from=0)
    return for_layers(activation(layer(x), "swiglu", **how), x.dtype)


def swiglu_at(place: Tensor | Codes, layer: nn.Module, x: Tensor | Codes, first: int) -> Tensor:
    """The same of the layer's outputs from one on, left there. Returns those before it."""
    if isinstance(place, Tensor):
        return cast(Tensor, layer(x, swiglu_from=first, tail=place)[0])
    format = code_format(place.values, place.scale)
    if format in written_by(layer):
        return cast(Tensor, layer(x, swiglu_from=first, tail=place)[0])
    y = cast(Tensor, layer(x))
    activation(y[..., first:], "swiglu", quantize=format, out=place.values, code_scale=place.scale)
    return y[..., :first]


# -- layers of many families ----------------------------------------------------------


class Residual:
    """A residual stream (..., D), and a branch that is added where the next norm reads it: one pass instead of two.

    Norms are LayerNorms without weights, modulated: LayerNorm(x) * (1 + scale) + shift.
    """

    def __init__(self, x: Tensor, branch: Tensor | None = None, gate: Tensor | None = None) -> None:
        self.x, self.branch, self.gate = x, branch, gate

    def add(self, branch: Tensor, gate: Tensor) -> None:
        """x + gate * branch, from the next norm on."""
        assert self.branch is None, "the last branch has not been added yet"
        self.branch, self.gate = branch, gate

    def norm(self, scale: Tensor, shift: Tensor, group: Tensor | None = None, *, into: Sequence[nn.Module] = ()) -> Any:
        """Scale, shift and gate are (G, D), one for every group of rows; see `kernels.norm`.

        Args:
            into: the layers that read the result, which gets `Codes` where all of them do.
        """
        how: dict[str, Any] = {"kind": "layer", "scale": scale, "shift": shift, "group": group}
        how |= codes_for(*into)
        if self.branch is None:
            return for_layers(norm(self.x, **how), self.x.dtype)
        branch, gate, self.branch, self.gate = self.branch, self.gate, None, None
        return for_layers(residual_norm(self.x, branch, gate, **how), self.x.dtype)

    def total(self, group: Tensor | None = None) -> Tensor:
        """The stream with all its branches."""
        if self.branch is None:
            return self.x
        return gate_residual(self.x, self.branch, self.gate, group=group, out=self.x)

    def after(self, token: int, count: int | None = None) -> Residual:
        """The tokens of every sample (B, L, D) from there on, or so many of them."""
        kept = slice(token, None if count is None else token + count)
        return Residual(self.x[:, kept], None if self.branch is None else self.branch[:, kept], self.gate)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between them (`TimestepEmbedding` of diffusers)."""

    def __init__(self, channels: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width, bias)
        self.linear_2 = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ModulationSlice(nn.Linear):
    """Some of the modulation layers, in one."""

    def forward(self, embedding: Tensor) -> Tensor:
        """Of (M, D); or of (B, M, D), sample by sample: with how many rows there are, products of few differ in their
        bits, and a picture must not with its neighbours.
        """
        if embedding.ndim == 2:
            return modulation(embedding, self.weight, self.bias)
        return torch.stack([modulation(e_MD, self.weight, self.bias) for e_MD in embedding])


class Modulations(nn.Module):
    """The modulation layers of all blocks: their vectors for every step of a request are computed before the first.

    They hold up to a third of a model's weights, and lie in slices about as large as a block, so that a device without
    room for all of them can have them one by one. Slices do not depend on where weights live: nor do the results.

    Args:
        layers: how many vectors of the model's width each layer gives, by its name in the checkpoint.
    """

    def __init__(self, width: int, layers: Mapping[str, int], *, bias: bool = True) -> None:
        super().__init__()
        cut: list[dict[str, int]] = [{}]
        for name, vectors in layers.items():
            if sum(cut[-1].values()) + vectors > VECTORS_OF_A_SLICE:
                cut.append({})
            cut[-1][name] = vectors
        self.width, self.layers = width, cut
        self.sizes = [sum(parts.values()) * width for parts in cut]
        self.slices = nn.ModuleList(ModulationSlice(width, size, bias) for size in self.sizes)

    def packed_as(self, name: str) -> dict[str, dict[str, int]]:
        """What the module that holds this one by that name declares as packed."""
        return {f"{name}.slices.{i}": parts for i, parts in enumerate(self.layers)}

    def forward(self, embedding: Tensor) -> Tensor:
        """(..., M, V, D), in the order of the layers, of (..., M, D)."""
        y, start = embedding.new_empty(*embedding.shape[:-1], sum(self.sizes)), 0
        for size, layer in zip(self.sizes, self.slices, strict=True):
            y[..., start : start + size] = layer(embedding)
            start += size
        return y.unflatten(-1, (-1, self.width))


class RMSNormWeight(nn.Module):
    """Holds the weight of an RMSNorm that is computed inside a fused kernel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class FeedForward(nn.Module):
    """Two linear layers with a tanh GELU between them; names as `FeedForward.net` of diffusers."""

    tensor_parallel = {"net.0.proj": outputs(), "net.2": inputs()}

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        up, down = Linear(width, hidden), Linear(hidden, width)
        self.net = nn.ModuleList([nn.ModuleDict({"proj": up}), nn.Identity(), down])

    @property
    def up(self) -> nn.Module:
        """Its first layer."""
        return cast(nn.ModuleDict, self.net[0])["proj"]

    def forward(self, x: Tensor | Codes, out: Tensor | None = None) -> Tensor:
        up, down = self.up, self.net[2]
        place = code_place(down, x, cast(int, up.out_features), writes=written_by(up))
        hidden = up(x, gelu_from=0, out=place)
        return cast(Tensor, down(hidden if place is None else place, out=out))


# -- two streams of tokens that attend jointly --------------------------------------


@dataclass(frozen=True)
class Sequenced:
    """Which tokens of a text and of images after it are here, where their sequence is split over ranks.

    Attributes:
        streams: how many there are on all ranks, of the text and of every image.
        replicated: 1 if the text has fewer tokens than there are ranks: all of them have it whole.
        own: those that are here, by stream.
    """

    streams: tuple[int, ...]
    replicated: int
    own: tuple[slice, ...]

    @classmethod
    def over(cls, split: Split, text: int, *images: int) -> Sequenced:
        replicated = int(text < split.ranks)
        own = (slice(0, text) if replicated else split.own(text), *map(split.own, images))
        return cls((text, *images), replicated, own)

    def here(self, x_L: Tensor) -> Tensor:
        """Of (L, ...), what belongs to the tokens that are here."""
        return torch.cat([stream[own] for stream, own in zip(x_L.split(self.streams), self.own, strict=True)])

    @property
    def counts(self) -> list[int]:
        return [own.stop - own.start for own in self.own]


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a batch stand in a residual stream (R, D) of text and image: all text, then all image.

    Each stream of tokens is a contiguous run of rows, so that its linear layers read and write it in place. `group_R`
    names every row's modulation: those of the text stream, then those of the image stream. `streams` and `replicated`
    are those of the sequence that these tokens are of.
    """

    batch: int
    text: int
    image: int
    group_R: Tensor
    streams: tuple[int, ...]
    replicated: int

    @classmethod
    def of(cls, batch: int, sequence: Sequenced, vectors: int, device: torch.device) -> Rows:
        """`vectors` each stream has of a kind: one for every sample, or one that all samples share."""
        text, *images = sequence.counts
        image = sum(images)
        groups = torch.arange(2 * vectors, dtype=torch.int32).view(2, vectors).expand(2, batch)
        tokens = torch.tensor([text, image]).repeat_interleave(batch)
        group_R = groups.flatten().repeat_interleave(tokens).to(device)
        return cls(batch, text, image, group_R, sequence.streams, sequence.replicated)

    def split(self, x_RD: Any) -> tuple[Any, Any]:
        """Views (B, T, D) and (B, I, D), of a tensor or of codes."""
        first = self.batch * self.text
        return x_RD[:first].view(self.batch, self.text, -1), x_RD[first:].view(self.batch, self.image, -1)

    def join(self, x_RD: Tensor) -> Tensor:
        """(B, L, D), text first in every sample; a view where there is one sample."""
        return x_RD[None] if self.batch == 1 else torch.cat(self.split(x_RD), dim=1)

    def image_of(self, stream: Residual, tokens: int) -> Residual:
        """The first image tokens (B, tokens, D) of a stream whose samples share their vectors."""
        x = self.split(stream.x)[1][:, :tokens]
        if stream.branch is None or stream.gate is None:
            return Residual(x)
        return Residual(x, self.split(stream.branch)[1][:, :tokens], stream.gate[1:2])

    def apply(self, to_text: Callable[..., Tensor], to_image: Callable[..., Tensor], x_RD: Tensor | Codes) -> Tensor:
        """A layer for each stream, (..., D) -> (..., D), which write their rows of one result in place."""
        (text, image), y_RD = self.split(x_RD), x_RD.new_empty(*x_RD.shape)
        text_out, image_out = self.split(y_RD)
        to_text(text, out=text_out)
        to_image(image, out=image_out)
        return y_RD


@dataclass(frozen=True)
class Rotary:
    """fp32 tables (L, P) for the joint sequence, text first."""

    cos: Tensor
    sin: Tensor


def attend_at(
    place: Tensor | Codes, split: Split, attention: AttentionFn, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor,
    streams: Sequence[int], replicated: int = 0,
) -> None:  # fmt: skip
    """Leaves there, (B, L, H * K), what queries see."""
    heads, attend = q_BLHK.shape[2:], partial(split.attend, attention, q_BLHK, k_BLHK, v_BLHK, streams)
    if isinstance(place, Tensor):
        attend(replicated=replicated, out=place.unflatten(-1, heads))
    elif place.scale.ndim == 1 or heads[1] == SCALE_BLOCK:
        attend(replicated=replicated, out=place.values.unflatten(-1, heads), code_scale=place.scale)
    else:  # no head is a block
        place.take(attend(replicated=replicated).flatten(2))


def attended(
    into: Sequence[nn.Module], split: Split, attention: AttentionFn, q_BLHK: Tensor, k_BLHK: Tensor, v_BLHK: Tensor,
    streams: Sequence[int], replicated: int = 0,
) -> Tensor | Codes:  # fmt: skip
    """What queries see, (B, L, H * K), as the layers that follow read it."""
    width, place = math.prod(q_BLHK.shape[2:]), None
    if len(into) == 1 or read_by(*into) == "fp8_block":  # a calibrated scale is of one layer
        place = code_place(into[0], q_BLHK[:, :, 0], width, writes=ALL_FORMATS)
    if place is None:
        return split.attend(attention, q_BLHK, k_BLHK, v_BLHK, streams, replicated=replicated).flatten(2)
    attend_at(place, split, attention, q_BLHK, k_BLHK, v_BLHK, streams, replicated)
    return place


class JointAttention(nn.Module):
    """Attention over text and image, each with weights of its own (diffusers' attention with added projections)."""

    packed = {
        "to_qkv": {"to_q": 1, "to_k": 1, "to_v": 1},
        "add_qkv_proj": {"add_q_proj": 1, "add_k_proj": 1, "add_v_proj": 1},
    }
    tensor_parallel = {
        "to_qkv": outputs(1, 1, 1),
        "add_qkv_proj": outputs(1, 1, 1),
        "to_out.0": inputs(),
        "to_add_out": inputs(),
    }

    def __init__(
        self, width: int, head_dim: int, attention: AttentionFn, *, bias: bool = True, split: Split = ONE_RANK
    ) -> None:
        super().__init__()
        D, K = width, head_dim
        self.head_dim, self.attention, self.split = K, attention, split
        self.to_qkv, self.add_qkv_proj = Linear(D, 3 * D, bias), Linear(D, 3 * D, bias)
        self.norm_q, self.norm_k = RMSNormWeight(K), RMSNormWeight(K)
        self.norm_added_q, self.norm_added_k = RMSNormWeight(K), RMSNormWeight(K)
        self.to_out = nn.ModuleList([Linear(D, D, bias)])
        self.to_add_out = Linear(D, D, bias)

    @property
    def first(self) -> tuple[nn.Module, ...]:
        """The layers that read its input."""
        return self.to_qkv, self.add_qkv_proj

    def forward(self, x_RD: Tensor | Codes, rows: Rows, rotary: Rotary) -> Tensor:
        mixed_BLD, y_RD = self.mix(*rows.split(x_RD), rows, rotary), x_RD.new_empty(*x_RD.shape)
        text_out, image_out = rows.split(y_RD)
        self.to_add_out(mixed_BLD[:, : rows.text], out=text_out)
        self.to_out[0](mixed_BLD[:, rows.text :], out=image_out)
        return y_RD

    def mix(self, text_BTD: Tensor | Codes, image_BID: Tensor | Codes, rows: Rows, rotary: Rotary) -> Tensor | Codes:
        """(B, L, D). Both streams write their rows of one Q, K and V, so nothing is concatenated."""
        B, L = text_BTD.shape[0], text_BTD.shape[1] + image_BID.shape[1]
        text_qkv = self.add_qkv_proj(text_BTD).unflatten(-1, (3, -1, self.head_dim))
        image_qkv = self.to_qkv(image_BID).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = image_qkv.new_empty(3, B, L, *image_qkv.shape[-2:])
        streams = [
            Stream(text_qkv, self.norm_added_q.weight, self.norm_added_k.weight),
            Stream(image_qkv, self.norm_q.weight, self.norm_k.weight),
        ]
        qk_norm_rope(streams, rotary.cos, rotary.sin, q, k, v)
        readers = (self.to_add_out, self.to_out[0])
        return attended(readers, self.split, self.attention, q, k, v, rows.streams, rows.replicated)


# -- tables -------------------------------------------------------------------------


def rotary_table(positions_L: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (L, width/2) in fp32 of one rotary axis, angles computed in float64.

    Source: RoFormer (Su et al. 2021); `get_1d_rotary_pos_embed` of diffusers without its repeats.
    """
    ladder = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions_L.device) / width)
    angle = positions_L.double()[:, None] * ladder[None]
    return angle.cos().float(), angle.sin().float()
