"""The small world the embedded model draws: scenes, their captions, their pictures, and a judge.

A scene has a background and one or two coloured shapes. One shape stands in the centre; two stand side by side
or one above the other. A tenth of all scenes is held out by a hash: training never sees them in any wording, and
the score is measured on them alone.

Pictures are (3, SIZE, SIZE) float32 arrays in [-1, 1]; coordinates are pixels, x to the right and y downwards.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]
Mask = NDArray[np.bool_]
Field = NDArray[Any]  # a number for every pixel

SIZE = 64
COLOURS = {
    "red": (220, 38, 38),
    "green": (34, 160, 70),
    "blue": (40, 80, 225),
    "yellow": (250, 215, 45),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {  # where the centre of a shape stands, (x, y)
    "centre": (32.0, 32.0),
    "left": (17.0, 32.0),
    "right": (47.0, 32.0),
    "top": (32.0, 17.0),
    "bottom": (32.0, 47.0),
}
RADIUS_ALONE, RADIUS_PAIR = 19.0, 12.5
RELATIONS = {  # places of (first named, second named) -> wordings
    ("left", "right"): ("left of", "to the left of"),
    ("right", "left"): ("right of", "to the right of"),
    ("top", "bottom"): ("above", "over"),
    ("bottom", "top"): ("below", "under"),
}
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]  # one in the centre, or two as (left, right) or (top, bottom)

    @property
    def held_out(self) -> bool:
        words = [self.background, *(f"{t.colour} {t.shape} {t.place}" for t in self.things)]
        return zlib.crc32(" ".join(words).encode()) % HELD_OUT_ONE_IN == 0


def all_scenes() -> list[Scene]:
    """Every scene of the world in a fixed order."""
    scenes = []
    for background in COLOURS:
        looks = [(c, s) for c in COLOURS if c != background for s in SHAPES]
        scenes += [Scene(background, (Thing(*look, "centre"),)) for look in looks]
        for places in (("left", "right"), ("top", "bottom")):
            for pair in itertools.product(looks, looks):
                things = tuple(Thing(*look, place) for look, place in zip(pair, places, strict=True))
                scenes.append(Scene(background, things))
    return scenes


Pools = tuple[list[Scene], list[Scene]]  # scenes of one shape, scenes of two


def split_scenes(*, held_out: bool) -> Pools:
    """One side of the held-out split, by the number of shapes."""
    pools: Pools = ([], [])
    for scene in all_scenes():
        if scene.held_out == held_out:
            pools[len(scene.things) - 1].append(scene)
    return pools


def draw_scenes(pools: Pools, rng: np.random.Generator, count: int, alone: float = 0.15) -> list[Scene]:
    """`count` scenes, a share `alone` of them with a single shape."""
    chosen = []
    for is_alone in rng.random(count) < alone:
        pool = pools[0 if is_alone else 1]
        chosen.append(pool[int(rng.integers(len(pool)))])
    return chosen


# -- captions -----------------------------------------------------------------


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The scene in words: the plain wording without `rng`, one of many with it (some leave the background out)."""
    things = scene.things
    if len(things) == 2 and rng is not None and rng.random() < 0.5:
        things = things[::-1]
    bare = rng is not None and rng.random() < 0.1
    nouns = [("" if bare else "a ") + f"{t.colour} {t.shape}" for t in things]
    if len(things) == 2:
        wordings = RELATIONS[things[0].place, things[1].place]
        text = f"{nouns[0]} {wordings[0 if rng is None else int(rng.integers(2))]} {nouns[1]}"
    else:
        text = nouns[0]
    ending = 1.0 if rng is None else rng.random()
    if ending > 0.2:
        text += f" on a {scene.background} background"
    elif ending > 0.1:
        text += f", {scene.background} background"
    if rng is not None:
        if rng.random() < 0.1:
            text = "a picture of " + text
        if rng.random() < 0.1:
            text = text[0].upper() + text[1:]
        if rng.random() < 0.1:
            text += "."
    return text


def vocabulary() -> list[str]:
    """Every word a caption can hold, sorted."""
    wordings = " ".join(itertools.chain(*RELATIONS.values()))
    return sorted({*COLOURS, *SHAPES, *wordings.split(), "a", "on", "background", "picture", "and"})


