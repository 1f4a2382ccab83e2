"""Images in a comparison: samples of all methods from the same noise, and rollout trees."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from alignbench.comparison.results import BASE, RecordedRun, Results
from alignbench.errors import UserError
from alignbench.figures.metric_names import axis_name
from alignbench.files.images import open_image
from alignbench.records.record import Protocol
from alignbench.reports.style import PAPER

PROMPTS, IMAGES = 2, 4
"""The first prompts of the gallery, and the images of each."""
EXAMPLES = 8
"""Largest number of images in an example set."""
BETWEEN = 0.3
"""Space between the images of two prompts, in images."""
WIDTH = 6.8
"""Inches: both columns of a two-column paper."""
TREE_WIDTH = 1440
"""Largest width of the drawing of a tree on a page, in pixels."""
SIDE = 192
"""Largest side of an image on a page, in pixels; larger ones are reduced."""

CAPTION = 0.11
"""Inches: the height of the line below an image, which has its score."""
PIXEL = 1 / PAPER["savefig.dpi"]
"""Inches: the side of a pixel of a PNG."""

Blocks = list[list[Image.Image]]
"""The images of each prompt."""


class Gallery(NamedTuple):
    """Images of several models. Those in the same place of each model were drawn from the same prompt and the same noise.

    Attributes:
        images: model -> its images of each prompt; the base model comes first.
        scores: model -> the score of each of these images; NaN where it could not be scored.
        prompts: the text of each prompt.
        metric: what the scores are of.
    """

    images: dict[str, Blocks]
    scores: dict[str, list[list[float]]]
    prompts: list[str]
    metric: str


def image_grid(shown: Gallery) -> Figure:
    """A row of images per method and a block of columns per prompt; below each image is its score.

    Small images are enlarged by a whole number, so that each of their pixels is a square in a PNG.
    """
    with plt.rc_context(PAPER | {"axes.grid": False}):
        left, gap = 0.15, 0.04  # shares of the width, and of an image
        blocks = next(iter(shown.images.values()))
        wide = [len(block) for block in blocks]
        columns = sum(wide) + BETWEEN * (len(wide) - 1)  # in images, with the space between prompts
        size = WIDTH * (0.995 - left) / (columns + gap * (columns - 1))
        # A sheet has small images at twice their size.
        own = max(image.width for block in blocks for image in block) / 2 * PIXEL
        size = size // own * own if size >= own else size
        titles = [_wrapped(prompt, int(n * size * 72 / 3.5)) for prompt, n in zip(shown.prompts, wide, strict=True)]
        head = 0.2 + 0.1 * max(title.count("\n") + 1 for title in titles)  # a letter takes about 3.5 points
        line = size * (1 + gap) + CAPTION
        height = _whole(line * len(shown.images) + head)
        figure = plt.figure(figsize=(WIDTH, height))
        for row, (name, of_model) in enumerate(shown.images.items()):
            at, top = 0.0, _whole(head + line * row)
            for block, scores, title in zip(of_model, shown.scores[name], titles, strict=True):
                for number, (image, score) in enumerate(zip(block, scores, strict=True)):
                    x = _whole(left * WIDTH + size * (1 + gap) * at)
                    axis = figure.add_axes((x / WIDTH, 1 - (top + size) / height, size / WIDTH, size / height))
                    axis.imshow(np.asarray(image), interpolation="nearest", aspect="auto")
                    axis.set_axis_off()
                    under = (x + size / 2) / WIDTH, 1 - (top + size + 0.02) / height
                    figure.text(*under, score_text(score), ha="center", va="top", fontsize=5)
                    if row == 0 and number == 0:
                        axis.set_title(title, fontsize=6, pad=2, loc="left")
                    at += 1
                at += BETWEEN
            middle, text = 1 - (top + size / 2) / height, name.replace(" x ", "\n")
            figure.text(left - 0.01, middle, text, ha="right", va="center", fontsize=6)
        note = f"same prompt and noise in each column; below each image: {axis_name(shown.metric)}"
        figure.text(left, 1 - 0.03 / height, note, ha="left", va="top", fontsize=5, color="#555555")
    return figure


def score_text(score: float) -> str:
    """The score of an image as the line below it."""
    return "-" if np.isnan(score) else f"{score:.2f}"


def _whole(inches: float) -> float:
    """A length in whole pixels of a PNG."""
    return round(inches / PIXEL) * PIXEL


def sample_images(run: RecordedRun, name: str, prompts: Sequence[int] = range(PROMPTS), images: int = IMAGES) -> Blocks:
    """The first images of each of some prompts, cut from `samples/<name>.png`; empty without a sheet.

    Args:
        name: `base` or `final`.
        prompts: their numbers; those that the run does not have are left out.
    """
    sheet = _opened(run.folder / "samples" / f"{name}.png")
    if sheet is None:
        return []
    protocol: Protocol = run.result.protocol
    each = protocol.images_per_prompt
    wide = each * max(1, 16 // each)  # as sheets.grid lays them out
    size = sheet.width // wide
    if size == 0:  # no sheet of that many images
        return []

    def cut(number: int) -> Image.Image:
        row, column = divmod(number, wide)
        image = sheet.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
        image.thumbnail((SIDE, SIDE))
        return image

    shown = [prompt for prompt in prompts if prompt < protocol.prompts]
    return [[cut(prompt * each + number) for number in range(min(images, each))] for prompt in shown]


def _opened(file: Path) -> Image.Image | None:
    """The image in a file; None if it cannot be opened, since a report can do without it."""
    try:
        return open_image(file)
    except UserError:
        return None


def gallery(results: Results, setup: str) -> Gallery:
    """Images of the base model and of the first seed of each cell that kept any, with their rewards; empty without images."""
    metric = results.reward(setup)
    found = Gallery({}, {}, [], metric)

    def add(name: str, run: RecordedRun, phase: str, images: Blocks) -> None:
        found.images[name] = images
        found.scores[name] = _scores_of(run, phase, metric, [len(block) for block in images])

    for run in results.of(setup):
        images = sample_images(run, "final") if run.cell not in found.images else []
        if images:
            if not found.images:
                add(BASE, run, "base", sample_images(run, "base"))
                found.prompts.extend(_prompts_of(run, len(images)))
            add(run.cell, run, "final", images)
    for name in [name for name, images in found.images.items() if len(images) != len(found.prompts)]:
        del found.images[name], found.scores[name]
    return found


def _scores_of(run: RecordedRun, phase: str, metric: str, counts: Sequence[int]) -> list[list[float]]:
    """The scores of the first images of each of the first prompts, NaN where there is none.

    Args:
        phase: `base` or `final`.
        counts: how many images of each prompt.
    """
    known: dict[tuple[int, int], float] = {}
    if run.evals is not None:
        rows = run.evals[(run.evals["phase"] == phase) & (run.evals["metric"] == metric)]
        known = dict(zip(zip(rows["prompt_index"], rows["image"], strict=True), rows["value"], strict=True))
    return [[float(known.get((prompt, i), np.nan)) for i in range(count)] for prompt, count in enumerate(counts)]


class ExampleSets(NamedTuple):
    """Images of one prompt by the base model and by the trained models that are the most and the least diverse.

    Attributes:
        prompt: its text.
        most, least: the names of the two cells.
        images: cell -> its images of the prompt; all that are drawn from the same noise have the same place.
    """

    prompt: str
    most: str
    least: str
    images: dict[str, list[Image.Image]]


def example_sets(results: Results, setup: str, metric: str, *, higher_is_better: bool = True) -> ExampleSets | None:
    """The prompt at which the most and the least diverse cell differ most; None unless two cells have values and images.

    Args:
        metric: a metric of diversity that is measured for each prompt.
        higher_is_better: whether a larger value is more diverse.
    """
    runs: dict[str, RecordedRun] = {}
    for run in results.of(setup):
        if run.cell not in runs and not _values_of_prompts(run, metric).empty and sample_images(run, "final", [0]):
            runs[run.cell] = run
    if len(runs) < 2:
        return None
    sign = 1.0 if higher_is_better else -1.0
    values = {cell: sign * _values_of_prompts(run, metric) for cell, run in runs.items()}
    means = pd.Series({cell: of_prompts.mean() for cell, of_prompts in values.items()})
    most, least = str(means.idxmax()), str(means.idxmin())
    gaps = (values[most] - values[least]).dropna()
    if most == least or gaps.empty:
        return None
    prompt = int(gaps.index[int(gaps.argmax())])
    shown = {BASE: sample_images(runs[most], "base", [prompt], EXAMPLES)}
    shown |= {cell: sample_images(runs[cell], "final", [prompt], EXAMPLES) for cell in (most, least)}
    images = {cell: blocks[0] for cell, blocks in shown.items() if blocks}
    return ExampleSets(_prompts_of(runs[most], prompt + 1)[prompt], most, least, images) if len(images) == len(shown) else None


def _values_of_prompts(run: RecordedRun, metric: str) -> pd.Series:
    """The trained model's values of a metric by the number of the prompt."""
    if run.evals is None:
        return pd.Series(dtype=np.float64)
    rows = run.evals[(run.evals["phase"] == "final") & (run.evals["metric"] == metric)]
    return rows.groupby("prompt_index")["value"].mean().dropna()


def tree_drawings(results: Results, setup: str, width: int = TREE_WIDTH) -> dict[str, Image.Image]:
    """The drawing of a rollout tree in the first run of each cell that has one.

    Args:
        width: largest width in pixels.
    """
    drawings: dict[str, Image.Image] = {}
    for run in results.of(setup):
        image = _opened(run.folder / "plots" / "tree.png") if run.cell not in drawings else None
        if image is not None:
            image.thumbnail((width, image.height))
            drawings[run.cell] = image.quantize(64)  # a quarter of the bytes; the drawing has few colours
    return drawings


def _prompts_of(run: RecordedRun, count: int) -> list[str]:
    if run.evals is None:
        return [f"prompt {i}" for i in range(count)]
    return [str(p) for p in run.evals.drop_duplicates("prompt_index").sort_values("prompt_index")["prompt"][:count]]


def _wrapped(text: str, width: int, lines: int = 5) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))
