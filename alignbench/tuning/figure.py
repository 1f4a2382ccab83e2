"""The figure of a tuning: the score of every trial against each setting."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from alignbench.figures.style import COLORS, STYLE
from alignbench.files.escaping import visible
from alignbench.tuning.record import MethodRecord, TuningRecord
from alignbench.tuning.space import UPDATES_KEY

PANEL = (2.5, 1.9)
"""Width and height of the panel of one method and setting, in inches."""


def draw_sensitivity(record: TuningRecord) -> Figure:
    """Draws a row for each method and a panel for each setting, with marks for the best trial, the preset and the median."""
    methods = [method for method in record.methods if method.scored]
    columns = max(len(method.trials[0].settings) for method in methods)
    with plt.rc_context(STYLE):
        size = (PANEL[0] * columns, PANEL[1] * len(methods) + 0.6)
        figure, grid = plt.subplots(len(methods), columns, figsize=size, squeeze=False, sharey=True, constrained_layout=True)
        for method, row in zip(methods, grid, strict=True):
            for axes, setting in zip(row, method.trials[0].settings, strict=False):
                _draw_panel(axes, method, setting)
            row[0].set_ylabel(f"{visible(str(method))}\nscore", fontsize=7)
            for axes in row[len(method.trials[0].settings) :]:
                axes.set_axis_off()
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(f"score of each trial: {visible(record.scored_by)}", fontsize=8)
    return figure


def _draw_panel(axes: Axes, method: MethodRecord, setting: str) -> None:
    points: list[tuple[Any, Any]] = [(trial.settings[setting], trial.score) for trial in method.scored]
    x, y = [point[0] for point in points], [point[1] for point in points]
    axes.plot(x, y, "o", color=COLORS[0], markersize=4, linestyle="none", label="trial")
    preset, best = method.trials[0], method.best
    if preset.score is not None:
        axes.plot(preset.settings[setting], preset.score, "s", color=COLORS[4], markersize=5, linestyle="none", label="preset")
    if best is not None and best.score is not None:
        options: Any = {"markerfacecolor": "none", "markeredgecolor": COLORS[1], "markersize": 9, "linestyle": "none"}
        axes.plot(best.settings[setting], best.score, "o", label="best", **options)
    if method.median is not None:
        axes.axhline(method.median, color="black", linewidth=0.8, linestyle="--", label="median")
    _scale(axes, sorted(set(x)), spread=setting != UPDATES_KEY)
    axes.set_xlabel(visible(setting))


def _scale(axes: Axes, values: list[float], *, spread: bool) -> None:
    """Makes the axis logarithmic, with 0 at its side if it occurs, and puts ticks at the values.

    Args:
        axes: the panel.
        values: values of the setting in the trials, in ascending order.
        spread: whether the values come from a range. If so, there are ticks only at its ends and in its middle.
    """
    above = [value for value in values if value > 0]
    if values[0] > 0:
        axes.set_xscale("log")
    elif values[0] == 0 and above:
        axes.set_xscale("symlog", linthresh=above[0])
    middle = [(above[0] * above[-1]) ** 0.5] if values[0] > 0 and len(above) > 2 else above[:1]
    ticks = list(dict.fromkeys([values[0], *middle, *above[-1:]])) if spread else values
    axes.set_xticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08)
