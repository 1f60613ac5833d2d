"""Which layers of a component are quantised, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.quantization.schemes import Scheme

SHOWN = 4  # names of layers in an error


@dataclass(frozen=True)
class Selection:
    """Paths of a component's linear layers: those that are quantised, and why each of the others is kept."""

    layers: tuple[str, ...]
    kept: Mapping[str, str]


def select(key: str, module: nn.Module, scheme: Scheme, ignored: Sequence[str]) -> Selection:
    """The linear layers of all blocks. Embeddings, modulation and the last layer are few, and errors in them reach
    every block: they are kept.

    Args:
        key: of the component, for messages.
        ignored: parts of names in the checkpoint, or patterns with * and ?, of layers to keep; of several that are
            packed in one, one name is enough.
    Raises:
        UserError: a pattern that is in no name, or nothing to quantise.
    """
    sources, layers, kept = checkpoint_names(module), [], {}
    unmatched = set(ignored)
    for path, layer in linear_layers(module).items():
        matched = {p for p in ignored if any(_matches(p, name) for name in sources[path])}
        unmatched -= matched
        if matched:
            kept[path] = f"quantization_ignored_layers has {min(matched)}"
        elif not in_blocks(module, path):
            kept[path] = "outside of the blocks"
        elif layer.in_features % scheme.columns or layer.out_features % scheme.rows:
            kept[path] = (
                f"{layer.out_features} x {layer.in_features}: {scheme.name} takes multiples of "
                f"{scheme.rows} x {scheme.columns}"
            )
        else:
            layers.append(path)
    if unmatched:
        names = sorted(name for path in sources for name in sources[path])
        known = f"{', '.join(names[:SHOWN])} and {max(len(names) - SHOWN, 0)} more"
        raise UserError(
            f"quantization_ignored_layers={min(unmatched)}: in no name of a layer of {key}; there are {known}"
        )
    if not layers:
        told = "; ".join(dict.fromkeys(kept.values())) or "it has no linear layers"
        raise UserError(f"quantization={scheme.name}: nothing of {key} can be quantised: {told}")
    return Selection(tuple(layers), kept)


def layer_class(path: str) -> str:
    """What layers with the same task in all blocks have in common: * for every number in the name."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def checkpoint_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Path of every linear layer -> what the checkpoint calls it, or all that it is packed of."""
    packed: dict[str, tuple[str, ...]] = {}
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        for target, rows in getattr(owner, "packed", {}).items():
            packed[prefix + target] = tuple(prefix + name for name in rows)
    return {path: packed.get(path, (path,)) for path in linear_layers(module)}


def _matches(pattern: str, name: str) -> bool:
    return pattern in name or fnmatchcase(name, pattern)


def in_blocks(module: nn.Module, path: str) -> bool:
    """Whether a layer is in one of the module's lists of layers, but for what works before the first step alone."""
    if path.startswith(tuple(f"{name}." for name in getattr(module, "before_first_step", ()))):
        return False
    parts = path.split(".")
    return any(isinstance(module.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(1, len(parts) - 1))
