"""Images in a comparison: samples of all methods from the same noise, and rollout trees."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from alignbench.comparison.results import BASE, RecordedRun, Results
from alignbench.errors import UserError
from alignbench.files.images import open_image
from alignbench.records.record import Protocol
from alignbench.reports.style import COLUMN, PAPER

IMAGE_PROMPTS = 6
"""Columns of the gallery: the first prompts."""


def image_grid(rows: dict[str, list[Image.Image]], prompts: Sequence[str]) -> Figure:
    """A row of images per method and a column per prompt; all images of a column were drawn from the same noise."""
    with plt.rc_context(PAPER | {"axes.grid": False}):
        left, gap = 0.26, 0.04  # shares of the width, and of an image
        size = COLUMN * (0.995 - left) / (len(prompts) + gap * (len(prompts) - 1))
        titles = [_wrapped(prompt, int(size * 72 / 3.5)) for prompt in prompts]  # points; a letter takes about 3.5
        head = 0.06 + 0.1 * max(title.count("\n") + 1 for title in titles)
        height = size * (len(rows) + gap * (len(rows) - 1)) + head
        figure, axes = plt.subplots(len(rows), len(prompts), figsize=(COLUMN, height), squeeze=False)
        figure.subplots_adjust(left=left, right=0.995, top=1 - head / height, bottom=0, wspace=gap, hspace=gap)
        for line, (name, images) in zip(axes, rows.items(), strict=True):
            for axis, image in zip(line, images, strict=True):
                axis.imshow(np.asarray(image), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            line[0].set_ylabel(name.replace(" x ", "\n"), rotation=0, ha="right", va="center", fontsize=6)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=6, pad=2)
    return figure


def sample_images(run: RecordedRun, name: str, prompts: int = IMAGE_PROMPTS) -> list[Image.Image]:
    """The first image of each of the first prompts, cut from `samples/<name>.png`; empty without a sheet.

    Args:
        name: `base` or `final`.
    """
    sheet = _opened(run.folder / "samples" / f"{name}.png")
    if sheet is None:
        return []
    protocol: Protocol = run.result.protocol
    wide = protocol.images_per_prompt * max(1, 16 // protocol.images_per_prompt)  # as plots.grid lays them out
    size = sheet.width // wide
    if size == 0:  # no sheet of that many images
        return []
    places = [divmod(p * protocol.images_per_prompt, wide) for p in range(min(prompts, protocol.prompts))]
    return [sheet.crop((column * size, row * size, (column + 1) * size, (row + 1) * size)) for row, column in places]


def _opened(file: Path) -> Image.Image | None:
    """The image in a file; None if it cannot be opened, since a report can do without it."""
    try:
        return open_image(file)
    except UserError:
        return None


def gallery(results: Results, setup: str) -> tuple[dict[str, list[Image.Image]], list[str]]:
    """Images of the base model and of the first seed of each cell that kept any, and the prompts."""
    rows: dict[str, list[Image.Image]] = {}
    texts: list[str] = []
    for run in results.of(setup):
        images = sample_images(run, "final") if run.cell not in rows else []
        if images:
            if not rows:
                rows[BASE] = sample_images(run, "base")
                texts = _prompts_of(run, len(images))
            rows[run.cell] = images
    return {name: images for name, images in rows.items() if len(images) == len(texts)}, texts


def tree_drawings(results: Results, setup: str, width: int = 900) -> dict[str, Image.Image]:
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
