"""The trade-off as curves: diversity over reward along the training and over strengths, with the target's front."""

from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from alignbench.comparison.results import BASE
from alignbench.figures.metric_names import axis_name
from alignbench.figures.style import legend_name
from alignbench.frontier.front import BEST_OF, KL, REWARD, TILT, Front, summary
from alignbench.reports.curve_report import CurveReport
from alignbench.reports.style import COLUMN, LINES, MARKERS, PALETTE, PAPER, make_room, say_better

HEIGHT = 3.1
"""Inches, with the legend."""
TARGET_COLOR, BEST_COLOR = "#000000", "#777777"
LABELLED_STRENGTHS = 12
"""Strengths of all methods up to which each is labelled."""


def curve_trade_off(report: CurveReport, metric: str) -> Figure | None:
    """One metric of diversity over the reward; None where there is neither a curve nor a front.

    A method is a line through its evaluations, means over seeds, with the range of the seeds as a band, and a mark at its end.
    The ends of a sweep's strengths are joined by a dotted line. Without curves, the marks are the trained models.
    """
    on_curves = report.comparable and metric in report.metrics
    front = report.curve_front if on_curves else report.front
    front = front if front is not None and metric in front.metrics and not front.record.normalised else None
    if not on_curves and front is None:
        return None
    with plt.rc_context(PAPER):
        figure, axis = plt.subplots(figsize=(COLUMN, HEIGHT), layout="constrained")
        handles = _draw_front(axis, front, metric) if front else []
        handles += _draw_curves(axis, report, metric) if on_curves else _draw_ends(axis, report, metric)
        axis.set(xlabel=f"reward: {axis_name(report.reward)}", ylabel=f"diversity: {axis_name(metric)}")
        say_better(axis, higher=report.directions.get(metric) is not False)
        what = "validation prompts; mean and range over seeds" if on_curves else "trained models, means over seeds"
        figure.legend(handles=handles, loc="outside lower center", ncols=2, title=what, title_fontsize=6, handlelength=1.8)
        make_room(figure, ceil(len(handles) / 2))
    return figure


def _draw_front(axis: Axes, front: Front, metric: str) -> list[Any]:
    """The target's line with its band over prompts, and best-of-n; returns what a legend shows."""
    means = summary(front).set_index(["rule", "metric"]).sort_index()

    def of(rule: str, name: str) -> pd.DataFrame:
        rows: pd.DataFrame = means.loc[[(rule, name)]].sort_values("strength")
        return rows

    x, y = of(TILT, REWARD)["value"].to_numpy(), of(TILT, metric)
    axis.plot(x, y["value"], color=TARGET_COLOR, linewidth=1.2, zorder=1)
    handles: list[Any] = [Line2D([], [], color=TARGET_COLOR, linewidth=1.2, label="front of the target")]
    if (BEST_OF, metric) in means.index and metric != KL:
        best, rewards = of(BEST_OF, metric), of(BEST_OF, REWARD)["value"]
        axis.plot(rewards, best["value"], linestyle="", marker="x", color=BEST_COLOR, markersize=4, zorder=2)
        handles.append(Line2D([], [], linestyle="", marker="x", color=BEST_COLOR, markersize=4, label=_best_label(best)))
    return handles


def _best_label(best: pd.DataFrame) -> str:
    return f"best of {', '.join(f'{n:g}' for n in best['strength'])}"


