"""What drawn images of a trial show: subjects whose attributes can be set one by one.

The attributes of an image are independent of each other: every colour contrasts with every background, and every size fits in
every place. So one of them can collapse while the others keep their distribution, which the drawing program of the embedded
model's training data does not offer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from alignbench.embedded.drawing import lettering, scenes
from alignbench.embedded.drawing.lettering import Lettering
from alignbench.embedded.drawing.palette import COLORS, IMAGE_SIZE, contrast
from alignbench.embedded.drawing.scenes import Scene, Shape

LIGHT = ("grey", "sky", "sand", "mint")
"""The backgrounds of a trial."""
INKS = tuple(c for c in COLORS if min(contrast(c, b) for b in LIGHT) >= lettering.MIN_CONTRAST)
"""The colours of a trial: those that contrast with each of these backgrounds."""
ROWS = 3
"""Number of rows of places, and of columns."""
COUNTS = (1, 2, 3, 4)
LETTERS_OF_A_WORD = 2
"""Words are short, so that a word has places beside each other and not only above each other."""
DIAMETER = 16.0
"""Diameter of each of several shapes."""

Attributes = Mapping[str, int]
"""Attribute -> the number of its value."""


@dataclass(frozen=True)
class Subject:
    """A prompt, and what it leaves open.

    Attributes:
        prompt: the prompt.
        values: attribute -> how many values it has.
        paint: draws an image with these attributes, uint8 [64, 64, 3]; the generator draws what is not an attribute.
    """

    prompt: str
    values: Mapping[str, int]
    paint: Callable[[Attributes, np.random.Generator], np.ndarray]

    def draw_attributes(self, rng: np.random.Generator) -> dict[str, int]:
        """Draws a value of each attribute, all values with the same probability."""
        return {attribute: int(rng.integers(count)) for attribute, count in self.values.items()}


def subjects(count: int, rng: np.random.Generator) -> list[Subject]:
    """Draws subjects: a word, a shape and several shapes in turn."""
    makers = (_word, _shape, _shapes)
    return [makers[i % len(makers)](rng) for i in range(count)]


def _word(rng: np.random.Generator) -> Subject:
    text = "".join(rng.choice(list(lettering.LETTERS), size=LETTERS_OF_A_WORD))
    fonts, width = list(lettering.FONTS), lettering.cell_width(len(text))

    def paint(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
        height = lettering.HEIGHTS[attributes["size"]]
        row, column = divmod(attributes["place"], ROWS)
        left = column * (IMAGE_SIZE - len(text) * width) // (ROWS - 1)
        top = row * (IMAGE_SIZE - height) // (ROWS - 1)
        font, ink, background = fonts[attributes["font"]], INKS[attributes["color"]], LIGHT[attributes["background"]]
        return Lettering(text, ink, background, font, width, height, (left, top)).draw()

    values = {
        "color": len(INKS),
        "place": ROWS**2,
        "size": len(lettering.HEIGHTS),
        "background": len(LIGHT),
        "font": len(fonts),
    }
    return Subject(str(rng.choice(lettering.PLAIN_WORDINGS)).format(text=text), values, paint)


def _shape(rng: np.random.Generator) -> Subject:
    kind = str(rng.choice(scenes.SHAPES))

    def paint(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
        size = scenes.SIZES[1][attributes["size"]]
        row, column = divmod(attributes["place"], ROWS)
        x, y = (size / 2 + place * (IMAGE_SIZE - size) / (ROWS - 1) for place in (column, row))
        shape = Shape(kind, INKS[attributes["color"]], (x, y), float(size))
        return Scene(LIGHT[attributes["background"]], (shape,)).draw()

    values = {"color": len(INKS), "place": ROWS**2, "size": len(scenes.SIZES[1]), "background": len(LIGHT)}
    return Subject(_prompt(kind, rng), values, paint)


def _shapes(rng: np.random.Generator) -> Subject:
    kind = str(rng.choice(scenes.SHAPES))

    def paint(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
        ink, step = INKS[attributes["color"]], (IMAGE_SIZE - DIAMETER) / (ROWS - 1)
        places = rng.choice(ROWS**2, size=COUNTS[attributes["count"]], replace=False)
        centers = [(DIAMETER / 2 + step * (p % ROWS), DIAMETER / 2 + step * (p // ROWS)) for p in map(int, places)]
        return Scene(LIGHT[attributes["background"]], tuple(Shape(kind, ink, center, DIAMETER) for center in centers)).draw()

    return Subject(_prompt(kind, rng), {"color": len(INKS), "background": len(LIGHT), "count": len(COUNTS)}, paint)


def _prompt(kind: str, rng: np.random.Generator) -> str:
    return str(rng.choice(scenes.PREFIXES)) + scenes.with_article(kind)
