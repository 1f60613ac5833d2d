"""Building diffusers' own pipeline objects: from a checkpoint, or with dummy weights from configs."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode
from transformers.utils import is_torchvision_available

from sgl_diffusion.models.family import ENCODERS, SETTINGS
from sgl_diffusion.models.text import HashTokenizer
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.checkpoint import Checkpoint
from sgl_diffusion.runtime.encoders import dummy_encoder, load_tokenizer, read_processor
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.plan import Plan
from sgl_diffusion.runtime.weights import fill_dummy


def load_pipe(checkpoint: Checkpoint, args: ServerArgs, plan: Plan, pipeline_class: str) -> Any:
    """diffusers' own pipeline object, on the plan's device.

    Raises:
        UserError: code of its own without leave, an unknown class, files diffusers cannot load.
    """
    diffusers.utils.logging.disable_progress_bar()  # the caller shows progress
    options: dict[str, Any] = {}
    for key in args.component_paths:
        options[key] = _component(checkpoint, key, plan, args)
    custom = _custom_code(checkpoint) if args.pipeline_class_name is None else None
    if custom is not None and not args.trust_remote_code:
        raise UserError(f"{custom}: this model runs code of its own; read it, then allow it with --trust-remote-code")
    cls = diffusers.DiffusionPipeline
    if custom is not None:
        options.update(custom_pipeline=str(checkpoint.root))
    elif (cls := getattr(diffusers, pipeline_class, None)) is None:
        near = difflib.get_close_matches(pipeline_class, [n for n in dir(diffusers) if n.endswith("Pipeline")], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"pipeline_class_name={pipeline_class}: diffusers {diffusers.__version__} has no such class{hint}"
        )
    tokenizers = {} if custom is not None else _tokenizers_alone(checkpoint)
    options.update(dict.fromkeys(tokenizers))
    dtypes: dict[str, torch.dtype] = {
        "default": next(iter(plan.dtypes.values()), torch.float32),
        **plan.dtypes,
    }
    try:
        pipe = cls.from_pretrained(
            checkpoint.root,
            dtype=dtypes,
            use_safetensors=None if args.allow_pickle_weights else True,  # None: where there are any
            local_files_only=True,
            trust_remote_code=args.trust_remote_code,
            **options,
        )
        for key, tokenizer in tokenizers.items():
            setattr(pipe, key, tokenizer)
        tell_pictures_from_words(pipe)
        return pipe.to(plan.device)
    except (SafetensorError, OSError, ValueError, TypeError, ImportError, pickle.UnpicklingError) as e:
        pickles = not args.allow_pickle_weights and any(checkpoint.root.glob("*/*.bin"))
        hint = "; its weights are pickles, which may run code: --allow-pickle-weights reads them" if pickles else ""
        raise UserError(
            f"model_path={checkpoint.name}: diffusers cannot load it: {' '.join(str(e).split())[:400]}{hint}"
        ) from e


def dummy_pipe(
    pipeline_class: str, kinds: Mapping[str, str], configs: Mapping[str, Mapping[str, Any]], plan: Plan
) -> Any:
    """A pipeline with the same dummy weights as the native one, built from configs alone."""
    parts: dict[str, Any] = {}
    for key, kind in kinds.items():
        if kind in ("denoiser", "vae", "scheduler"):
            cls = getattr(diffusers, configs[key]["_class_name"])
        if kind in ("denoiser", "vae"):
            with UnfilledParameters():
                module = cls.from_config(dict(configs[key]))
            tables = {name: table.clone() for name, table in module.named_buffers()}
            fill_dummy(module, plan.device, plan.dtypes[key])
            for name, table in tables.items():
                module.get_buffer(name).copy_(table)
            parts[key] = module.eval().requires_grad_(False)
        elif kind == "scheduler":
            parts[key] = cls.from_config(dict(configs[key]))
        elif kind in ENCODERS:
            parts[key] = dummy_encoder(key, configs[key], plan.device, plan.dtypes[key], None).eval()
            fill_dummy(parts[key], plan.device, plan.dtypes[key])
        elif kind == "tokenizer":
            parts[key] = HashTokenizer.beside(key, configs)
        elif kind == "image_processor":
            parts[key] = read_processor(key, configs[key])
        elif kind == "processor":
            raise UserError(f"load_format=dummy: for the diffusers backend, there is no stand-in for {key}")
    return getattr(diffusers, pipeline_class)(**parts, **configs.get(SETTINGS, {}))


class UnfilledParameters(TorchFunctionMode):
    """The parameters of PyTorch's layers, which begin as `torch.empty`, have no memory: what will be drawn anew is not
    drawn twice. All else, as tables of positions, is made as it stands.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "meta"} if func is torch.empty else kwargs))


