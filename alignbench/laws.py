"""Laws in the plane as records and as pictures: `laws.parquet` of runs whose backbone can tell what it draws.

A row is a point of a law: its iteration, x, y, the mass there, and the base model's mode that it belongs to. Iteration
`TARGET` is the target, 0 the base model, the last one the model that was judged. All are for the first evaluation prompt.

A picture is a histogram of the mass, smoothed by a Gaussian of deviation `SMOOTHING`: details below that are not seen.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter

from alignbench.backbone import Law

FILE = "laws.parquet"
TARGET = -1
WIDTH = 6.8
"""Inches: both columns of a two-column paper."""
STYLE: Any = {"font.size": 7, "axes.titlesize": 7, "axes.linewidth": 0.4, "savefig.dpi": 200}
PIXELS = 120
"""Of a picture, in each direction."""
SMOOTHING = 0.12
"""In the plane's units."""
BEYOND = 1e-3
"""A picture's frame leaves out at most this share of the base model's mass."""


def as_rows(law: Law, iteration: int) -> pd.DataFrame:
    """The rows of one law."""
    columns = {"x": law.points[:, 0], "y": law.points[:, 1], "mass": law.mass}
    table = pd.DataFrame({name: values.astype(np.float32) for name, values in columns.items()})
    return table.assign(mode=law.mode.astype(np.int16), iteration=np.int32(iteration))


def read_laws(folder: Path) -> pd.DataFrame | None:
    """A run's `laws.parquet`, or None where its backbone cannot tell its law."""
    return pd.read_parquet(folder / FILE) if (folder / FILE).is_file() else None


def mode_masses(laws: pd.DataFrame) -> pd.DataFrame:
    """Mass of each mode, a row a mode: columns `target`, `base` and `trained`, each summing to 1."""
    wide = laws.pivot_table(index="mode", columns="iteration", values="mass", aggfunc="sum", fill_value=0.0)
    return pd.DataFrame({"target": wide[TARGET], "base": wide[0], "trained": wide[wide.columns.max()]})


def over_training(laws: pd.DataFrame, title: str) -> Figure:
    """A strip: target, base, the model at each iteration that was kept, and the mass of each mode."""
    parts = _by_iteration(laws)
    half = _frame(parts[0])
    brightest = _picture(parts[TARGET], half).max()
    names = {TARGET: "target", 0: "base"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(parts) + 1,
            figsize=(WIDTH, WIDTH / (len(parts) + 1.5) + 0.4),
            layout="constrained",
            width_ratios=[1.0] * len(parts) + [1.5],
        )
        for axis, (iteration, part) in zip(axes, parts.items(), strict=False):
            _show(axis, _picture(part, half), half, brightest)
            axis.set_title(names.get(iteration, f"iteration {iteration}"))
        masses, bars = mode_masses(laws), axes[-1]
        for shift, (name, color) in enumerate(zip(masses.columns, ("#999999", "#56B4E9", "#D55E00"), strict=True)):
            bars.bar(np.arange(len(masses)) + (shift - 1) * 0.27, masses[name], 0.27, label=name, color=color)
        bars.set(title="mass of each mode", ylim=(0, 1.35 * masses.to_numpy().max()))
        bars.tick_params(labelsize=5)
        bars.legend(fontsize=5, frameon=False, ncols=3, loc="upper center", columnspacing=0.8, handlelength=1)
        figure.suptitle(title, fontsize=7)
    return figure


def side_by_side(models: dict[tuple[str, str], pd.DataFrame], title: str) -> Figure:
    """Target and base, and beside them a row a sampler and a column an objective, each as it ended.

    Args:
        models: (objective, sampler) -> `laws.parquet` of one run, all of one prompt.
    """
    objectives, samplers = (list(dict.fromkeys(key[i] for key in models)) for i in range(2))
    parts = _by_iteration(next(iter(models.values())))
    half = _frame(parts[0])
    brightest = _picture(parts[TARGET], half).max()
    rows = max(2, len(samplers))
    with plt.rc_context(STYLE):
        side = min(1.2, (WIDTH - 0.32) / (len(objectives) + 1))
        size = (side * (len(objectives) + 1) + 0.32, side * rows + 0.38)
        figure, axes = plt.subplots(rows, len(objectives) + 1, figsize=size, squeeze=False)
        figure.subplots_adjust(
            left=0.16 / size[0], right=1 - 0.16 / size[0], bottom=0.01, top=1 - 0.36 / size[1], wspace=0.04, hspace=0.04
        )
        for axis in axes.flat:
            axis.axis("off")
        for row, name in enumerate(("target", "base")):
            _show(axes[row, 0], _picture(parts[(TARGET, 0)[row]], half), half, brightest)
            axes[row, 0].set_ylabel(name, fontsize=6, labelpad=2)
        for (objective, sampler), laws in models.items():
            last = laws[laws["iteration"] == laws["iteration"].max()]
            _show(axes[samplers.index(sampler), 1 + objectives.index(objective)], _picture(last, half), half, brightest)
        for axis, objective in zip(axes[0, 1:], objectives, strict=True):
            axis.set_title(objective.replace(": ", ":\n"), fontsize=6, pad=2)
        beside: Any = {"xycoords": "axes fraction", "ha": "left", "va": "center", "rotation": 270, "fontsize": 6}
        for axis, sampler in zip(axes[:, -1], samplers, strict=False):
            axis.annotate(sampler, (1.03, 0.5), **beside)
        figure.suptitle(title, fontsize=7, y=0.99)
    return figure


def _by_iteration(laws: pd.DataFrame) -> dict[int, pd.DataFrame]:
    return {int(i): laws[laws["iteration"] == i] for i in sorted(laws["iteration"].unique())}


def _frame(base: pd.DataFrame) -> float:
    """Half the side of a square around the origin that holds nearly all of the base model."""
    reach = base[["x", "y"]].abs().max(axis=1).sort_values()
    inside = base["mass"].loc[reach.index].cumsum().to_numpy()
    return 1.1 * float(reach.iloc[min(int(np.searchsorted(inside, 1 - BEYOND)), len(reach) - 1)])


def _picture(law: pd.DataFrame, half: float) -> np.ndarray:
    """Density on a grid of PIXELS x PIXELS over +- half, rows from low to high y."""
    edges = np.linspace(-half, half, PIXELS + 1)
    pixel = edges[1] - edges[0]
    mass, _, _ = np.histogram2d(law["y"], law["x"], bins=[edges, edges], weights=law["mass"])
    return np.asarray(gaussian_filter(mass, SMOOTHING / pixel, mode="constant")) / pixel**2


def _show(axis: Axes, picture: np.ndarray, half: float, brightest: float) -> None:
    """Square roots, so that faint modes are seen; brightest wherever it is above the target's highest density."""
    axis.axis("on")
    shown = np.sqrt(np.clip(picture / brightest, 0, 1))
    axis.imshow(shown, origin="lower", extent=(-half, half, -half, half), cmap="magma", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
