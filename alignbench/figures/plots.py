"""Plots of a run."""

import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from math import ceil, log10
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from alignbench.evaluation.curve import PATH_KL, by_prompt, means, read_curve
from alignbench.figures import distributions
from alignbench.figures.metric_names import axis_name
from alignbench.figures.rollout_tree import TREE, RolloutTree, tree
from alignbench.figures.style import COLORS, STYLE, error_bars, left_out, write_figure
from alignbench.files.escaping import visible
from alignbench.files.writing import refuse_links
from alignbench.records.distributions import read_distributions
from alignbench.records.diversity import DIVERSITY
from alignbench.records.record import RESULT, MetricRecord, Result, read_result, visible_record
from alignbench.records.tables import read_metrics
from alignbench.records.unfinished import UNFINISHED, unfinished_record
from alignbench.statistics import mean_interval

DIAGNOSED = {
    "reward_std_in_group": "deviation of the reward in a group",
    "zero_std_ratio": "share of groups with equal rewards",
    "failed_scores": "failed scores",
    "grad_norm": "gradient norm",
    "policy_update_norm": "norm of the update",
    "lr": "learning rate",
    "loss": "loss",
    "ratio_abs_dev_first": "max |ratio - 1|, first update",
    "ratio_abs_dev_max": "max |ratio - 1|, all updates",
    "advantage_abs": "mean |advantage|",
    "clip_share": "share of clipped ratios",
    "off_policy_share": "share of off-policy updates",
    "seconds": "seconds per iteration",
    "ess_target": "effective sample size of q",
    "ess_policy": "effective sample size of p",
}
"""What the panels of `diagnostics` are called."""
NO_DIAGNOSTICS = (
    *("iteration", "reward", "rollout_lgmd", "model_rows", "model_rows_rollout", "model_rows_train", "reward_calls"),
)
"""Columns of the metrics table that other plots show, or that only count."""
LINEAR = 3.0
"""Half-widths of the base model's interval up to which the axis of `changes` is linear; beyond, it is logarithmic."""


def plot_run(folder: Path, warn: Callable[[str], None] = warnings.warn) -> list[Path]:
    """Draws the plots of a run from the files in its folder; returns the files.

    Of a run that has not ended, what its tables have so far is drawn, and the plots say so.

    Args:
        folder: folder of the run.
        warn: called with a sentence for each plot that is left out because its data cannot be read or drawn.

    Raises:
        UserError: the folder has no readable record, and is not that of an unfinished run either.
        DiskError: a plot cannot be written.
    """
    finished = os.path.lexists(folder / RESULT)
    result = visible_record(read_result(folder) if finished else unfinished_record(folder))
    refuse_links(folder, "plots")
    written: list[Path] = []

    def write(name: str, draw: Callable[[], Figure | None]) -> None:
        with left_out(f"plots/{name}.png", warn):
            figure = draw()
            if figure is not None:
                written.append(write_figure(folder / "plots" / f"{name}.png", figure))

    def of_distributions() -> Figure | None:
        kept = read_distributions(folder)
        return None if kept is None else distributions.over_training(kept, _of(result))

    frame = None
    with left_out("plots/curves.png and plots/diagnostics.png", warn):
        frame = read_metrics(folder)
    if frame is not None and len(frame):
        write("curves", partial(curves, frame, result))
        write("diagnostics", partial(diagnostics, frame))

    def of_curve() -> Figure | None:
        table = read_curve(folder)
        return None if table is None or table["iteration"].nunique() < 2 else along_training(table, result)

    write("along_training", of_curve)
    write("distributions", of_distributions)
    write("changes", partial(changes, result))
    write("tree", lambda: tree(RolloutTree.read(folder / TREE)) if os.path.lexists(folder / TREE) else None)
    return written