def _component(checkpoint: Checkpoint, key: str, plan: Plan, args: ServerArgs) -> Any:
    """One overridden component, by the class its own config names, or else `model_index.json` for it."""
    (library, class_name), config, folder = checkpoint.index[key], checkpoint.config(key), checkpoint.folders[key]
    class_name = config.get("_class_name", class_name)
    options: dict[str, Any] = {"dtype": plan.dtypes[key]} if key in plan.dtypes else {}
    if "auto_map" in config and library == "diffusers":
        if not args.trust_remote_code:
            raise UserError(
                f"{key}_path={folder}: {class_name} is code of its own; read it, then allow it with --trust-remote-code"
            )
        class_name, options["trust_remote_code"] = "AutoModel", True
    module = importlib.import_module(library)
    cls = getattr(module, class_name, None)
    if cls is None:
        raise UserError(f"{key}_path={folder}: {library} has no class {class_name}")
    try:
        return cls.from_pretrained(str(folder), local_files_only=True, **options)
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise UserError(f"{key}_path={folder}: {' '.join(str(e).split())[:300]}") from e


def _tokenizers_alone(checkpoint: Checkpoint) -> dict[str, Any]:
    """Tokenizers whose published class prepares pictures, too, by component, where that share of it cannot be loaded.

    It needs torchvision. A pipeline without a processor beside them reads text alone.
    """
    if is_torchvision_available():
        return {}
    processors = [
        key
        for key in checkpoint.folders
        if key.startswith("tokenizer") and checkpoint.index[key][1].endswith("Processor")
    ]
    return {key: load_tokenizer(checkpoint.folders[key]) for key in processors}


def _custom_code(checkpoint: Checkpoint) -> Path | None:
    """The Python file a checkpoint asks to run, if it names one."""
    name = checkpoint.index["_class_name"]
    if isinstance(name, list):
        return checkpoint.root / f"{name[0]}.py"
    for key in checkpoint.folders:
        library = checkpoint.index[key][0]
        if (file := checkpoint.root / key / f"{library}.py").is_file():
            return file
    return None


def tell_pictures_from_words(pipe: Any) -> None:
    """Tells a vision-language encoder which tokens are a picture's.

    transformers asks for it since version 5, and diffusers does not answer yet (its issue 14194): without, the tokens
    of a picture are placed like words, one after the other, and not as in training.
    """
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module) and "mm_token_type_ids" in inspect.signature(part.forward).parameters:
            part.register_forward_pre_hook(_name_pictures, with_kwargs=True)


def _name_pictures(encoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook."""
    if kwargs.get("image_grid_thw") is not None and kwargs.get("mm_token_type_ids") is None:
        pictures = kwargs["input_ids"] == encoder.config.image_token_id
        kwargs = {**kwargs, "mm_token_type_ids": pictures.int()}
    return args, kwargs


def bridge_precisions(pipe: Any, denoisers: Iterable[torch.nn.Module]) -> None:
    """Casts what enters a denoiser or VAE to its own dtype, for components of different precisions.

    diffusers' pipelines expect one dtype everywhere and stop at the first matrix product otherwise.
    """
    parts: list[Any] = list(denoisers)
    if (vae := getattr(pipe, "vae", None)) is not None:
        parts += [getattr(vae, name, None) for name in ("encoder", "decoder", "quant_conv", "post_quant_conv")]
    for part in parts:
        if isinstance(part, torch.nn.Module):
            part.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


def _cast_inputs(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook. Times and positions (`*_ids`, tensors below two dimensions) keep their precision."""
    dtype = next(module.parameters()).dtype

    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
        if isinstance(value, dict):
            return {k: v if k.endswith("_ids") else cast(v) for k, v in value.items()}
        return type(value)(cast(v) for v in value) if isinstance(value, list | tuple) else value

    return cast(args), cast(kwargs)
