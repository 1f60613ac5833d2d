"""One order of the server carried out: jobs through the engine, in the engine process."""

from __future__ import annotations

import io
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sgl_diffusion.runtime.args import OutputOptions, SamplingParams
from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.events import Drawing, Finished, Pixels, Result, StageStarted, StepDone
from sgl_diffusion.runtime.option import parse
from sgl_diffusion.runtime.parallel.lockstep import RankLost
from sgl_diffusion.runtime.request import DEFAULT_SEED
from sgl_diffusion.runtime.snapshots import Snapshot, read_snapshot, save_snapshot
from sgl_diffusion.server import messages
from sgl_diffusion.server.folders import REPORT, Folders
from sgl_diffusion.server.jobs import Failure, ResultFile
from sgl_diffusion.server.messages import Answer, Draw, DrawnJob

log = logging.getLogger("sgl_diffusion")

MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
}
PROGRESS_S = 0.05  # between two steps that are told of: telling of each costs a small model a tenth of its time
PREVIEW_QUALITY, PREVIEW_EFFORT = 80, 0  # of WebP: the engine waits for it


class Batch:
    """Jobs that are drawn together, as one request of all their prompts and seeds.

    Args:
        tell: takes what becomes of them.
        cancelled: ids of jobs that are not wanted any more; others add to it.
        keep: set when the work is to stop at its next step, and to be kept.
    """

    def __init__(
        self,
        engine: Engine,
        folders: Folders,
        order: Draw,
        tell: Callable[[Answer], None],
        cancelled: Collection[str],
        keep: threading.Event,
    ) -> None:
        self.engine, self.folders, self.tell, self.cancelled, self.keep = engine, folders, tell, cancelled, keep
        self.snapshot_every = order.snapshot_every
        self.jobs = order.jobs
        self.left = {job.id: job for job in order.jobs}  # without those whose end is told
        self._told_at = 0.0  # of the last progress
        self._prepared: SamplingParams | None = None  # of one job, whose folder is there and empty

    def prepare(self) -> None:
        """Does beforehand what a job that was never begun begins with. What cannot be done, `draw` finds out again."""
        (job,) = self.jobs
        folder = self.folders.unfinished(job.id)
        with suppress(UserError, OSError):
            _empty(folder)
            self._prepared = self._params([job], folder)

    def drop(self) -> None:
        """Of what was prepared, nothing is left."""
        for job in self.jobs:
            shutil.rmtree(self.folders.unfinished(job.id), ignore_errors=True)

    def draw(self) -> None:
        """Tells of every job exactly one end, unless it raises something unforeseen (see `fail`)."""
        if self._attempt(list(self.jobs)):
            return
        for job in list(self.left.values()):  # what one of them failed of is not the others' fault
            self._attempt([job])

    def fail(self, failure: Failure) -> None:
        """Tells that all jobs failed whose end is not told yet."""
        for job in list(self.left.values()):
            self._end(messages.Failed(job=job.id, failure=failure))

    # -- a request -------------------------------------------------------------------

    def _attempt(self, jobs: Sequence[DrawnJob]) -> bool:
        """Draws the jobs together. False if that failed, and is worth trying job by job."""
        snapshot = self._last_snapshot(jobs[0]) if len(jobs) == 1 and self._prepared is None else None
        try:
            try:
                self._draw(jobs, snapshot)
            except UserError as e:
                if snapshot is None:
                    raise
                log.warning("%s begins anew: %s", jobs[0].id, e)
                self._draw(jobs, None)
        except (UserError, RunFailure, OSError) as e:
            if is_fatal(e):
                raise
            if len(jobs) > 1:
                log.warning("a batch of %d jobs failed (%s), they are drawn one by one", len(jobs), type(e).__name__)
                return False
            for job in self._live(jobs):
                self._end(messages.Failed(job=job.id, failure=self._keep_latents(job, failure_of(e))))
        return True

    def _draw(self, jobs: Sequence[DrawnJob], snapshot: Snapshot | None) -> None:
        params, self._prepared = self._prepared, None
        if params is not None:
            self._draw_with(params, jobs, snapshot)
            return
        for job in jobs:
            _empty(self.folders.unfinished(job.id))
        if len(jobs) == 1:
            self._draw_with(self._params(jobs, self.folders.unfinished(jobs[0].id)), jobs, snapshot)
            return
        shared = self.folders.unfinished(f"batch_{uuid.uuid4().hex}")  # not of a job, as any of them may be cancelled
        _empty(shared)
        try:
            self._draw_with(self._params(jobs, shared), jobs, snapshot)
        finally:
            shutil.rmtree(shared, ignore_errors=True)

    def _draw_with(self, params: SamplingParams, jobs: Sequence[DrawnJob], snapshot: Snapshot | None) -> None:
        stage, kept = "", False
        with closing(self.engine.generate(params, resume=snapshot)) as events:
            for event in events:
                if all(job.id in self.cancelled for job in self._live(jobs)):
                    break
                self._drop_cancelled(jobs)
                if isinstance(event, StageStarted):
                    stage = event.name
                    self._progress(jobs, stage, 0, 0)
                elif isinstance(event, StepDone):
                    if time.monotonic() - self._told_at >= PROGRESS_S:
                        os.utime(params.output_path)  # old ones that are no job's are removed
                        self._progress(jobs, stage, event.step, event.total)
                    if kept := event.step < event.total and self.keep.is_set():
                        self._snapshot(jobs, event.drawing)
                        break
                    self._look(jobs, event)
                elif isinstance(event, Finished):
                    self._hand_out(jobs, event.result)
        self._drop_cancelled(jobs)
        if kept:
            for job in self._live(jobs):
                self._end(messages.Kept(job=job.id))

    def _params(self, jobs: Sequence[DrawnJob], folder: Path) -> SamplingParams:
        """Jobs of a batch have one prompt each, and are equal but for it and the seed."""
        first = jobs[0]
        sampling = dict(first.sampling)
        if len(jobs) > 1:
            sampling["prompt"] = [job.sampling["prompt"][0] for job in jobs]
            sampling["seed"] = [_seed(job) for job in jobs]
        suffix = first.presentation.get("output_format") or ("mp4" if self.engine.backend.draws_video else "png")
        place = {"output_path": str(folder), "output_file_name": f"0.{suffix}"}
        return parse(SamplingParams, sampling | place)

    def _last_snapshot(self, job: DrawnJob) -> Snapshot | None:
        path = self.folders.snapshot(job.id)
        if not path.exists():
            return None
        try:
            return read_snapshot(path)
        except UserError as e:
            log.warning("%s begins anew: %s", job.id, e)
            return None

    # -- between two steps -----------------------------------------------------------

    def _live(self, jobs: Sequence[DrawnJob]) -> list[DrawnJob]:
        return [job for job in jobs if job.id in self.left]

    def _drop_cancelled(self, jobs: Sequence[DrawnJob]) -> None:
        for job in self._live(jobs):
            if job.id in self.cancelled:
                self._end(messages.Cancelled(job=job.id))

    def _progress(self, jobs: Sequence[DrawnJob], stage: str, step: int, steps: int) -> None:
        self._told_at = time.monotonic()
        ids = [job.id for job in self._live(jobs)]
        self.tell(messages.Progress(jobs=ids, stage=stage, step=step, steps=steps))

    def _look(self, jobs: Sequence[DrawnJob], event: StepDone) -> None:
        """Shows previews and keeps snapshots, where it is time for them."""
        step, total, drawing = event.step, event.total, event.drawing
        if drawing is None or step == total:
            return
        curious = [job for job in self._live(jobs) if step in preview_steps(job, total)]
        if curious:
            self._show(jobs, curious, step, drawing)
        if self.snapshot_every and step % self.snapshot_every == 0:
            self._snapshot(jobs, drawing)

    def _show(self, jobs: Sequence[DrawnJob], curious: Collection[DrawnJob], step: int, drawing: Drawing) -> None:
        try:
            pictures = drawing.preview()
        except (RunFailure, torch.OutOfMemoryError) as e:
            log.warning("no preview of step %d: %s", step, str(e).splitlines()[0])
            return
        for job in curious:
            for index, pixels in enumerate(pictures[_share(jobs, job, len(pictures))]):
                self.tell(messages.Preview(job=job.id, index=index, step=step, data=_webp(pixels)))

    def _snapshot(self, jobs: Sequence[DrawnJob], drawing: Drawing | None) -> None:
        """Of every job by itself: after an interruption each goes on alone. A full disk does not end the work."""
        if drawing is None:
            return
        snapshot = drawing.snapshot()
        for job in self._live(jobs):
            try:
                save_snapshot(snapshot.part(_share(jobs, job, len(snapshot.x))), self.folders.snapshot(job.id))
            except RunFailure as e:
                log.warning("%s has no snapshot of this step: %s", job.id, e)

    # -- the end of a job --------------------------------------------------------------

    def _hand_out(self, jobs: Sequence[DrawnJob], result: Result) -> None:
        """Every job gets a folder with its share of the results and a report of its own."""
        for job in self._live(jobs):
            share = _share(jobs, job, len(result.paths))
            folder, final = self.folders.unfinished(job.id), self.folders.results(job.id)
            files = []
            for i, (path, output) in enumerate(zip(result.paths[share], result.outputs[share], strict=True)):
                placed = path.replace(folder / f"{i}{path.suffix}")
                files.append(ResultFile(placed.name, MEDIA_TYPES[placed.suffix], placed.stat().st_size, output.seed))
            shutil.rmtree(final, ignore_errors=True)  # of an attempt whose end nobody heard of
            os.replace(folder, final)
            self.tell(messages.Drawn(job=job.id, results=files))  # who waits for them does not wait for the report
            report = result.report.model_copy(
                update={
                    "request_id": job.id,
                    "tag": "serve",
                    "outputs": [str(final / file.name) for file in files],
                    "meta": result.report.meta | {"prompt": job.sampling["prompt"], "seed": [f.seed for f in files]},
                    "effective": result.report.effective | {"jobs_in_batch": len(jobs)},
                }
            )
            try:
                report.write(final / REPORT)
            except RunFailure as e:  # the results are there all the same
                log.error("%s has no report: %s", job.id, e)
            self._end(messages.Finished(job=job.id))

    def _keep_latents(self, job: DrawnJob, failure: Failure) -> Failure:
        """A request that failed after its last step left its latents, and says where: they can be decoded yet."""
        folder, final = self.folders.unfinished(job.id), self.folders.results(job.id)
        if not list(folder.glob("*.safetensors")):
            return replace(failure, message=failure.message.replace(f"{folder}/", ""))
        os.replace(folder, final)
        return replace(failure, message=failure.message.replace(str(folder), str(final)))

    def _end(self, end: messages.Finished | messages.Failed | messages.Cancelled | messages.Kept) -> None:
        shutil.rmtree(self.folders.unfinished(end.job), ignore_errors=True)
        del self.left[end.job]
        self.tell(end)


