"""How fast ranks reach each other: presets, and files that `sglang bench links` writes. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sgl_diffusion.runtime.errors import RunFailure, UserError

COLLECTIVES = ("all_to_all", "all_gather", "all_reduce", "exchange")
"""What `Group` does, by its name there."""


@dataclass(frozen=True)
class Line:
    """Time of a collective as a straight line: latency, and bytes that a rank sends to others over a bandwidth."""

    latency_us: float
    gb_per_s: float

    def ms(self, sent: float) -> float:
        return self.latency_us / 1e3 + sent / self.gb_per_s / 1e6

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Line:
        """Of measured (bytes, microseconds). Errors count relative to the time, so that small messages, which tell the
        latency, weigh as much as large ones, which tell the bandwidth.

        Source: weighted least squares, weights 1 / time^2.
        """
        weights = [1 / us**2 for _, us in points]
        total = sum(weights)
        mean_b = sum(w * b for w, (b, _) in zip(weights, points, strict=True)) / total
        mean_us = sum(w * us for w, (_, us) in zip(weights, points, strict=True)) / total
        spread = sum(w * (b - mean_b) ** 2 for w, (b, _) in zip(weights, points, strict=True))
        both = sum(w * (b - mean_b) * (us - mean_us) for w, (b, us) in zip(weights, points, strict=True))
        slope = max(both / spread if spread else 0.0, 1e-9)  # microseconds a byte; noise may tilt it
        return cls(latency_us=max(mean_us - slope * mean_b, 0.0), gb_per_s=1e-3 / slope)


@dataclass(frozen=True)
class Links:
    """What joins ranks: a line for each of the `COLLECTIVES`. `source` says where the figures come from."""

    name: str
    source: str
    lines: Mapping[str, Line]


REACHED = 0.8  # of a link's rated bandwidth by large messages: an assumption


def _preset(name: str, rated_gb_per_s: float, latency_us: float, source: str) -> Links:
    line = Line(latency_us, REACHED * rated_gb_per_s)
    told = f"{source}; {REACHED:.0%} of it and {latency_us:g} us of latency are assumed"
    return Links(name, told, dict.fromkeys(COLLECTIVES, line))


PRESETS = {
    links.name: links
    for links in (
        _preset("nvlink", 450, 15, "NVIDIA's data sheet of the H200: NVLink 4, 450 GB/s per direction and GPU"),
        _preset("pcie5", 63, 20, "PCI Express 5.0 with 16 lanes: 63 GB/s per direction"),
        _preset("infiniband-400", 50, 30, "InfiniBand NDR, an adapter of 400 Gb/s for every GPU: 50 GB/s"),
        _preset("loopback", 1.0, 200, "gloo between processes of one host: 1 GB/s, assumed as well"),
    )
}


def read_links(told: str) -> Links:
    """A preset by its name, or the file of a measurement.

    Raises:
        UserError: neither; with the presets there are.
    """
    if told in PRESETS:
        return PRESETS[told]
    try:
        raw = json.loads(Path(told).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"links={told}: expected {', '.join(PRESETS)} or a file ({e.strerror})") from e
    except ValueError as e:
        raise UserError(f"links={told}: not readable as JSON: {e}") from e
    try:
        lines = {name: Line(**raw["collectives"][name]) for name in COLLECTIVES}
        return Links(str(raw["name"]), f"measured, {told}", lines)
    except (KeyError, TypeError) as e:
        raise UserError(f"links={told}: not a file of `sglang bench links` ({e})") from e


def write_links(path: Path, links: Links, about: Mapping[str, Any]) -> None:
    """What `read_links` reads, and what it holds for. Raises RunFailure for a place that cannot be written."""
    collectives = {name: asdict(line) for name, line in links.lines.items()}
    report = {"name": links.name, **about, "collectives": collectives}
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise RunFailure(f"{path} cannot be written: {e.strerror}") from e
