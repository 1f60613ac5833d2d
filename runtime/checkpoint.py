"""Finding a checkpoint: the embedded model, a local folder, a hub id; and what its `model_index.json` says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from sgl_diffusion.runtime.errors import UserError

EMBEDDED = "embedded"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_FILE = re.compile(r"\w[\w.-]*/\w[\w.-]*/\w[\w./-]*\.(safetensors|gguf)")
CONFIG_NAMES = (
    "config.json",
    "scheduler_config.json",
    "preprocessor_config.json",  # before that of a tokenizer, which a processor's folder holds as well
    "processor_config.json",
    "tokenizer_config.json",
)
# *.bin only if asked for, and *.ckpt never: pickles run code
HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers-format folder: `index` is its model_index.json, `folders` the folder of each component."""

    name: str
    root: Path
    index: Mapping[str, Any]
    folders: Mapping[str, Path]
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pipeline_class(self) -> str:
        name = self.index["_class_name"]
        return str(name[-1] if isinstance(name, list) else name)

    @property
    def settings(self) -> dict[str, Any]:
        """The plain values in model_index.json."""
        return {k: v for k, v in self.index.items() if not k.startswith("_") and not isinstance(v, list)}

    def kinds(self) -> dict[str, str]:
        """Component key -> kind, by the naming habit of diffusers' pipelines."""
        kinds = {}
        for key, folder in self.folders.items():
            if key.startswith(("transformer", "unet", "prior")):
                kinds[key] = "denoiser"
            elif key.startswith(("vae", "vqgan", "movq")):
                kinds[key] = "vae"
            elif key.startswith("text_encoder"):
                kinds[key] = "text_encoder"
            elif (folder / "config.json").is_file():
                kinds[key] = "model"
            else:
                kinds[key] = "other"
        return kinds

    def config(self, component: str) -> dict[str, Any]:
        """The component's config file, `{}` if it has none.

        A transformers model may be saved by a larger class than the pipeline uses (T5 with its decoder):
        `architectures` is the class that `model_index.json` names.
        """
        for name in CONFIG_NAMES:
            if (path := self.folders[component] / name).is_file():
                library, class_name = self.index[component]
                config = read_json(path)
                return config | {"architectures": [class_name]} if library == "transformers" else config
        return {}


def open_checkpoint(
    model_path: str, revision: str | None, component_paths: Mapping[str, str], *, pickles: bool = False
) -> Checkpoint:
    """Resolves `model_path`, downloading if it is a hub id, and applies component overrides.

    Args:
        pickles: download weights of that kind, too.
    Raises:
        UserError: no such folder or repository, no readable `model_index.json`, a component key that is not in it.
    """
    root = _resolve("model_path", model_path, revision, pickles)
    index_file = root / "model_index.json"
    if not index_file.is_file():
        raise UserError(
            f"model_path={model_path}: no model_index.json in it; expected a diffusers-format folder or hub id"
        )
    index = read_json(index_file)
    if "_class_name" not in index:
        raise UserError(f"{index_file}: no _class_name in it; expected a diffusers-format model_index.json")
    keys = [k for k, v in index.items() if isinstance(v, list) and len(v) == 2 and not k.startswith("_") and v[0]]
    folders = {k: root / k for k in keys}
    for key, path in component_paths.items():
        if key not in folders:
            raise UserError(
                f"{key}_path={path}: {model_path} has no component {key!r}; its components: {', '.join(keys)}"
            )
        folders[key] = _component_folder(key, path)
    for key, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"model_path={model_path}: component folder {key} is missing")
    defaults_file = root / "sampling_defaults.json"
    defaults = read_json(defaults_file) if defaults_file.is_file() else {}
    return Checkpoint(model_path, root, index, folders, defaults)


