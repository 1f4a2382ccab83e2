"""Short words on a plain background: prompts and images of the OCR task."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from alignbench.embedded.drawing.palette import BACKGROUNDS, COLORS, GRID, IMAGE_SIZE, backgrounds_for, colors_for

FONTS: dict[str, str] = {
    "sans": "DejaVuSans-Bold.ttf",
    "serif": "DejaVuSerif-Bold.ttf",
    "mono": "DejaVuSansMono-Bold.ttf",
}
"""Fonts that come with matplotlib."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_LETTERS = 5
HEIGHTS = (2 * GRID, 3 * GRID)
"""Heights of a letter's cell in pixels, including one empty row."""
MIN_CONTRAST = 45.0

PLAIN_WORDINGS = (
    'the word "{text}"',
    '"{text}"',
    'a sign that says "{text}"',
    'a sign that reads "{text}"',
    'the text "{text}" on a sign',
    'a poster with the word "{text}"',
)
COLORED_WORDINGS = (
    'the word "{text}" in {color}',
    '"{text}" in {color} letters',
    'a sign that says "{text}" in {color}',
    '{color} letters that read "{text}"',
)


@dataclass(frozen=True)
class Lettering:
    """A word, drawn letter by letter in cells of equal size in pixels, from `origin` (left, top)."""

    text: str
    color: str
    background: str
    font: str
    cell_width: int
    height: int
    origin: tuple[int, int]

    def draw(self) -> np.ndarray:
        """Draws the image, uint8 [64, 64, 3]."""
        canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
        canvas[:] = BACKGROUNDS[self.background]
        ink = np.array(COLORS[self.color], dtype=np.float32)
        left, top = self.origin
        for letter in self.text:
            mask = _glyph(letter, self.font, self.cell_width, self.height)
            cell = canvas[top : top + self.height, left : left + self.cell_width]
            cell += mask[..., None] * (ink - cell)
            left += self.cell_width
        return np.round(canvas).astype(np.uint8)


def sample_lettering(rng: np.random.Generator, text: str, color: str | None = None) -> Lettering:
    """Draws the attributes of an image of `text` at random, except a given colour.

    Raises:
        ValueError: the text is not 1 to 5 letters A-Z.
    """
    if not (1 <= len(text) <= MAX_LETTERS and set(text) <= set(LETTERS)):
        raise ValueError(f"lettering needs 1 to {MAX_LETTERS} letters A-Z, got {text!r}")
    if color is None:
        background = str(rng.choice(list(BACKGROUNDS)))
        color = str(rng.choice(colors_for(background, MIN_CONTRAST)))
    else:
        background = str(rng.choice(backgrounds_for(frozenset([color]), MIN_CONTRAST)))
    height = int(rng.choice(HEIGHTS))
    lefts, tops = origins(len(text), height)
    left, top = lefts[rng.integers(len(lefts))], tops[rng.integers(len(tops))]
    return Lettering(text, color, background, str(rng.choice(list(FONTS))), cell_width(len(text)), height, (left, top))


def cell_width(letters: int) -> int:
    """Width in pixels of a letter's cell in a word with this number of letters."""
    return 2 * GRID if letters * 2 * GRID <= IMAGE_SIZE else IMAGE_SIZE // MAX_LETTERS


def origins(letters: int, height: int) -> tuple[list[int], list[int]]:
    """The possible left edges and top edges of a word with this number of letters and this height."""
    free = IMAGE_SIZE - cell_width(letters) * letters
    lefts = list(range(0, free + 1, GRID)) if free >= GRID else [free // 2]
    return lefts, list(range(0, IMAGE_SIZE - height + 1, GRID))


def sample_prompt(rng: np.random.Generator, text: str) -> tuple[str, str | None]:
    """Draws a prompt for an image of `text`, and the colour that it names; half of the prompts name none (None)."""
    if rng.random() < 0.5:
        return str(rng.choice(PLAIN_WORDINGS)).format(text=text), None
    color = str(rng.choice(list(COLORS)))
    return str(rng.choice(COLORED_WORDINGS)).format(text=text, color=color), color


def sample_text(rng: np.random.Generator, exclude: frozenset[str] = frozenset()) -> str:
    """Draws 2 to 5 random letters that are not in `exclude`; half of the texts have vowels in every second place."""
    while True:
        length = int(rng.integers(2, MAX_LETTERS + 1))
        text = "".join(rng.choice(list(LETTERS), size=length))
        if rng.random() < 0.5:
            start = int(rng.integers(2))
            text = "".join(str(rng.choice(list("AEIOU"))) if (i + start) % 2 else c for i, c in enumerate(text))
        if text not in exclude:
            return text


@cache
def _glyph(letter: str, font: str, cell_width: int, height: int) -> np.ndarray:
    """Coverage (0 to 1) of a letter in its cell, float32 [height, cell_width], with one empty pixel on either side."""
    import matplotlib

    scale = 4
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONTS[font]
    face = ImageFont.truetype(str(path), size=scale * height)
    left, top, right, bottom = face.getbbox(letter)
    tall = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(tall).text((-left, -top), letter, font=face, fill=255)
    # Every letter has the full height. Wide letters are narrowed to their cell; narrow ones keep their shape.
    natural_width = round(tall.width * (height - 1) / tall.height)
    width = max(2, min(cell_width - 2, natural_width)) if letter != "I" else min(cell_width - 2, natural_width)
    small = tall.resize((width, height - 1), Image.Resampling.LANCZOS)
    mask = np.zeros((height, cell_width), dtype=np.float32)
    x = (cell_width - width) // 2
    mask[: height - 1, x : x + width] = np.asarray(small, dtype=np.float32) / 255.0
    return mask
