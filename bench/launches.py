"""`sglang bench launches`: counts what one denoiser call launches at true size, ours against diffusers eager.

Both models are built and called on shape-only ("meta") tensors: every PyTorch operation that is not a view counts as
one launch, and so does every Triton kernel. Attention and RMSNorm, which PyTorch would take apart here, count as one.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from sgl_diffusion.bench.absent import GPUS, absent
from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.kernels.launch import Impl
from sgl_diffusion.models.catalog import FAMILIES
from sgl_diffusion.models.family import SETTINGS, Family, Guidance, Predictor, Preset, Size
from sgl_diffusion.runtime.accounting import FREE
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.option import nearest

TIMESTEPS = (1000.0, 500.0)


class Launches(TorchDispatchMode):
    """Counts launches by name while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in FREE:
            self.by_name[name] += 1
        return func(*args, **kwargs or {})


@contextmanager
def counted(arch: str) -> Iterator[Counter[str]]:
    """Launches inside the `with`, as they would be on a GPU of `arch`."""

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            launches.by_name[kernel.__name__.strip("_")] += 1

        return launch

    def sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        launches.by_name["scaled_dot_product_attention"] += 1
        heads_last = query.new_empty(query.transpose(1, 2).shape[:-1] + value.shape[-1:])
        return heads_last.transpose(1, 2)

    def rms_norm(x: Tensor, *args: Any, **options: Any) -> Tensor:
        launches.by_name["rms_norm"] += 1
        return torch.empty_like(x)

    launches = Launches()
    with (
        torch.no_grad(),
        absent(GPUS[arch]),
        mock.patch.object(KernelInterface, "__getitem__", launcher),
        mock.patch.object(F, "scaled_dot_product_attention", sdpa),
        mock.patch.object(F, "rms_norm", rms_norm),
        launches,
    ):
        yield launches.by_name


def on_meta(
    family: type[Family], preset: Preset, size: Size, arch: str, attention_impl: Impl = "triton"
) -> tuple[Predictor, Tensor]:
    """A denoiser in bf16 made ready for a request of two steps, and the state it starts from: shapes alone."""
    with torch.device("meta"):
        kinds = family.components()
        attend = partial(attention, impl=attention_impl)
        options: Mapping[str, Any] = {"tile_height": 512, "tile_width": 512, "with_encoder": False}
        parts = {
            key: family.build(key, preset.components[key], attend, options if kind == "vae" else {}).to(torch.bfloat16)
            for key, kind in kinds.items()
            if kind in ("denoiser", "vae") and key in preset.components
        }
        pipeline = family({**{key: parts.get(key) for key in kinds}, SETTINGS: preset.components.get(SETTINGS, {})})
        condition = family.examples(preset.components)[0]
    x = pipeline.noise(size, [torch.Generator()])
    guidance = Guidance(preset.defaults.guidance_scale)
    with counted(arch):
        return pipeline.predictor(condition, size, guidance, TIMESTEPS, "transformer"), x


def count_native(family: type[Family], preset: Preset, size: Size, arch: str, attention_impl: Impl) -> Counter[str]:
    """Launches of one step of one branch, all that a request does once left out."""
    predict, x = on_meta(family, preset, size, arch, attention_impl)
    with counted(arch) as launches:
        predict(x, 1)
    return launches


def count_diffusers(family: type[Family], preset: Preset, size: Size, arch: str) -> Counter[str]:
    import diffusers

    key = next(key for key, kind in family.components().items() if kind == "denoiser")
    config = preset.components[key]
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(dict(config))
        fp32 = set(model._keep_in_fp32_modules or ())  # as `from_pretrained` does; `to` would cast these as well
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if tensor.is_floating_point() and not fp32 & set(name.split(".")):
                tensor.data = tensor.data.to(torch.bfloat16)
        inputs = family.diffusers_inputs(preset.components, family.examples(preset.components)[0], size)
    with counted(arch) as launches:
        model(**inputs)
    return launches


def spellings(hub_id: str) -> tuple[str, ...]:
    """A hub id, and its name in small letters, with and without the dots of its version.

    "t2v" may be left out: of models of clips, those that take no pictures are meant then.
    """
    full = hub_id.rpartition("/")[2].lower().removesuffix("-diffusers")
    names = dict.fromkeys((full, full.replace("-t2v", "")))
    return hub_id, *names, *(name.replace(".", "") for name in names)


def find(model: str) -> tuple[type[Family], Preset]:
    """A preset by one of its spellings."""
    known = {}
    for path in FAMILIES.values():
        module, _, name = path.partition(":")
        family: type[Family] = getattr(importlib.import_module(module), name)
        for hub_id, preset in family.presets().items():
            known.update(dict.fromkeys(spellings(hub_id), (family, preset)))
    if model not in known:
        short_names = [name for name in known if "/" not in name and "." not in name]
        raise UserError(f"model={model}: expected one of {', '.join(short_names)}{nearest(model, short_names)}")
    return known[model]


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("--model", required=True, help="a preset: its hub id, or its name in small letters")
    parser.add_argument("--height", type=int, help="pixels (default: the model's)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's)")
    parser.add_argument("--arch", choices=GPUS, default="sm_90", help="whose table of tiles to follow (default: sm_90)")
    parser.add_argument(
        "--attention", choices=("triton", "torch_sdpa"), default="triton", help="attention backend (default: triton)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there as well")
    args = parser.parse_args(argv)
    family, preset = find(args.model)
    default = preset.defaults
    size = Size(args.height or default.height, args.width or default.width, default.num_frames)
    impl: Impl = "triton" if args.attention == "triton" else "torch"
    ours = count_native(family, preset, size, args.arch, impl)
    theirs = count_diffusers(family, preset, size, args.arch)
    frames = f" of {size.frames} frames" if size.frames > 1 else ""
    print(f"launches of one denoiser call of {args.model}, {size.width}x{size.height}{frames}, tiles of {args.arch}")
    for name, counts in (("ours", ours), ("diffusers eager", theirs)):
        print(f"{name}: {counts.total()}")
        print("    " + ", ".join(f"{launch} {n}" for launch, n in counts.most_common()))
    print(f"{theirs.total() / ours.total():.1f} times fewer")
    if args.json:
        facts = {"model": args.model, **asdict(size), "arch": args.arch}
        report = {"ours": dict(ours.most_common()), "diffusers": dict(theirs.most_common())}
        args.json.write_text(json.dumps({**facts, "attention": args.attention, **report}, indent=1))
    return 0
