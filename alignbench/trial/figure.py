"""The figure of a trial: what each metric sees of each planted loss, what it takes for one, and its index."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from alignbench.figures.plots import COLORS, STYLE
from alignbench.files.escaping import visible
from alignbench.trial.judging import TYPICAL_IMAGES, TYPICAL_PROMPTS
from alignbench.trial.record import Seen, Trial

ACROSS = 4
MOST = 7
"""So many metrics are drawn in the panels, the best ones and the last; the index has all of them."""
MARKS = "osD^vPX"


def draw(trial: Trial) -> Figure:
    """Draws a panel of power against degree for each planted condition, one of false alarms, and one of Youden's index."""
    typical = [s for s in trial.seen if s.images == TYPICAL_IMAGES]
    planted = list(dict.fromkeys((s.source, s.condition) for s in typical if s.kind == "planted"))
    shown = [v.metric for v in trial.verdicts if v.youden.value is not None]
    shown = shown if len(shown) <= MOST else [*shown[: MOST - 1], shown[-1]]
    down = ceil(len(planted) / ACROSS)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 2.1 * down + 3.2), layout="constrained")
        grid = figure.add_gridspec(down + 1, ACROSS, height_ratios=[*[1] * down, 1.5])
        for i, (source, condition) in enumerate(planted):
            axis = figure.add_subplot(grid[i // ACROSS, i % ACROSS])
            _draw_power(axis, [s for s in typical if (s.source, s.condition) == (source, condition)], shown)
            axis.set_title(visible(f"{condition} ({source} images)"))
            axis.set(xlabel="degree" if i >= len(planted) - ACROSS else "", ylabel="power" if i % ACROSS == 0 else "")
        if planted:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(shown))
        _draw_alarms(figure.add_subplot(grid[down, :2]), typical, shown)
        _draw_index(figure.add_subplot(grid[down, 2:]), trial)
        figure.suptitle(
            f"a one-sided t test at 2.5 %, {TYPICAL_IMAGES} images of {TYPICAL_PROMPTS} prompts; bars are 95 % intervals",
            fontsize=9,
        )
    return figure


def _draw_power(axis: Any, seen: Sequence[Seen], shown: Sequence[str]) -> None:
    for i, metric in enumerate(shown):
        of_metric = sorted((s for s in seen if s.metric == metric), key=lambda s: s.degree)
        if of_metric:
            rates = np.array([_rate(s) for s in of_metric])
            place = [s.degree + 0.008 * (i - len(shown) / 2) for s in of_metric]
            axis.errorbar(
                place,
                rates[:, 0],
                yerr=np.abs(rates[:, 1:] - rates[:, :1]).T,
                color=COLORS[i],
                marker=MARKS[i],
                markersize=3,
                linewidth=1,
                elinewidth=0.6,
                label=visible(metric),
            )
    axis.set(ylim=(-0.05, 1.05), xlim=(0.15, 1.1), xticks=[0.25, 0.5, 0.75, 1])


def _draw_alarms(axis: Any, seen: Sequence[Seen], shown: Sequence[str]) -> None:
    harmless = list(dict.fromkeys((s.source, s.condition) for s in seen if s.kind != "planted"))
    for i, metric in enumerate(shown):
        of_metric = {(s.source, s.condition): s for s in seen if s.metric == metric and s.kind != "planted"}
        places = [k for k, place in enumerate(harmless) if place in of_metric]
        rates = np.array([_rate(of_metric[harmless[k]]) for k in places]).reshape(-1, 3)
        place = [k + 0.09 * (i - (len(shown) - 1) / 2) for k in places]
        error = np.abs(rates[:, 1:] - rates[:, :1]).T
        axis.errorbar(
            place, rates[:, 0], yerr=error, color=COLORS[i], marker=MARKS[i], markersize=3, linestyle="", elinewidth=0.6
        )
    axis.axhline(0.025, color="black", linewidth=0.8, linestyle=":")
    labels = [visible(f"{condition}\n({source})") for source, condition in harmless]
    axis.set(xticks=range(len(harmless)), ylim=(-0.05, 1.05), ylabel="reported falls")
    axis.set_xticks(range(len(harmless)), labels, rotation=40, ha="right")
    axis.set_title("changes that are no loss of diversity (dots: 2.5 %)")


def _draw_index(axis: Any, trial: Trial) -> None:
    known = [v for v in trial.verdicts if v.youden.value is not None][::-1]
    values = [v.youden.value for v in known]
    bounds = np.array([[_number(v.youden.lower, v.youden.value), _number(v.youden.upper, v.youden.value)] for v in known])
    if known:
        error = np.abs(bounds.reshape(-1, 2) - np.array(values, dtype=float)[:, None]).T
        axis.errorbar(values, range(len(known)), xerr=error, color="black", marker="o", markersize=3, linestyle="")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(known)), [visible(v.metric) for v in known])
    axis.set_title("Youden's index: mean power - mean false alarms")


def _rate(seen: Seen) -> tuple[float, float, float]:
    """Power with its bounds; a bound that is not known is drawn as none."""
    found = seen.falls[TYPICAL_PROMPTS]
    value = _number(found.value, np.nan)
    return value, _number(found.lower, value), _number(found.upper, value)


def _number(value: float | None, otherwise: float | None) -> float:
    chosen = otherwise if value is None else value
    return float("nan") if chosen is None else chosen
