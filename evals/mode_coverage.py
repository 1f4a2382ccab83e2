"""mode_coverage: how evenly the pictures of a drawn prompt spread over what it leaves open: colour, place, size, background.

Of a scene's first shape, or of a word, read from the picture: its colour where the prompt names none, its place, its size,
and the background. For each the number of different values, and the entropy over them divided by its maximum, the logarithm
of the number of values that the drawing program has or of pictures, whichever is smaller. 1 is an even spread, 0 always the
same. `mode_coverage` is the mean over what the prompt leaves open.

Distances of latents need not show this: a model can grow more varied in them while it settles on one background.
"""

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from typing import Any

import numpy as np

from alignbench import SetMetric, UserError
from alignbench.embedded.drawing import lettering, scenes
from alignbench.embedded.drawing.palette import BACKGROUNDS, COLORS, PICTURE_SIZE, backgrounds_for, nearest
from alignbench.embedded.drawing.scenes import SIZES, Scene, Shape
from evals.detectors.base import Detection
from evals.detectors.grammar import SCENES
from evals.detectors.lettering import background_of, find_lettering
from evals.detectors.shapes import ShapesDetector
from evals.ocr import quoted_text, unquoted_words

ASPECTS = ("color", "place", "size", "background")
PLACES = 3
"""Rows and columns of places."""


@dataclass(frozen=True)
class Subject:
    """What the pictures of one prompt show, and how much of it could vary.

    Attributes:
        found: of each picture; None where nothing was found.
        any_color: whether the prompt leaves its colour open.
        backgrounds: how many the drawing program could put behind it.
        extents: the sizes that the drawing program has, in pixels of a drawn picture, ascending.
        by_height: whether these are heights, or longer sides.
        places: how many places the drawing program could put it at.
    """

    found: list[Detection | None]
    any_color: bool
    backgrounds: int
    extents: list[float]
    by_height: bool
    places: int


def coverage(values: Sequence[Hashable], possible: int) -> float:
    """Entropy of the values over its maximum for this many values and possible ones; NaN where there are fewer than two.

    Raises:
        UserError: fewer than two values are possible.
    """
    if possible < 2:
        raise UserError(f"coverage needs at least two possible values, got {possible}")
    if len(values) < 2:
        return float("nan")
    shares = [count / len(values) for count in Counter(values).values()]
    # A model may draw what the drawing program would not.
    return -sum(p * log(p) for p in shares) / log(min(len(values), max(possible, len(shares))))


@dataclass(frozen=True)
class Read:
    """What mode coverage reads of N images.

    Attributes:
        values: aspect -> the value of each image; None where the image shows none.
        possible: aspect -> how many values the drawing program has.
    """

    values: dict[str, list[Hashable | None]]
    possible: dict[str, int]


class ModeCoverage(SetMetric):
    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        """NaN for what the prompt settles, for prompts of other tasks, and where nothing is found in two pictures."""
        return self.measure_read(self.read_images(images, latents, prompt), range(len(images)), prompt)

    def read_images(self, images: np.ndarray, latents: Any, prompt: str) -> Read:
        subject = subject_of(images, prompt)
        values: dict[str, list[Hashable | None]] = {aspect: [None] * len(images) for aspect in ASPECTS}
        values["background"] = [nearest(background_of(image), BACKGROUNDS) for image in images]
        possible = {"color": len(COLORS), "background": len(BACKGROUNDS)}
        if subject is not None:
            possible |= {"place": subject.places, "size": len(subject.extents), "background": subject.backgrounds}
            for i, detection in enumerate(subject.found):
                if detection is not None:
                    values["color"][i] = detection["color"] if subject.any_color else None
                    values["place"][i] = place(detection, images.shape[1:3])
                    values["size"][i] = size(detection, subject, images.shape[1])
        return Read(values, possible)

    def measure_read(self, read: Read, members: Sequence[int] | np.ndarray, prompt: str) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for aspect in ASPECTS:
            seen = [value for i in members if (value := read.values[aspect][i]) is not None]
            varies = seen and read.possible[aspect] > 1
            metrics[f"modes_{aspect}"] = float(len(set(seen))) if varies else float("nan")
            metrics[f"coverage_{aspect}"] = coverage(seen, read.possible[aspect]) if varies else float("nan")
        coverages = [value for aspect in ASPECTS if not np.isnan(value := metrics[f"coverage_{aspect}"])]
        return {"mode_coverage": float(np.mean(coverages)) if coverages else float("nan"), **metrics}

    def higher_is_better(self, metric: str) -> bool | None:
        """The numbers of values say again what the coverages say; one alarm is enough."""
        return None if metric.startswith("modes_") else True


def subject_of(images: np.ndarray, prompt: str) -> Subject | None:
    """The first shape of a drawn scene's prompt, or the word of one that quotes a text; None for other prompts."""
    if (metadata := SCENES.parse(prompt)) is not None:
        clauses = metadata["include"]
        kind = clauses[0]["class"]
        named = frozenset(c["color"] for c in clauses if "color" in c)
        extents = [drawn_extent(kind, d) for d in sorted(SIZES[sum(c["count"] for c in clauses)])]
        shapes = [next(iter(d.get(kind, ())), None) for d in ShapesDetector().detect(list(images))]
        backgrounds = len(backgrounds_for(named, scenes.MIN_CONTRAST))
        return Subject(shapes, "color" not in clauses[0], backgrounds, extents, False, PLACES**2)
    if text := quoted_text(prompt):
        words = re.findall(r"\w+", unquoted_words(prompt).lower())
        heights = [float(height - 1) for height in lettering.HEIGHTS]
        named = frozenset(COLORS).intersection(words)
        backgrounds = len(backgrounds_for(named, lettering.MIN_CONTRAST))
        found = [find_lettering(picture) for picture in images]
        return Subject(found, not named, backgrounds, heights, True, places_of(len(text)))
    return None


def place(found: Detection, picture: Sequence[int]) -> tuple[int, int]:
    """Row and column of the box's centre among PLACES each."""
    x0, y0, x1, y1 = found["box"]
    height, width = picture
    return min(int(PLACES * (y0 + y1) / 2 / height), PLACES - 1), min(int(PLACES * (x0 + x1) / 2 / width), PLACES - 1)


@cache
def places_of(letters: int) -> int:
    """How many places the drawing program has for a word of so many letters; all where it draws none of that length."""
    if letters > lettering.MAX_LETTERS:
        return PLACES**2
    width, found = lettering.cell_width(letters) * letters, set()
    for height in lettering.HEIGHTS:
        lefts, tops = lettering.origins(letters, height)
        boxes = [[left, top, left + width, top + height] for left in lefts for top in tops]
        found |= {place({"box": box, "score": 1.0}, (PICTURE_SIZE, PICTURE_SIZE)) for box in boxes}
    return len(found)


def size(found: Detection, subject: Subject, side: int) -> int:
    """Which of the subject's extents the box is nearest to, in a picture of so many pixels a side."""
    x0, y0, x1, y1 = found["box"]
    extent = (y1 - y0 if subject.by_height else max(x1 - x0, y1 - y0)) * PICTURE_SIZE / side
    return int(np.abs(extent - np.array(subject.extents)).argmin())


@cache
def drawn_extent(kind: str, diameter: float) -> float:
    """The longer side of the box around a drawn shape: a square's is shorter than its diameter."""
    middle = PICTURE_SIZE / 2
    picture = Scene("grey", (Shape(kind, "black", (middle, middle), diameter),)).draw()
    found = ShapesDetector().detect([picture])[0][kind][0]["box"]
    return max(found[2] - found[0], found[3] - found[1])
