"""Coloured shapes with counts and relations: prompts of GenEval's six task types, and images that fulfil them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, hypot, pi, sin
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from alignbench.embedded.drawing.palette import BACKGROUNDS, COLORS, GRID, IMAGE_SIZE, backgrounds_for, colors_for

SHAPES = ("circle", "square", "triangle", "star", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""For each relation of A to B, the direction from B's centre to A's centre (x to the right, y down)."""
TASK_TYPES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
PREFIXES = ("", "a photo of ", "a picture of ", "a drawing of ")
MIN_CONTRAST = 25.0
SIZES = {1: (16, 32), 2: (16, 32), 3: (16,), 4: (16,)}
"""For each number of shapes, their possible diameters in pixels; these are whole cells."""
CELL = 2 * GRID
GAP = 3
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Shape:
    """A coloured shape: its centre (x, y) and its diameter, in pixels."""

    kind: str
    color: str
    center: tuple[float, float]
    size: float


@dataclass(frozen=True)
class Scene:
    """Shapes on a plain background."""

    background: str
    shapes: tuple[Shape, ...]

    def draw(self) -> np.ndarray:
        """Draws the image, uint8 [64, 64, 3]."""
        canvas = Image.new("RGB", (IMAGE_SIZE * SUPERSAMPLING,) * 2, BACKGROUNDS[self.background])
        pen = ImageDraw.Draw(canvas)
        for shape in self.shapes:
            x, y = (c * SUPERSAMPLING for c in shape.center)
            r = shape.size * SUPERSAMPLING / 2
            if shape.kind == "circle":
                pen.ellipse((x - r, y - r, x + r, y + r), fill=COLORS[shape.color])
            else:
                pen.polygon([(x + r * u, y + r * v) for u, v in _OUTLINES[shape.kind]], fill=COLORS[shape.color])
        return np.asarray(canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def _star() -> list[tuple[float, float]]:
    radii = (1.0, 0.42)
    return [(radii[i % 2] * sin(i * pi / 5), -radii[i % 2] * cos(i * pi / 5)) for i in range(10)]


_ARM = 0.32
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
    "star": _star(),
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip


def sample_metadata(rng: np.random.Generator, tag: str) -> dict[str, Any]:
    """Draws a prompt of a GenEval task type, with what must (`include`) and must not (`exclude`) be in the image.

    The format is that of GenEval's metadata file: `include` has {class, count, color?, position? [relation, index]}.
    """
    a, b = (str(s) for s in rng.choice(SHAPES, size=2, replace=False))
    c, d = (str(s) for s in rng.choice(list(COLORS), size=2, replace=False))
    count = int(rng.integers(2, 5)) if tag == "counting" else 1
    relation = str(rng.choice(list(RELATIONS))) if tag == "position" else ""
    metadata = compose(tag, (a, b), (c, d), count, relation, PLURALS.__getitem__)
    return {**metadata, "prompt": str(rng.choice(PREFIXES)) + metadata["prompt"]}


def compose(
    tag: str, kinds: tuple[str, str], colors: tuple[str, str], count: int, relation: str, plural: Callable[[str], str]
) -> dict[str, Any]:
    """Builds the metadata of a task type for these kinds of objects; the prompt does not yet begin with "a photo of".

    Arguments that the task type does not need are ignored.

    Raises:
        ValueError: the task type is unknown.
    """
    (a, b), (c, d) = kinds, colors
    exclude: list[dict[str, Any]] = []
    if tag == "single_object":
        include, phrase = [{"class": a, "count": 1}], with_article(a)
    elif tag == "two_object":
        include = [{"class": a, "count": 1}, {"class": b, "count": 1}]
        phrase = f"{with_article(a)} and {with_article(b)}"
    elif tag == "counting":
        include, phrase = [{"class": a, "count": count}], f"{NUMBERS[count]} {plural(a)}"
        exclude = [{"class": a, "count": count + 1}]
    elif tag == "colors":
        include, phrase = [{"class": a, "count": 1, "color": c}], f"{with_article(c)} {a}"
    elif tag == "position":
        include = [{"class": b, "count": 1}, {"class": a, "count": 1, "position": [relation, 0]}]
        phrase = f"{with_article(a)} {relation} {with_article(b)}"
    elif tag == "color_attr":
        include = [{"class": a, "count": 1, "color": c}, {"class": b, "count": 1, "color": d}]
        phrase = f"{with_article(c)} {a} and {with_article(d)} {b}"
    else:
        raise ValueError(f"unknown task type {tag!r}; known: {', '.join(TASK_TYPES)}")
    return {"tag": tag, "include": include, "exclude": exclude, "prompt": phrase}


def sample_scene(rng: np.random.Generator, metadata: dict[str, Any], single_sizes: Sequence[int] = SIZES[1]) -> Scene:
    """Draws a scene that fulfils the metadata; colours, places, sizes and the background are random if they are left open.

    Args:
        rng: the generator.
        metadata: the metadata of the prompt.
        single_sizes: possible diameters of a single shape.
    """
    clauses = [c for c in metadata["include"] for _ in range(c["count"])]
    named = frozenset(c["color"] for c in clauses if "color" in c)
    background = str(rng.choice(backgrounds_for(named, MIN_CONTRAST)))
    one_color = str(rng.choice(colors_for(background, MIN_CONTRAST)))
    same_color = metadata["tag"] == "counting"
    while True:
        sizes = rng.choice(single_sizes if len(clauses) == 1 else SIZES[len(clauses)], size=len(clauses))
        if same_color:
            sizes[:] = sizes[0]
        # Shapes lie on whole cells of 2x2 patches, so that a small model learns each shape once and not at each offset.
        corners = [CELL * rng.integers((IMAGE_SIZE - s) // CELL + 1, size=2) for s in sizes]
        centers = [tuple(corner + s / 2) for corner, s in zip(corners, sizes, strict=True)]
        if _apart(centers, sizes) and _relations_hold(metadata["include"], centers):
            break
    shapes = [
        Shape(
            clause["class"],
            clause.get("color") or (one_color if same_color else str(rng.choice(colors_for(background, MIN_CONTRAST)))),
            (float(x), float(y)),
            float(size),
        )
        for clause, (x, y), size in zip(clauses, centers, sizes, strict=True)
    ]
    return Scene(background, tuple(shapes))


def with_article(word: str) -> str:
    """Puts the indefinite article before a word."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _apart(centers: Sequence[tuple[float, ...]], sizes: Sequence[float] | np.ndarray) -> bool:
    return all(
        max(abs(centers[i][0] - centers[j][0]), abs(centers[i][1] - centers[j][1])) > (sizes[i] + sizes[j]) / 2 + GAP
        for i in range(len(sizes))
        for j in range(i)
    )


def _relations_hold(include: list[dict[str, Any]], centers: Sequence[tuple[float, ...]]) -> bool:
    """Whether each relation holds clearly: the direction between the centres differs by less than 35 degrees from it."""
    for i, clause in enumerate(include):
        if "position" not in clause:
            continue
        relation, target = clause["position"]
        dx, dy = centers[i][0] - centers[target][0], centers[i][1] - centers[target][1]
        ux, uy = RELATIONS[relation]
        if (dx * ux + dy * uy) < cos(35 * pi / 180) * hypot(dx, dy):
            return False
    return True