# -- pictures -----------------------------------------------------------------

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def _distance(shape: str, x: Field, y: Field, radius: float) -> Field:
    """Signed distance in pixels to the outline of a shape centred at 0, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if shape == "triangle":
        y = y - 0.2 * radius
        return np.maximum(y, np.abs(x) * 0.866 - y * 0.5) - 0.62 * radius
    if shape == "cross":
        width, length = 0.34 * radius, 1.05 * radius
        ax, ay = np.abs(x), np.abs(y)
        upright, flat = np.maximum(ax - width, ay - length), np.maximum(ax - length, ay - width)
        return np.minimum(upright, flat)
    raise ValueError(f"shape {shape!r}: expected one of {', '.join(SHAPES)}")


def render(scene: Scene, rng: np.random.Generator | None = None) -> Picture:
    """The picture of a scene; with `rng` every shape is moved by up to 2 pixels and resized by up to 6 %."""
    picture: Field = np.empty((3, SIZE, SIZE), np.float32)
    picture[:] = np.array(COLOURS[scene.background], np.float32)[:, None, None] / 255
    radius = RADIUS_ALONE if len(scene.things) == 1 else RADIUS_PAIR
    for thing in scene.things:
        dx, dy, grow = (0.0, 0.0, 0.0) if rng is None else rng.uniform(-1, 1, 3)
        cx, cy = PLACES[thing.place]
        outline = _distance(thing.shape, _X - cx - 2 * dx, _Y - cy - 2 * dy, radius * (1 + 0.06 * grow))
        cover = np.clip(0.5 - outline, 0, 1)
        colour = np.array(COLOURS[thing.colour], np.float32)[:, None, None] / 255
        picture = picture * (1 - cover) + colour * cover
    return (picture * 2 - 1).astype(np.float32)


# -- judge --------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What is right in a picture. `shapes` asks for every shape of the scene."""

    background: bool
    colours: bool
    layout: bool
    shapes: bool


def judge(picture: Picture, scene: Scene) -> Verdict:
    """Reads a picture pixel by pixel: nearest palette colour, then where each colour stands and in which form."""
    palette = np.array(list(COLOURS.values()), np.float32) / 255
    pixels = (np.clip(picture, -1, 1).transpose(1, 2, 0) + 1) / 2
    distance = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    label = distance.argmin(-1)
    label[distance.min(-1) > 0.3] = -1  # neither colour: anti-aliased edges, or mud
    names = list(COLOURS)

    edge = np.ones((SIZE, SIZE), bool)
    edge[3:-3, 3:-3] = False
    background = label == names.index(scene.background)
    radius = RADIUS_ALONE if len(scene.things) == 1 else RADIUS_PAIR

    colours = layout = shapes = True
    claimed = np.zeros((SIZE, SIZE), bool)
    for thing in scene.things:
        cx, cy = PLACES[thing.place]
        near = np.hypot(_X - cx, _Y - cy) < radius * 1.25 + 2
        mask = (label == names.index(thing.colour)) & near
        expected_area = (_distance(thing.shape, _X - 32, _Y - 32, radius) < 0).sum()
        core = np.hypot(_X - cx, _Y - cy) < 0.4 * radius
        colours &= bool(mask[core].mean() > 0.6)
        area_fits = 0.5 * expected_area < mask.sum() < 1.8 * expected_area
        centred = bool(mask.any()) and (max(abs(_X[mask].mean() - cx), abs(_Y[mask].mean() - cy)) < 0.4 * radius)
        layout &= bool(area_fits and centred)
        shapes &= _closest_shape(mask, cx, cy, radius) == thing.shape
        claimed |= near
    stray = (~background & ~claimed).mean()
    return Verdict(
        background=bool(background[edge].mean() > 0.9),
        colours=colours,
        layout=layout and bool(stray < 0.02),
        shapes=shapes,
    )


def _closest_shape(mask: Mask, cx: float, cy: float, radius: float) -> str | None:
    """The shape whose outline, moved and scaled a little, overlaps the mask best; None below half overlap."""
    best, name = 0.5, None
    for shape in SHAPES:
        for scale in (0.88, 0.94, 1.0, 1.06, 1.12):
            for dx, dy in itertools.product((-2, -1, 0, 1, 2), repeat=2):
                form = _distance(shape, _X - cx - dx, _Y - cy - dy, radius * scale) < 0
                overlap = (form & mask).sum() / (form | mask).sum()
                if overlap > best:
                    best, name = overlap, shape
    return name


def score(pictures: Iterable[Picture], scenes: Iterable[Scene]) -> dict[str, float]:
    """Share of pictures with the right background, colours, layout, all three of them, and shapes."""
    verdicts = [judge(p, s) for p, s in zip(pictures, scenes, strict=True)]
    return {
        "background": float(np.mean([v.background for v in verdicts])),
        "colours": float(np.mean([v.colours for v in verdicts])),
        "layout": float(np.mean([v.layout for v in verdicts])),
        "scene": float(np.mean([v.background and v.colours and v.layout for v in verdicts])),
        "shapes": float(np.mean([v.shapes for v in verdicts])),
    }
