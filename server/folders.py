"""Where the server keeps what does not fit a database: given pictures, results, snapshots. Torch-free."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.server.jobs import Status

REPORT = "report.json"
PARTS = ("inputs", "results", "snapshots")

_OF_A_JOB = re.compile(r"\.?((?:img|video|batch)_[0-9a-f]{32})(?:\..*)?")  # a name with its id, or a batch's


class Folders:
    """Everything of a job has its id in its path, so that it is found, and removed, without asking the database.

    Raises:
        UserError: data_dir cannot be made or written.
    """

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir
        try:
            for folder in (self.root, *(self.root / part for part in PARTS)):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"data_dir={data_dir}: cannot be made: {e.strerror}") from e
        if not os.access(self.root, os.W_OK):
            raise UserError(f"data_dir={data_dir}: is not writable")

    def inputs(self, job_id: str) -> Path:
        """Pictures a client gave."""
        return self.root / "inputs" / job_id

    def results(self, job_id: str) -> Path:
        """What was drawn, and the report. It appears whole, by a rename of `unfinished`, or not at all."""
        return self.root / "results" / job_id

    def unfinished(self, job_id: str) -> Path:
        return self.root / "results" / f".{job_id}"

    def snapshot(self, job_id: str) -> Path:
        """The state of a job's last kept step."""
        return self.root / "snapshots" / f"{job_id}.safetensors"

    def entries(self) -> Iterator[tuple[str, Path]]:
        """Everything that has a job's id in its name, with that id; of a folder, not what is in it."""
        for part in PARTS:
            for path in (self.root / part).iterdir():
                if match := _OF_A_JOB.fullmatch(path.name):
                    yield match[1], path

    def half_written(self) -> Iterator[Path]:
        """Snapshots whose writing a death cut short: they have no job's name yet."""
        return (self.root / "snapshots").glob(".*")

    def tidy(self, job_id: str, end: Status) -> None:
        """Removes what an ended job does not need any more; of a cancelled one, whatever it came to."""
        with suppress(OSError):  # what is left here goes with the job's record
            self.snapshot(job_id).unlink(missing_ok=True)
        if end is Status.CANCELLED:
            self.remove(job_id)

    def remove(self, job_id: str) -> None:
        """Everything of a job; nothing happens where there is nothing."""
        for folder in (self.inputs(job_id), self.results(job_id), self.unfinished(job_id)):
            shutil.rmtree(folder, ignore_errors=True)
        self.snapshot(job_id).unlink(missing_ok=True)
