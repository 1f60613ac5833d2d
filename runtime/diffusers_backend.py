"""Any diffusers pipeline behind the same face: same requests, events, pixels and receipts as the native one."""

from __future__ import annotations

import difflib
import inspect
import queue
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import attention_backend

from sgl_diffusion.models.family import ENCODERS, Size
from sgl_diffusion.runtime.args import ServerArgs
from sgl_diffusion.runtime.diffusers_loader import bridge_precisions
from sgl_diffusion.runtime.encoders import IMPLEMENTATIONS
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.events import Drawn, Event, Pixels, StageFinished, StageStarted, StepDone
from sgl_diffusion.runtime.pictures import read_pictures
from sgl_diffusion.runtime.plan import Plan, dtype_name
from sgl_diffusion.runtime.request import Request
from sgl_diffusion.runtime.trace import Stopwatch

COUNT_ARGUMENTS = ("num_images_per_prompt", "num_videos_per_prompt")
# our name -> the argument of a pipeline's __call__; the same word unless listed
CALL_NAMES = {"image_path": "image"}
NOT_CALL_ARGUMENTS = ("fps",)  # used when the file is written


class DiffusersPipeline:
    """A pipeline loaded with `from_pretrained`."""

    name = "diffusers"

    def __init__(self, pipe: Any, kinds: Mapping[str, str], args: ServerArgs, plan: Plan, pipeline_class: str) -> None:
        self.pipe, self.kinds, self.plan, self.pipeline_class = pipe, kinds, plan, pipeline_class
        self.pipe.set_progress_bar_config(disable=True)
        self.call_arguments = _call_arguments(type(self.pipe))
        self.draws_video = "num_frames" in self.call_arguments
        if len(set(plan.dtypes.values())) > 1:
            bridge_precisions(pipe, self.denoisers().values())
        self.attention = self._set_attention(args)
        self.tile = self._tile_size(args)
        if plan.vae_slicing:
            self._vae_switch("vae_slicing", "enable_slicing")
        if plan.vae_tiling:
            self._vae_switch("vae_tiling", "enable_tiling")
        self.compiled = self._compile() if plan.compile else {}

    def denoisers(self) -> dict[str, Any]:
        found = {k: getattr(self.pipe, k, None) for k, kind in self.kinds.items() if kind == "denoiser"}
        return {k: m for k, m in found.items() if isinstance(m, torch.nn.Module)}

    # -- options that take effect at load ------------------------------------------

    def _set_attention(self, args: ServerArgs) -> dict[str, str]:
        used = {}
        if args.attention_backend_config:
            told = dict(args.attention_backend_config)
            raise UserError(f"attention_backend_config={told}: diffusers' attention backends take no settings")
        wanted = args.diffusers_attention_backend or args.attention_backend
        for key, module in self.denoisers().items():
            backend = args.component_attention_backends.get(key, wanted)
            used[key] = backend or "native"
            if backend is None or backend == "auto":
                used[key] = "native"
                continue
            if not hasattr(module, "set_attention_backend"):
                raise UserError(
                    f"diffusers_attention_backend={backend}: {type(module).__name__} has no choice of attention"
                )
            try:
                with attention_backend():  # or every other model of this process would have it too
                    module.set_attention_backend(backend)
            except (ValueError, ImportError, RuntimeError) as e:
                raise UserError(f"diffusers_attention_backend={backend}: {' '.join(str(e).split())[:300]}") from e
        for key, backend in args.component_attention_backends.items():
            if key in used:
                continue
            module = getattr(self.pipe, key)
            if backend not in IMPLEMENTATIONS or not hasattr(module, "set_attn_implementation"):
                raise UserError(
                    f"component_attention_backends.{key}={backend}: "
                    f"expected one of {', '.join(IMPLEMENTATIONS)} on a text encoder"
                )
            module.set_attn_implementation(IMPLEMENTATIONS[backend])
        for key, kind in self.kinds.items():
            if kind == "text_encoder":
                used[key] = getattr(getattr(self.pipe, key).config, "_attn_implementation", "unknown")
        return used

    def _vae_switch(self, option: str, method: str) -> None:
        vae = getattr(self.pipe, "vae", None)
        if vae is None or not hasattr(vae, method):
            raise UserError(f"{option}=true: the VAE of {self.pipeline_class} cannot do it")
        getattr(vae, method)()

    def _tile_size(self, args: ServerArgs) -> tuple[int, int] | None:
        """Sets the size of VAE tiles where it was asked for, and returns it in pixels."""
        height, width = args.vae_config.tile_sample_min_height, args.vae_config.tile_sample_min_width
        if height is None and width is None:
            return None
        vae: Any = getattr(self.pipe, "vae", None)
        if hasattr(vae, "tile_sample_min_height"):
            vae.tile_sample_min_height = height or vae.tile_sample_min_height
            vae.tile_sample_min_width = width or vae.tile_sample_min_width
            return vae.tile_sample_min_height, vae.tile_sample_min_width
        if not hasattr(vae, "tile_sample_min_size"):
            raise UserError(f"vae_config.tile_sample_min_height={height}: {self.pipeline_class} has no VAE with tiles")
        if height is None or height != width:
            raise UserError(
                f"vae_config.tile_sample_min_height={height}: this VAE has square tiles; "
                "give the same tile_sample_min_width"
            )
        vae.tile_latent_min_size = int(height * vae.tile_latent_min_size / vae.tile_sample_min_size)
        vae.tile_sample_min_size = height
        return height, height

    def _compile(self) -> dict[str, str]:
        compiled = {}
        for key, module in self.denoisers().items():
            if getattr(module, "_repeated_blocks", None):
                module.compile_repeated_blocks()
                compiled[key] = "repeated blocks"
            else:
                module.compile()
                compiled[key] = "whole"
        if not compiled:
            raise UserError(f"enable_torch_compile=true: {self.pipeline_class} has no transformer or unet to compile")
        return compiled

    # -- a request -------------------------------------------------------------------

    def prepare(self, request: Request) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call, without prompts and generators.

        Raises:
            UserError: a parameter the pipeline does not take, an unreadable input picture.
        """
        arguments: dict[str, Any] = {}
        for name, value in request.given.items():
            if name in NOT_CALL_ARGUMENTS and self.draws_video:
                continue
            call_name = CALL_NAMES.get(name, name)
            if call_name not in self.call_arguments:
                hint = "; pipeline_class_name can name a pipeline that does" if name == "image_path" else ""
                raise UserError(f"{name}={value}: {self.pipeline_class} does not take it{hint}")
            pictures = name == "image_path"
            arguments |= _input_pictures(value, self.call_arguments) if pictures else {call_name: value}
        if request.negative_prompt is not None and "negative_prompt" not in self.call_arguments:
            raise UserError(f"negative_prompt: {self.pipeline_class} does not take it")
        self._check_guidance(request)
        for name, value in request.diffusers_kwargs.items():
            if name in arguments:
                raise UserError(f"diffusers_kwargs.{name}={value!r}: already given as a parameter of its own")
            if name in self.call_arguments:
                arguments[name] = value
            elif name not in self.pipe.scheduler.config:
                near = difflib.get_close_matches(name, self.call_arguments, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; it takes: {', '.join(self.call_arguments)}"
                raise UserError(f"diffusers_kwargs.{name}={value!r}: {self.pipeline_class} does not take it{hint}")
        return arguments

    def _check_guidance(self, request: Request) -> None:
        """Guidance that diffusers would drop without a word is an error here."""
        scale, true_cfg = request.given.get("guidance_scale"), request.given.get("true_cfg_scale")
        if "true_cfg_scale" not in self.call_arguments:
            if request.negative_prompt is not None and scale is not None and scale <= 1:
                raise UserError(f"negative_prompt: has no effect with guidance_scale={scale}; use one above 1")
            return
        if true_cfg is not None and true_cfg > 1 and request.negative_prompt is None:
            raise UserError(f"true_cfg_scale={true_cfg}: needs a negative_prompt (it may be empty)")
        default = self.call_arguments["true_cfg_scale"].default
        if request.negative_prompt is not None and (true_cfg if true_cfg is not None else default) <= 1:
            raise UserError("negative_prompt: has no effect without true_cfg_scale above 1")
        embeds = getattr(getattr(self.pipe, "transformer", None), "config", {}).get("guidance_embeds")
        if embeds is False and scale not in (None, 0.0, 1.0):
            raise UserError(
                f"guidance_scale={scale}: this checkpoint has no guidance embedding; "
                "leave it out, or use negative_prompt with true_cfg_scale"
            )

    def run(self, request: Request, watch: Stopwatch) -> Generator[Event, None, None]:
        """Yields progress, and at the end the pictures or clips of the request in order.

        diffusers reports progress through a callback, so the pipeline runs in a thread and its events cross a queue.
        """
        arguments = self.prepare(request)
        scheduler = self.pipe.scheduler
        self._apply_scheduler_options(request)
        self._apply_automatic_tiling(request)
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        outcome: list[list[Pixels]] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                with torch.inference_mode():
                    outcome.append(self._call(request, arguments, watch, events.put))
            except BaseException as e:  # noqa: BLE001 (crosses the thread and is raised again there)
                failure.append(e)
            finally:
                events.put(None)

        thread = threading.Thread(target=work, name="diffusers")
        thread.start()
        try:
            while (event := events.get()) is not None:
                yield event
        finally:
            self.pipe._interrupt = True  # ends the loop early if the caller stopped listening
            thread.join()
            self.pipe._interrupt = False
            self.pipe.scheduler = scheduler
        if failure:
            raise _explained(failure[0], self.pipeline_class)
        yield Drawn(outcome[0])

    def _call(
        self,
        request: Request,
        arguments: Mapping[str, Any],
        watch: Stopwatch,
        emit: Callable[[Event], None],
    ) -> list[Pixels]:
        count_argument = next((a for a in COUNT_ARGUMENTS if a in self.call_arguments), None)
        generators = [torch.Generator().manual_seed(s) for s in request.seeds]
        batches: list[tuple[list[str], list[torch.Generator], int]] = []
        if count_argument is not None:
            batches.append((list(request.prompts), generators, request.outputs_per_prompt))
        else:
            batches = [([request.prompt_of(i)], [generators[i]], 1) for i in range(request.count)]
        pixels: list[Pixels] = []
        for prompts, batch_generators, times in batches:
            call = dict(arguments, prompt=prompts, generator=batch_generators, output_type="np")
            if count_argument is not None:
                call[count_argument] = times
            if request.negative_prompt is not None:
                call["negative_prompt"] = [request.negative_prompt] * len(prompts)
            with _Stages(self, watch, emit) as stages:
                if "callback_on_step_end" in self.call_arguments:
                    call["callback_on_step_end"] = stages.step_done
                pixels += _pixels(self.pipe(**call))
        return pixels

    def _apply_automatic_tiling(self, request: Request) -> None:
        """Tiles large pictures where the user left the choice open and the VAE can."""
        height, width = request.given.get("height"), request.given.get("width")
        vae: Any = getattr(self.pipe, "vae", None)
        if self.plan.vae_tiling is None and hasattr(vae, "enable_tiling") and height and width:
            (vae.enable_tiling if self.plan.tiles(Size(height, width)) else vae.disable_tiling)()

    def _apply_scheduler_options(self, request: Request) -> None:
        options = {k: v for k, v in request.diffusers_kwargs.items() if k not in self.call_arguments}
        if options:
            self.pipe.scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config, **options)

    @contextmanager
    def warming_up(self, shapes: int) -> Iterator[None]:
        """Nothing beside the throw-away requests themselves."""
        yield

    def effective(self, request: Request) -> dict[str, Any]:
        """What took effect, for the report."""
        vae = getattr(self.pipe, "vae", None)
        return {
            "attention": dict(self.attention),
            "precision": {
                k: dtype_name(getattr(self.pipe, k).dtype)
                for k, kind in self.kinds.items()
                if kind in ("denoiser", "vae", *ENCODERS)
            },
            "vae": {of: bool(getattr(vae, f"use_{of}", False)) for of in ("tiling", "slicing")} | {"tile": self.tile},
            "compile": self.compiled,
            "scheduler": type(self.pipe.scheduler).__name__,
            "call": {k: v for k, v in request.given.items() if k not in NOT_CALL_ARGUMENTS},
            "diffusers_kwargs": dict(request.diffusers_kwargs),
        }


@contextmanager
def replaced(owner: Any, method: str, stand_in: Callable[..., Any]) -> Iterator[None]:
    """Lets `stand_in` answer for a method of one object, and puts back what answered before."""
    before = vars(owner).get(method)
    setattr(owner, method, stand_in)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, method)
        else:
            setattr(owner, method, before)


class _Stages:
    """Times the stages of a pipeline call from outside: prompt encoding, denoising steps, decoding."""

    def __init__(self, backend: DiffusersPipeline, watch: Stopwatch, emit: Callable[[Event], None]) -> None:
        self.pipe, self.watch, self.emit = backend.pipe, watch, emit
        self.denoisers = list(backend.denoisers().values())
        self.open: dict[str, ExitStack] = {}
        self.undo = ExitStack()

    def __enter__(self) -> _Stages:
        self._wrap(self.pipe, "encode_prompt", "text_encoding")
        if getattr(self.pipe, "vae", None) is not None:
            self._wrap(self.pipe.vae, "decode", "decoding")
        for module in self.denoisers:
            self.undo.callback(module.register_forward_pre_hook(self._denoiser_called).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._close("denoise_step")
        self._close("denoising")
        self.undo.close()

    def _wrap(self, owner: Any, method: str, stage: str) -> None:
        original = getattr(owner, method, None)
        if original is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            if stage == "decoding":
                self._close("denoise_step")
                self._close("denoising")
            self._start(stage)
            try:
                return original(*args, **kwargs)
            finally:
                self._close(stage)

        self.undo.enter_context(replaced(owner, method, timed))

    def _denoiser_called(self, module: torch.nn.Module, args: Any) -> None:
        self._start("denoising")
        self._start("denoise_step")

    def step_done(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """diffusers' `callback_on_step_end`."""
        self._close("denoise_step")
        self.emit(StepDone(index + 1, pipe.num_timesteps))
        return tensors

    def _start(self, stage: str) -> None:
        if stage not in self.open:
            self.open[stage] = ExitStack()
            self.open[stage].enter_context(self.watch.span(stage))
            if stage != "denoise_step":
                self.emit(StageStarted(stage))

    def _close(self, stage: str) -> None:
        if stage in self.open:
            self.open.pop(stage).close()
            if stage != "denoise_step":
                self.emit(StageFinished(stage))