def _component_folder(key: str, path: str) -> Path:
    folder = _resolve(f"{key}_path", path, None)
    config = next((folder / n for n in CONFIG_NAMES if (folder / n).is_file()), None)
    if config is None:
        raise UserError(f"{key}_path={path}: no {CONFIG_NAMES[0]} in it; expected a complete component folder")
    if config.name == "config.json" and not list(folder.glob("*.safetensors")):
        raise UserError(f"{key}_path={path}: no safetensors file in it; expected a complete component folder")
    return folder


def _resolve(field_name: str, path: str, revision: str | None, pickles: bool = False) -> Path:
    if path == EMBEDDED:
        return Path(str(resources.files("sgl_diffusion.models.embedded"))) / "checkpoint"
    local = Path(path).expanduser()
    if local.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision}: {path} is a local folder; a revision is for hub ids")
        return local
    if not HUB_ID.fullmatch(path):
        raise UserError(f"{field_name}={path}: no such folder, and not a hub id (org/name) or {EMBEDDED!r}")
    if os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return _from_modelscope(field_name, path, revision)
    return _from_hub(field_name, path, revision, pickles)


def other_weights(path: str) -> list[Path]:
    """The files of `transformer_weights_path`: one, those of a folder, those of a repository, or one in a repository.

    Raises:
        UserError: there is no such file, or nothing in such a folder.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return [local]
    if local.is_dir() or HUB_ID.fullmatch(path):
        folder = local if local.is_dir() else _resolve("transformer_weights_path", path, None)
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.gguf"))
        if not files:
            raise UserError(f"transformer_weights_path={path}: no .safetensors or .gguf file in it")
        return files
    if HUB_FILE.fullmatch(path):
        return [_file_from_hub(path)]
    raise UserError(
        f"transformer_weights_path={path}: no such file or folder, and not a hub id (org/name) or a file in one "
        "(org/name/file.safetensors)"
    )


def _file_from_hub(path: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    organisation, name, file = path.split("/", 2)
    try:
        return Path(hf_hub_download(f"{organisation}/{name}", file))
    except LocalEntryNotFoundError as e:
        why = "not in the local cache and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
        raise UserError(f"transformer_weights_path={path}: {why}") from e
    except (HfHubHTTPError, OSError) as e:
        raise UserError(f"transformer_weights_path={path}: cannot be fetched: {str(e).splitlines()[0]}") from e


def _from_hub(field_name: str, repo: str, revision: str | None, pickles: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision}" if revision else ""
    try:
        # whole safetensors repositories only: variants (fp16, ema) would double the download
        patterns = [*HUB_FILES, "*/*.safetensors", "*.safetensors", *(["*/*.bin"] if pickles else [])]
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*.fp16.*", "*.ema.*", "*/flax_*"],
            )
        )
    except GatedRepoError as e:
        raise UserError(f"{field_name}={repo}: access is gated; accept its terms on the hub and set HF_TOKEN") from e
    except RevisionNotFoundError as e:
        raise UserError(f"revision={revision}: {repo} has no such revision") from e
    except LocalEntryNotFoundError as e:
        raise UserError(
            f"{field_name}={repo}: not in the local cache{at} and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
        ) from e
    except HfHubHTTPError as e:
        raise UserError(
            f"{field_name}={repo}: the hub answered {e.response.status_code if e.response else e}{at}"
        ) from e
    except OSError as e:
        raise UserError(f"{field_name}={repo}: cannot be fetched{at}: {str(e).splitlines()[0]}") from e


def _from_modelscope(field_name: str, repo: str, revision: str | None) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as e:
        raise UserError(
            "SGLANG_USE_MODELSCOPE is set: needs the package modelscope (pip install 'sgl-diffusion[modelscope]')"
        ) from e
    try:
        return Path(snapshot_download(repo, revision=revision))
    except (OSError, ValueError) as e:
        raise UserError(f"{field_name}={repo}: ModelScope: {str(e).splitlines()[0]}") from e


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError naming the file if it is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable as JSON: {e}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
