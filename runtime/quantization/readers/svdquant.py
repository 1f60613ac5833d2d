"""Nunchaku's checkpoints of SVDQuant (Li et al. 2024, arXiv 2411.05007): weights of 4 bits beside a branch of low rank.

Nunchaku multiplies them by activations of 4 bits; here these keep 16. Its first format has names of its own for the
layers of a block, its second nearly those of diffusers. Q, K and V are one layer in both, as they are in our models.

A block that attends and feeds forward in parallel has four layers there and two here: two that read the same input are
put above each other, and two whose results are added side by side; their branches become one of twice the rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgl_diffusion.kernels.low_rank import LARGEST_RANK
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.readers.scaled import tensors_of
from sgl_diffusion.runtime.quantization.readers.svdquant_weights import (
    AWQ_GROUP,
    TILE_K,
    TILE_N,
    above,
    added,
    beside,
    halves_swapped,
    modulation_bias,
    modulation_weight,
    unshifted,
    vector,
    weight,
)
from sgl_diffusion.runtime.quantization.stored import InFile, QuantizedCheckpoint, Rows, StoredLayer
from sgl_diffusion.runtime.reading import Stored

# names of the first format in those of the second
BLOCK = re.compile(r"((?:single_)?transformer_blocks\.\d+)\.(.+)")
LAYERS = {
    "qkv_proj": "attn.to_qkv",
    "qkv_proj_context": "attn.add_qkv_proj",
    "out_proj": "attn.to_out.0",
    "out_proj_context": "attn.to_add_out",
    "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2",
    "mlp_context_fc1": "ff_context.net.0.proj",
    "mlp_context_fc2": "ff_context.net.2",
} | {name: f"attn.{name}" for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
OF_PARALLEL = {"out_proj": "attn.to_out", "mlp_fc1": "mlp_fc1", "mlp_fc2": "mlp_fc2"}
LEAVES = {
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
    "lora_down": "proj_down",
    "lora_up": "proj_up",
}

# tensors of a layer
NEEDED = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up")
OPTIONAL = ("wtscale", "wcscales")
# what calibration found, kept also where the layer before has been divided by it
UNUSED = "smooth_factor_orig"
GROUPS = {torch.bfloat16: ("int4", 64), torch.float16: ("int4", 64), torch.float8_e4m3fn: ("fp4", 16)}  # by the scales
WEIGHT_DTYPES = {"int4": "int4", "fp4_e2m1_all": "fp4"}  # of the header

PARTS = {"to_qkv": ("to_q", "to_k", "to_v"), "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj")}
VECTORS = {"norm1.linear": 6, "norm1_context.linear": 6, "img_mod.1": 6, "txt_mod.1": 6, "norm.linear": 3}
PARALLEL = ("attn.to_qkv", "mlp_fc1", "attn.to_out", "mlp_fc2")  # layers of such a block
GATED = "net.0.proj"  # w3 above w1, of a feed_forward
AFTER_GELU = re.compile(r".*\.(mlp_fc2|(ff|ff_context|img_mlp|txt_mlp)\.net\.2)")

Module = Mapping[str, Stored]  # tensors of a quantised layer, by their names in the second format
DOWN = (".proj_down", ".lora_down")  # which of a name tells the format


@dataclass(frozen=True)
class Computed:
    """A tensor that is made of some in files when it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[..., Tensor]
    sources: Mapping[str, InFile]  # by the names of its arguments

    def mapped(self) -> Tensor:
        return self.make(**{name: tensor.mapped() for name, tensor in self.sources.items()})


@dataclass(frozen=True)
class Shared:
    """What two layers have to have in common to be one."""

    first: Stored
    second: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    def mapped(self) -> Tensor:
        tensor = self.first.mapped()
        if not torch.equal(tensor, self.second.mapped()):
            raise UserError(f"{self.first.path}: {self.first.name} and {self.second.name} differ; expected them equal")
        return tensor


