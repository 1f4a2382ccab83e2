"""Figures of the 2-D distributions of runs, from the table of `records.distributions`.

A panel is a histogram of the mass, smoothed by a Gaussian with standard deviation `SMOOTHING`.
"""

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter

from alignbench.records.distributions import TARGET, mode_masses

NAMES = {TARGET: "target", 0: "base"}
IN_A_ROW = 6
"""Largest number of panels in a row."""
COLUMNS, GAP = 12, 0.45
"""Largest number of objectives side by side, and the gap between them and the target, in panels."""
WIDTH = 6.8
"""Width of the figures in inches: both columns of a two-column paper."""
STYLE: Any = {"text.parse_math": False, "font.size": 7, "axes.titlesize": 7, "axes.linewidth": 0.4, "savefig.dpi": 200}
PIXELS = 120
"""Resolution of a panel in each direction."""
SMOOTHING = 0.12
"""Standard deviation of the smoothing, in units of the coordinates."""
BEYOND = 1e-3
"""Largest share of the base model's mass that may lie outside a panel."""


def over_training(distributions: pd.DataFrame, title: str) -> Figure:
    """Draws the target, the base model and the model at each recorded iteration, and below them the mass of each mode."""
    parts = _by_iteration(distributions)
    half, brightest = frame_of(distributions), brightest_of(distributions)
    rows = -(-len(parts) // IN_A_ROW)
    columns = -(-len(parts) // rows)  # rows of about the same length
    side = WIDTH / max(columns, 4)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(side * columns, (side + 0.15) * rows + 1.1), layout="constrained")
        grid = figure.add_gridspec(rows + 1, columns, height_ratios=[side] * rows + [0.8])
        for i, (iteration, part) in enumerate(parts.items()):
            axis = figure.add_subplot(grid[i // columns, i % columns])
            draw_density(axis, part, half, brightest)
            axis.set_title(NAMES.get(iteration, f"iteration {iteration}"))
        masses, bars = mode_masses(distributions), figure.add_subplot(grid[rows, :])
        for shift, (name, color) in enumerate(zip(masses.columns, ("#999999", "#56B4E9", "#D55E00"), strict=True)):
            bars.bar(np.arange(len(masses)) + (shift - 1) * 0.27, masses[name], 0.27, label=name, color=color)
        bars.set(xlabel="mode", ylabel="mass", xticks=np.arange(len(masses)))
        bars.tick_params(labelsize=5)
        bars.legend(fontsize=5, frameon=False)
        figure.suptitle(title, fontsize=7)
    return figure


def side_by_side(models: dict[tuple[str, str], pd.DataFrame], title: str) -> Figure:
    """Draws target and base, and beside them the trained models, with one row per sampler and one column per objective.

    Args:
        models: for each (objective, sampler) the table of one run; all runs have the same prompt.
        title: title of the figure.
    """
    objectives, samplers = (list(dict.fromkeys(key[i] for key in models)) for i in range(2))
    first = next(iter(models.values()))
    parts, half, brightest = _by_iteration(first), frame_of(first), brightest_of(first)
    leftmost = {sampler: next(o for o in objectives if (o, sampler) in models) for sampler in samplers}
    blocks = -(-len(objectives) // COLUMNS)
    columns, rows = -(-len(objectives) // blocks), max(2, len(samplers))
    headings = [textwrap.fill(name.replace("_", " "), 12, break_long_words=False) for name in objectives]
    with plt.rc_context(STYLE):
        side = min(1.2, WIDTH / (columns + GAP + 1.3))
        heading = 0.06 + 0.1 * max(name.count("\n") + 1 for name in headings)
        width, height = side * (columns + GAP + 1.3), 0.2 + blocks * (side * rows + heading)
        figure = plt.figure(figsize=(width, height))
        ratios = [1, GAP, *[1] * columns]
        grids = []
        for block in range(blocks):
            top = height - 0.2 - heading - block * (side * rows + heading)
            inside = {"left": 0.18 / width, "right": 0.995, "top": top / height, "bottom": (top - side * rows) / height}
            grids.append(figure.add_gridspec(rows, columns + 2, width_ratios=ratios, wspace=0.04, hspace=0.04, **inside))
        for row, iteration in enumerate((TARGET, 0)):
            axis = figure.add_subplot(grids[0][row, 0])
            draw_density(axis, parts[iteration], half, brightest)
            axis.set_ylabel(NAMES[iteration], labelpad=2)
        for (objective, sampler), distributions in models.items():
            row, (block, column) = samplers.index(sampler), divmod(objectives.index(objective), columns)
            axis = figure.add_subplot(grids[block][row, 2 + column])
            last = distributions[distributions["iteration"] == distributions["iteration"].max()]
            draw_density(axis, last, half, brightest)
            if row == 0:
                axis.set_title(headings[objectives.index(objective)], fontsize=6, pad=2)
            if column == 0 or objective == leftmost[sampler]:
                axis.set_ylabel(sampler.replace("_", " "), fontsize=6, labelpad=2)
        figure.suptitle(title, fontsize=7, y=1 - 0.03 / height)
    return figure


def _by_iteration(distributions: pd.DataFrame) -> dict[int, pd.DataFrame]:
    return {int(i): distributions[distributions["iteration"] == i] for i in sorted(distributions["iteration"].unique())}


def frame_of(distributions: pd.DataFrame) -> float:
    """Half the side of a square around the origin that contains nearly all mass of the base model."""
    base = distributions[distributions["iteration"] == 0]
    reach = base[["x", "y"]].abs().max(axis=1).sort_values()
    inside = base["mass"].loc[reach.index].cumsum().to_numpy()
    return 1.1 * float(reach.iloc[min(int(np.searchsorted(inside, 1 - BEYOND)), len(reach) - 1)]) or 1.0


def brightest_of(distributions: pd.DataFrame) -> float:
    """The target's highest density within that square."""
    return float(_density(distributions[distributions["iteration"] == TARGET], frame_of(distributions)).max())


def draw_density(axis: Axes, distribution: pd.DataFrame, half: float, brightest: float) -> None:
    """Draws the square root of a density, which makes faint modes visible.

    Args:
        distribution: points with their mass.
        half: half the side of the square that is shown.
        brightest: the density that has the brightest colour.
    """
    axis.axis("on")
    brightness = np.sqrt(np.clip(_density(distribution, half) / (brightest or 1.0), 0, 1))
    axis.imshow(brightness, origin="lower", extent=(-half, half, -half, half), cmap="magma", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])


def _density(distribution: pd.DataFrame, half: float) -> np.ndarray:
    """The density on a grid of PIXELS x PIXELS over +- half; rows go from low to high y."""
    edges = np.linspace(-half, half, PIXELS + 1)
    pixel = edges[1] - edges[0]
    mass, _, _ = np.histogram2d(distribution["y"], distribution["x"], bins=[edges, edges], weights=distribution["mass"])
    return np.asarray(gaussian_filter(mass, SMOOTHING / pixel, mode="constant")) / pixel**2
