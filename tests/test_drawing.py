"""An order carried out in this process: what is told of it, in which order, and what it leaves on the disk."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

import pytest
from dispatching import MODEL, PROMPT

from sgl_diffusion.runtime.engine import Engine
from sgl_diffusion.runtime.errors import RunFailure
from sgl_diffusion.runtime.report import Report
from sgl_diffusion.server.drawing import Batch
from sgl_diffusion.server.folders import REPORT, Folders
from sgl_diffusion.server.messages import Answer, Draw, Drawn, DrawnJob, Failed, Finished, Progress


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(MODEL)


class Told(list[Answer]):
    """What a batch of one job has told, without its progress."""

    def __init__(self, engine: Engine, folders: Folders) -> None:
        self.folders, self.id = folders, f"img_{uuid.uuid4().hex}"
        job = DrawnJob(id=self.id, sampling={"prompt": [PROMPT], "num_inference_steps": 1}, presentation={})
        self.batch = Batch(engine, folders, Draw(jobs=[job], snapshot_every=0), self._hear, set(), threading.Event())

    def _hear(self, answer: Answer) -> None:
        if not isinstance(answer, Progress):
            self.append(answer)


@pytest.fixture
def told(engine: Engine, tmp_path: Path) -> Told:
    return Told(engine, Folders(tmp_path))


def test_results_are_told_of_before_the_report_is_written(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    results, write = told.folders.results(told.id), Report.write
    before: list[list[Answer]] = []

    def noted(report: Report, path: Path) -> None:
        before.append(list(told))
        assert path == results / REPORT and [file.name for file in results.iterdir()] == ["0.png"]
        write(report, path)

    monkeypatch.setattr(Report, "write", noted)
    told.batch.draw()
    (drawn,) = before[0]
    assert isinstance(drawn, Drawn) and [result.name for result in drawn.results] == ["0.png"]
    assert list(told) == [drawn, Finished(job=told.id)]
    assert sorted(file.name for file in results.iterdir()) == ["0.png", REPORT]
    assert not told.folders.unfinished(told.id).exists()


def test_results_are_kept_though_the_disk_takes_no_report(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RunFailure("report.json cannot be written: No space left on device")

    monkeypatch.setattr(Report, "write", full)
    told.batch.draw()
    assert [type(answer) for answer in told] == [Drawn, Finished]
    assert [file.name for file in told.folders.results(told.id).iterdir()] == ["0.png"]


def test_what_was_prepared_is_drawn_the_same(told: Told, engine: Engine, tmp_path: Path) -> None:
    told.batch.prepare()
    assert told.folders.unfinished(told.id).is_dir() and not list(told)
    told.batch.draw()
    other = Told(engine, told.folders)
    other.batch.draw()
    pictures = [(told.folders.results(one.id) / "0.png").read_bytes() for one in (told, other)]
    assert pictures[0] == pictures[1] and [type(answer) for answer in told] == [Drawn, Finished]


def test_what_was_prepared_and_dropped_leaves_nothing(told: Told) -> None:
    told.batch.prepare()
    told.batch.drop()
    assert not told.folders.unfinished(told.id).exists() and not list(told)


def test_what_cannot_be_prepared_is_told_when_it_is_drawn(told: Told) -> None:
    told.folders.unfinished(told.id).write_text("where a folder should be")
    told.batch.prepare()
    assert not list(told)
    told.batch.draw()
    (failed,) = told
    assert isinstance(failed, Failed) and failed.failure.code == "storage_unavailable"
