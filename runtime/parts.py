"""A blueprint's components with their weights: loaded, found in their files, or dummies."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sgl_diffusion.models.family import ENCODERS
from sgl_diffusion.models.text import HashTokenizer
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.attention import Attention
from sgl_diffusion.runtime.blueprint import Blueprint
from sgl_diffusion.runtime.encoders import dummy_encoder, load_encoder, load_tokenizer, read_processor
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.offload import CudaStreams, fits_host_memory
from sgl_diffusion.runtime.reading import LoadTimes
from sgl_diffusion.runtime.report import ComponentLoad
from sgl_diffusion.runtime.weights import Source, fill_dummy, find_weights, load_weights, weight_files

CPU = torch.device("cpu")


@dataclass
class LoadedParts:
    """By component key.

    Attributes:
        encoder_attention: what transformers' encoders attend with.
        mapped: sources of weights that stay in their files; empty for all others.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Attention] = field(default_factory=dict)
    encoder_attention: dict[str, str] = field(default_factory=dict)
    reports: dict[str, ComponentLoad] = field(default_factory=dict)
    mapped: dict[str, Sequence[Source]] = field(default_factory=dict)


def load_parts(blueprint: Blueprint, folders: Mapping[str, Path] | None, args: ServerArgs) -> LoadedParts:
    """Every component where the plan wants it.

    Args:
        folders: of the components; None where weights are dummies.
    Raises:
        UserError: weights that cannot be read or do not fit the model, or not be locked as asked.
    """
    plan, loaded, loader = blueprint.plan, LoadedParts(), _Loader(blueprint, folders)
    for key, kind in blueprint.kinds.items():
        started, times = time.perf_counter(), LoadTimes()
        found: Sequence[Source] = ()
        if kind in ("denoiser", "vae"):
            config = args.attention_backend_config if kind == "denoiser" else {}
            attention = Attention(key, plan.attention[key], plan.device, plan.dtypes[key], config)
            loaded.attention[key] = attention
            loaded.parts[key] = blueprint.module(key, attention)
            if kind == "denoiser" and args.use_fsdp_inference:
                times = loader.shard(key, loaded.parts[key])
            else:
                times, found = loader.fill(key, loaded.parts[key], must_pin=args.pin_cpu_memory is True)
            loaded.mapped[key] = found
        elif kind in ENCODERS:
            times, loaded.parts[key] = loader.encoder(key)
            loaded.encoder_attention[key] = str(loaded.parts[key].config._attn_implementation)
        elif kind == "tokenizer":
            loaded.parts[key] = loader.tokenizer(key)
        elif kind == "image_processor":
            loaded.parts[key] = read_processor(key, blueprint.configs[key])
        elif kind == "processor":
            loaded.parts[key] = blueprint.processor(key)
        if key in plan.dtypes:  # it has weights
            weights: Literal["read", "mapped", "dummy"] = "mapped" if found else "read"
            wall_ms = (time.perf_counter() - started) * 1000
            weights = "dummy" if folders is None else weights
            loaded.reports[key] = ComponentLoad(weights=weights, wall_ms=wall_ms, **asdict(times))
    return loaded


@dataclass(frozen=True)
class _Loader:
    blueprint: Blueprint
    folders: Mapping[str, Path] | None

    def _home(self, key: str) -> torch.device:
        """Where a component's weights are loaded to."""
        plan = self.blueprint.plan
        return plan.device if plan.offload[key] == "resident" else CPU

    def _uploads(self, key: str) -> CudaStreams | None:
        """What a component's weights are uploaded through."""
        home = self._home(key)
        return CudaStreams(home) if home.type == "cuda" else None

    def fill(self, key: str, module: nn.Module, *, must_pin: bool) -> tuple[LoadTimes, Sequence[Source]]:
        """Loads a module's weights, or finds them in their files where host memory has no room for a copy."""
        plan = self.blueprint.plan
        home, dtype = self._home(key), plan.dtypes[key]
        if self.folders is None:
            fill_dummy(module, home, dtype, drawn_on=plan.device)
            return LoadTimes(), ()
        files = weight_files(self.folders[key])
        if plan.offload[key] == "resident" or fits_host_memory(module, dtype):
            return load_weights(module, files, home, dtype, self._uploads(key)), ()
        if must_pin:
            raise UserError(f"pin_cpu_memory=true: host memory has no room for {key}; left out, it stays in its files")
        found = find_weights(module, files)
        module.to(dtype).to_empty(device=CPU)  # takes no memory before it is written to
        return LoadTimes(), found

    def shard(self, key: str, module: nn.Module) -> LoadTimes:
        """Loads what this rank keeps of a module's weights."""
        from sgl_diffusion.runtime.parallel.sharded import check_sharding, load_sharded  # takes most of a second

        plan, mesh = self.blueprint.plan, self.blueprint.mesh
        check_sharding(mesh.tp.size, {key: plan.offload[key]})
        files = None if self.folders is None else weight_files(self.folders[key])
        return load_sharded(key, module, files, plan.device, plan.dtypes[key], mesh.world, self._uploads(key))

    def encoder(self, key: str) -> tuple[LoadTimes, nn.Module]:
        plan, config = self.blueprint.plan, self.blueprint.configs[key]
        home, dtype, requested = self._home(key), plan.dtypes[key], plan.attention[key]
        times, tp = LoadTimes(), self.blueprint.mesh.tp
        if self.folders is None:
            encoder = dummy_encoder(key, config, home, dtype, requested, tp)
            fill_dummy(encoder, home, dtype, drawn_on=plan.device)
        else:
            folder, streams = self.folders[key], self._uploads(key)
            times, encoder = load_encoder(key, config, folder, home, dtype, requested, streams, tp)
        return times, encoder.eval().requires_grad_(False)

    def tokenizer(self, key: str) -> Any:
        if self.folders is not None:
            return load_tokenizer(self.folders[key])
        return HashTokenizer.beside(key, self.blueprint.configs)
