"""Animations: 2-D distributions on their way to the target, and a rollout tree that grows step by step."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from alignbench.figures.distributions import STYLE, brightest_of, draw_density, frame_of
from alignbench.figures.rollout_tree import RolloutTree, tree
from alignbench.files.writing import write_atomically
from alignbench.records.distributions import TARGET

SIDE, DPI = 1.5, 100
"""Side of a panel in inches, and pixels per inch."""
COLORS = 64
"""Colours of the palette, which keeps the file small."""
DURATION, LAST = 160, 2000
"""Milliseconds that a frame is shown, and the last one before the animation begins again."""
TREE_DPI, TREE_COLORS = 100, 128
"""Pixels per inch of a growing tree, which give an image at a leaf 85 pixels, and the colours of its palette."""
STEP, GROWTH, GROWN = 700, 6000, 4000
"""Milliseconds that a step of a growing tree is shown and that all take, at most, and that the grown tree is."""


def write_animation(models: Mapping[str, pd.DataFrame], file: Path) -> None:
    """Writes a GIF in which each model moves from the base model to its last iteration, beside the target.

    Args:
        models: name -> the table of one run; all have the same prompt. A model without a table at an iteration keeps its last.
        file: where it is written.
    """
    iterations = sorted({int(i) for table in models.values() for i in table["iteration"].unique() if i != TARGET})
    frames = [_image(_frame(models, iteration)) for iteration in iterations]
    durations = [DURATION] * (len(frames) - 1) + [LAST]

    _write(frames, durations, file)


def write_growing_tree(drawn: RolloutTree, file: Path) -> None:
    """Writes a GIF in which a rollout tree grows: a frame for each denoising step, and one with the rewards and p and q."""
    steps = len(drawn.children)
    stages = [*range(steps + 1), None]
    frames = [_image(tree(drawn, until), TREE_COLORS, TREE_DPI) for until in stages]
    _write(frames, [min(STEP, GROWTH // (steps + 1))] * (steps + 1) + [GROWN], file)


def _write(frames: Sequence[Image.Image], durations: Sequence[int], file: Path) -> None:
    """Writes an endless GIF.

    Args:
        durations: how many milliseconds each frame is shown.
    """

    def save(path: Path) -> None:
        options = {"append_images": frames[1:], "duration": list(durations), "loop": 0, "optimize": True}
        frames[0].save(path, format="GIF", save_all=True, **options)

    write_atomically(file, save)


def _frame(models: Mapping[str, pd.DataFrame], iteration: int) -> Figure:
    first = next(iter(models.values()))
    half, brightest = frame_of(first), brightest_of(first)
    panels = {"target": first[first["iteration"] == TARGET]}
    for name, table in models.items():
        before = table.loc[(table["iteration"] != TARGET) & (table["iteration"] <= iteration), "iteration"]
        panels[name] = table[table["iteration"] == before.max()]
    with plt.rc_context(STYLE):
        size = (SIDE * len(panels), SIDE + 0.35)
        figure, axes = plt.subplots(1, len(panels), figsize=size, dpi=DPI, squeeze=False, layout="constrained")
        for axis, (name, part) in zip(axes[0], panels.items(), strict=True):
            draw_density(axis, part, half, brightest)
            axis.set_title(textwrap.shorten(name, 24, placeholder="..."))
        figure.supxlabel("base model" if iteration == 0 else f"iteration {iteration}", fontsize=7)
    return figure


def _image(figure: Figure, colors: int = COLORS, dpi: float = DPI) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(dpi)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    plt.close(figure)
    return Image.fromarray(pixels).quantize(colors)
