"""The file to read first: a loaded model, and what happens to a request.

engine = Engine.load(ServerArgs(model_path="..."))
for event in engine.generate(SamplingParams(prompt="a red circle on a blue background")):
    ...  # the last one is Finished(result)
"""

from __future__ import annotations

import datetime
import difflib
import importlib
import logging
import os
import sys
import time
import uuid
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sgl_diffusion.models.catalog import FAMILIES
from sgl_diffusion.models.config import ConfigError
from sgl_diffusion.models.family import Family
from sgl_diffusion.runtime.args import SamplingParams, ServerArgs
from sgl_diffusion.runtime.checkpoint import EMBEDDED, Checkpoint, open_checkpoint
from sgl_diffusion.runtime.diffusers_backend import DiffusersPipeline
from sgl_diffusion.runtime.diffusers_loader import component_kinds, dummy_pipe, load_pipe
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.events import Event, Finished, Result, StageFinished, StageStarted
from sgl_diffusion.runtime.output import Output, frames_path, plan_outputs, request_digest, save, save_frames
from sgl_diffusion.runtime.pipeline import NativePipeline, Pixels
from sgl_diffusion.runtime.plan import make_plan
from sgl_diffusion.runtime.report import Failure, Report, StageTime, StepTime, commit_hash, memory_checkpoint, versions
from sgl_diffusion.runtime.request import Request, resolve_request
from sgl_diffusion.runtime.trace import Span, Stopwatch

log = logging.getLogger("sgl_diffusion")

DEFAULT_FPS = 24


class Engine:
    """A model ready to draw. `backend` is the native pipeline or the diffusers one; both answer to the same calls."""

    def __init__(
        self,
        args: ServerArgs,
        backend: NativePipeline | DiffusersPipeline,
        pipeline_class: str,
        checkpoint_defaults: Mapping[str, Any],
        why: str,
    ) -> None:
        self.args, self.backend, self.pipeline_class = args, backend, pipeline_class
        self.checkpoint_defaults = checkpoint_defaults
        self.why = why
        self.device = backend.plan.device

    @classmethod
    def load(cls, args: ServerArgs) -> Engine:
        """Loads the model the arguments name.

        Raises:
            UserError: the model cannot be found, read or run as asked.
        """
        started = time.perf_counter()
        engine = cls._load_dummy(args) if args.load_format == "dummy" else cls._load_checkpoint(args)
        log.info(
            "loaded %s with the %s backend (%s) in %.1f s",
            args.model_path,
            engine.backend.name,
            engine.why,
            time.perf_counter() - started,
        )
        return engine

    @classmethod
    def _load_checkpoint(cls, args: ServerArgs) -> Engine:
        checkpoint = open_checkpoint(args.model_path, args.revision, args.component_paths)
        pipeline_class = args.pipeline_class_name or checkpoint.pipeline_class
        native_why = _refusal(args, pipeline_class)
        if native_why is None:
            try:
                return cls(
                    args,
                    _native(checkpoint, args, pipeline_class),
                    pipeline_class,
                    checkpoint.sampling_defaults,
                    "native family",
                )
            except ConfigError as e:
                native_why = str(e)
        if args.backend == "sglang":
            raise UserError(f"backend=sglang: {native_why}; --backend diffusers can run it")
        if args.model_id is not None:
            raise UserError(f"model_id={args.model_id}: lends native defaults; has no effect here ({native_why})")
        kinds = component_kinds(checkpoint)
        plan = make_plan(args, kinds)
        pipe = load_pipe(checkpoint, args, plan, pipeline_class)
        backend = DiffusersPipeline(pipe, kinds, args, plan, pipeline_class)
        return cls(args, backend, pipeline_class, checkpoint.sampling_defaults, native_why)

    @classmethod
    def _load_dummy(cls, args: ServerArgs) -> Engine:
        """Random weights at true shape, from a preset's configs or those of a local folder."""
        name, why = args.model_id or args.model_path, f"dummy weights of {args.model_id or args.model_path}"
        pipeline_class = next((c for c in FAMILIES if name in _family(c).presets()), None)
        sampling_defaults: Mapping[str, Any] = {}
        if pipeline_class is not None:
            if args.component_paths:
                raise UserError(f"component_paths={args.component_paths}: no effect on the dummy weights of a preset")
            family = _family(pipeline_class)
            configs, defaults = family.presets()[name].components, family.presets()[name].defaults
        elif name == EMBEDDED or Path(name).expanduser().is_dir():
            checkpoint = open_checkpoint(name, None, args.component_paths)
            pipeline_class, sampling_defaults = checkpoint.pipeline_class, checkpoint.sampling_defaults
            if pipeline_class not in FAMILIES:
                raise UserError(f"load_format=dummy: {pipeline_class} has no native implementation")
            family = _family(pipeline_class)
            configs = {key: checkpoint.config(key) for key in family.components()}
            defaults = family.defaults(configs)
        else:
            raise UserError(
                f"model_path={name}: load_format=dummy needs a config folder or one of {', '.join(presets())}"
            )
        kinds = family.components()
        plan = make_plan(args, kinds)
        backend: NativePipeline | DiffusersPipeline
        if args.backend == "diffusers":
            pipe = dummy_pipe(pipeline_class, kinds, configs, plan)
            backend = DiffusersPipeline(pipe, kinds, args, plan, pipeline_class)
        else:
            try:
                backend = NativePipeline(family, configs, None, defaults, args, plan)
            except ConfigError as e:
                raise UserError(f"load_format=dummy: {e}") from e
        return cls(args, backend, pipeline_class, sampling_defaults, why)

    # -- a request ------------------------------------------------------------------

    def generate(self, params: SamplingParams) -> Iterator[Event]:
        """Draws a request. The last event is `Finished`; files and the perf dump are written before it.

        Raises:
            UserError: a request that cannot be honoured, found before any work is done. The perf dump is still written.
            RunFailure: memory ran out, or the model drew something that is not a picture.
        """
        run = _Run(self, params)
        try:
            yield from run.events()
        except torch.OutOfMemoryError as e:
            told = str(e).splitlines()[0]
            raise RunFailure(f"out of device memory: {told} Try --performance-mode memory or a smaller picture.") from e
        finally:
            run.close(sys.exc_info()[1])

    def run(self, params: SamplingParams) -> Result:
        """Draws a request without progress."""
        for event in self.generate(params):
            if isinstance(event, Finished):
                return event.result
        raise AssertionError("generate ends with Finished")


