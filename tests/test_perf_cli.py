"""`sglang perf` as a gate: which runs pass and which do not; timelines of batches. Reports are made by hand."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from sgl_diffusion.cli.main import main
from sgl_diffusion.runtime.errors import RunFailure, UserError
from sgl_diffusion.runtime.report import Failure, Report, StageTime, StepTime


def report(*, step: float = 10.0, decoding: float = 30.0, batches: int = 1, **changes: Any) -> Report:
    """Three steps a batch."""
    stages = [("text_encoding", 10.0), *[("denoising", 3 * step)] * batches, ("decoding", decoding)]
    whole: dict[str, Any] = {
        "timestamp": "2026-01-01T00:00:00+00:00", "request_id": "r", "commit_hash": None, "tag": "cli_generate",
        "total_duration_ms": sum(ms for _, ms in stages),
        "steps": [StageTime(name=name, duration_ms=ms) for name, ms in stages],
        "denoise_steps_ms": [StepTime(step=i, duration_ms=step) for i in range(3 * batches)],
        "memory_checkpoints": {}, "meta": {}, "effective": {}, "versions": {}, "outputs": ["cat.png"], "error": None,
    }  # fmt: skip
    return Report(**whole | changes)


def compare(folder: Path, first: Report, last: Report) -> int:
    for name, made in (("first.json", first), ("last.json", last)):
        made.write(folder / name)
    return main(["perf", "compare", str(folder / "first.json"), str(folder / "last.json"), "--fail-over", "5%"])


FAILED = {"error": Failure(type="OutOfMemoryError", message="no room"), "total_duration_ms": 1.0}


@pytest.mark.parametrize(
    ("first", "last", "code", "told"),
    [
        (report(), report(), 0, "total 0.0% slower, median step 0.0% slower"),
        (report(), report(step=9), 0, "median step 10.0% faster"),
        (report(), report(decoding=300), 1, "total 385.7% slower, median step 0.0% slower"),
        (report(), report(step=11, decoding=20), 1, "total 10.0% faster, median step 10.0% slower"),
        (report(denoise_steps_ms=[]), report(decoding=60), 1, "total 42.9% slower (limit"),
        (report(), report(**FAILED), 1, "last.json: not comparable, the run failed: OutOfMemoryError: no room"),
        (report(**FAILED), report(), 1, "first.json: not comparable, the run failed"),
        (report(total_duration_ms=0), report(), 2, "first.json: holds no time to compare with"),
    ],
    ids=["same", "faster", "slow-decoding", "slow-step", "no-steps", "failed", "failed-baseline", "empty-baseline"],
)
def test_the_gate(
    first: Report, last: Report, code: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, first, last) == code
    shown = capsys.readouterr()
    assert told in shown.out + shown.err


@pytest.mark.parametrize("share", ["nan", "inf%", "-1%"])
def test_a_limit_is_a_number(tmp_path: Path, share: str, capsys: pytest.CaptureFixture[str]) -> None:
    report().write(tmp_path / "a.json")
    path = str(tmp_path / "a.json")
    assert main(["perf", "compare", path, path, f"--fail-over={share}"]) == 2
    assert f"fail_over={share}: expected a share" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["NaN", "Infinity", "-1.0"])
def test_times_are_numbers(tmp_path: Path, written: str) -> None:
    text = report(total_duration_ms=123.0).model_dump_json().replace("123.0", written)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: not a perf dump: total_duration_ms"):
        Report.read(tmp_path / "a.json")


def test_names_of_files_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report().write(tmp_path / "[red].json")
    assert main(["perf", "show", str(tmp_path / "[red].json")]) == 0
    shown = capsys.readouterr().out
    assert "[red].json" in shown and "saved cat.png" in shown


def test_every_batch_has_its_own_steps_in_the_timeline(tmp_path: Path) -> None:
    report(batches=2).write(tmp_path / "a.json")
    assert main(["perf", "show", str(tmp_path / "a.json"), "--plot", str(tmp_path / "t.html")]) == 0
    bars = re.findall(r'<rect x="([\d.]+)" .*?<title>(\w+)(?: (\d))?:', (tmp_path / "t.html").read_text())
    order = [name + number for _, name, number in sorted(bars, key=lambda bar: (float(bar[0]), bar[1]))]
    batch = ["denoising", "step{}", "step{}", "step{}"]
    assert order == ["text_encoding", *[b.format(i) for i, b in zip((0, 0, 1, 2), batch, strict=True)],
                     *[b.format(i) for i, b in zip((0, 3, 4, 5), batch, strict=True)], "decoding"]  # fmt: skip


def test_a_timeline_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report().write(tmp_path / "a.json")
    (tmp_path / "t.html").mkdir()
    assert main(["perf", "show", str(tmp_path / "a.json"), "--plot", str(tmp_path / "t.html")]) == 2
    assert "t.html: cannot be written: Is a directory" in capsys.readouterr().err


# -- the file of a report ---------------------------------------------------------------------


def test_a_report_is_read_back_and_readable_by_others(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    report().write(tmp_path / "a.json")
    assert Report.read(tmp_path / "a.json") == report()
    assert len({stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}) == 1


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report().write(tmp_path / "a.json")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunFailure, match="cannot be written: No space left on device"):
        report(step=99).write(tmp_path / "a.json")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert Report.read(tmp_path / "a.json") == report()


def test_a_summary_names_what_was_ignored_and_why_a_run_failed() -> None:
    told = report(effective={"ignored": ["fps"]}, error=Failure(type="ValueError", message="no")).summary()
    assert "ignored fps" in told and "failed: ValueError: no" in told