def is_fatal(error: BaseException) -> bool:
    """Whether the device, or another rank, is of no more use to this process: every call after it fails as well."""
    lost = (torch.AcceleratorError, RankLost)
    return any(isinstance(e, lost) or "CUDA error" in str(e) for e in _causes(error))


def failure_of(error: Exception) -> Failure:
    """As the client is told. What the server itself chose, such as the folder, is not the client's mistake."""
    told = str(error)
    if isinstance(error, OSError):
        return Failure(f"the results cannot be stored: {error.strerror}", code="storage_unavailable")
    if isinstance(error, UserError):
        field = told.partition(":")[0].partition("=")[0]
        if field in OutputOptions.model_fields and field != "output_quality":
            return Failure(f"the results cannot be stored: {told}", code="storage_unavailable")
        param = field if field in SamplingParams.model_fields else None
        return Failure(told, type="invalid_request_error", code="invalid_value", param=param)
    if any(isinstance(e, OSError) for e in _causes(error)):
        return Failure(f"the results cannot be stored: {told}", code="storage_unavailable")
    memory = any(isinstance(e, torch.OutOfMemoryError) for e in _causes(error))
    return Failure(told, code="out_of_memory" if memory else "run_failed")


def preview_steps(job: DrawnJob, total: int) -> set[int]:
    """After which of `total` steps the job is shown: evenly spread, and never after the last, which is the result."""
    wanted = int(job.presentation.get("partial_images") or 0)
    return {step for k in range(wanted) if 0 < (step := round(total * (k + 1) / (wanted + 1))) < total}


def _share(jobs: Sequence[DrawnJob], job: DrawnJob, results: int) -> slice:
    """Which of the batch's results are the job's: all jobs have as many."""
    each, place = results // len(jobs), jobs.index(job)
    return slice(each * place, each * (place + 1))


def _seed(job: DrawnJob) -> int:
    seed: Any = job.sampling.get("seed")
    if isinstance(seed, list):
        return int(seed[0]) if seed else DEFAULT_SEED
    return DEFAULT_SEED if seed is None else int(seed)


def _empty(folder: Path) -> None:
    """Makes the folder, or removes what an earlier attempt left in it."""
    try:
        folder.mkdir()
    except FileExistsError:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()


def _webp(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=PREVIEW_QUALITY, method=PREVIEW_EFFORT)
    return file.getvalue()


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
