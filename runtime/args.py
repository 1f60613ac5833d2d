"""Every option, declared once: type, default, range, help, aliases. Torch-free.

Flags, config keys, validation messages and `docs/cli.md` derive from these declarations. A field whose default is None
takes the model's own default, or is resolved by `plan.py`; the values here stay as the user said them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from sgl_diffusion.runtime.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]


def option(default: Any, help: str, *, aliases: Sequence[str] = (), **limits: Any) -> Any:
    """A documented field. `limits` are pydantic's (`ge`, `le`); a list or dict default is copied."""
    if isinstance(default, list | dict):
        kind = type(default)
        return Field(default_factory=kind, description=help, json_schema_extra={"aliases": list(aliases)}, **limits)
    return Field(default, description=help, json_schema_extra={"aliases": list(aliases)}, **limits)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Strings = Annotated[list[str], BeforeValidator(_as_list)]


class Options(BaseModel):
    """Base of all groups: immutable, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


T = TypeVar("T", bound=Options)


# -- the model and how it runs ---------------------------------------------------------


class ModelOptions(Options):
    """Model"""

    model_path: str = option(
        "embedded",
        "Local folder or hub id of a diffusers-format checkpoint; `embedded` is the small model in the package.",
        aliases=["model"],
    )
    model_id: str | None = option(
        None, "Published checkpoint whose defaults apply (fine-tunes), or whose shapes --load-format dummy builds."
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub id.")
    trust_remote_code: bool = option(False, "Let a checkpoint run Python code of its own.")
    backend: Literal["auto", "sglang", "diffusers"] = option(
        "auto", "`sglang`: native or an error; `diffusers`: always diffusers; `auto`: native where there is one."
    )
    pipeline_class_name: str | None = option(
        None, "Pipeline class to use instead of the one in model_index.json.", aliases=["pipeline"]
    )
    component_paths: dict[str, str] = option(
        {}, "Other folders or hub ids for components; also as --<component>-path, for example --vae-path."
    )
    load_format: Literal["auto", "dummy"] = option(
        "auto", "`dummy`: random weights at true shape, for benchmarks without a download."
    )


class DeviceOptions(Options):
    """Device"""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = option(
        "auto", "auto, cpu, cuda or cuda:N; `auto` is the first GPU if there is one."
    )
    num_gpus: int = option(1, "Devices used by one request. This version runs on one.", ge=1, le=1)
    tp_size: int | None = option(None, "Tensor parallelism. This version runs on one device.", ge=1, le=1)
    sp_degree: int | None = option(
        None, "Sequence parallelism. This version runs on one device.", aliases=["sp_size"], ge=1, le=1
    )
    performance_mode: Literal["manual", "auto", "speed", "memory"] = option(
        "auto",
        "`memory`: VAE tiling and slicing on; `speed`: both off; `auto`: tiling above 4 megapixels; "
        "`manual`: only what other flags say.",
        aliases=["mode"],
    )


class PrecisionOptions(Options):
    """Precision"""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "Weights and activations of all components; `auto` is bf16 on a GPU and fp32 on a CPU."
    )
    dit_precision: Precision | None = option(None, "The denoiser's precision.")
    vae_precision: Precision | None = option(None, "The VAE's precision.")
    text_encoder_precisions: Annotated[list[Precision], BeforeValidator(_as_list)] | None = option(
        None, "One precision for all text encoders, or one for each."
    )


class VaeConfig(Options):
    """VAE parts and tiles."""

    load_encoder: bool = option(False, "Load the VAE's encoder too; drawing from text does not need it.")
    load_decoder: Literal[True] = option(True, "The decoder makes the pictures and is always loaded.")
    tile_sample_min_height: int | None = option(None, "Pixels of a tile; the checkpoint's own size otherwise.", ge=64)
    tile_sample_min_width: int | None = option(None, "Pixels of a tile; the checkpoint's own size otherwise.", ge=64)


class VaeOptions(Options):
    """VAE"""

    vae_tiling: bool | None = option(None, "Decode in blended tiles: bounded memory, near-exact seams.")
    vae_slicing: bool | None = option(None, "Decode the pictures of a batch one by one.")
    vae_config: VaeConfig = option(
        VaeConfig(), "VAE parts and tiles; nested in a config file, dotted on the command line."
    )


class AttentionOptions(Options):
    """Attention"""

    attention_backend: str | None = option(
        None, "Denoiser's attention. Native: torch_sdpa, triton, fa. With the diffusers backend: diffusers' names."
    )
    component_attention_backends: dict[str, str] = option(
        {}, "Per component, for example transformer=triton,text_encoder=torch_sdpa; also dotted."
    )
    diffusers_attention_backend: str | None = option(
        None, "Attention of diffusers (native, flash, _flash_3_hub, sage, xformers ...); selects that backend."
    )


class CompileOptions(Options):
    """Compilation"""

    enable_torch_compile: bool = option(False, "torch.compile the denoiser, block by block.")


class LogOptions(Options):
    """Logging"""

    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Least severe message shown on stderr.")


class ServerArgs(
    ModelOptions, DeviceOptions, PrecisionOptions, VaeOptions, AttentionOptions, CompileOptions, LogOptions
):
    """What to load and how to run it."""


# -- what to draw ---------------------------------------------------------------------


class PromptOptions(Options):
    """Prompt"""

    prompt: Strings = option([], "What to draw. Several prompts make one request.")
    negative_prompt: str | None = option(None, "What to steer away from; needs guidance that uses it.")
    prompt_path: str | None = option(None, "Text file with one prompt a line.", aliases=["prompt_file_path"])
    max_sequence_length: int | None = option(None, "Tokens of the text encoder's input.", ge=1)


class PictureOptions(Options):
    """Picture"""

    height: int | None = option(None, "Pixels.", ge=1)
    width: int | None = option(None, "Pixels.", ge=1)
    num_outputs_per_prompt: int = option(
        1, "Pictures or clips of every prompt.", aliases=["num_outputs", "num_samples"], ge=1
    )
    seed: int | None = option(
        None, "Seed of the first picture, 42 if not given; each further one adds 1.", ge=0, lt=2**63
    )


class VideoOptions(Options):
    """Video and input pictures"""

    num_frames: int | None = option(None, "Frames of a clip.", ge=1)
    fps: int | None = option(None, "Frames per second of the file, 24 if not given.", ge=1)
    image_path: Strings = option([], "Input picture or pictures.", aliases=["image_paths"])


class DenoisingOptions(Options):
    """Denoising"""

    num_inference_steps: int | None = option(None, "Denoising steps.", ge=1)
    guidance_scale: float | None = option(None, "Guidance strength, embedded or classifier-free by model.", ge=0)
    true_cfg_scale: float | None = option(None, "Classifier-free guidance with negative_prompt, above 1.", ge=0)


class OutputOptions(Options):
    """Output"""

    output_path: str = option("outputs/", "Folder of the results; made if missing.")
    output_file_name: str | None = option(
        None, "File name; its suffix is the format. Several results get _0, _1 ... (default: prompt, time, digest)."
    )
    save_output: bool = option(True, "Write files. It is on unless switched off.")
    return_frames: bool = option(
        False, "Also write the raw frames, uint8 (F, H, W, 3), as a .npy file beside each result."
    )
    output_quality: int | None = option(None, "1 to 100, for JPEG, WebP and video.", ge=1, le=100)
    perf_dump_path: str | None = option(None, "Write the run's report to this JSON file, also if it fails.")


class BackendOptions(Options):
    """diffusers"""

    diffusers_kwargs: dict[str, Any] = option({}, "More arguments for the diffusers pipeline, as JSON.")


class SamplingParams(PromptOptions, PictureOptions, VideoOptions, DenoisingOptions, OutputOptions, BackendOptions):
    """What to draw and where to put it."""


# -- names ------------------------------------------------------------------------------


def groups(model: type[Options]) -> Iterator[tuple[str, dict[str, FieldInfo]]]:
    """The groups of `ServerArgs` or `SamplingParams`: title and own fields, in the order of declaration."""
    for base in model.__bases__:
        assert issubclass(base, Options)
        own = {n: f for n, f in base.model_fields.items() if n in base.__annotations__}
        yield (base.__doc__ or base.__name__), own


def aliases(field: FieldInfo) -> list[str]:
    extra = field.json_schema_extra
    found = extra.get("aliases", []) if isinstance(extra, dict) else []
    return [str(a) for a in found] if isinstance(found, list) else []


def canonical_names() -> dict[str, str]:
    """Every spelling of a key (aliases included) -> the field's name."""
    names = {}
    for model in (ServerArgs, SamplingParams):
        for name, field in model.model_fields.items():
            names.update(dict.fromkeys([name, *aliases(field)], name))
    return names


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or nothing where no name is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


