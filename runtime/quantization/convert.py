"""`sglang quantize`: a checkpoint with quantised denoisers, which is loaded as any other is.

With prompts, the model draws them first as it is, and what goes into every layer is watched.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from sgl_diffusion.kernels.attention import attention
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.blueprint import Blueprint
from sgl_diffusion.runtime.checkpoint import Checkpoint
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parts import ComponentLoader
from sgl_diffusion.runtime.pipeline import NativePipeline
from sgl_diffusion.runtime.quantization.component import Online
from sgl_diffusion.runtime.quantization.layers import QuantizedLinear
from sgl_diffusion.runtime.quantization.readers.saved import METHOD
from sgl_diffusion.runtime.quantization.receipt import receipt
from sgl_diffusion.runtime.quantization.selection import linear_layers
from sgl_diffusion.runtime.resolve import QUANTIZED, resolve
from sgl_diffusion.runtime.weights import slots

FILES = "diffusion_pytorch_model{suffix}.safetensors"


def quantize_checkpoint(
    args: ServerArgs, output: Path, calibration: SamplingParams | None = None
) -> dict[str, dict[str, Any]]:
    """Writes the model that the arguments name, quantised as they say. There is no folder before it is whole.

    Args:
        calibration: what is drawn, and thrown away, to see what goes into layers; None for what weights alone tell.
    Returns:
        By component, its receipt.
    Raises:
        UserError: nothing to quantise, a model that is not native, a scheme that takes no calibration, a folder that
            is there already.
    """
    if output.exists():
        raise UserError(f"output={output}: is there already; expected the name of a new folder")
    if not output.resolve().parent.is_dir():
        raise UserError(f"output={output}: the folder {output.parent} does not exist")
    model = resolve(args)
    if not model.native or model.checkpoint is None or model.dummy or model.blueprint is None:
        raise UserError(f"model_path={args.model_path}: {model.why}; expected the weights of a native model")
    chosen = {key: q for key, q in model.blueprint.quantization.items() if isinstance(q, Online)}
    if not chosen:
        raise UserError("quantization: missing; it says what to write")
    if others := [key for key in chosen if model.kinds[key] != "denoiser"]:
        raise UserError(f"component_quantizations.{others[0]}: only denoisers are written quantised")
    if calibration is not None:
        unable = [q.scheme.name for q in chosen.values() if q.scheme.calibrated is None]
        if unable:
            raise UserError(f"calibration_prompts: {unable[0]} makes no use of them")
        seen = calibrate(args, chosen, calibration)
        chosen = {key: replace(q, seen=seen[key]) for key, q in chosen.items()}
    blueprint = replace(model.blueprint, quantization={**model.blueprint.quantization, **chosen})
    with tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=f".{output.name}.") as unfinished:
        folder = Path(unfinished) / output.name
        receipts = _write(blueprint, chosen, model.checkpoint, folder)
        folder.rename(output)
    return receipts


def calibrate(args: ServerArgs, chosen: Mapping[str, Online], drawn: SamplingParams) -> dict[str, dict[str, Tensor]]:
    """By component and path of a layer, the largest magnitude of each of its inputs while something is drawn."""
    plain: dict[str, Any] = {"quantization": None, "component_quantizations": {}, "quantization_ignored_layers": []}
    eager = {"enable_cuda_graph": "false", "enable_torch_compile": False}  # replayed steps call no hooks
    with Engine.load(args.model_copy(update=plain | eager)) as engine, ExitStack() as watching:
        assert isinstance(engine.backend, NativePipeline)
        seen = {key: watching.enter_context(watched(engine.backend.parts[key])) for key in chosen}
        engine.run(drawn.model_copy(update={"save_output": False}))
    return seen


@contextmanager
def watched(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Fills the dict, by path of a linear layer, with the largest magnitude of each of its inputs: fp32 (K,)."""
    largest: dict[str, Tensor] = {}

    def watch(path: str, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen_K = arguments[0].detach().flatten(0, -2).abs().amax(0).float()
        largest[path] = torch.maximum(largest[path], seen_K) if path in largest else seen_K

    handles = [layer.register_forward_pre_hook(partial(watch, path)) for path, layer in linear_layers(module).items()]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _write(
    blueprint: Blueprint, chosen: Mapping[str, Online], checkpoint: Checkpoint, folder: Path
) -> dict[str, dict[str, Any]]:
    """The whole pipeline: what is not quantised is copied."""
    folder.mkdir()
    shutil.copy(checkpoint.root / "model_index.json", folder)
    if (defaults := checkpoint.root / "sampling_defaults.json").is_file():
        shutil.copy(defaults, folder)
    loader, receipts = ComponentLoader(blueprint, checkpoint.folders), {}
    for key, source in checkpoint.folders.items():
        if key not in chosen:
            shutil.copytree(source, folder / key)
            continue
        module = blueprint.module(key, attention)
        kept = chosen[key].kept(module)
        loader.fill(key, module, must_pin=False)
        receipts[key] = receipt(chosen[key].format, module, kept, blueprint.plan.dtypes[key])
        (folder / key).mkdir()
        save_torch_state_dict(state_dict(module), folder / key, filename_pattern=FILES)
        config = checkpoint.config(key) | {QUANTIZED: quantization_config(chosen[key].scheme.name, module)}
        (folder / key / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return receipts


def quantization_config(scheme: str, module: nn.Module) -> dict[str, Any]:
    """What `readers.saved` reads."""
    return {
        "quant_method": METHOD,
        "scheme": scheme,
        "layers": {path: q.kind for path, q in _quantized(module).items()},
    }


def state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Codes by the names of our layers, all else by the names of the checkpoint; on the host."""
    codes = {f"{path}.{name}": t for path, q in _quantized(module).items() for name, t in q.quantized.tensors.items()}
    parameters = dict(module.named_parameters())
    plain = {
        name: parameters[slot.parameter][slot.start : slot.stop]
        for name, slot in slots(module).items()
        if slot.parameter not in codes
    }
    return {name: t.detach().cpu().contiguous().clone() for name, t in (codes | plain).items()}


def _quantized(module: nn.Module) -> dict[str, QuantizedLinear]:
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}
