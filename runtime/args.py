"""Every option, declared once: type, default, range, help, aliases. Torch-free.

Flags, config keys, validation messages and `docs/cli.md` derive from these declarations. A field whose default is None
is resolved later, by the model or by `plan.py`; `unset` says to what. The values here stay as the user said them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
)

from sgl_diffusion.runtime.option import Options, Resolution, Seeds, Strings, Switch, aliases, as_list, option, parse

Precision = Literal["fp32", "bf16", "fp16"]


def _is_true(value: bool) -> bool:
    if not value:
        raise ValueError("must be true: the decoder makes the pictures")
    return value


# -- the model and how it runs ---------------------------------------------------------


class ModelOptions(Options):
    """Model"""

    model_path: str = option(
        "embedded",
        "Local folder or hub id of a diffusers-format checkpoint; `embedded` is the small model in the package.",
        aliases=["model"],
    )
    model_id: str | None = option(
        None,
        "Published checkpoint whose defaults apply (fine-tunes), or whose shapes --load-format dummy builds.",
        unset="none",
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub id.", unset="the newest")
    trust_remote_code: bool = option(False, "Let a checkpoint run Python code of its own.")
    allow_pickle_weights: bool = option(
        False, "Let the diffusers backend read weights that are pickles (.bin) where there are no safetensors."
    )
    backend: Literal["auto", "sglang", "diffusers"] = option(
        "auto", "`sglang`: native or an error; `diffusers`: always diffusers; `auto`: native where there is one."
    )
    pipeline_class_name: str | None = option(
        None,
        "Pipeline class to use instead of the one in model_index.json.",
        aliases=["pipeline"],
        unset="the checkpoint's",
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
    device_memory_limit_mb: int | None = option(
        None,
        "MiB of the device's memory that a request may take; one that is predicted to need more is refused.",
        unset="what is free on a GPU",
        ge=1,
    )
    performance_mode: Literal["manual", "auto", "speed", "memory"] = option(
        "auto",
        "`memory`: VAE tiling and slicing, and on a GPU every component offloaded; `speed`: none of it; "
        "`auto`: tiling above 4 megapixels, offload as far as a GPU is too small; "
        "`manual`: only what other flags say.",
        aliases=["mode"],
    )


class ParallelOptions(Options):
    """Several GPUs"""

    num_gpus: int | None = option(None, "GPUs of all hosts together.", unset="the product of the degrees", ge=1)
    sp_degree: int | None = option(
        None, "Ranks that share a sequence.", aliases=["sp_size"], unset="ulysses x ring, or all that are left", ge=1
    )
    ulysses_degree: int | None = option(None, "Of these, how many exchange heads for tokens.", unset="derived", ge=1)
    ring_degree: int | None = option(None, "How many pass keys and values around.", unset="derived", ge=1)
    enable_cfg_parallel: bool = option(False, "The two branches of guidance on two groups of ranks.")
    tp_size: int | None = option(None, "Ranks that share text encoders' and denoiser's weights.", unset="1", ge=1)
    dp_size: int | None = option(
        None, "Replicas, each with requests (serve) or results (generate) of its own.",
        aliases=["dp_degree"], unset="1", ge=1,
    )  # fmt: skip
    vae_sp: bool = option(False, "Decode on all ranks, each with rows of its own.")
    use_fsdp_inference: bool = option(False, "Ranks keep shares of the denoiser, and gather a layer while it computes.")
    sp_communication: Literal["model", "fp8"] = option(
        "model", "How heads travel between ranks: in the model's dtype, or in half of bf16's bytes, which is not exact."
    )
    nnodes: int = option(1, "Hosts.", ge=1)
    node_rank: int = option(0, "Which of the hosts this one is, from 0.", ge=0)
    dist_init_addr: str | None = option(None, "HOST:PORT, free on the first host.", unset="this host's")
    dist_timeout: float = option(600.0, "Seconds until a rank that others wait for is given up.", gt=0)


class PrecisionOptions(Options):
    """Precision"""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "Weights and activations of all components; `auto` is bf16 on a GPU and fp32 on a CPU."
    )
    dit_precision: Precision | None = option(None, "The denoiser's precision.", unset="as precision")
    vae_precision: Precision | None = option(None, "The VAE's precision.", unset="as precision")
    text_encoder_precisions: Annotated[list[Precision], BeforeValidator(as_list)] | None = option(
        None, "One precision for all text encoders, or one for each.", unset="as precision"
    )


Scheme = Literal["fp8", "fp8_block", "int8", "int4", "svdquant", "mxfp8", "nvfp4"]


class NunchakuConfig(Options):
    """What SVDQuant weights of nunchaku are to be."""

    precision: Literal["int4", "fp4"] | None = option(None, "Of their codes.", unset="the file's")
    rank: int | None = option(None, "Of the branch beside them.", unset="the file's", ge=1)


class QuantizationOptions(Options):
    """Quantization"""

    quantization: Scheme | None = option(
        None, "Denoisers' weights become codes while they are loaded; embeddings, modulation and the last layer stay.",
        unset="none",
    )  # fmt: skip
    quantization_ignored_layers: Strings = option(
        [], "Layers to keep: parts of their names in the checkpoint (attn.to_), or patterns with * and ?."
    )
    component_quantizations: dict[str, Literal[Scheme, "none"]] = option(
        {}, "Per component, for example text_encoder_2=int8,transformer_2=none; also dotted."
    )
    transformer_weights_path: str | None = option(
        None,
        "Other weights for the transformer, quantised ones too: a file, a folder, a hub id, or a file in one.",
        unset="the checkpoint's",
    )
    nunchaku_config: NunchakuConfig = option(
        NunchakuConfig(), "What the SVDQuant weights of transformer_weights_path have to be; as JSON, or dotted."
    )


class VaeConfig(Options):
    """VAE parts and tiles."""

    load_encoder: bool = option(False, "Load the VAE's encoder too; drawing from text does not need it.")
    load_decoder: Annotated[bool, AfterValidator(_is_true)] = option(
        True, "The decoder makes the pictures and is always loaded."
    )
    tile_sample_min_height: int | None = option(None, "Pixels of a tile.", unset="the checkpoint's", ge=64)
    tile_sample_min_width: int | None = option(None, "Pixels of a tile.", unset="the checkpoint's", ge=64)


class VaeOptions(Options):
    """VAE"""

    vae_tiling: bool | None = option(
        None, "Decode in tiles: less memory; no seams in clips, blended ones in pictures.", unset="by performance_mode"
    )
    vae_slicing: bool | None = option(None, "Decode the pictures of a batch one by one.", unset="by performance_mode")
    vae_config: VaeConfig = option(
        VaeConfig(), "VAE parts and tiles; nested in a config file, dotted on the command line."
    )


class OffloadOptions(Options):
    """Offload"""

    dit_cpu_offload: bool | None = option(
        None, "Keep the denoiser on the host, and on the GPU only while it works.", unset="by performance_mode"
    )
    text_encoder_cpu_offload: bool | None = option(None, "The same for text encoders.", unset="by performance_mode")
    image_encoder_cpu_offload: bool | None = option(None, "The same for image encoders.", unset="by performance_mode")
    vae_cpu_offload: bool | None = option(None, "The same for the VAE.", unset="by performance_mode")
    dit_layerwise_offload: bool = option(
        False, "Keep the denoiser's layers on the host; each is copied to the GPU while the one before it computes."
    )
    layerwise_offload_components: Strings = option(
        [], "Components whose layers are kept on the host, by name, or `all`.", aliases=["layerwise_offload_modules"]
    )
    dit_offload_prefetch_size: float | None = option(
        None, "Layers copied ahead: 0 is one, below 1 a share of the layers, from 1 on a count.", unset="0", ge=0
    )
    pin_cpu_memory: bool | None = option(
        None, "Lock offloaded weights in host memory, for copies that overlap.", unset="true"
    )


class AttentionOptions(Options):
    """Attention"""

    attention_backend: str | None = option(
        None,
        "Denoiser's attention: torch_sdpa, triton, cudnn, fa or auto; in 8 bits, not exact and never auto's choice, "
        "triton_int8, triton_fp8 or sage_attn; diffusers' names with its backend.",
        unset="auto",
    )
    attention_backend_config: dict[str, Any] = option(
        {},
        "Settings of attention_backend: JSON, key=value pairs, or a .json or .yaml file. Those in 8 bits have smooth_k "
        "(true or false: keys without their mean), triton_int8 also pv (half or fp8: its product with the values).",
    )
    component_attention_backends: dict[str, str] = option(
        {}, "Per component, for example transformer=triton,text_encoder=torch_sdpa; also dotted."
    )
    diffusers_attention_backend: str | None = option(
        None,
        "Attention of diffusers (native, flash, _flash_3_hub, sage, xformers ...); selects that backend.",
        unset="none",
    )


class CompileOptions(Options):
    """Graphs and compilation"""

    enable_cuda_graph: Switch = option(
        "auto",
        "Capture a denoising step and replay it: `auto` where that can be done, on a CPU too; `true` or an error; "
        "`false` never.",
    )

    enable_torch_compile: bool = option(False, "torch.compile the denoiser, block by block.")
    warmup: bool = option(
        False, "Compile, capture and try everything on throw-away pictures before the model is called ready."
    )
    warmup_steps: int | None = option(None, "Denoising steps of a throw-away picture.", unset="1", ge=1)
    warmup_resolutions: Annotated[list[Resolution], BeforeValidator(as_list)] = option(
        [], "Sizes to warm up, WIDTHxHEIGHT, for example 1024x1024 768x1344. Others run on what these compile."
    )


class LogOptions(Options):
    """Logging"""

    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Least severe message shown on stderr.")


class ServerArgs(
    ModelOptions,
    DeviceOptions,
    ParallelOptions,
    PrecisionOptions,
    QuantizationOptions,
    VaeOptions,
    OffloadOptions,
    AttentionOptions,
    CompileOptions,
    LogOptions,
):
    """What to load and how to run it."""


# -- what to draw ---------------------------------------------------------------------


class PromptOptions(Options):
    """Prompt"""

    prompt: Strings = option([], "What to draw. Several prompts make one request.")
    negative_prompt: str | None = option(None, "What to steer away from; needs guidance that uses it.", unset="none")
    prompt_path: str | None = option(
        None, "Text file with one prompt a line.", aliases=["prompt_file_path"], unset="none"
    )
    max_sequence_length: int | None = option(None, "Tokens of the text encoder's input.", ge=1)


class PictureOptions(Options):
    """Picture"""

    height: int | None = option(None, "Pixels.", ge=1)
    width: int | None = option(None, "Pixels.", ge=1)
    num_outputs_per_prompt: int = option(
        1, "Pictures or clips of every prompt.", aliases=["num_outputs", "num_samples"], ge=1
    )
    seed: Seeds | None = option(
        None, "Seed of the first picture, each further one adds 1; or one for every prompt.", unset="42"
    )


class VideoOptions(Options):
    """Video and input pictures"""

    num_frames: int | None = option(None, "Frames of a clip.", ge=1)
    fps: int | None = option(None, "Frames per second of the file.", unset="the model's, or 24", ge=1)
    image_path: Strings = option(
        [], "Input picture or pictures: files, http(s) URLs or data URIs.", aliases=["image_paths"]
    )


class DenoisingOptions(Options):
    """Denoising"""

    num_inference_steps: int | None = option(None, "Denoising steps.", ge=1)
    guidance_scale: float | None = option(None, "Guidance strength, embedded or classifier-free by model.", ge=0)
    guidance_scale_2: float | None = option(
        None, "That of a second denoiser, for little noise.", unset="the model's, or guidance_scale", ge=0
    )
    flow_shift: float | None = option(
        None, "Shift of the noise levels; above 1, more steps at high noise.", unset="the model's", gt=0
    )
    true_cfg_scale: float | None = option(None, "Classifier-free guidance with negative_prompt, above 1.", ge=0)


class OutputOptions(Options):
    """Output"""

    output_path: str = option("outputs/", "Folder of the results; made if missing.")
    output_file_name: str | None = option(
        None,
        "File name; its suffix is the format: .png, .jpg, .webp; .mp4 (H.264), .mkv (H.265), .webm (VP9), .gif. "
        "Several results get _0, _1 ...",
        unset="prompt, time, digest",
    )
    save_output: bool = option(True, "Write files. It is on unless switched off.")
    return_frames: bool = option(
        False, "Also write the raw frames, uint8 (F, H, W, 3), as a .npy file beside each result."
    )
    output_quality: int | None = option(
        None,
        "1 to 100, for JPEG, WebP and video. A video's CRF is (100 - quality) % of 51, of .webm 63, and at least 1.",
        unset="95, video 75",
        ge=1,
        le=100,
    )
    perf_dump_path: str | None = option(
        None,
        "Write the run's report to this JSON file, also if it fails; with shares of what the device can do.",
        unset="none",
    )
    measure_memory: bool = option(
        False, "On a CPU, follow every tensor for the report, which takes time; a GPU's memory is always measured."
    )
    resume_latents: str | None = option(
        None, "Decode the latents that a run kept in this .safetensors file when its decode failed.", unset="none"
    )
    profile: bool = option(False, "Write a PyTorch trace of the run beside its results (.trace.json.gz).")


class BackendOptions(Options):
    """diffusers"""

    diffusers_kwargs: dict[str, Any] = option({}, "More arguments for the diffusers pipeline, as JSON.")


class SamplingParams(PromptOptions, PictureOptions, VideoOptions, DenoisingOptions, OutputOptions, BackendOptions):
    """What to draw and where to put it."""


def canonical_names(models: Sequence[type[Options]] = (ServerArgs, SamplingParams)) -> dict[str, str]:
    """Every spelling of a key (aliases included) -> the field's name."""
    names = {}
    for model in models:
        for name, field in model.model_fields.items():
            names.update(dict.fromkeys([name, *aliases(field)], name))
    return names


def parse_args(values: Mapping[str, Any]) -> tuple[ServerArgs, SamplingParams]:
    """Both records from one flat mapping of canonical names.

    Raises:
        UserError: one line on the first value that is wrong.
    """
    server = {k: v for k, v in values.items() if k in ServerArgs.model_fields}
    sampling = {k: v for k, v in values.items() if k in SamplingParams.model_fields}
    return parse(ServerArgs, server), parse(SamplingParams, sampling)