def curves(frame: pd.DataFrame, result: Result) -> Figure:
    """Draws training reward and rollout diversity over the iterations, and the evaluation reward before and after."""
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
        at = frame["iteration"] + 1  # an iteration's numbers are known when it has ended
        smooth = frame["reward"].rolling(8, min_periods=1).mean()
        marker = "." if len(at) == 1 else ""
        left.plot(at, frame["reward"], alpha=0.35, linewidth=0.8, marker=marker)
        left.plot(at, smooth, color=COLORS[0], label="mean of 8 iterations")
        left.set(ylabel="training reward", title="reward of the rollouts")
        left.legend()
        if "rollout_lgmd" in frame:
            middle.plot(at, frame["rollout_lgmd"], color=COLORS[2], marker=marker)
        middle.set_ylabel("LGMD within groups")
        middle.set_title("diversity of the rollouts", pad=14)
        shared = "branches of a tree share steps: not that of the model"
        middle.text(0.5, 1.02, shared, fontsize=6, transform=middle.transAxes, ha="center", color="#555555")
        for axis in (left, middle):
            axis.set_xlabel(f"iteration ({_model_evaluations(frame)})")
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.set_xlim(left=0 if len(at) == 1 else 1)
        _before_and_after(right, result)
        figure.suptitle(_of(result), fontsize=8)
    return figure


def _model_evaluations(frame: pd.DataFrame) -> str:
    each = float(frame["model_rows"].iloc[-1]) / len(frame)
    return f"{EngFormatter(places=1, sep='')(each)} model evaluations each"


def _before_and_after(axis: Any, result: Result) -> None:
    """Draws the reward of base and trained model on the evaluation prompts."""
    rewards = [m for m in result.metrics.values() if m.role == "reward"]
    for x, estimate in enumerate((rewards[0].base, rewards[0].final) if rewards else ()):
        if estimate.value is not None:
            axis.errorbar([x], [estimate.value], yerr=error_bars(estimate), fmt="o", capsize=4, color=COLORS[x])
            at = (x, estimate.value)
            axis.annotate(f"{estimate.value:.3f}", at, xytext=(8, 0), textcoords="offset points", va="center")
    axis.set(xlim=(-0.5, 1.7), xticks=[0, 1], xticklabels=["base", "trained"], ylabel="reward")
    axis.set_title("evaluation prompts (95 % intervals)" if rewards else "not evaluated yet")


def diagnostics(frame: pd.DataFrame) -> Figure | None:
    """Draws each further column of the metrics table that varies over the iteration in a small panel; None if none does.

    Columns that stay the same are named in a line below.
    """
    numeric = [c for c in frame.columns if c not in NO_DIAGNOSTICS and pd.api.types.is_numeric_dtype(frame[c])]
    known = {name: frame[["iteration", name]].dropna() for name in numeric}
    moving = [name for name in numeric if known[name][name].nunique() > 1]
    still = {_diagnosed(n): known[n][n].iloc[0] for n in numeric if n not in moving and len(known[n])}
    if not moving:
        return None
    columns = min(4, len(moving))
    height = -(-len(moving) // columns)
    with plt.rc_context(STYLE):
        size = (2.4 * columns, 1.5 * height + 0.5)
        figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False, layout="constrained")
        for axis, name in zip(axes.flat, moving, strict=False):
            values = known[name]
            marker = "." if len(values) < len(frame) or len(values) == 1 else ""
            axis.plot(values["iteration"] + 1, values[name], linewidth=0.9, marker=marker)
            axis.set_title(_diagnosed(name), fontsize=7, wrap=True)
            axis.ticklabel_format(axis="y", useOffset=False)
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        for axis in axes.flat[len(moving) :]:
            axis.set_visible(False)
        figure.supxlabel("iteration" + _unchanged(still), fontsize=7)
    return figure


def _diagnosed(column: str) -> str:
    """What a panel calls a column."""
    if column.startswith("measured_"):
        return visible(axis_name(column.removeprefix("measured_")))
    if column.startswith("reward_") and column not in DIAGNOSED:
        return visible(f"training {axis_name(column.removeprefix('reward_'))}")
    return DIAGNOSED.get(column, visible(axis_name(column)))


