"""Text encoders and tokenizers of transformers, loaded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.weights import weight_files

# our backend names -> transformers' attention implementations
IMPLEMENTATIONS = {"torch_sdpa": "sdpa", "eager": "eager"}


def load_encoder(
    key: str,
    config: Mapping[str, Any],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None,
) -> Any:
    """The encoder named by `architectures` in its config, which is `model_index.json`'s word for it.

    Raises:
        UserError: an unknown class, a corrupt file, missing or mis-shaped weights, an attention backend it refuses.
    """
    cls = _encoder_class(key, config)
    weight_files(folder)
    transformers.utils.logging.disable_progress_bar()  # the caller shows progress
    try:
        encoder, info = cls.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            **_attention_option(key, attention),
        )
    except (SafetensorError, OSError) as e:
        raise UserError(f"{folder}: not a readable safetensors file: {str(e).splitlines()[0]}") from e
    except RuntimeError as e:  # transformers reports mis-shaped weights so
        raise UserError(f"{folder}: {' '.join(str(e).split())[:300]}") from e
    problems = {
        k.removesuffix("_keys"): sorted(map(str, info[k]))
        for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[k]
    }
    if problems:
        told = "; ".join(f"{kind} weights: {', '.join(names[:6])}" for kind, names in problems.items())
        raise UserError(f"{folder}: {told}")
    return encoder


def dummy_encoder(
    key: str,
    config: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None,
) -> nn.Module:
    """The encoder of a config at true shape; the caller fills its weights."""
    cls = _encoder_class(key, config)
    values = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "dtype", "torch_dtype")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            encoder: nn.Module = cls._from_config(cls.config_class(**values), **_attention_option(key, attention))
    finally:
        torch.set_default_dtype(before)
    return encoder


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a component folder, by the class its own config names."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: not a readable tokenizer: {str(e).splitlines()[0]}") from e


def _encoder_class(key: str, config: Mapping[str, Any]) -> Any:
    names = config.get("architectures") or [None]
    cls = getattr(transformers, str(names[0]), None)
    if cls is None:
        raise UserError(f"{key}: transformers {transformers.__version__} has no class {names[0]}")
    return cls


def _attention_option(key: str, attention: str | None) -> dict[str, str]:
    if attention is None:
        return {}
    if attention not in IMPLEMENTATIONS:
        raise UserError(f"component_attention_backends.{key}={attention}: expected one of {', '.join(IMPLEMENTATIONS)}")
    return {"attn_implementation": IMPLEMENTATIONS[attention]}
