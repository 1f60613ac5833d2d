"""Links between ranks: lines through what was measured, files, and a measurement over gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from sgl_diffusion.bench.links import Points, fitted, measure
from sgl_diffusion.cli.main import main
from sgl_diffusion.runtime.errors import UserError
from sgl_diffusion.runtime.parallel.group import Group
from sgl_diffusion.runtime.parallel.links import COLLECTIVES, PRESETS, Line, read_links, write_links


def test_a_line_is_latency_and_bandwidth() -> None:
    line = Line(latency_us=20.0, gb_per_s=50.0)
    assert line.ms(0) == 0.02 and line.ms(50e6) == pytest.approx(1.02)
    points = [(size, 1e3 * line.ms(size)) for size in (2**16, 2**18, 2**20, 2**24)]
    found = Line.through(points)
    assert (found.latency_us, found.gb_per_s) == pytest.approx((20.0, 50.0))
    # small messages tell the latency, though large ones are off by many times as much
    off = [(2**n, 1e3 * line.ms(2**n) * share) for n, share in ((22, 1.2), (23, 0.8), (24, 1.2))]
    assert Line.through([*points[:2], *off]).latency_us == pytest.approx(20.0, rel=0.05)
    assert Line.through([(8, 100.0), (4096, 90.0)]).gb_per_s > 1e5  # noise alone: bandwidth does not show


def test_presets_say_where_they_come_from() -> None:
    for links in PRESETS.values():
        assert set(links.lines) == set(COLLECTIVES) and "assumed" in links.source
    assert PRESETS["nvlink"].lines["all_to_all"].gb_per_s < 450


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="links=nvlnk: expected nvlink, pcie5, infiniband-400, loopback or a file"):
        read_links("nvlnk")
    file = tmp_path / "links.json"
    for text, message in (("x", "not readable as JSON"), ("{}", "not a file of `sglang bench links`")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_links(str(file))


SIZES = (8192, 65536)


def _measured() -> Points:
    group = Group("world", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    return measure(group, torch.device("cpu"), SIZES)


def test_ranks_measure_their_links(tmp_path: Path) -> None:
    first, second = run_ranks(2, _measured)
    assert first == second  # the slowest rank's
    assert [sent for sent, _ in first["all_to_all"]] == [size // 2 for size in SIZES]
    assert [sent for sent, _ in first["all_reduce"]] == list(SIZES) == [sent for sent, _ in first["exchange"]]
    assert [sent for sent, _ in first["all_gather"]] == [size // 2 for size in SIZES]
    assert all(us > 0 for points in first.values() for _, us in points)
    file = tmp_path / "links.json"
    links = fitted("two of us", "measured", first)
    write_links(file, links, {"device": "CPU", "ranks": 2})
    again = read_links(str(file))
    assert again.name == "two of us" and again.lines == links.lines and again.source == f"measured, {file}"
    assert json.loads(file.read_text())["device"] == "CPU"


def test_one_rank_has_no_links(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "links", "--num-gpus", "1"]) == 2
    assert "num_gpus=1: one rank has no links to measure" in capsys.readouterr().err