def _draw_curves(axis: Axes, report: CurveReport, metric: str) -> list[Any]:
    """Every method's curves; returns what a legend shows."""
    handles = []
    starts = []
    labelled = sum(len(s) for s in report.strengths.values() if len(s) > 1) <= LABELLED_STRENGTHS
    for number, method in enumerate(report.recorded.methods):
        color, marker, line = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)], LINES[number // len(PALETTE)]
        ends = []
        strengths = [strength for strength, _ in report.strengths[method]]
        for strength in strengths:
            points = [c.points for c in report.runs if (c.method, c.strength) == (method, strength)]
            if not points:
                continue
            x, y, low, high = _over_seeds(points, report.reward, metric)
            faint = len(strengths) > 1
            axis.plot(x, y, color=color, linestyle=line, linewidth=0.6 if faint else 1.1, alpha=0.5 if faint else 1, zorder=3)
            axis.fill_between(x, low, high, color=color, alpha=0.08 if faint else 0.15, linewidth=0, zorder=0)
            starts.append((x[0], y[0]))
            ends.append((x[-1], y[-1], strength))
        xs, ys = [end[0] for end in ends], [end[1] for end in ends]
        linked = {"linestyle": ":", "linewidth": 1.2} if len(ends) > 1 else {"linestyle": ""}
        axis.plot(xs, ys, color=color, marker=marker, markeredgecolor="white", markeredgewidth=0.4, zorder=4, **linked)
        for x_end, y_end, strength in ends if labelled and len(ends) > 1 else ():
            text = strength.rpartition("=")[2]
            axis.annotate(text, (x_end, y_end), textcoords="offset points", xytext=(3, 3), fontsize=5.5, color=color)
        handles.append(Line2D([], [], color=color, linestyle=line, marker=marker, label=legend_name(_label(report, method))))
    if starts:
        x_base, y_base = np.mean(starts, axis=0)
        axis.plot([x_base], [y_base], marker="*", color="black", markersize=8, linestyle="", zorder=5)
        handles.append(Line2D([], [], marker="*", color="black", linestyle="", markersize=7, label=BASE))
    if any(len(points) > 1 for points in report.strengths.values()):
        handles.append(Line2D([], [], color="#555555", linestyle=":", label="ends of a sweep's strengths"))
    return handles


def _label(report: CurveReport, method: str) -> str:
    """The method's name, without a sampler that all share."""
    samplers = {name.partition(" x ")[2] for name in report.recorded.methods or report.strengths}
    return method.partition(" x ")[0] if len(samplers) == 1 else method


def _over_seeds(points: list[pd.DataFrame], reward: str, metric: str) -> tuple[np.ndarray, ...]:
    """Reward and metric of each evaluation, means over seeds, and the lowest and highest metric of any seed.

    Seeds that have more evaluations than others are cut to the fewest.
    """
    fewest = min(len(each) for each in points)
    x = np.stack([each[reward].to_numpy(dtype=np.float64)[:fewest] for each in points])
    y = np.stack([each[metric].to_numpy(dtype=np.float64)[:fewest] for each in points])
    return x.mean(0), y.mean(0), y.min(0), y.max(0)


def _draw_ends(axis: Axes, report: CurveReport, metric: str) -> list[Any]:
    """The trained models on the evaluation prompts, with intervals over seeds; returns what a legend shows."""
    frame = report.results.cells_frame
    cells: Any = frame[frame["setup"] == report.setup].set_index(["cell", "metric"])
    handles = []
    for number, (method, strengths) in enumerate(report.strengths.items()):
        color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        found = [cell for _, cell in strengths if (cell, metric) in cells.index]
        x = [float(cells.loc[(cell, report.reward), "mean"]) for cell in found]
        y = [float(cells.loc[(cell, metric), "mean"]) for cell in found]
        ends = cells.loc[[(cell, metric) for cell in found], ["mean_lower", "mean_upper"]].to_numpy(dtype=np.float64)
        errors = np.abs(ends.T - np.array(y)) if np.isfinite(ends).all() else None
        link: Any = ":" if len(found) > 1 else ""
        axis.errorbar(x, y, yerr=errors, color=color, marker=marker, linestyle=link, elinewidth=0.7, zorder=3)
        handles.append(Line2D([], [], color=color, marker=marker, linestyle=link, label=legend_name(_label(report, method))))
    x_base, y_base = (float(cells.loc[(BASE, name), "mean"]) for name in (report.reward, metric))
    axis.plot([x_base], [y_base], marker="*", color="black", markersize=8, linestyle="", zorder=5)
    return [*handles, Line2D([], [], marker="*", color="black", linestyle="", markersize=7, label=BASE)]