# -- values -------------------------------------------------------------------------------


def parse_args(values: Mapping[str, Any]) -> tuple[ServerArgs, SamplingParams]:
    """Both records from one flat mapping of canonical names.

    Raises:
        UserError: one line on the first value that is wrong.
    """
    server = {k: v for k, v in values.items() if k in ServerArgs.model_fields}
    sampling = {k: v for k, v in values.items() if k in SamplingParams.model_fields}
    return parse(ServerArgs, server), parse(SamplingParams, sampling)


def parse(model: type[T], values: Mapping[str, Any]) -> T:
    """A `ServerArgs` or `SamplingParams`; pydantic's complaint becomes one line that names field, value, allowed."""
    try:
        return model(**values)
    except ValidationError as e:
        raise UserError(_one_line(e)) from e


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(p) for p in first["loc"])
    context = first.get("ctx", {})
    told = {
        "greater_than_equal": "must be at least {ge}",
        "less_than_equal": "must be at most {le}",
        "less_than": "must be below {lt}",
        "literal_error": "expected {expected}",
        "string_pattern_mismatch": "expected auto, cpu, cuda or cuda:N",
        "int_parsing": "expected a whole number",
        "int_type": "expected a whole number",
        "int_from_float": "expected a whole number",
        "float_parsing": "expected a number",
        "bool_parsing": "expected true or false",
        "extra_forbidden": "is not a known key",
    }.get(first["type"])
    if told is None:
        return f"{field}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    if field == "vae_config.load_decoder":
        told = "must be true: the decoder makes the pictures"
    if first["type"] == "less_than_equal" and field in ("num_gpus", "tp_size", "sp_degree"):
        told = "this version runs on one device"
    return f"{field}={first['input']}: {told.format(**context)}"