def _unchanged(still: Mapping[str, float]) -> str:
    """A line on columns that stay the same."""
    texts = [f"{name} {value:.3g}" for name, value in still.items()]
    lines = [", ".join(texts[i : i + 5]) for i in range(0, len(texts), 5)]
    return "\nunchanged throughout: " + ",\n".join(lines) if lines else ""


def along_training(table: pd.DataFrame, result: Result, most: int = 6) -> Figure:
    """The trained reward, independent metrics and diversity at each evaluation on validation prompts; bands are 95 %.

    Panels show each metric over the iteration. Below them one plot has all of them against the path KL, if that is known.
    """
    present = set(table["metric"])
    shown = [name for name in _by_interest(result, list(dict.fromkeys(table["metric"]))) if name in present][: most - 1]
    names = [*shown, *([PATH_KL] if PATH_KL in present else [])]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    against_kl = PATH_KL in present and len(shown) > 0
    with plt.rc_context(STYLE):
        height = 2.0 * lines + 2.6 * against_kl
        figure = plt.figure(figsize=(2.6 * columns, height), layout="constrained")
        parts = figure.subfigures(1 + against_kl, 1, squeeze=False, height_ratios=[2.0 * lines, *[2.6] * against_kl])[:, 0]
        grid = parts[0].subplots(lines, columns, squeeze=False, sharex=True)
        for axes, name in zip(grid.flat, names, strict=False):
            iterations, values = by_prompt(table, name)
            intervals = [mean_interval(of_one) for of_one in values]
            axes.plot(iterations, [i.value for i in intervals], marker="o", markersize=3)
            bounds = np.array([[i.lower, i.upper] for i in intervals])
            if np.isfinite(bounds).all():
                axes.fill_between(iterations, bounds[:, 0], bounds[:, 1], alpha=0.15, linewidth=0)
            axes.set_title(_title(name, result))
            axes.set_xlabel("iteration")
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        if against_kl:
            _against_path_kl(parts[1].subplots(), table, shown, result)
        figure.suptitle(f"{_of(result)}: validation prompts along the training", fontsize=9)
    return figure


def _by_interest(result: Result, measured: list[str]) -> list[str]:
    """Metrics in the order in which a reader looks: the trained reward, what turned, an independent metric, diversity, others.

    Args:
        result: the run's record; without metrics where the run is unfinished.
        measured: all metrics along the training.
    """
    if not result.metrics:
        return [name for name in measured if name != PATH_KL]
    rewards = [name for name, record in result.metrics.items() if record.role == "reward"]
    independent = [
        n for n, r in result.metrics.items() if r.role == "judge" and r.higher_is_better is not None and n != PATH_KL
    ]
    turned = [each.metric for each in result.onsets if each.over_optimised]
    diversity = [name for name in DIVERSITY if name in independent and result.metrics[name].base.value is not None]
    others = [name for name in independent if name not in diversity]
    return list(dict.fromkeys([*rewards[:1], *turned, *others[:1], *diversity[:2], *rewards, *independent]))


def _against_path_kl(axes: Any, table: pd.DataFrame, names: list[str], result: Result) -> None:
    """Draws the change of each metric from the base model, over the path KL; a ring marks where over-optimisation sets in.

    Each line is in units of its own largest change, which the legend gives, so that all turns can be seen. A metric of which
    lower is better is turned over, so that up is better for every line.
    """
    points = means(table)
    turns = {each.metric: each.iteration for each in result.onsets if each.over_optimised}
    for name, color in zip(names, COLORS, strict=False):
        change = points[name] - points[name].iloc[0]
        largest = change.loc[change.abs().idxmax()] if change.notna().any() else 0.0
        if largest == 0:
            continue
        record = result.metrics.get(name)
        lower_is_better = record is not None and record.higher_is_better is False
        share = change / (-abs(largest) if lower_is_better else abs(largest))
        label = f"{_title(name, result)}: {largest:+.3g}{', lower is better' if lower_is_better else ''}"
        width = 2.2 if record is not None and record.role == "reward" else 1.2
        axes.plot(points[PATH_KL], share, color=color, marker="o", markersize=3, label=label, linewidth=width)
        if name in turns:
            at = points["iteration"] == turns[name]
            axes.plot(points[PATH_KL][at], share[at], "o", markersize=10, fillstyle="none", color=color)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="path KL to the base model (nats)", ylabel="change from the base model,\nas a share of the largest; up is better"
    )
    if turns:
        axes.set_title("rings: where a metric turns while the reward goes on rising")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _title(name: str, result: Result) -> str:
    is_reward = name in result.metrics and result.metrics[name].role == "reward"
    return f"{axis_name(name)} (trained on)" if is_reward else axis_name(name)


