"""Finished latents on disk: what a run leaves when its decode fails, and another run decodes without denoising."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sgl_diffusion.runtime.args import OutputOptions, SamplingParams, ServerArgs
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.files import whole
from sgl_diffusion.runtime.option import parse
from sgl_diffusion.runtime.output import METADATA_KEY
from sgl_diffusion.runtime.request import Request

TENSOR = "latents"
MODEL = ("model_path", "model_id", "revision", "component_paths", "load_format")  # which decoder the latents are for


@dataclass(frozen=True)
class Latents:
    """Final states of a request, and the request."""

    path: Path
    x: Tensor
    sampling: Mapping[str, Any]
    model: Mapping[str, Any]

    def check_model(self, args: ServerArgs) -> None:
        """Raises UserError if other settings of the model made the latents."""
        for name in MODEL:
            made, asked = self.model[name], getattr(args, name)
            if made != asked:
                raise UserError(f"resume_latents={self.path}: made with {name}={made}, not {name}={asked}")

    def of_shape(self, expected: torch.Size) -> Tensor:
        """The states. Raises UserError if the model's have another shape."""
        if self.x.shape != expected:
            found = tuple(self.x.shape)
            raise UserError(f"resume_latents={self.path}: of shape {found}, the model's are {tuple(expected)}")
        return self.x


def latents_path(paths: Sequence[Path]) -> Path:
    """Where the latents of the request with these results go: beside the first."""
    return paths[0].with_suffix(".latents.safetensors")


def save_latents(x: Tensor, request: Request, args: ServerArgs, path: Path) -> Path:
    """Writes the final states of a request, with all that is needed to decode them.

    Raises:
        RunFailure: the disk does not take the file.
    """
    sampling = {
        "prompt": list(request.prompts),
        "negative_prompt": request.negative_prompt,
        "num_outputs_per_prompt": request.outputs_per_prompt,
        "seed": list(request.seeds[:: request.outputs_per_prompt]),
        **request.given,
    }
    note = json.dumps({"sampling": sampling, "model": args.model_dump(include=set(MODEL))}, sort_keys=True)
    save_tensors({TENSOR: x.detach().cpu()}, note, path)
    return path


def save_tensors(tensors: Mapping[str, Tensor], note: str, path: Path) -> None:
    """Writes tensors of the host, with a note of ours. Raises RunFailure if the disk does not take the file."""
    with whole(path) as part:
        try:
            save_file({name: x.contiguous() for name, x in tensors.items()}, part, {METADATA_KEY: note})
        except SafetensorError as e:
            raise RunFailure(f"{path} cannot be written: {e}") from e


def read_latents(path: Path) -> Latents:
    """Raises UserError if the file is missing, broken or not of our making."""
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {})[METADATA_KEY])
            return Latents(path, file.get_tensor(TENSOR), note["sampling"], note["model"])
    except (OSError, SafetensorError) as e:
        raise UserError(f"resume_latents={path}: cannot be read: {e}") from e
    except (KeyError, ValueError) as e:
        raise UserError(f"resume_latents={path}: holds no latents that a run has kept") from e


def resumed(params: SamplingParams, args: ServerArgs) -> tuple[SamplingParams, Latents | None]:
    """The parameters with those of the kept latents, if that is what they ask for.

    Raises:
        UserError: the file is no such file, belongs to another model, or settles what the user has settled too.
    """
    if params.resume_latents is None:
        return params, None
    latents = read_latents(Path(params.resume_latents))
    latents.check_model(args)
    for name in sorted(params.model_fields_set - OutputOptions.model_fields.keys()):
        raise UserError(f"{name}={getattr(params, name)}: no effect with resume_latents, whose file holds it")
    output = params.model_dump(include=set(OutputOptions.model_fields))
    return parse(SamplingParams, {**latents.sampling, **output}), latents
