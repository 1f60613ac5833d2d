"""The native pipeline, for every family: encode -> prepare -> denoise -> decode."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import Defaults, Family, Guidance, Size
from sgl_diffusion.models.text import HashTokenizer, PromptTooLong
from sgl_diffusion.runtime import denoise
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.attention import Attention
from sgl_diffusion.runtime.encoders import dummy_encoder, load_encoder, load_tokenizer
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.events import Event, StageFinished, StageStarted, StepDone
from sgl_diffusion.runtime.graphs import step_graphs
from sgl_diffusion.runtime.plan import Plan, dtype_name
from sgl_diffusion.runtime.request import Request
from sgl_diffusion.runtime.schedulers import FlowMatchEuler
from sgl_diffusion.runtime.trace import Stopwatch
from sgl_diffusion.runtime.weights import fill_dummy, load_weights, weight_files

Pixels = NDArray[np.uint8]
"""A picture (H, W, 3) or a clip (F, H, W, 3)."""

Record = Callable[[str, Tensor], None]
"""Is shown every intermediate tensor by name; `sglang verify` compares them between backends."""


def ignore(name: str, tensor: Tensor) -> None:
    """Records nothing."""


class NativePipeline:
    """A loaded family. `folders` is None where weights are dummies built from `configs` alone."""

    name = "sglang"
    draws_video = False

    def __init__(
        self,
        family: type[Family],
        configs: Mapping[str, Mapping[str, Any]],
        folders: Mapping[str, Path] | None,
        defaults: Defaults,
        args: ServerArgs,
        plan: Plan,
    ) -> None:
        self.plan, self.defaults, self.dummy = plan, defaults, folders is None
        self.attention: dict[str, Attention] = {}
        self.encoder_attention: dict[str, str] = {}
        self.scheduler = FlowMatchEuler.read(configs["scheduler"])
        vae_config = args.vae_config
        vae_options = {
            "tile_height": vae_config.tile_sample_min_height,
            "tile_width": vae_config.tile_sample_min_width,
            "with_encoder": vae_config.load_encoder,
        }
        parts: dict[str, Any] = {}
        for key, kind in family.components().items():
            if kind in ("denoiser", "vae"):
                self.attention[key] = Attention(key, plan.attention[key], plan.device, plan.dtypes[key])
                options = vae_options if kind == "vae" else {}
                parts[key] = self._module(family, key, configs[key], folders, options)
            elif kind == "text_encoder":
                parts[key] = self._encoder(key, configs[key], folders)
            elif kind == "tokenizer":
                parts[key] = self._tokenizer(key, configs, folders)
        self.family = family(parts)
        self.parts = parts
        self.compiled = self._compile() if plan.compile else {}
        prevented_by = "torch.compile has graphs of its own" if self.compiled else ""
        self.graphs = step_graphs(args.enable_cuda_graph, plan.device, prevented_by)

    def _module(
        self,
        family: type[Family],
        key: str,
        config: Mapping[str, Any],
        folders: Mapping[str, Path] | None,
        options: Mapping[str, Any],
    ) -> nn.Module:
        device, dtype = self.plan.device, self.plan.dtypes[key]
        try:
            with torch.device("meta"):
                module = family.build(key, config, self.attention[key], options)
        except ConfigError as e:
            raise ConfigError(f"{key}: {e}") from e
        if folders is None:
            fill_dummy(module, device, dtype)
        else:
            load_weights(module, weight_files(folders[key]), device, dtype)
        return module.eval().requires_grad_(False)

    def _encoder(self, key: str, config: Mapping[str, Any], folders: Mapping[str, Path] | None) -> Any:
        device, dtype, requested = self.plan.device, self.plan.dtypes[key], self.plan.attention[key]
        encoder: Any
        if folders is None:
            encoder = dummy_encoder(key, config, device, dtype, requested)
            fill_dummy(encoder, device, dtype)
        else:
            encoder = load_encoder(key, config, folders[key], device, dtype, requested)
        self.encoder_attention[key] = str(encoder.config._attn_implementation)
        return encoder.eval().requires_grad_(False)

    @staticmethod
    def _tokenizer(key: str, configs: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path] | None) -> Any:
        if folders is not None:
            return load_tokenizer(folders[key])
        return HashTokenizer.for_encoder(configs[key.replace("tokenizer", "text_encoder")])

    def _compile(self) -> dict[str, int]:
        """Regional compilation: every block of a denoiser's block lists. Component -> number of blocks."""
        compiled = {}
        for key in self.attention:
            lists = [m for m in self.parts[key].children() if isinstance(m, nn.ModuleList)]
            blocks = [block for blocks in lists for block in blocks]
            for block in blocks:
                block.compile()
            if blocks:
                compiled[key] = len(blocks)
        return compiled

    # -- a request ----------------------------------------------------------------

    def prepare(self, request: Request) -> tuple[Size, Guidance, int, int]:
        """Size, guidance, steps and text length of a request.

        Raises:
            UserError: anything this family or checkpoint cannot honour.
        """
        for name in ("num_frames", "fps", "image_path"):
            if name in request.given:
                raise UserError(f"{name}={request.given[name]}: this model draws pictures from text alone")
        if request.diffusers_kwargs:
            raise UserError(f"diffusers_kwargs={dict(request.diffusers_kwargs)}: needs --backend diffusers")
        chosen = replace(self.defaults, **{k: v for k, v in request.given.items() if hasattr(self.defaults, k)})
        true_cfg = request.given.get("true_cfg_scale", 1.0)
        if true_cfg > 1 and request.negative_prompt is None:
            raise UserError(f"true_cfg_scale={true_cfg}: needs a negative_prompt (it may be empty)")
        if true_cfg <= 1 and request.negative_prompt is not None:
            raise UserError("negative_prompt: has no effect without true_cfg_scale above 1")
        size = Size(chosen.height, chosen.width)
        guidance = Guidance(chosen.guidance_scale, true_cfg)
        try:
            self.family.check(size, guidance, chosen.max_sequence_length)
            self.scheduler.sigmas(chosen.num_inference_steps, self.family.image_tokens(size))
        except ValueError as e:
            raise UserError(str(e)) from e
        return size, guidance, chosen.num_inference_steps, chosen.max_sequence_length

    @torch.inference_mode()
    def run(self, request: Request, watch: Stopwatch, record: Record = ignore) -> Generator[Event, None, list[Pixels]]:
        """Yields progress and returns the pictures of the request in order."""
        size, guidance, steps, text_length = self.prepare(request)
        family, n = self.family, request.outputs_per_prompt

        yield StageStarted("text_encoding")
        with watch.span("text_encoding"):
            try:
                condition = family.encode(request.prompts, text_length).repeat(n)
                negative = None
                if request.negative_prompt is not None:
                    negative = family.encode([request.negative_prompt] * len(request.prompts), text_length).repeat(n)
            except PromptTooLong as e:
                raise UserError(str(e)) from e
        for name, tensor in condition.tensors.items():
            record(name, tensor)
        yield StageFinished("text_encoding")

        yield StageStarted("latent_preparation")
        with watch.span("latent_preparation"):
            x = family.noise(size, [torch.Generator().manual_seed(s) for s in request.seeds()])
            sigmas = self.scheduler.sigmas(steps, family.image_tokens(size))
            positive = family.predictor(condition, size, guidance, sigmas)
            against = None if negative is None else family.predictor(negative, size, guidance, sigmas)
        record("initial_latents", x)
        record("timesteps", torch.tensor(sigmas[:-1]) * 1000)
        yield StageFinished("latent_preparation")

        yield StageStarted("denoising")
        with watch.span("denoising"):
            loop = denoise.euler(x, sigmas, positive, against, guidance.true_cfg, self.graphs)
            for i in range(steps):
                with watch.span("denoise_step"):
                    step = next(loop)
                record(f"prediction_{i}", step.velocity)
                yield StepDone(i + 1, steps)
            x = step.x
        record("final_latents", x)
        yield StageFinished("denoising")

        yield StageStarted("decoding")
        with watch.span("decoding"):
            self.parts["vae"].tiling, self.parts["vae"].slicing = (
                self.plan.tiles(size),
                self.plan.vae_slicing,
            )
            pictures = family.decode(x, size)
            pixels = to_pixels(pictures)
        record("pixels", pictures)
        yield StageFinished("decoding")
        return pixels

    def effective(self, request: Request) -> dict[str, Any]:
        """What took effect, for the report."""
        size, guidance, steps, text_length = self.prepare(request)
        used = {key: a.used or "not run" for key, a in self.attention.items()}
        return {
            "attention": {**used, **self.encoder_attention},
            "precision": {key: dtype_name(d) for key, d in self.plan.dtypes.items()},
            "vae": {"tiling": self.plan.tiles(size), "slicing": self.plan.vae_slicing},
            "compile": self.compiled,
            "cuda_graph": self.graphs.report(),
            "guidance": {"embedded": guidance.embedded, "true_cfg": guidance.true_cfg},
            "scheduler": type(self.scheduler).__name__,
            "size": [size.height, size.width],
            "num_inference_steps": steps,
            "max_sequence_length": text_length,
            "dummy_weights": self.dummy,
        }


def to_pixels(pictures_BCHW: Tensor) -> list[Pixels]:
    """[-1, 1] -> rounded 8-bit pictures.

    Raises:
        RunFailure: not a number in a picture, as fp16 overflow gives.
    """
    if not torch.isfinite(pictures_BCHW).all():
        raise RunFailure("the decoded pictures hold NaN or infinity; try a wider --precision")
    unit = (pictures_BCHW.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return list((unit * 255).round().astype(np.uint8))
