"""What the figures of runs and of comparisons share: colours, style, and how they are saved.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

if "inline" not in os.environ.get("MPLBACKEND", ""):  # that of a notebook, which shows the figures of its cells
    matplotlib.use("Agg")

import numpy as np
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from alignbench.errors import RunError, UserError
from alignbench.files.writing import write_atomically
from alignbench.records.record import Estimate

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=COLORS),
    "text.parse_math": False,  # two dollar signs in a name are not a formula
}


@contextmanager
def left_out(what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Reports a record or plot that cannot be read or drawn in one sentence and continues; a full disk ends the command."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            yield
    except UserError as error:
        tell(f"left out: {what}: {error}")
    except RunError:
        raise
    except Exception as error:  # matplotlib raises various errors for unusual numbers and names
        tell(f"left out: {what}: it cannot be drawn ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def error_bars(estimate: Estimate) -> np.ndarray:
    """How far the interval extends below and above the value, [2, 1]; NaN, which is not drawn, if it is unbounded."""
    if estimate.value is None or estimate.lower is None or estimate.upper is None:
        return np.full((2, 1), np.nan)
    return np.maximum([[estimate.value - estimate.lower], [estimate.upper - estimate.value]], 0.0)


def draw_estimates(
    axis: Any, at: Iterable[float], estimates: Iterable[Estimate], *, horizontal: bool = False, **style: Any
) -> None:
    """Draws the estimates that have a value, with their intervals; nothing, and no entry in the legend, if none has one.

    Args:
        at: where each stands, along the other axis.
        horizontal: whether values lie along the x axis.
        style: of the markers and bars, beside those of all figures.
    """
    places, estimates = list(at), list(estimates)
    if all(e.value is None for e in estimates):
        return
    values = [np.nan if e.value is None else e.value for e in estimates]
    bars = np.hstack([error_bars(e) for e in estimates])
    along = {"x": values, "y": places, "xerr": bars} if horizontal else {"x": places, "y": values, "yerr": bars}
    axis.errorbar(**along, **{"marker": "o", "markersize": 3, "capsize": 3, "linewidth": 1, "linestyle": "", **style})


def write_figure(path: Path, figure: Figure) -> Path:
    """Saves the figure atomically and closes it."""
    write_atomically(path, partial(save, figure))
    return path


def save(figure: Figure, to: Any, **options: Any) -> None:
    """Saves and closes the figure."""
    # Tick labels are made when they are drawn. The font shows boxes for letters that it lacks.
    with plt.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from|constrained_layout not applied")
        figure.savefig(to, **options)
    plt.close(figure)


def legend_name(name: str) -> str:
    """A name as a legend label: matplotlib leaves out labels that begin with `_`."""
    return f" {name}" if name.startswith("_") else name
