"""Text encoders and tokenizers of transformers, loaded strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import transformers
from torch import Tensor, nn

from sgl_diffusion.models.family import Read
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parallel.group import Group
from sgl_diffusion.runtime.parallel.mesh import ONE
from sgl_diffusion.runtime.parallel.tensor import share_encoder
from sgl_diffusion.runtime.reading import Loader, LoadTimes, Run, Stored, stored_tensors
from sgl_diffusion.runtime.weights import some, weight_files

if TYPE_CHECKING:
    from sgl_diffusion.runtime.offload import DeviceStreams

CPU = torch.device("cpu")

# our backend names -> transformers' attention implementations
IMPLEMENTATIONS = {"torch_sdpa": "sdpa", "eager": "eager"}

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class _Unread:
    """Stands in for a tensor in the state dict that `from_pretrained` is given.

    transformers knows the names of old checkpoints, which weights stay in fp32 and which are tied. It takes all of a
    tensor (`tensor[...]`) and moves it to the device and dtype it is to have: that move is the read. Without a loader,
    it stays a view of the mapped file where that has the dtype.
    """

    stored: Stored
    loader: Loader | None

    def __getitem__(self, all_of_it: Any) -> Self:
        return self

    def to(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        if self.loader is None:
            return self.stored.mapped().to(dtype)
        tensor = torch.empty(self.stored.shape, device=device, dtype=dtype)
        self.loader.load([(Run(self.stored), tensor)])
        return tensor


def load_encoder(
    key: str,
    config: Mapping[str, Any],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None,
    streams: DeviceStreams | None = None,
    tp: Group = ONE.tp,
    read: Read | None = None,
) -> tuple[LoadTimes, Any]:
    """The encoder named by `architectures` in its config, which is `model_index.json`'s word for it.

    Args:
        read: what of a language model is loaded; None for all.
        tp: ranks that share its weights. Each maps the files and copies its own out of them, without the readers: the
            others' are not read, and are never on the device.
    Raises:
        UserError: an unknown class, a corrupt file, missing or mis-shaped weights, an attention backend it refuses, an
            architecture that ranks cannot share.
    """
    cls = _encoder_class(key, config)
    built = cls.config_class.from_pretrained(folder, local_files_only=True)
    left_out = _reduce(built, read)
    every = (tensor for path in _encoder_files(folder) for tensor in stored_tensors(path))
    unread = () if read is None else ("lm_head.weight",)
    stored = [t for t in every if _layer_of(t.name) not in left_out and not t.name.endswith(unread)]
    transformers.utils.logging.disable_progress_bar()  # the caller shows progress
    try:
        with Loader(streams) as loader:
            encoder, info = cls.from_pretrained(
                None,
                config=built,
                state_dict={tensor.name: _Unread(tensor, loader if tp.size == 1 else None) for tensor in stored},
                dtype=dtype,
                device_map={"": device if tp.size == 1 else CPU},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below, by name
                **_attention_option(key, attention),
            )
    except RuntimeError as e:  # weights that transformers could not convert
        raise UserError(f"{folder}: {' '.join(str(e).split())[:300]}") from e
    misshaped = [f"{name} {tuple(shape)} instead of {tuple(wanted)}" for name, shape, wanted in info["mismatched_keys"]]
    problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "mis-shaped": misshaped}
    if any(problems.values()):
        told = "; ".join(f"{kind} weights: {some(sorted(names))}" for kind, names in problems.items() if names)
        raise UserError(f"{folder}: {told}")
    _drop(encoder, read, left_out)
    if tp.size > 1:
        share_encoder(key, encoder, tp)
        encoder._apply(lambda t: t.to(device, copy=True))  # out of the mapped files, which may change
        loader.times.bytes_read = sum(p.nbytes for p in encoder.parameters())
    return loader.times, encoder


def _reduce(config: Any, read: Read | None) -> range:
    """Makes it the config of what is read. Returns the numbers of the layers that it has not any more."""
    if read is None:
        return range(0)
    text = config.get_text_config()
    config.tie_word_embeddings = text.tie_word_embeddings = True  # such a head is no weight of its own
    every = range(text.num_hidden_layers)
    text.num_hidden_layers = len(every[: read.layers])
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    return every[text.num_hidden_layers :]


def _drop(encoder: Any, read: Read | None, left_out: range) -> None:
    """Takes away what a language model comes with and nobody reads."""
    if read is not None and hasattr(encoder, "lm_head"):
        encoder.lm_head = nn.Identity()
    if left_out:
        encoder.get_decoder().norm = nn.Identity()  # is meant for the last layer


def _layer_of(name: str) -> int | None:
    """The layer of a language model that a weight is of."""
    found = _LAYER.search(name)
    return None if found is None or "vision" in name else int(found[1])


def _encoder_files(folder: Path) -> list[Path]:
    """As `weight_files`, but a whole file goes before shards and variants: so it is with transformers."""
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else weight_files(folder)


def dummy_encoder(
    key: str,
    config: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None,
    tp: Group = ONE.tp,
    read: Read | None = None,
) -> nn.Module:
    """The encoder of a config at true shape, or a rank's share of it; the caller fills its weights.

    Args:
        read: as of `load_encoder`.
    Raises:
        UserError: as `load_encoder`.
    """
    cls = _encoder_class(key, config)
    built = _built(cls, config)
    left_out = _reduce(built, read)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            encoder: nn.Module = cls._from_config(built, **_attention_option(key, attention))
    finally:
        torch.set_default_dtype(before)
    _drop(encoder, read, left_out)
    share_encoder(key, encoder, tp)
    return encoder


def layers_left_out(key: str, config: Mapping[str, Any], read: Read) -> int:
    """How many layers of a language model nobody reads. Raises UserError for an unknown class."""
    return len(_reduce(_built(_encoder_class(key, config), config), read))


def _built(cls: Any, config: Mapping[str, Any]) -> Any:
    """The config as transformers has it."""
    told = ("architectures", "model_type", "dtype", "torch_dtype")
    return cls.config_class(**{name: value for name, value in config.items() if name not in told})


def read_processor(key: str, config: Mapping[str, Any]) -> Any:
    """What prepares pictures for an image encoder, from its config alone.

    Raises:
        UserError: transformers does not know it.
    """
    name = str(config.get("image_processor_type"))
    cls = getattr(transformers, name, None)
    if cls is None:
        raise UserError(f"{key}: transformers {transformers.__version__} has no class {name}")
    return cls.from_dict(dict(config))


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
