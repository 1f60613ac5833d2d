"""What the arguments come to on this machine: device, dtypes, attention, VAE options. The arguments stay as said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from sgl_diffusion.models.family import ENCODERS, Size
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.option import nearest
from sgl_diffusion.runtime.parallel.layout import Layout, read_layout
from sgl_diffusion.runtime.parallel.ranks import local_rank, started_ranks
from sgl_diffusion.runtime.parallel.rows import check_tiling
from sgl_diffusion.runtime.parallel.usp import check_communication

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPONENT_OFFLOAD = {
    "dit_cpu_offload": "denoiser",
    "text_encoder_cpu_offload": "text_encoder",
    "image_encoder_cpu_offload": "image_encoder",
    "vae_cpu_offload": "vae",
}
AUTO_TILING_PIXELS = 4 * 1024 * 1024  # above this a whole decode needs more than ten gigabytes in fp32
PREDICTION_ERROR = 0.05  # of memory; what it is held to

Residency = Literal["resident", "component", "layerwise"]
"""Where weights live: on the device; on the host but for their stage; on the host but for the layers at work."""

ChooseOffload = Callable[["Plan", Mapping[str, Mapping[str, Residency]]], tuple[str, Mapping[str, Any]]]
"""Which of the ways to hold weights by name, the fastest first, and the numbers that led there."""


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, d in DTYPES.items() if d == dtype)


@dataclass(frozen=True)
class Plan:
    """Resolved choices of one loaded model. `dtypes`, `attention` and `offload` are by component key."""

    device: torch.device
    dtypes: Mapping[str, torch.dtype]
    attention: Mapping[str, str | None]  # requested backend, None for automatic
    vae_tiling: bool | None  # None: by the size of the picture
    vae_slicing: bool
    compile: bool
    offload: Mapping[str, Residency]
    pin_memory: bool  # lock offloaded weights in host memory
    prefetch: float  # layers copied ahead: 0 is one, below 1 a share of the layers, from 1 on a count
    layout: Layout = Layout()
    sp_communication: Literal["model", "fp8"] = "model"
    vae_sp: bool = False
    sharded: bool = False  # ranks keep shares of the denoiser's weights
    attention_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # component -> backend's settings
    quantization: Mapping[str, str] = field(default_factory=dict)  # component -> scheme, of what is not yet quantised
    chosen: Mapping[str, Any] = field(default_factory=dict)  # what performance_mode decided, as no flag did

    def tiles(self, size: Size) -> bool:
        """Whether pictures of this size are decoded in tiles. Ranks that have bands of them do without."""
        if self.vae_sp:
            return False
        if self.vae_tiling is None:
            return size.height * size.width > AUTO_TILING_PIXELS
        return self.vae_tiling


def make_plan(
    args: ServerArgs,
    kinds: Mapping[str, str],
    *,
    native: bool = True,
    heads: int | None = None,
    choose_offload: ChooseOffload | None = None,
) -> Plan:
    """The plan for a pipeline whose components have these kinds (`denoiser`, `vae`, `text_encoder`, ...).

    Args:
        native: False for the diffusers backend, which keeps its components on the device, and has one.
        heads: of the denoiser's attention, where they are known.
        choose_offload: is asked on a GPU where performance_mode=auto has to choose; without it, weights are taken
            to fit.
    Raises:
        UserError: a device that is not there, a list of precisions of the wrong length, an unknown component,
            offload where it has no effect, a layout of ranks that is impossible.
    """
    device = _device(args.device)
    layout = _layout(args, heads, native=native)
    check_communication(args.sp_communication, layout.sp, device)
    if args.enable_cuda_graph == "true" and device.type != "cuda":
        raise UserError(f"enable_cuda_graph=true: the device is {device}; auto captures what can be captured there")
    denoisers = [k for k, kind in kinds.items() if kind == "denoiser"]
    encoders = [k for k, kind in kinds.items() if kind == "text_encoder"]
    everywhere = DTYPES.get(args.precision, torch.bfloat16 if device.type == "cuda" else torch.float32)
    dtypes = {k: everywhere for k, kind in kinds.items() if kind in ("denoiser", "vae", *ENCODERS, "model")}
    if args.dit_precision is not None:
        dtypes.update(dict.fromkeys(denoisers, DTYPES[args.dit_precision]))
    if args.vae_precision is not None:
        dtypes.update({k: DTYPES[args.vae_precision] for k, kind in kinds.items() if kind == "vae"})
    if args.text_encoder_precisions is not None:
        dtypes.update(zip(encoders, _one_each(args.text_encoder_precisions, encoders), strict=True))

    tiling, slicing = {"memory": (True, True), "speed": (False, False)}.get(args.performance_mode, (None, False))
    if args.performance_mode == "manual":
        tiling = False
    chosen: dict[str, Any] = {}
    if args.vae_tiling is None and args.performance_mode != "manual" and not args.vae_sp and (native or tiling):
        chosen["vae_tiling"] = "by size" if tiling is None else tiling
    if args.vae_slicing is None and args.performance_mode in ("memory", "speed"):
        chosen["vae_slicing"] = slicing
    holders = {k: kind for k, kind in kinds.items() if k in dtypes}  # components with weights
    asked = _asked_offload(args, holders, device, native)
    plan = Plan(
        device=device,
        dtypes=dtypes,
        attention=_attention(args, list(dtypes), denoisers),
        vae_tiling=tiling if args.vae_tiling is None else args.vae_tiling,
        vae_slicing=slicing if args.vae_slicing is None else args.vae_slicing,
        compile=args.enable_torch_compile,
        offload={k: asked.get(k, "resident") for k in holders},
        pin_memory=args.pin_cpu_memory is not False,
        prefetch=args.dit_offload_prefetch_size or 0.0,
        layout=layout,
        sp_communication=args.sp_communication,
        vae_sp=args.vae_sp,
        sharded=args.use_fsdp_inference,
        attention_config=dict.fromkeys(denoisers, args.attention_backend_config),
        quantization=_quantization(args, kinds, native=native),
    )
    offload = plan.offload
    if native and device.type == "cuda":
        if args.performance_mode == "memory":
            offload = {k: asked.get(k, "component") for k in holders}
        elif args.performance_mode == "auto" and choose_offload is not None and not plan.sharded:
            ways = ways_to_hold(holders, asked, layerwise=not args.enable_torch_compile)
            way, chosen["offload_numbers"] = choose_offload(plan, ways)
            offload = ways[way]
    if by_mode := {k: place for k, place in offload.items() if place != plan.offload[k]}:
        chosen["offload"] = by_mode
    _check_offload_effects(args, holders, offload)
    return replace(plan, offload=offload, chosen=chosen)


def _attention(args: ServerArgs, components: Sequence[str], denoisers: Sequence[str]) -> dict[str, str | None]:
    """Backends by component, None for the fastest."""
    asked: dict[str, str | None] = dict.fromkeys(components)
    asked.update(dict.fromkeys(denoisers, args.attention_backend))
    for component, backend in args.component_attention_backends.items():
        if component not in asked:
            raise UserError(f"component_attention_backends.{component}={backend}: expected one of {', '.join(asked)}")
        asked[component] = backend
    return {key: None if backend == "auto" else backend for key, backend in asked.items()}


def _quantization(args: ServerArgs, kinds: Mapping[str, str], *, native: bool) -> dict[str, str]:
    """Schemes by component."""
    asked: dict[str, str] = {}
    if args.quantization is not None:
        asked = {key: args.quantization for key, kind in kinds.items() if kind == "denoiser"}
    for key, scheme in args.component_quantizations.items():
        able = [key for key, kind in kinds.items() if kind in ("denoiser", *ENCODERS)]
        if key not in able:
            raise UserError(f"component_quantizations.{key}={scheme}: expected one of {', '.join(able)}")
        asked[key] = scheme
    asked = {key: scheme for key, scheme in asked.items() if scheme != "none"}
    if args.quantization_ignored_layers and not any(kinds[key] == "denoiser" for key in asked):
        raise UserError(
            f"quantization_ignored_layers={' '.join(args.quantization_ignored_layers)}: no effect without quantization "
            "of a denoiser"
        )
    if not asked:
        return {}
    told = f"quantization={next(iter(asked.values()))}"
    if not native:
        raise UserError(f"{told}: the diffusers backend quantises nothing")
    if args.use_fsdp_inference:
        raise UserError(f"{told}: not with use_fsdp_inference, which shards weights as they are")
    return asked


def _asked_offload(
    args: ServerArgs, kinds: Mapping[str, str], device: torch.device, native: bool
) -> dict[str, Residency]:
    """Where the weights of those components live that a flag speaks of."""
    flags = _offload_flags(args)
    if flags and (device.type == "cpu" or not native):
        value = getattr(args, flags[0])
        told = " ".join(value) if isinstance(value, list) else str(value).lower()
        why = "on a CPU there is nothing to offload" if native else "the diffusers backend has no offload"
        raise UserError(f"{flags[0]}={told}: {why}")
    asked: dict[str, Residency] = {}
    for name, kind in COMPONENT_OFFLOAD.items():
        chosen: bool | None = getattr(args, name)
        members = [k for k in kinds if kinds[k] == kind or (kind == "image_encoder" and k.startswith(kind))]
        if chosen and not members:
            raise UserError(f"{name}=true: this pipeline has no {kind.replace('_', ' ')}")
        if chosen is not None:
            asked.update(dict.fromkeys(members, "component" if chosen else "resident"))

    layerwise = [k for k in kinds if args.dit_layerwise_offload and kinds[k] == "denoiser"]
    for name in args.layerwise_offload_components:
        if name != "all" and name not in kinds:
            expected = f"expected all or any of {', '.join(kinds)}{nearest(name, list(kinds))}"
            raise UserError(f"layerwise_offload_components={name}: {expected}")
        layerwise += list(kinds) if name == "all" else [name]
    if both := [k for k in layerwise if asked.get(k) == "component"]:
        raise UserError(f"{both[0]}: asked to be offloaded both whole and layer by layer; expected one of the two")
    asked.update(dict.fromkeys(layerwise, "layerwise"))
    return asked


def ways_to_hold(
    kinds: Mapping[str, str], asked: Mapping[str, Residency], *, layerwise: bool = True
) -> dict[str, Mapping[str, Residency]]:
    """Ways to hold the weights of components of these kinds, the fastest first, by name.

    Args:
        asked: components that are settled.
        layerwise: layers may come one by one.
    """
    encoders: dict[str, Residency] = {k: "component" for k, kind in kinds.items() if kind == "text_encoder"}
    denoisers = [k for k, kind in kinds.items() if kind == "denoiser"]
    whole: dict[str, Residency] = encoders | dict.fromkeys(denoisers, "component")
    layers: dict[str, Residency] = encoders | dict.fromkeys(denoisers, "layerwise")
    named = {"resident": {}, "text encoders offloaded": encoders, "denoiser offloaded too": whole}
    ways: dict[str, Mapping[str, Residency]] = {}
    for name, way in (named | ({"denoiser layer by layer": layers} if layerwise else {})).items():
        settled = way | dict(asked)
        if (offload := {k: settled.get(k, "resident") for k in kinds}) not in ways.values():
            ways[name] = offload
    return ways


def first_that_fits(needed: Mapping[str, int], available: int) -> str:
    """The first way whose bytes fit, were it predicted too low; else the one that needs the least."""
    fitting = (way for way, size in needed.items() if size * (1 + PREDICTION_ERROR) <= available)
    return next(fitting, min(needed, key=lambda way: needed[way]))


def _offload_flags(args: ServerArgs) -> list[str]:
    """Fields that ask for an offload, in the order of their declaration."""
    fields = (*COMPONENT_OFFLOAD, "dit_layerwise_offload", "layerwise_offload_components", "pin_cpu_memory")
    asked = [name for name in fields if getattr(args, name)]
    return asked + ["dit_offload_prefetch_size"] * (args.dit_offload_prefetch_size is not None)


def _check_offload_effects(args: ServerArgs, kinds: Mapping[str, str], offload: Mapping[str, Residency]) -> None:
    """Every setting of an offload needs one that it applies to."""
    size = args.dit_offload_prefetch_size
    if size is not None and "layerwise" not in offload.values():
        raise UserError(f"dit_offload_prefetch_size={size:g}: no effect without --dit-layerwise-offload")
    if size is not None and size > 1 and size != int(size):
        raise UserError(f"dit_offload_prefetch_size={size:g}: expected 0, a share below 1, or a whole count")
    if args.pin_cpu_memory and set(offload.values()) == {"resident"}:
        raise UserError("pin_cpu_memory=true: no effect: no component is offloaded")
    compiled = [k for k in kinds if offload[k] == "layerwise" and kinds[k] not in ENCODERS]
    if args.enable_torch_compile and compiled:
        raise UserError(f"enable_torch_compile=true: not with the layerwise offload of {compiled[0]}")


def _layout(args: ServerArgs, heads: int | None, *, native: bool) -> Layout:
    layout = read_layout(args, heads)
    check_tiling(args.vae_sp and args.vae_tiling is True, layout.ranks)
    if layout.ranks > 1:
        told = f"num_gpus={layout.ranks}"
        if not native:
            raise UserError(f"{told}: the diffusers backend runs on one")
        if args.enable_torch_compile:
            raise UserError(f"enable_torch_compile=true: not with {told}; steps are captured in graphs instead")
        if args.use_fsdp_inference and layout.dp > 1:  # all ranks gather every layer, as often as any of them
            raise UserError(f"use_fsdp_inference=true: not with dp_size={layout.dp}, whose replicas do unlike work")
    for name, value, needs, degree in (
        ("vae_sp", args.vae_sp, "several ranks", layout.ranks),
        ("use_fsdp_inference", args.use_fsdp_inference, "several ranks", layout.ranks),
    ):
        if value and degree == 1:
            raise UserError(f"{name}=true: no effect without {needs}; see num_gpus")
    return layout


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(name)
    if started_ranks() > 1 and device.type == "cuda":
        if device.index is not None:
            raise UserError(f"device={name}: every rank has a GPU of its own; expected auto, cuda or cpu")
        device = torch.device("cuda", local_rank())
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device={name}: no NVIDIA GPU is available to PyTorch {torch.__version__}")
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"device={name}: this machine has {torch.cuda.device_count()} GPU(s)")
    return device


def _one_each(names: Sequence[str], encoders: Sequence[str]) -> list[torch.dtype]:
    if len(names) not in (1, len(encoders)):
        raise UserError(
            f"text_encoder_precisions={' '.join(names)}: expected 1 or {len(encoders)} values, "
            f"one for each of {', '.join(encoders)}"
        )
    return [DTYPES[n] for n in (list(names) * len(encoders) if len(names) == 1 else names)]