def _call_arguments(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """Named arguments of a pipeline's call, those of its parents included: a custom class may pass **kwargs on."""
    named: dict[str, inspect.Parameter] = {}
    for parent in reversed(cls.__mro__):
        if "__call__" in vars(parent):
            parameters = inspect.signature(vars(parent)["__call__"]).parameters
            passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and parent is not cls.__mro__[-1]
            own = {n: p for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD and n != "self"}
            named = {**(named if passes_on else {}), **own}
    return named


def _input_pictures(paths: Sequence[str], call_arguments: Collection[str]) -> dict[str, Any]:
    """Of two pictures, the second is the last frame where a pipeline has a name for that."""
    pictures = read_pictures(paths)
    if len(pictures) == 2 and "last_image" in call_arguments:
        return {"image": pictures[0], "last_image": pictures[1]}
    return {"image": pictures if len(pictures) > 1 else pictures[0]}


def _pixels(result: Any) -> list[Pixels]:
    batch = result.images if hasattr(result, "images") else result.frames
    pixels = []
    for item in batch:
        unit = np.asarray(item)
        if not np.isfinite(unit).all():
            raise RunFailure("the decoded pictures hold NaN or infinity; try a wider --precision")
        pixels.append((unit.clip(0, 1) * 255).round().astype(np.uint8))
    return pixels


def _explained(error: BaseException, pipeline_class: str) -> BaseException:
    """diffusers checks inputs with ValueError and TypeError: those are the user's to mend."""
    if isinstance(error, ValueError | TypeError):
        return UserError(f"{pipeline_class}: {' '.join(str(error).split())[:400]}")
    return error
