"""The reward-KL frontier: the reward that each method gains for its KL to the base model, beside the best possible."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from alignbench.analysis.contrasts import BEST_REWARD, KL
from alignbench.comparison.results import BASE
from alignbench.figures import distributions
from alignbench.figures.style import STYLE, legend_name
from alignbench.files.escaping import visible
from alignbench.frontier.front import Front
from alignbench.reports.style import Look, looks, objective_of, sampler_of

REWARD = "exact_reward"
METRICS = (KL, REWARD, BEST_REWARD)
"""The metrics that the plot needs: the KL, the reward, and the best reward of any distribution at that KL."""
SMALLEST_KL = 1e-2
"""Where the KL axis begins."""
MARGIN = 1.6
"""Factor by which the KL axis extends beyond the points on either side, so that it always has two ticks."""
COLUMNS = 4
"""Panels in a row, at most."""


def reward_kl_frontier(
    values: pd.DataFrame, equal_kl: pd.DataFrame, titles: dict[str, str], fronts: Mapping[str, Front | None]
) -> Figure:
    """Reward against KL to the base model, a panel per task; no distribution can be above the line.

    A marker is where a method's trainings ended, means over seeds. Its trail leads there over the KL levels at which all of
    them were seen, from the base model on if they were at the first level.

    Args:
        values: `contrasts.values_frame` with `METRICS`.
        equal_kl: `contrasts.equal_kl_frame`; may be empty.
        titles: setup -> title of its panel.
        fronts: setup -> its front, if there is one. The line goes through the tilts of an exact front, and otherwise only
            through the best rewards at the methods' own KL.
    """
    setups = list(titles)
    columns = min(COLUMNS, len(setups))
    lines = -(-len(setups) // columns)
    cells = [str(cell) for cell in dict.fromkeys(values["cell"]) if cell != BASE]
    look = looks(cells)
    size = (distributions.WIDTH if columns > 1 else 0.7 * distributions.WIDTH, (2.0 if lines > 1 else 3.0) * lines + 0.6)
    with plt.rc_context({**STYLE, "font.size": 7, "savefig.dpi": 200}):
        figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
        for axis, setup in zip(axes.flat, setups, strict=False):
            at_levels = equal_kl[equal_kl["setup"] == setup] if len(equal_kl) else equal_kl
            of_setup = values[values["setup"] == setup]
            _panel(axis, of_setup, at_levels, look, _bound(of_setup, fronts.get(setup)))
            axis.set_title(visible(titles[setup]).replace("_", " "))
        for axis in axes.flat[len(setups) :]:
            axis.set_visible(False)
        for axis in axes[:, 0]:
            axis.set_ylabel("expected reward")
        _legends(figure, cells, look, columns)
    return figure


def _bound(values: pd.DataFrame, front: Front | None) -> np.ndarray:
    """[N, 2]: KL divergences in ascending order, and the best expected reward at each."""
    points = values.dropna(subset=[KL, BEST_REWARD])[[KL, BEST_REWARD]].to_numpy()
    if front is not None and REWARD in front.metrics:
        # Among distributions with the same mean KL over prompts, tilts by one beta have the largest mean reward.
        tilts = np.stack([front.values(KL).mean(1), front.values(REWARD).mean(1)], axis=1)
        points = np.concatenate([tilts, points[points[:, 0] > tilts[:, 0].max()]])
    points = points[points[:, 0].argsort()]
    # Means over prompts whose KL differs need not rise, though the bound of each prompt does.
    return np.stack([points[:, 0], np.maximum.accumulate(points[:, 1])], axis=1)


def _panel(axis: Axes, values: pd.DataFrame, at_levels: pd.DataFrame, look: dict[str, Look], bound: np.ndarray) -> None:
    axis.set_xscale("log")
    axis.plot(bound[:, 0].clip(SMALLEST_KL), bound[:, 1], color="black", linewidth=0.7)
    base = values[values["cell"] == BASE].iloc[0]
    start = (max(base[KL], SMALLEST_KL), base[REWARD])
    means = values[values["cell"] != BASE].groupby("cell", sort=False)[[KL, REWARD]].mean()
    for cell, mean in means.iterrows():
        style = look[str(cell)]
        end = (max(mean[KL], SMALLEST_KL), mean[REWARD])
        axis.plot(*end, linestyle="", markersize=3.5, **_marker(style))
        if len(at_levels):
            trail = _trail(at_levels[at_levels["cell"] == cell], start, end)
            axis.plot(*trail.T, color=style.color, linewidth=0.5, alpha=0.7)
    axis.plot(*start, marker="*", color="black", markersize=7)
    low, high = axis.get_xlim()
    axis.set(xlabel="KL to the base model (nats)", xlim=(max(low, SMALLEST_KL) / MARGIN, high * MARGIN))
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 30 * max(low, SMALLEST_KL) else (1.0,)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _trail(at_levels: pd.DataFrame, start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    """[N, 2]: the points that lead to a method's end."""
    rewards = at_levels[at_levels["metric"] == REWARD]
    seen = rewards[(rewards["n"] == rewards["runs"]) & (rewards["kl"] < end[0])]
    from_base = [start] if len(seen) and seen["kl"].min() == rewards["kl"].min() else []
    return np.array([*from_base, *seen[["kl", "value"]].to_numpy(), end])


def _legends(figure: Figure, cells: Sequence[str], look: dict[str, Look], columns: int) -> None:
    """Below the panels: objectives by their colours, then samplers, the base model and the bound."""
    samplers = dict.fromkeys(map(sampler_of, cells))
    first_of = {objective_of(cell): look[cell] for cell in reversed(cells)}
    objectives = [
        Line2D([], [], linestyle="", label=legend_name(name), **{**_marker(first_of[name]), "marker": "o"})
        for name in dict.fromkeys(map(objective_of, cells))
    ]
    shape = {sampler_of(cell): look[cell].marker for cell in cells}
    others = [Line2D([], [], linestyle="", color="#555555", marker=shape[s], label=legend_name(s)) for s in samplers]
    others.append(Line2D([], [], linestyle="", color="black", marker="*", label=BASE))
    others.append(Line2D([], [], color="black", linewidth=0.7, label="best reachable"))
    figure.legend(handles=[*objectives, *others], loc="outside lower center", ncols=6 if columns > 1 else 3, fontsize=6)


def _marker(look: Look) -> dict[str, Any]:
    return {"color": look.color, "marker": look.marker, "fillstyle": look.fill}
