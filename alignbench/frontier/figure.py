"""The figure of a front: each diversity metric against the reward, with best-of-n for comparison."""

from math import ceil
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignbench.figures.style import COLORS, STYLE
from alignbench.frontier.front import BEST_OF, KL, REWARD, TILT, Front, summary

COLUMNS = 3
PANEL = (2.9, 2.3)
"""Width and height of one metric's panel, in inches."""


def draw_front(front: Front) -> Figure:
    """Draws a panel for each metric, and one for the KL divergence, against the expected reward.

    Bands are 95 % intervals over prompts.
    """
    metrics = [*front.record.headline, KL]
    columns = min(COLUMNS, len(metrics))
    lines = ceil(len(metrics) / columns)
    with plt.rc_context(STYLE):
        size = (PANEL[0] * columns, PANEL[1] * lines)
        figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, constrained_layout=True)
        for axes, metric in zip(grid.flat, metrics, strict=False):
            draw_line(axes, front, metric)
            axes.set_xlabel("expected reward")
            axes.set_ylabel("KL to the base model (nats)" if metric == KL else metric)
        for axes in grid.flat[len(metrics) :]:
            axes.set_axis_off()
        grid.flat[0].legend(loc="best")
        record = front.record
        figure.suptitle(
            f"{record.task} on {record.backbone}: front of the tilted target, {record.images} base samples of each of "
            f"{record.prompts} prompts, sets of {record.set_size}",
            fontsize=8,
        )
    return figure


def draw_line(axes: Axes, front: Front, metric: str, *, color: str = "black", best_of: bool = True) -> None:
    """Draws the front's line of one metric against the reward, with its band, a mark for the base model, and best-of-n."""
    means = summary(front).set_index(["rule", "metric"]).sort_index()

    def rows_of(rule: str, name: str) -> Any:
        return means.loc[[(rule, name)]].sort_values("strength")

    rewards, values = rows_of(TILT, REWARD), rows_of(TILT, metric)
    x, y = rewards["value"].to_numpy(), values["value"].to_numpy()
    axes.plot(x, y, color=color, linewidth=1.2, label="tilted target")
    lower, upper = values["lower"].to_numpy(), values["upper"].to_numpy()
    if np.isfinite([lower, upper]).all():
        axes.fill_between(x, lower, upper, color=color, alpha=0.12, linewidth=0)
    axes.plot(x[:1], y[:1], marker="o", color=color, markersize=5, linestyle="none", label="base model")
    if best_of and (BEST_OF, metric) in means.index and metric != KL:
        best, rewarded = rows_of(BEST_OF, metric), rows_of(BEST_OF, REWARD)
        color = COLORS[0]
        axes.plot(rewarded["value"], best["value"], marker="x", color=color, markersize=4, linestyle="none", label="best of n")
        for n, px, py in zip(best["strength"], rewarded["value"], best["value"], strict=True):
            axes.annotate(f"{n:g}", (px, py), textcoords="offset points", xytext=(3, 2), fontsize=6, color=color)
