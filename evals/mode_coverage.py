"""mode_coverage: how evenly the images of a drawn prompt vary in what it leaves open: colour, place, size, background.

These aspects are read from the image, for the first shape of a scene or for a word. Its colour is left open if the prompt names
none. For each aspect that the prompt leaves open there are

    modes_ASPECT      the number of different values
    coverage_ASPECT   the entropy of the values / log min(number of images, number of possible values)

where the possible values are those of the drawing program. A coverage of 1 means that all values occur equally often, 0 that
the value is always the same. `mode_coverage` is the mean of the coverages.

Distances of latents need not show this: latents can become more diverse while all images get the same background.
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
from alignbench.embedded.drawing.palette import BACKGROUNDS, COLORS, IMAGE_SIZE, backgrounds_for, nearest
from alignbench.embedded.drawing.scenes import SIZES, Scene, Shape
from evals.detectors.base import Detection
from evals.detectors.grammar import SCENES
from evals.detectors.lettering import find_lettering
from evals.detectors.pixels import background_of
from evals.detectors.shapes import ShapesDetector
from evals.ocr import quoted_text, unquoted_words

ASPECTS = ("color", "place", "size", "background")
PLACES = 3
"""How many rows of places there are, and how many columns."""


@dataclass(frozen=True)
class Subject:
    """The shape or word that the images of one prompt show, and in how many ways it could vary.

    Attributes:
        detections: what was found in each image; None where nothing was found.
        any_color: whether the prompt leaves its colour open.
        backgrounds: how many backgrounds the drawing program could have chosen.
        extents: the sizes that the drawing program could have chosen, in pixels of a drawn image, ascending.
        by_height: whether these sizes are heights; if not, they are longer sides.
        places: at how many places the drawing program could have put it.
    """

    detections: list[Detection | None]
    any_color: bool
    backgrounds: int
    extents: list[float]
    by_height: bool
    places: int


def coverage(values: Sequence[Hashable], possible: int) -> float:
    """Computes the entropy of values divided by its maximum, log min(number of values, number of possible values).

    Args:
        values: the value of each image.
        possible: the number of possible values.

    Returns:
        0 to 1, or NaN if there are fewer than two values.

    Raises:
        UserError: fewer than two values are possible.
    """
    if possible < 2:
        raise UserError(f"coverage needs at least two possible values, got {possible}")
    if len(values) < 2:
        return float("nan")
    shares = [count / len(values) for count in Counter(values).values()]
    # A model may draw values that the drawing program does not have.
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
    """Evenness of colour, place, size and background over the images of a prompt."""

    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        """Measures the images of one prompt.

        A metric is NaN for an aspect that the prompt determines, for prompts of other tasks, and if fewer than two images show
        the shape or word.
        """
        return self.measure_read(self.read_images(images, latents, prompt), range(len(images)), prompt)

    def read_images(self, images: np.ndarray, latents: Any, prompt: str) -> Read:
        subject = subject_of(images, prompt)
        values: dict[str, list[Hashable | None]] = {aspect: [None] * len(images) for aspect in ASPECTS}
        values["background"] = [nearest(background_of(image), BACKGROUNDS) for image in images]
        possible = {"color": len(COLORS), "background": len(BACKGROUNDS)}
        if subject is not None:
            possible |= {"place": subject.places, "size": len(subject.extents), "background": subject.backgrounds}
            for i, detection in enumerate(subject.detections):
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
        """Tells the direction of a metric: higher for coverages, none for counts, which would only repeat their alarms."""
        return None if metric.startswith("modes_") else True


def subject_of(images: np.ndarray, prompt: str) -> Subject | None:
    """Finds the first shape of a drawn scene's prompt, or the word of a prompt that quotes a text.

    Args:
        images: uint8 [N, H, W, 3].
        prompt: their prompt.

    Returns:
        None for prompts that are worded in another way.
    """
    if (metadata := SCENES.parse(prompt)) is not None:
        clauses = metadata["include"]
        kind = clauses[0]["class"]
        named = frozenset(c["color"] for c in clauses if "color" in c)
        extents = [drawn_extent(kind, d) for d in sorted(SIZES[sum(c["count"] for c in clauses)])]
        shapes = [next(iter(d.get(kind, ())), None) for d in ShapesDetector().detect(list(images))]
        backgrounds = len(backgrounds_for(named, scenes.MIN_CONTRAST))
        return Subject(shapes, not colors_of_subject(prompt), backgrounds, extents, False, PLACES**2)
    if text := quoted_text(prompt):
        heights = [float(height - 1) for height in lettering.HEIGHTS]
        named = colors_of_subject(prompt)
        backgrounds = len(backgrounds_for(named, lettering.MIN_CONTRAST))
        return Subject([find_lettering(image) for image in images], not named, backgrounds, heights, True, places_of(len(text)))
    return None


def colors_of_subject(prompt: str) -> frozenset[str]:
    """Returns the colours that a prompt names for its first shape or its word; empty if it names none, or has neither."""
    if (metadata := SCENES.parse(prompt)) is not None:
        color = metadata["include"][0].get("color")
        return frozenset() if color is None else frozenset({str(color)})
    if not quoted_text(prompt):
        return frozenset()
    return frozenset(COLORS).intersection(re.findall(r"\w+", unquoted_words(prompt).lower()))


def place(detection: Detection, image_size: Sequence[int]) -> tuple[int, int]:
    """Computes the place of a box's centre in a grid of `PLACES` rows and columns.

    Args:
        detection: what was found.
        image_size: height and width of the image, in pixels.

    Returns:
        Row and column, 0 to PLACES - 1.
    """
    x0, y0, x1, y1 = detection["box"]
    height, width = image_size
    return min(int(PLACES * (y0 + y1) / 2 / height), PLACES - 1), min(int(PLACES * (x0 + x1) / 2 / width), PLACES - 1)


@cache
def places_of(letters: int) -> int:
    """Counts the places that the drawing program has for a word of this length; all if it draws no such word."""
    if letters > lettering.MAX_LETTERS:
        return PLACES**2
    width, places = lettering.cell_width(letters) * letters, set()
    for height in lettering.HEIGHTS:
        lefts, tops = lettering.origins(letters, height)
        boxes = [[left, top, left + width, top + height] for left in lefts for top in tops]
        places |= {place({"box": box, "score": 1.0}, (IMAGE_SIZE, IMAGE_SIZE)) for box in boxes}
    return len(places)


def size(detection: Detection, subject: Subject, side: int) -> int:
    """Tells which of the possible sizes a box is nearest to: an index of `subject.extents`.

    Args:
        detection: what was found.
        subject: the possible sizes.
        side: the side of the square image, in pixels.
    """
    x0, y0, x1, y1 = detection["box"]
    extent = (y1 - y0 if subject.by_height else max(x1 - x0, y1 - y0)) * IMAGE_SIZE / side
    return int(np.abs(extent - np.array(subject.extents)).argmin())


@cache
def drawn_extent(kind: str, diameter: float) -> float:
    """Measures the longer side of the box around a drawn shape, in pixels. That of a square is shorter than its diameter."""
    middle = IMAGE_SIZE / 2
    image = Scene("grey", (Shape(kind, "black", (middle, middle), diameter),)).draw()
    x0, y0, x1, y1 = ShapesDetector().detect([image])[0][kind][0]["box"]
    return max(x1 - x0, y1 - y0)
