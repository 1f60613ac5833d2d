"""Bars as a small SVG picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

COLOURS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#ff9da6", "#9d755d", "#bab0ac", "#eeca3b",
)  # fmt: skip
LABEL, SCALE, ROW, GAP, TOP = 560, 400, 15, 10, 60  # pixels: label column, a share of 1, a bar, between groups, header


@dataclass(frozen=True)
class Bar:
    group: str
    name: str
    share: float


def bars(title: str, values: Sequence[Bar]) -> str:
    """Horizontal bars of shares, neighbours of one group together; the line is a share of 1."""
    names = list(dict.fromkeys(bar.name for bar in values))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    parts, y = [_text(8, 20, title)], TOP
    for i, name in enumerate(names):
        parts += [_box(8 + 120 * i, 30, 12, colour[name]), _text(24 + 120 * i, 41, name)]
    for group, members in groupby(values, key=lambda bar: bar.group):
        parts.append(_text(8, y + 11, group))
        for bar in members:
            parts += [_box(LABEL, y, SCALE * bar.share, colour[bar.name])]
            parts.append(_text(LABEL + SCALE * bar.share + 4, y + 11, f"{bar.share:.0%}"))
            y += ROW
        y += GAP
    parts.append(f'<line x1="{LABEL + SCALE}" x2="{LABEL + SCALE}" y1="{TOP}" y2="{y}" stroke="#999"/>')
    size = f'width="{LABEL + 2 * SCALE}" height="{y + GAP}"'
    style = 'font-family="sans-serif" font-size="11"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *parts, "</svg>", ""])


def _box(x: float, y: float, width: float, colour: str) -> str:
    return f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.1f}" height="{ROW - 3}" fill="{colour}"/>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}">{escape(text)}</text>'
