"""From what the user named to what will be built: a checkpoint or a preset, its configs, and the backend that runs it.

No weight is read here: what is known now is enough to plan memory and to compile kernels.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgl_diffusion.models.catalog import FAMILIES
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import ENCODERS, SETTINGS, Defaults, Family
from sgl_diffusion.runtime.args import NunchakuConfig, SamplingParams, ServerArgs
from sgl_diffusion.runtime.blueprint import Blueprint, kinds_of
from sgl_diffusion.runtime.checkpoint import EMBEDDED, Checkpoint, open_checkpoint, other_weights, read_json
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.memory import MemoryPlanner
from sgl_diffusion.runtime.parallel.layout import read_layout
from sgl_diffusion.runtime.parallel.mesh import Mesh
from sgl_diffusion.runtime.plan import Plan, Residency, make_plan
from sgl_diffusion.runtime.quantization.component import Online, Quantization, Stored
from sgl_diffusion.runtime.quantization.readers.catalog import read_quantized
from sgl_diffusion.runtime.quantization.schemes import SCHEMES
from sgl_diffusion.runtime.rehearsal import Rehearsal
from sgl_diffusion.runtime.request import overridden, resolve_request
from sgl_diffusion.runtime.weights import weight_files

QUANTIZED = "quantization_config"  # key of a component's config


@dataclass(frozen=True)
class Resolved:
    """A model that can be built.

    Attributes:
        native: the native backend runs it, else diffusers'.
        why: the reason for that backend.
        blueprint: of the native pipeline, if the family has one; dummy weights for diffusers' are shaped by it as well.
        checkpoint: where the weights are; None for dummies of a preset.
        memory: of the native pipeline.
        dummy: weights are random, whatever the checkpoint holds.
    """

    pipeline_class: str
    native: bool
    why: str
    kinds: Mapping[str, str]
    plan: Plan
    blueprint: Blueprint | None
    memory: MemoryPlanner | None
    checkpoint: Checkpoint | None
    dummy: bool

    @property
    def folders(self) -> Mapping[str, Path] | None:
        """Of the components' weights; None where they are dummies."""
        return None if self.dummy or self.checkpoint is None else self.checkpoint.folders

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        return self.checkpoint.sampling_defaults if self.checkpoint else {}


def resolve(args: ServerArgs, requests: Sequence[SamplingParams] = ()) -> Resolved:
    """Finds the model the arguments name, and who can run it.

    Args:
        requests: what has to fit a GPU beside the weights that performance_mode=auto leaves there; one result of
            default size where nothing is known.
    Raises:
        UserError: it cannot be found or read, or not be run as asked.
    """
    return _resolve_dummy(args, requests) if args.load_format == "dummy" else _resolve_checkpoint(args, requests)


def presets() -> list[str]:
    """Hub ids whose shapes are built in, for `load_format="dummy"`."""
    return list(dict.fromkeys(name for pipeline_class in FAMILIES for name in _family(pipeline_class).presets()))


def _resolve_checkpoint(args: ServerArgs, requests: Sequence[SamplingParams]) -> Resolved:
    pickles = args.allow_pickle_weights
    checkpoint = open_checkpoint(args.model_path, args.revision, args.component_paths, pickles=pickles)
    pipeline_class = args.pipeline_class_name or checkpoint.pipeline_class
    refused = _refusal(args, pipeline_class)
    if refused is None:
        try:
            memory = _native_memory(checkpoint, args, pipeline_class, requests)
        except ConfigError as e:
            refused = str(e)
        else:
            blueprint = memory.blueprint
            kinds, plan, why = blueprint.kinds, blueprint.plan, "native family"
            return Resolved(pipeline_class, True, why, kinds, plan, blueprint, memory, checkpoint, dummy=False)
    if args.backend == "sglang":
        raise UserError(f"backend=sglang: {refused}; --backend diffusers can run it")
    if args.transformer_weights_path is not None:
        raise UserError(f"transformer_weights_path={args.transformer_weights_path}: needs a native model ({refused})")
    if args.model_id is not None:
        raise UserError(f"model_id={args.model_id}: lends native defaults; has no effect here ({refused})")
    kinds = checkpoint.kinds()
    plan = make_plan(args, kinds, native=False)
    return Resolved(pipeline_class, False, refused, kinds, plan, None, None, checkpoint, dummy=False)