class _Run:
    """One request on its way: what is known so far, so that a failure can be reported with it."""

    def __init__(self, engine: Engine, params: SamplingParams) -> None:
        self.engine, self.params = engine, params
        self.watch = Stopwatch(engine.device)
        self.started = time.perf_counter()
        self.memory = {"before_forward": memory_checkpoint(engine.device)}
        self.request_id = uuid.uuid4().hex
        self.request: Request | None = None
        self.paths: list[Path] = []
        self.finished = False

    def events(self) -> Generator[Event, None, None]:
        engine, params = self.engine, self.params
        if params.perf_dump_path is not None:
            _demand_writable("perf_dump_path", Path(params.perf_dump_path))
        self.request = request = resolve_request(params, engine.checkpoint_defaults, engine.args)
        engine.backend.prepare(request)
        plan = plan_outputs(params, request, is_video=engine.backend.draws_video) if params.save_output else []
        pixels = yield from engine.backend.run(request, self.watch)
        outputs = [self._output(request, i, p) for i, p in enumerate(pixels)]
        if plan:
            yield StageStarted("saving")
            with self.watch.span("saving"):
                for output, path in zip(outputs, plan, strict=True):
                    save(output, path, self._metadata(request, output), params.output_quality)
                    self.paths.append(path)
                    if params.return_frames:
                        self.paths.append(save_frames(output, frames_path(path)))
            yield StageFinished("saving")
        report = self._report(error=None)
        self.finished = True
        if params.perf_dump_path is not None:
            report.write(Path(params.perf_dump_path))
        yield Finished(Result(outputs, self.paths, report))

    def close(self, error: BaseException | None) -> None:
        """Writes the perf dump of a request that did not finish."""
        path = self.params.perf_dump_path
        if not self.finished and path is not None and Path(path).parent.is_dir():
            self._report(error).write(Path(path))

    def _output(self, request: Request, index: int, pixels: Pixels) -> Output:
        is_video = pixels.ndim == 4
        return Output(
            prompt=request.prompt_of(index),
            seed=request.seeds()[index],
            index=index,
            image=None if is_video else Image.fromarray(pixels),
            frames=pixels if is_video else None,
            fps=request.given.get("fps", DEFAULT_FPS) if is_video else None,
        )

    def _metadata(self, request: Request, output: Output) -> dict[str, Any]:
        """What is needed to draw this picture again."""
        return {
            "prompt": output.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": output.seed,
            "model": self.engine.args.model_path,
            "pipeline_class": self.engine.pipeline_class,
            "backend": self.engine.backend.name,
            "digest": request_digest(request, output.index),
            **request.given,
        }

    def _report(self, error: BaseException | None) -> Report:
        engine, request = self.engine, self.request
        try:
            spans = self.watch.finish()
        except RuntimeError:  # a broken GPU answers every call with the error that broke it: report without times
            if error is None:
                raise
            spans = []
        self.memory["after_forward"] = memory_checkpoint(engine.device)
        effective: dict[str, Any] = {
            "backend": engine.backend.name,
            "backend_reason": engine.why,
            "pipeline_class": engine.pipeline_class,
            "device": str(engine.device),
            "ignored": [],
        }
        meta: dict[str, Any] = {"model": engine.args.model_path}
        if request is not None:
            meta |= {
                "prompt": list(request.prompts),
                "negative_prompt": request.negative_prompt,
                "seed": request.seeds(),
                **request.given,
            }
            if error is None:
                effective |= engine.backend.effective(request)
        return Report(
            timestamp=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            request_id=self.request_id,
            commit_hash=commit_hash(),
            tag="cli_generate",
            total_duration_ms=(time.perf_counter() - self.started) * 1000,
            steps=[StageTime(name=s.name, duration_ms=s.duration_ms) for s in spans if s.depth == 0],
            denoise_steps_ms=[StepTime(step=i, duration_ms=s.duration_ms) for i, s in enumerate(_steps(spans))],
            memory_checkpoints=self.memory,
            meta=meta,
            effective=effective,
            versions=versions(engine.device),
            outputs=[str(p) for p in self.paths],
            error=None if error is None else Failure(type=type(error).__name__, message=str(error)),
        )


