"""Tensor parallelism: ranks share the weights of linear layers, a column of one going with a row of the next.

A layer whose outputs are spread is a smaller one: this rank has the heads, or the hidden units, that are its own. A
layer that reads them has their columns of the weight, and ranks sum what they get (one all-reduce). Everything in
between, activations and attention, is each rank's own; everything else is whole on every rank. Which layers these are,
models declare (`models.family.Spread`; for encoders of transformers `models.text.SHARED`).

Source: Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sgl_diffusion.kernels.gemm import gemm
from sgl_diffusion.models.family import Spread
from sgl_diffusion.models.layers import Linear
from sgl_diffusion.models.text import SHARED
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parallel.group import Group
from sgl_diffusion.runtime.weights import Share


class SummedLinear(nn.Linear):
    """A linear layer of which this rank reads its share of the inputs: ranks sum what they get.

    The bias is added by the first rank, before the sum: so it is there once, and takes no pass of its own.
    """

    def __init__(self, layer: nn.Linear, group: Group) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.group = layer.weight, layer.bias, group
        self.is_ours = isinstance(layer, Linear)

    def forward(self, x: Tensor, **epilogue: Any) -> Tensor:  # type: ignore[override]
        """Arguments and result are those of the layer it stands for; `out`, if there is one, is contiguous."""
        bias = self.bias if self.group.rank == 0 else None
        multiply = gemm if self.is_ours else F.linear  # by name: where work is counted, another stands there
        return self.group.all_reduce(multiply(x.contiguous(), self.weight, bias, **epilogue))


def share_denoiser(name: str, module: nn.Module, group: Group) -> None:
    """Leaves this rank its share of a denoiser's layers: of shapes alone ("meta"), before weights are loaded.

    Args:
        name: of the component.
    Raises:
        UserError: the ranks do not divide its heads or hidden units, or it declares nothing that they could share.
    """
    if group.size == 1:
        return
    for path, owner in list(module.named_modules()):
        declared: Mapping[str, Spread] = getattr(owner, "tensor_parallel", {})
        if refusal := _refusal(f"{name}.{path}", owner, declared, getattr(owner, "head_dim", 1), group.size):
            raise UserError(f"tp_size={group.size}: {refusal}")
        _share_layers(owner, declared, group)
    if not receipt(module)["rows"]:
        raise UserError(f"tp_size={group.size}: {name}, a {type(module).__name__}, has no layers for ranks to share")


def share_encoder(name: str, encoder: nn.Module, group: Group) -> None:
    """As `share_denoiser`, of an encoder of transformers, whose weights may be there: what other ranks have is let go.

    Modules with a number of heads, or of hidden units, that the ranks do not divide stay whole.

    Raises:
        UserError: nothing is known of its architecture.
    """
    if group.size == 1:
        return
    known = False
    for path, owner in list(encoder.named_modules()):
        if (shared := SHARED.get(type(owner).__name__)) is None:
            continue
        known = True
        layers = {layer: spread for layer, spread in shared.layers.items() if hasattr(owner, layer)}
        unit = 1 if shared.head_dim is None else getattr(owner, shared.head_dim)
        if _refusal(path, owner, layers, unit, group.size):
            continue
        _share_layers(owner, layers, group)
        for count in shared.counts:
            setattr(owner, count, int(getattr(owner, count)) // group.size)
    if not known:
        raise UserError(f"tp_size={group.size}: {name}: not known how ranks share a {type(encoder).__name__}")


def receipt(module: nn.Module) -> dict[str, int]:
    """What ranks share of a component, for the report.

    `columns` and `rows` count layers whose outputs, or inputs, are spread; `whole` the modules of an encoder that have
    layers to share, but in numbers that do not allow it.
    """
    shared = [part for part in module.modules() if hasattr(part, "share")]
    rows = sum(isinstance(part, SummedLinear) for part in shared)
    columns = sum(isinstance(part, nn.Linear) for part in shared) - rows
    known = [part for part in module.modules() if type(part).__name__ in SHARED]
    whole = sum(not any(hasattr(child, "share") for child in part.children()) for part in known)
    return {"columns": columns, "rows": rows, "whole": whole}


def _refusal(path: str, owner: nn.Module, declared: Mapping[str, Spread], unit: int, ranks: int) -> str:
    """Why ranks cannot share these layers, a whole number of units each; empty if they can."""
    for name, spread in declared.items():
        layer = owner.get_submodule(name)
        size = _dimension(layer, spread)
        for part in spread.parts:
            features = size * part // sum(spread.parts)
            # an embedding of heads has one number for each
            each = 1 if isinstance(layer, nn.Embedding) else unit
            if features % (ranks * each):
                units = f"{features} {spread.of}" if each == 1 else f"{features // each} heads of {each}"
                return f"{path}.{name} has {units}, which {ranks} ranks cannot share"
    return ""


def _dimension(layer: nn.Module, spread: Spread) -> int:
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim
    assert isinstance(layer, nn.Linear)
    return layer.out_features if spread.of == "outputs" else layer.in_features


def _share_layers(owner: nn.Module, declared: Mapping[str, Spread], group: Group) -> None:
    for name, spread in declared.items():
        layer = owner.get_submodule(name)
        # an embedding's outputs are the columns of its weight
        dim = 1 if spread.of == "inputs" or isinstance(layer, nn.Embedding) else 0
        share = Share(dim, spread.parts, group.rank, group.size)
        for leaf, p in list(layer.named_parameters(recurse=False)):
            setattr(layer, leaf, nn.Parameter(share.of(p.detach()), requires_grad=False))
        size = _dimension(layer, spread) // group.size
        if isinstance(layer, nn.Embedding):
            layer.embedding_dim = size
        elif isinstance(layer, nn.Linear) and spread.of == "outputs":
            layer.out_features = size
        elif isinstance(layer, nn.Linear):
            layer.in_features = size
            layer = SummedLinear(layer, group)
            owner.set_submodule(name, layer)
        layer.__dict__["share"] = share  # which `runtime.weights` reads