def _resolve_dummy(args: ServerArgs, requests: Sequence[SamplingParams]) -> Resolved:
    """Random weights at true shape, from a preset's configs or those of a local folder."""
    if args.transformer_weights_path is not None:
        raise UserError(f"transformer_weights_path={args.transformer_weights_path}: no effect on dummy weights")
    name, why = args.model_id or args.model_path, f"dummy weights of {args.model_id or args.model_path}"
    pipeline_class = next((c for c in FAMILIES if name in _family(c).presets()), None)
    checkpoint = None
    if pipeline_class is not None:
        if args.component_paths:
            raise UserError(f"component_paths={args.component_paths}: no effect on the dummy weights of a preset")
        family = _family(pipeline_class)
        preset = family.presets()[name]
        configs, defaults, pipeline_class = preset.components, preset.defaults, preset.pipeline_class
    elif name == EMBEDDED or Path(name).expanduser().is_dir():
        checkpoint = open_checkpoint(name, None, args.component_paths)
        pipeline_class = checkpoint.pipeline_class
        if pipeline_class not in FAMILIES:
            raise UserError(f"load_format=dummy: {pipeline_class} has no native implementation")
        family = _family(pipeline_class)
        configs = _configs(checkpoint, family)
        defaults = family.defaults(configs)
    else:
        raise UserError(f"model_path={name}: load_format=dummy needs a config folder or one of {', '.join(presets())}")
    native = args.backend != "diffusers"
    try:
        sampling_defaults = checkpoint.sampling_defaults if checkpoint else {}
        memory = _plan(args, family, configs, defaults, sampling_defaults, requests, native=native)
    except ConfigError as e:
        raise UserError(f"load_format=dummy: {e}") from e
    plan, blueprint = memory.plan, memory.blueprint
    planned = memory if native else None
    return Resolved(pipeline_class, native, why, blueprint.kinds, plan, blueprint, planned, checkpoint, dummy=True)