def read(files: Sequence[Path], config: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """Layers in four bits; modulation layers, which nunchaku has in four bits of AWQ's, as plain weights.

    Raises:
        UserError: a corrupt file, a layer with tensors missing or in another format, or a precision or rank that is not
            what a file's name or header says.
    """
    stored = tensors_of([path for path in files if path.suffix == ".safetensors"])
    quantised = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    if not any(module + down in stored for module in quantised for down in DOWN):
        return None
    modules: dict[str, dict[str, Stored]] = {}
    tensors: dict[str, InFile] = {}
    for full, tensor in stored.items():
        module, _, leaf = full.rpartition(".")
        if module in quantised:
            modules.setdefault(_name(module), {})[LEAVES.get(leaf, leaf)] = tensor
        else:
            tensors |= _plain(_name(module), leaf, tensor)
    modulations = {name: modules.pop(name) for name in list(modules) if "wzeros" in modules[name]}
    precision, rank = _found(modules)
    for path, file in {tensor.path: tensor.file for tensor in stored.values()}.items():
        header: dict[str, str] | None = file.metadata()  # type: ignore[no-untyped-call]
        _check(path, header or {}, precision, rank)
    layers: dict[str, StoredLayer] = {}
    for name, layer, biases in _layers(modules, precision):
        layers[name] = layer
        tensors |= biases
    for name, leaves in modulations.items():
        tensors |= _modulation(name, leaves)
    kept = ", modulation layers decoded" if modulations else ""
    facts: dict[str, str | int] = {"precision": precision, "rank": rank}
    return QuantizedCheckpoint(f"SVDQuant ({precision}, rank {rank}{kept})", layers, tensors, facts)


def _name(module: str) -> str:
    """In the second format, but for the last layer of a feed-forward with a gate, which has diffusers'."""
    if (match := BLOCK.fullmatch(module)) is None:
        return re.sub(r"\.feed_forward\.net\.2$", ".feed_forward.w2", module)
    block, layer = match.groups()
    names = LAYERS | OF_PARALLEL if block.startswith("single_") else LAYERS
    return f"{block}.{names.get(layer, layer)}"


def _plain(module: str, leaf: str, tensor: InFile) -> dict[str, InFile]:
    """A tensor that is not quantised, by its names in diffusers' checkpoints."""
    owner, half = module.removesuffix(GATED), tensor.shape[0] // 2
    if module.endswith(f".feed_forward.{GATED}"):
        return {f"{owner}w3.{leaf}": Rows(tensor, 0, half), f"{owner}w1.{leaf}": Rows(tensor, half, 2 * half)}
    return {f"{module}.{leaf}".removeprefix("."): tensor}


def _found(modules: Mapping[str, Module]) -> tuple[str, int]:
    """Precision and rank of all layers."""
    kinds: dict[tuple[str, int], str] = {}
    for name, module in modules.items():
        path = next(iter(module.values())).path
        if missing := [leaf for leaf in NEEDED if leaf not in module]:
            raise UserError(f"{path}: {name} has no {missing[0]}; expected {', '.join(NEEDED)}")
        if unknown := module.keys() - {*NEEDED, *OPTIONAL, UNUSED, "bias"}:
            raise UserError(f"{path}: {name}.{min(unknown)}: not a tensor of SVDQuant's layers")
        (N, pairs), G, dtype = module["qweight"].shape, module["wscales"].shape[0], module["wscales"].dtype
        precision, group = GROUPS.get(dtype, ("", 0))
        if 2 * pairs != G * group or N % TILE_N or pairs % TILE_K:
            raise UserError(
                f"{path}: {name} has {N} x {2 * pairs} weights, and {G} scales of a row in {dtype}; expected multiples "
                "of 128, and scales in 16 bits for 64 columns (int4) or in e4m3 for 16 (fp4)"
            )
        kinds[precision, module["proj_down"].shape[1]] = name
    if len(kinds) > 1:
        told = ", ".join(f"{name}: {precision}, rank {rank}" for (precision, rank), name in kinds.items())
        raise UserError(f"{path}: layers of several kinds ({told}); expected one")
    ((precision, rank),) = kinds
    largest = LARGEST_RANK // 2 if any(name.endswith(".mlp_fc2") for name in modules) else LARGEST_RANK
    if rank % 16 or not 0 < rank <= largest:
        raise UserError(f"{path}: rank {rank}; expected a multiple of 16 up to {largest}")
    return precision, rank


def _check(path: Path, header: Mapping[str, str], precision: str, rank: int) -> None:
    """What a file says of itself against what is in it."""
    told: dict[str, tuple[str, int]] = {}
    if match := re.search(r"svdq-(int4|fp4)_r(\d+)", path.name):
        told["name"] = match[1], int(match[2])
    config = json.loads(header.get("quantization_config", "{}"))
    if "weight" in config:
        dtype = config["weight"]["dtype"]
        told["header"] = WEIGHT_DTYPES.get(dtype, dtype), config.get("rank", rank)
    for where, kind in told.items():
        if kind != (precision, rank):
            raise UserError(
                f"{path}: by its {where} {kind[0]}, rank {kind[1]}; its tensors are {precision}, rank {rank}"
            )


# -- layers -----------------------------------------------------------------------


def _layers(modules: Mapping[str, Module], precision: str) -> Iterator[tuple[str, StoredLayer, dict[str, InFile]]]:
    """Name, weights and biases."""
    left = dict(modules)
    for block in [name.removesuffix(".mlp_fc2") for name in modules if name.endswith(".mlp_fc2")]:
        if missing := [part for part in PARALLEL if f"{block}.{part}" not in left]:
            raise UserError(f"{left[f'{block}.mlp_fc2']['qweight'].path}: {block} has no quantised {missing[0]}")
        qkv, up, out, down = (left.pop(f"{block}.{part}") for part in PARALLEL)
        smooth = {"smooth_factor": Shared(qkv["smooth_factor"], up["smooth_factor"])}
        biases = _cut(f"{block}.attn.to_qkv", _bias(qkv)) | {f"{block}.proj_mlp.bias": _bias(up)}
        yield f"{block}.attn.to_qkv_mlp", StoredLayer(_both({**qkv, **smooth}, {**up, **smooth}), above), biases
        both = {"first": _bias(out), "second": _bias(down, shifted=precision == "int4")}
        bias = Computed(both["first"].shape, torch.float32, added, both)
        yield f"{block}.proj_out", StoredLayer(_both(out, down), beside), {f"{block}.proj_out.bias": bias}
    for name, module in left.items():
        if name.endswith(f".feed_forward.{GATED}"):
            biases = _plain(name, "bias", _bias(module)) if "bias" in module else {}
            yield name.removesuffix(GATED) + "w13", StoredLayer(_of_product(module), halves_swapped), biases
            continue
        shifted = precision == "int4" and AFTER_GELU.fullmatch(name) is not None
        biases = _cut(name, _bias(module, shifted=shifted)) if "bias" in module else {}
        yield name, StoredLayer(_of_product(module), weight), biases


def _of_product(module: Mapping[str, InFile]) -> dict[str, InFile]:
    return {leaf: module[leaf] for leaf in NEEDED + OPTIONAL if leaf in module}


def _both(first: Mapping[str, InFile], second: Mapping[str, InFile]) -> dict[str, InFile]:
    named = (_of_product(first), _of_product(second))
    return {f"{i}_{leaf}": tensor for i, module in enumerate(named) for leaf, tensor in module.items()}


def _bias(module: Module, *, shifted: bool = False) -> Computed:
    packed = module["bias"]
    if shifted:
        return Computed(packed.shape, torch.float32, unshifted, {"bias": packed, **_of_product(module)})
    return Computed(packed.shape, packed.dtype, vector, {"packed": packed})


def _cut(name: str, bias: InFile) -> dict[str, InFile]:
    """Biases of the layers that are one there."""
    owner, _, last = name.rpartition(".")
    parts = PARTS.get(last, (last,))
    rows = bias.shape[0] // len(parts)
    return {f"{owner}.{part}.bias": Rows(bias, i * rows, (i + 1) * rows) for i, part in enumerate(parts)}


def _modulation(name: str, module: Module) -> dict[str, InFile]:
    """A layer with AWQ's weights, which are decoded: they are multiplied once a request."""
    qweight, scales = module["qweight"], module["wscales"]
    vectors = next((n for layer, n in VECTORS.items() if name.endswith(f".{layer}")), None)
    (quarter, half), dtype, path = qweight.shape, scales.dtype, qweight.path
    if vectors is None or qweight.dtype != torch.int32 or scales.shape[0] * AWQ_GROUP < 2 * half:
        raise UserError(
            f"{path}: {name} has weights in {qweight.dtype} and {scales.shape[0]} scales of a row; expected int32, "
            f"scales for {AWQ_GROUP} columns, and a name that ends in one of {', '.join(VECTORS)}"
        )
    weights = {"qweight": qweight, "wscales": scales, "wzeros": module["wzeros"]}
    make_weight = partial(modulation_weight, vectors=vectors)
    make_bias = partial(modulation_bias, vectors=vectors)
    bias = module["bias"]
    return {
        f"{name}.weight": Computed((4 * quarter, 2 * half), dtype, make_weight, weights),
        f"{name}.bias": Computed(bias.shape, bias.dtype, make_bias, {"bias": bias}),
    }
