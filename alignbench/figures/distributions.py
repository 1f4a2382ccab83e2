"""Figures of the 2-D distributions of runs, from the table of `records.distributions`.

A panel is a histogram of the mass, smoothed by a Gaussian with standard deviation `SMOOTHING`.
"""

import textwrap
from collections.abc import Collection
from typing import Any, NamedTuple

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
    """Draws target and base, and beside them the trained models.

    There is a row for each sampler and a column for each objective; where most objectives have one sampler alone, each sampler
    has rows of its own objectives.

    Args:
        models: for each (objective, sampler) the table of one run; all runs have the same prompt.
        title: title of the figure.
    """
    first = next(iter(models.values()))
    parts, half, brightest = _by_iteration(first), frame_of(first), brightest_of(first)
    rows = _rows(models)
    headings = {o: textwrap.fill(o.replace("_", " "), 12, break_long_words=False) for o, _ in models}
    columns = max(len(row.objectives) for row in rows)
    side = min(1.2, WIDTH / (columns + GAP + 1.3))
    heading = 0.06 + 0.1 * max(name.count("\n") + 1 for name in headings.values())
    # The bottom of each row, in inches from that of the first one downwards.
    depth = np.cumsum([0.0, *(side + (heading if row.headed else 0.0) for row in rows[1:])])
    width, height = side * (columns + GAP + 1.3), 0.2 + heading + side + max(float(depth[-1]), side)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(width, height))

        def panel(column: float, below: float) -> Axes:
            """An empty panel at a column, this many inches below the first row."""
            bottom = height - 0.2 - heading - side - below
            size = 0.96 * side
            return figure.add_axes(((0.18 + side * column) / width, bottom / height, size / width, size / height))

        for iteration, below in zip((TARGET, 0), (0.0, float(depth[1]) if len(rows) > 1 else side), strict=True):
            axis = panel(0, below)
            draw_density(axis, parts[iteration], half, brightest)
            axis.set_ylabel(NAMES[iteration], labelpad=2)
        for row, below in zip(rows, depth, strict=True):
            shown = [o for o in row.objectives if (o, row.sampler) in models]
            for objective in shown:
                axis = panel(1 + GAP + row.objectives.index(objective), float(below))
                distributions = models[objective, row.sampler]
                last = distributions[distributions["iteration"] == distributions["iteration"].max()]
                draw_density(axis, last, half, brightest)
                if objective in row.headed:
                    axis.set_title(headings[objective], fontsize=6, pad=2)
                if objective == shown[0]:
                    axis.set_ylabel(row.sampler.replace("_", " "), fontsize=6, labelpad=2)
        figure.suptitle(title, fontsize=7, y=1 - 0.03 / height)
    return figure


class _Row(NamedTuple):
    """A row of panels: its sampler, the objectives of its places, and those of them that have a heading."""

    sampler: str
    objectives: list[str]
    headed: set[str]


def _rows(models: Collection[tuple[str, str]]) -> list[_Row]:
    objectives, samplers = (list(dict.fromkeys(key[i] for key in models)) for i in range(2))
    if len(models) > len(objectives) * len(samplers) / 2:
        uppermost = {o: next(s for s in samplers if (o, s) in models) for o in objectives}
        blocks = _in_rows(objectives)
        return [_Row(s, block, {o for o in block if uppermost[o] == s}) for block in blocks for s in samplers]
    own = {s: [o for o in objectives if (o, s) in models] for s in samplers}
    return [_Row(s, part, set(part)) for s in samplers for part in _in_rows(own[s])]


def _in_rows(objectives: list[str]) -> list[list[str]]:
    """As few rows as there must be, of about the same length."""
    length = -(-len(objectives) // -(-len(objectives) // COLUMNS))
    return [objectives[i : i + length] for i in range(0, len(objectives), length)]


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