def _refusal(args: ServerArgs, pipeline_class: str) -> str | None:
    """Why the native backend does not take this model, or None if it does."""
    if args.backend == "diffusers":
        return "asked for with backend=diffusers"
    if args.diffusers_attention_backend is not None:
        return "asked for with diffusers_attention_backend"
    if pipeline_class not in FAMILIES:
        near = difflib.get_close_matches(pipeline_class, FAMILIES, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        return f"{pipeline_class} has no native implementation{hint}"
    return None


def _native_memory(
    checkpoint: Checkpoint, args: ServerArgs, pipeline_class: str, requests: Sequence[SamplingParams]
) -> MemoryPlanner:
    family = _family(pipeline_class)
    if missing := [k for k in family.components() if k not in checkpoint.folders and k not in family.optional()]:
        raise ConfigError(f"{pipeline_class} without component {missing[0]}")
    configs = _configs(checkpoint, family)
    preset = family.presets().get(args.model_id or "")
    if args.model_id is not None and preset is None:
        raise UserError(f"model_id={args.model_id}: expected one of {', '.join(family.presets())}")
    defaults = preset.defaults if preset else family.defaults(configs)
    weights = _denoisers_weights(args, checkpoint, family)
    return _plan(args, family, configs, defaults, checkpoint.sampling_defaults, requests, native=True, weights=weights)


def _configs(checkpoint: Checkpoint, family: type[Family]) -> dict[str, Mapping[str, Any]]:
    """Of the components there are, but for how their weights are quantised; and the settings of the whole."""
    configs = {key: checkpoint.config(key) for key in family.components() if key in checkpoint.folders}
    plain = {key: {k: v for k, v in config.items() if k != QUANTIZED} for key, config in configs.items()}
    return {**plain, SETTINGS: checkpoint.settings}


@dataclass(frozen=True)
class Weights:
    """By component, those that are quantised in their files, and files outside of the component's folder."""

    stored: Mapping[str, Stored] = field(default_factory=dict)
    files: Mapping[str, Sequence[Path]] = field(default_factory=dict)


def _denoisers_weights(args: ServerArgs, checkpoint: Checkpoint, family: type[Family]) -> Weights:
    """Raises UserError for quantised weights that no reader knows, or of other components."""
    stored, files = {}, {}
    other = args.transformer_weights_path
    if other is None and args.nunchaku_config != NunchakuConfig():
        raise UserError("nunchaku_config: no effect without transformer_weights_path")
    for key, kind in family.components().items():
        config = checkpoint.config(key).get(QUANTIZED, {}) if key in checkpoint.folders else {}
        if kind in ENCODERS and config:
            raise UserError(f"{checkpoint.folders[key]}: quantised encoders are not read; see component_quantizations")
        if kind != "denoiser" or key not in checkpoint.folders:
            continue
        if other is not None:  # of the first denoiser
            files[key] = other_weights(other)
            beside = files[key][0].parent / "config.json"
            config = read_json(beside).get(QUANTIZED, {}) if beside.is_file() else {}
        if config or other is not None:
            found = read_quantized(files[key] if key in files else weight_files(checkpoint.folders[key]), config)
            demanded = args.nunchaku_config.model_dump(exclude_none=True) if other is not None else {}
            for name, value in demanded.items():
                facts = {} if found is None else found.facts
                if facts.get(name) != value:
                    there = facts.get(name, "weights that are not quantised" if found is None else found.format)
                    raise UserError(f"nunchaku_config.{name}={value}: {other} has {there}")
            if found is not None:
                stored[key] = Stored(other or str(checkpoint.folders[key]), found)
        other = None
    return Weights(stored, files)


def _quantization(
    args: ServerArgs, plan: Plan, kinds: Mapping[str, str], stored: Mapping[str, Stored]
) -> dict[str, Quantization]:
    """By component. Raises UserError for one that is to be quantised twice, or that ranks cannot share."""
    if both := [key for key in stored if key in plan.quantization]:
        key = both[0]
        raise UserError(
            f"quantization={plan.quantization[key]}: the weights of {key} are quantised: {stored[key].format}"
        )
    if stored and (plan.sharded or plan.layout.tp > 1):
        name = "use_fsdp_inference=true" if plan.sharded else f"tp_size={plan.layout.tp}"
        raise UserError(f"{name}: not with weights that come quantised ({next(iter(stored.values())).format})")
    ignored = tuple(args.quantization_ignored_layers)
    online = {
        key: Online(key, SCHEMES[scheme], ignored if kinds[key] == "denoiser" else ())
        for key, scheme in plan.quantization.items()
    }
    return {**stored, **online}


def _plan(
    args: ServerArgs,
    family: type[Family],
    configs: Mapping[str, Mapping[str, Any]],
    defaults: Defaults,
    sampling_defaults: Mapping[str, Any],
    params: Sequence[SamplingParams],
    *,
    native: bool,
    weights: Weights = Weights(),
) -> MemoryPlanner:
    """The planner holds the blueprint.

    Raises:
        ConfigError: the native family does not understand a config.
        UserError: it cannot be run as asked, or not draw what is asked for.
    """
    requests = [resolve_request(p, sampling_defaults, args) for p in params]
    usual = overridden(defaults, sampling_defaults)
    vae_options = {
        "tile_height": args.vae_config.tile_sample_min_height,
        "tile_width": args.vae_config.tile_sample_min_width,
        "with_encoder": args.vae_config.load_encoder or family.encodes_pictures(configs),
    }
    rehearsal: Rehearsal | None = None

    def blueprint_of(plan: Plan) -> Blueprint:
        quantization = _quantization(args, plan, kinds, weights.stored)
        mesh = Mesh.stand_in(plan.layout)
        return Blueprint(family, configs, defaults, plan, vae_options, mesh, quantization, weights.files)

    def choose_offload(plan: Plan, ways: Mapping[str, Mapping[str, Residency]]) -> tuple[str, Mapping[str, Any]]:
        nonlocal rehearsal
        memory = MemoryPlanner(blueprint_of(plan), args)
        rehearsal = memory.rehearsal
        works = [rehearsal.workload(request) for request in requests] or [rehearsal.usual_workload(usual)]
        return memory.choose_offload(ways, works)

    kinds = kinds_of(family, configs)
    heads = family.attention_heads(configs) if native and read_layout(args).ranks > 1 else None
    plan = make_plan(args, kinds, native=native, heads=heads, choose_offload=choose_offload)
    blueprint = blueprint_of(plan)
    if native:
        blueprint.check(requests)
    return MemoryPlanner(blueprint, args, rehearsal)


def _family(pipeline_class: str) -> type[Family]:
    module, _, name = FAMILIES[pipeline_class].partition(":")
    family: type[Family] = getattr(importlib.import_module(module), name)
    return family
