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
from sgl_diffusion.runtime.encoders import dummy_encoder, layers_left_out, load_encoder, load_tokenizer, read_processor
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.offload import CudaStreams, fits_host_memory
from sgl_diffusion.runtime.quantization.component import Online, Stored
from sgl_diffusion.runtime.quantization.receipt import receipt
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
        quantization: receipts of components with quantised layers.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Attention] = field(default_factory=dict)
    encoder_attention: dict[str, str] = field(default_factory=dict)
    reports: dict[str, ComponentLoad] = field(default_factory=dict)
    mapped: dict[str, Sequence[Source]] = field(default_factory=dict)
    quantization: dict[str, dict[str, Any]] = field(default_factory=dict)


def load_parts(blueprint: Blueprint, folders: Mapping[str, Path] | None, args: ServerArgs) -> LoadedParts:
    """Every component where the plan wants it.

    Args:
        folders: of the components; None where weights are dummies.
    Raises:
        UserError: weights that cannot be read or do not fit the model, or not be locked as asked.
    """
    plan, loaded, loader = blueprint.plan, LoadedParts(), ComponentLoader(blueprint, folders)
    for key, kind in blueprint.kinds.items():
        started, times, quantization = time.perf_counter(), LoadTimes(), blueprint.quantization.get(key)
        found: Sequence[Source] = ()
        if kind in ("denoiser", "vae"):
            config = plan.attention_config.get(key)
            attention = Attention(key, plan.attention[key], plan.device, plan.dtypes[key], config)
            loaded.attention[key] = attention
            loaded.parts[key] = blueprint.module(key, attention)
            kept = {} if quantization is None else quantization.kept(loaded.parts[key])
            if kind == "denoiser" and args.use_fsdp_inference:
                times = loader.shard(key, loaded.parts[key])
            else:
                times, found = loader.fill(key, loaded.parts[key], must_pin=args.pin_cpu_memory is True)
            loaded.mapped[key] = found
        elif kind in ENCODERS:
            times, loaded.parts[key], kept = loader.encoder(key)
            loaded.encoder_attention[key] = str(loaded.parts[key].config._attn_implementation)
        elif kind == "tokenizer":
            loaded.parts[key] = loader.tokenizer(key)
        elif kind == "image_processor":
            loaded.parts[key] = read_processor(key, blueprint.configs[key])
        elif kind == "processor":
            loaded.parts[key] = blueprint.processor(key)
        if quantization is not None:
            loaded.quantization[key] = receipt(quantization.format, loaded.parts[key], kept, plan.dtypes[key])
        if key in plan.dtypes:  # it has weights
            weights: Literal["read", "mapped", "dummy"] = "mapped" if found else "read"
            wall_ms = (time.perf_counter() - started) * 1000
            weights = "dummy" if folders is None else weights
            read = blueprint.family.language_models.get(key)
            left_out = 0 if read is None else layers_left_out(key, blueprint.configs[key], read)
            loaded.reports[key] = ComponentLoad(
                weights=weights, layers_left_out=left_out, wall_ms=wall_ms, **asdict(times)
            )
    return loaded


@dataclass(frozen=True)
class ComponentLoader:
    """Loads components of a blueprint one by one.

    Attributes:
        folders: of the components; None where weights are dummies.
    """

    blueprint: Blueprint
    folders: Mapping[str, Path] | None

    def _home(self, key: str) -> torch.device:
        """Where a component's weights are loaded to."""
        plan = self.blueprint.plan
        return plan.device if plan.offload[key] == "resident" else CPU

    def _files(self, key: str) -> Sequence[Path]:
        """Of a component's weights, where they are not dummies."""
        assert self.folders is not None
        return self.blueprint.files.get(key) or weight_files(self.folders[key])

    def _uploads(self, key: str) -> CudaStreams | None:
        """What a component's weights are uploaded through."""
        home = self._home(key)
        return CudaStreams(home) if home.type == "cuda" else None

    def fill(self, key: str, module: nn.Module, *, must_pin: bool) -> tuple[LoadTimes, Sequence[Source]]:
        """Loads a module's weights, or finds them in their files where host memory has no room for a copy."""
        plan = self.blueprint.plan
        home, dtype = self._home(key), plan.dtypes[key]
        quantization = self.blueprint.quantization.get(key)
        if isinstance(quantization, Stored):
            quantization.load(module, home, dtype)
            return LoadTimes(), ()
        if self.folders is None:
            fill_dummy(module, home, dtype, plan.device, quantization)
            return LoadTimes(), ()
        files = self._files(key)
        if plan.offload[key] == "resident" or quantization is not None or fits_host_memory(module, dtype):
            return load_weights(module, files, home, dtype, self._uploads(key), quantization), ()
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
        files = None if self.folders is None else self._files(key)
        return load_sharded(key, module, files, plan.device, plan.dtypes[key], mesh.world, self._uploads(key))

    def encoder(self, key: str) -> tuple[LoadTimes, nn.Module, Mapping[str, str]]:
        """An encoder, and why layers of it are not quantised where others are."""
        plan, config = self.blueprint.plan, self.blueprint.configs[key]
        quantization, place = self.blueprint.quantization.get(key), self._home(key)
        # quantised layer by layer on their way to the device, which never has all of them in full
        home = place if quantization is None else CPU
        dtype, requested = plan.dtypes[key], plan.attention[key]
        times, tp, read = LoadTimes(), self.blueprint.mesh.tp, self.blueprint.family.language_models.get(key)
        if self.folders is None:
            encoder = dummy_encoder(key, config, home, dtype, requested, tp, read)
            fill_dummy(encoder, home, dtype, drawn_on=plan.device)
        else:
            folder, streams = self.folders[key], self._uploads(key) if home == place else None
            times, encoder = load_encoder(key, config, folder, home, dtype, requested, streams, tp, read)
        kept: Mapping[str, str] = {}
        if isinstance(quantization, Online):
            selection = quantization.select(encoder)
            for path in selection.layers:
                encoder.get_submodule(path).to(place)
                quantization.quantize(encoder, path)
            encoder.to(place)
            kept = selection.kept
        return times, encoder.eval().requires_grad_(False), kept

    def tokenizer(self, key: str) -> Any:
        if self.folders is not None:
            return load_tokenizer(self.folders[key])
        return HashTokenizer.beside(key, self.blueprint.configs)