def _steps(spans: list[Span]) -> list[Span]:
    return [s for s in spans if s.name == "denoise_step"]


def _demand_writable(field: str, path: Path) -> None:
    """Finds out before the work whether the file can be written, without leaving one behind."""
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{field}={path}: the folder {folder} does not exist or is not writable")
    if path.is_dir():
        raise UserError(f"{field}={path}: is a folder; expected a file name")


def _family(pipeline_class: str) -> type[Family]:
    module, _, name = FAMILIES[pipeline_class].partition(":")
    family: type[Family] = getattr(importlib.import_module(module), name)
    return family


def presets() -> list[str]:
    """Hub ids whose shapes are built in, for `load_format="dummy"`."""
    return [name for pipeline_class in FAMILIES for name in _family(pipeline_class).presets()]


def _refusal(args: ServerArgs, pipeline_class: str) -> str | None:
    """Why the native backend does not take this model, or None if it does."""
    if args.backend == "diffusers":
        return "asked for with backend=diffusers"
    if args.diffusers_attention_backend is not None:
        return "asked for with diffusers_attention_backend"
    if pipeline_class not in FAMILIES:
        near = difflib.get_close_matches(pipeline_class, FAMILIES, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        return f"{pipeline_class} has no native implementation{hint}"
    return None


def _native(checkpoint: Checkpoint, args: ServerArgs, pipeline_class: str) -> NativePipeline:
    family = _family(pipeline_class)
    kinds = family.components()
    if missing := [k for k in kinds if k not in checkpoint.folders]:
        raise ConfigError(f"{pipeline_class} without component {missing[0]}")
    configs = {key: checkpoint.config(key) for key in kinds}
    preset = family.presets().get(args.model_id or "")
    if args.model_id is not None and preset is None:
        raise UserError(f"model_id={args.model_id}: expected one of {', '.join(family.presets())}")
    defaults = preset.defaults if preset else family.defaults(configs)
    folders = {key: checkpoint.folders[key] for key in kinds}
    return NativePipeline(family, configs, folders, defaults, args, make_plan(args, kinds))
