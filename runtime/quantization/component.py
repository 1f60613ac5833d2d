"""How one component comes to quantised layers: from weights that are quantised while they load, or from its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from sgl_diffusion.models.layers import Linear
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parallel.tensor import SummedLinear
from sgl_diffusion.runtime.quantization.layers import LAYERS, SideBySide
from sgl_diffusion.runtime.quantization.readers.original_names import renamed
from sgl_diffusion.runtime.quantization.schemes import Scheme
from sgl_diffusion.runtime.quantization.selection import Selection, checkpoint_names, in_blocks, select
from sgl_diffusion.runtime.quantization.stored import QuantizedCheckpoint
from sgl_diffusion.runtime.quantization.weight import QuantizedWeight, side_by_side
from sgl_diffusion.runtime.weights import give_memory, slots, told

META = torch.device("meta")


@dataclass(frozen=True)
class Online:
    """Weights of a checkpoint are quantised layer by layer: one at a time is there in full.

    Attributes:
        key: of the component, for messages.
        ignored: as `selection.select` takes it.
        seen: by path of a layer, the largest magnitude of each of its inputs, where the scheme makes use of it.
    """

    key: str
    scheme: Scheme
    ignored: Sequence[str] = ()
    seen: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def format(self) -> str:
        return self.scheme.name

    def select(self, module: nn.Module) -> Selection:
        """Raises UserError as `selection.select`."""
        return select(self.key, module, self.scheme, self.ignored)

    def quantize(self, module: nn.Module, path: str) -> None:
        """Puts a quantised layer in the place of one that has its weight, or its shape alone ("meta")."""
        layer = module.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        weight, seen = layer.weight.data, self.seen.get(path)
        if seen is None or self.scheme.calibrated is None:
            put(module, path, self.scheme.quantize(weight))
        else:
            put(module, path, self.scheme.calibrated(weight, seen.to(weight.device)))

    def kept(self, module: nn.Module) -> Mapping[str, str]:
        """Why layers are not quantised, by path, of a module that nothing was done to."""
        return self.select(module).kept

    def shapes(self, module: nn.Module) -> None:
        """Quantises a module of shapes alone. Raises UserError as `select`."""
        for path in self.select(module).layers:
            self.quantize(module, path)


@dataclass(frozen=True)
class Stored:
    """Weights come as codes from a file.

    Attributes:
        source: the file or folder, for messages.
    """

    source: str
    checkpoint: QuantizedCheckpoint

    @property
    def format(self) -> str:
        return self.checkpoint.format

    def kept(self, module: nn.Module) -> Mapping[str, str]:
        """As `Online.kept`."""
        reasons, layers = {}, self._named_as(module).checkpoint.layers
        for path, names in checkpoint_names(module).items():
            if not any(name in layers for name in (path, *names)):
                reasons[path] = "numbers in the file"
            elif not in_blocks(module, path):
                reasons[path] = "outside of the blocks: decoded"
        return reasons

    @cached_property
    def _shapes(self) -> Mapping[str, QuantizedWeight]:
        return {name: layer.shapes() for name, layer in self.checkpoint.layers.items()}

    def shapes(self, module: nn.Module) -> None:
        """Puts layers of codes in a module of shapes alone. Raises UserError as `load`."""
        own = self._named_as(module)
        own._check(module)
        own._put_layers(module, META)

    def load(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Fills a module of shapes alone. Codes of layers outside of the blocks are decoded.

        Raises:
            UserError: missing, unexpected or mis-shaped weights, listing their names.
        """
        own = self._named_as(module)
        own._check(module)
        module.to(dtype)
        own._put_layers(module, device)
        left = {name for name, p in module.named_parameters() if p.is_meta}
        wanted = {name: slot for name, slot in slots(module).items() if slot.parameter in left}
        give_memory(module, device)
        parameters = dict(module.named_parameters())
        for name, slot in wanted.items():
            rows = parameters[slot.parameter].data[slot.start : slot.stop]
            if name in own.checkpoint.tensors:
                rows.copy_(own.checkpoint.tensors[name].mapped())
            else:
                rows.copy_(own.checkpoint.layers[name.removesuffix(".weight")].read().dequantized(dtype))

    def _named_as(self, module: nn.Module) -> Stored:
        """With the names that diffusers gives the module's weights, where the file has their authors'."""
        original = getattr(module, "original_names", None)
        return self if original is None else replace(self, checkpoint=renamed(self.checkpoint, original))

    def _put_layers(self, module: nn.Module, device: torch.device) -> None:
        layers = self.checkpoint.layers
        for path, names in checkpoint_names(module).items():
            layer = module.get_submodule(path)
            if not isinstance(layer, Linear) or not in_blocks(module, path):
                continue
            if path in layers:  # packed there as it is here
                put(module, path, self._weight(path, layer, device))
                if f"{path}.bias" in self.checkpoint.tensors:
                    module.get_submodule(path).bias = self._parameter(f"{path}.bias", layer, device)
            elif all(name in layers for name in names) and (joined := self._joined(names, layer, device)) is not None:
                put(module, path, joined)
            elif any(name in layers for name in names):
                module.set_submodule(path, SideBySide([self._part(name, layer, device) for name in names]))

    def _joined(self, names: Sequence[str], layer: Linear, device: torch.device) -> QuantizedWeight | None:
        return side_by_side([self._weight(name, layer, device) for name in names])

    def _part(self, name: str, layer: Linear, device: torch.device) -> nn.Module:
        """Of a packed layer, what the file has by one name: as codes, or as numbers."""
        bias = None if layer.bias is None else self._parameter(f"{name}.bias", layer, device)
        if name in self.checkpoint.layers:
            weight = self._weight(name, layer, device)
            return LAYERS[weight.kind](weight, bias)
        part = Linear(1, 1, bias=False, device=META)
        part.weight, part.bias = self._parameter(f"{name}.weight", layer, device), bias
        part.out_features, part.in_features = part.weight.shape
        return part

    def _weight(self, name: str, layer: Linear, device: torch.device) -> QuantizedWeight:
        """Of branches beside the codes, in the dtype that the layer computes in."""
        weight = self._shapes[name] if device == META else self.checkpoint.layers[name].read()
        weight = weight.map(lambda t: t.to(device, copy=True))  # out of the mapped file, which may change
        if weight.down_RK is None or weight.up_NR is None:
            return weight
        dtype = layer.weight.dtype
        return replace(weight, down_RK=weight.down_RK.to(dtype), up_NR=weight.up_NR.to(dtype))

    def _parameter(self, name: str, layer: Linear, device: torch.device) -> nn.Parameter:
        tensor, dtype = self.checkpoint.tensors[name], layer.weight.dtype
        whole = torch.empty(tensor.shape, device=META) if device == META else tensor.mapped()
        return nn.Parameter(whole.to(device, dtype, copy=True), requires_grad=False)

    def _check(self, module: nn.Module) -> None:
        """Raises UserError for names and shapes that are not those of the module."""
        wanted: dict[str, tuple[int, ...]] = {name: slot.shape for name, slot in slots(module).items()}
        for path, names in checkpoint_names(module).items():
            if path in self._shapes and names != (path,):  # packed in the file: one shape for all
                for leaf in ("weight", "bias") if f"{path}.bias" in self.checkpoint.tensors else ("weight",):
                    parts = [wanted.pop(f"{name}.{leaf}") for name in names]
                    wanted[f"{path}.{leaf}"] = (sum(shape[0] for shape in parts), *parts[0][1:])
        skipped = tuple(getattr(module, "unused_weights", tuple)())
        found = {name: t.shape for name, t in self.checkpoint.tensors.items() if not name.startswith(skipped)}
        found |= {f"{name}.weight": weight.shape for name, weight in self._shapes.items()}
        both = wanted.keys() & found.keys()
        problems = {
            "missing": [name for name in wanted if name not in found],
            "unexpected": [name for name in found if name not in wanted],
            "mis-shaped": [
                f"{n} {found[n]} instead of {wanted[n]}" for n in wanted if n in both and found[n] != wanted[n]
            ],
        }
        if any(problems.values()):
            raise UserError(f"{self.source}: {self.format}: {told(problems)}")


Quantization = Online | Stored


def put(module: nn.Module, path: str, weight: QuantizedWeight) -> None:
    """Puts a layer over these weights in the place of a linear one, whose bias it keeps."""
    layer = module.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    quantized = LAYERS[weight.kind](weight, layer.bias)
    if isinstance(layer, SummedLinear):
        group = layer.group
        quantized.bias = layer.bias if group.rank == 0 else None
        quantized.register_forward_hook(lambda _, arguments, result: group.all_reduce(result))
    if (share := getattr(layer, "share", None)) is not None:
        quantized.__dict__["share"] = share
    module.set_submodule(path, quantized)
