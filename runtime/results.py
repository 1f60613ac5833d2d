"""Results on their way to files: a clip is encoded while its later frames are still being decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from sgl_diffusion.runtime.args import SamplingParams
from sgl_diffusion.runtime.events import Pixels
from sgl_diffusion.runtime.output import Output, frames_path, save, save_frames
from sgl_diffusion.runtime.request import Request
from sgl_diffusion.runtime.video import ClipWriter, Write, frames_file


class Results:
    """Takes what a request draws, and writes it. Left by an exception, it leaves no clip behind.

    Args:
        fps: of clips; None if pictures are drawn.
        plan: the files, one a result; empty if nothing is written.
        metadata: by the number of a result, what goes into its file.
    """

    def __init__(
        self,
        request: Request,
        params: SamplingParams,
        fps: int | None,
        plan: Sequence[Path],
        metadata: Callable[[int], Mapping[str, Any]],
    ) -> None:
        self.request, self.params, self.fps, self.plan, self.metadata = request, params, fps, plan, metadata
        self.holds_frames = not plan or params.return_frames  # else a long clip would fill the memory
        self._drawn: list[list[Pixels]] = [[] for _ in range(request.count)]
        self._writes: list[list[Write]] = []
        self._files = ExitStack()

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)

    def add(self, pixels: Sequence[Pixels]) -> None:
        """The picture of every result, or the next frames of its clip.

        Raises:
            RunFailure: a file cannot be written.
        """
        if self.fps is not None and self.plan and not self._writes:
            self._writes = [self._open(i, frames) for i, frames in enumerate(pixels)]
        for i, drawn in enumerate(pixels):
            if self.fps is None or self.holds_frames:
                self._drawn[i].append(drawn)
            for write in self._writes[i] if self._writes else ():
                write(drawn)

    def _open(self, index: int, frames: Pixels) -> list[Write]:
        path, (height, width) = self.plan[index], frames.shape[1:3]
        assert self.fps is not None
        clip = ClipWriter(
            path,
            size=(height, width),
            fps=self.fps,
            metadata=self.metadata(index),
            quality=self.params.output_quality,
        )
        writes: list[Write] = [self._files.enter_context(clip).write]
        if self.params.return_frames:
            writes.append(self._files.enter_context(frames_file(frames_path(path))))
        return writes

    def finish(self) -> tuple[list[Output], list[Path]]:
        """All results, and the files they are in.

        Raises:
            RunFailure: a file cannot be written.
        """
        outputs = [self._output(i, drawn) for i, drawn in enumerate(self._drawn)]
        self._files.close()
        paths: list[Path] = []
        for output, path in zip(outputs, self.plan, strict=False):
            if self.fps is None:
                save(output, path, self.metadata(output.index), self.params.output_quality)
                if self.params.return_frames:
                    save_frames(output, frames_path(path))
            paths += [path, frames_path(path)] if self.params.return_frames else [path]
        return outputs, paths

    def _output(self, index: int, drawn: Sequence[Pixels]) -> Output:
        return Output(
            prompt=self.request.prompt_of(index),
            seed=self.request.seeds[index],
            index=index,
            image=Image.fromarray(drawn[0]) if self.fps is None else None,
            frames=np.concatenate(drawn) if self.fps is not None and drawn else None,
            fps=self.fps,
        )