def _of(result: Result) -> str:
    """What a figure is about."""
    unfinished = f", unfinished: {_iterations(result.run.iterations)}" if result.run.status == UNFINISHED else ""
    return f"{' x '.join(result.pair)}, {result.run.task}, seed {result.run.seed}{unfinished}"


def _iterations(count: int) -> str:
    return f"{count} iteration{'s' * (count != 1)}"


def changes(result: Result) -> Figure | None:
    """Draws the paired difference of each metric in units of the base model's half interval, with its numbers beside it.

    The axis is linear near 0 and logarithmic beyond, so that changes of very different size can be read. A metric that is equal
    for all prompts of the base model, such as the distance to it, has no such unit and is left out. None without any metric.
    """
    shown = []
    for name, metric in result.metrics.items():
        d, b = metric.difference, metric.base
        if d.value is not None and b.lower is not None and b.upper is not None and b.lower != b.upper:
            shown.append((name, metric, (b.upper - b.lower) / 2))
    if not shown:
        return None
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 0.32 * len(shown) + 1.1), layout="constrained")
        largest = 1.0
        for y, (_, metric, unit) in enumerate(shown):
            value, bars = float(metric.difference.value or 0.0) / unit, np.divide(error_bars(metric.difference), unit)
            color = COLORS[1] if metric.role == "reward" else COLORS[0]
            axis.errorbar([value], [y], xerr=bars, fmt="o", capsize=3, color=color)
            largest = max(largest, abs(value) + float(np.nanmax([0.0, *bars.ravel()])))
        axis.axvline(0, color="black", linewidth=0.8)
        if largest > 4 * LINEAR:
            _compressed(axis, largest)
        axis.set(yticks=range(len(shown)), yticklabels=[_change_label(name, metric) for name, metric, _ in shown])
        axis.set_xlabel("trained minus base, in half-widths of the base model's 95 % interval")
        axis.set_ylim(len(shown) - 0.5, -0.5)
        numbers = axis.secondary_yaxis("right")
        texts = [f"{metric.base.value:.3g} to {metric.final.value:.3g}" for _, metric, _ in shown]
        numbers.set(yticks=range(len(shown)), yticklabels=texts)
        numbers.tick_params(length=0, labelsize=7)
        numbers.spines["right"].set_visible(False)
        figure.suptitle(f"{_of(result)}: change of each metric (arrows: where better is)", fontsize=8)
    return figure


def _compressed(axis: Any, largest: float) -> None:
    """Makes the x axis logarithmic beyond `LINEAR` on either side, with few ticks."""
    axis.set_xscale("symlog", linthresh=LINEAR)
    decades = max(2, ceil(log10(largest)))
    powers = [10.0**n for n in range(1, decades + 1, ceil(decades / 4))]
    low = min(axis.get_xlim()[0], -1.0)
    axis.set_xlim(low, 2 * largest)
    ticks = [0.0, *powers, *(-power for power in powers if -power >= low)]
    axis.set_xticks(ticks, [f"{tick:,.0f}" if abs(tick) < 1e4 else f"{tick:.0e}" for tick in ticks])
    axis.minorticks_off()


def _change_label(name: str, metric: MetricRecord) -> str:
    arrow = {True: " \N{RIGHTWARDS ARROW}", False: " \N{LEFTWARDS ARROW}", None: ""}[metric.higher_is_better]
    return f"{axis_name(name)}{' (trained on)' if metric.role == 'reward' else ''}{arrow}"
