"""Plots of a comparison, a function each, from the frames of `comparison.results`. They fit one column of a two-column paper.

Colour tells the objective and marker or line the sampler. Every interval is a 95 % one.
"""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from alignbench.analysis.modes import first_distributions
from alignbench.comparison.results import BASE, Results
from alignbench.figures import distributions
from alignbench.figures.metric_names import axis_name
from alignbench.figures.style import left_out
from alignbench.files.escaping import slugs
from alignbench.reports.plots.gallery import gallery, image_grid
from alignbench.reports.style import (
    COLUMN,
    PAPER,
    SMOOTHED,
    add_legend,
    axis_title,
    draw_point,
    few_ticks,
    looks,
    metric_pairs,
    objective_of,
    sampler_of,
    say_better,
    seeds_of,
    sign,
)
from alignbench.statistics import hypervolume, mean_interval, performance_profile

DIAGNOSTICS = ("ratio_abs_dev_max", "grad_norm", "policy_update_norm", "zero_std_ratio", "ess_target", "ess_policy")
"""Columns of a run's metrics that reveal a training that has gone wrong."""
DISTANCES = ("kl_base", "path_kl")
"""Metrics that say how far a model is from the base."""
ALIKE = 0.1
"""Cells whose costs are within this share of one another cost the same, and there is no plot against that cost."""
NOTE_LETTERS = 72
"""Letters of a note that one line above a figure holds."""
BOX_MARGIN = 0.1
"""The hypervolume's reference point lies this share of the range below the worst of all runs."""


def trade_off(cells: pd.DataFrame, reward: str, diversity: str) -> Figure:
    """Diversity against reward of each cell with both intervals, and the non-dominated front.

    Args:
        cells: rows of `Results.cells_frame` of one setup.
    """
    points = metric_pairs(cells, reward, diversity)
    with plt.rc_context(PAPER):
        figure, axis = plt.subplots(figsize=(COLUMN, 2.9), layout="constrained")
        look = looks(list(points.index))
        for cell, point in points.iterrows():
            draw_point(axis, point, look[str(cell)])
        front = points[points["front"]].sort_values("x")
        axis.step(front["x"], front["y"], where="pre" if sign(cells, reward) > 0 else "post", color="#777777", zorder=0)
        axis.set(xlabel=f"reward: {axis_title(cells, reward)}", ylabel=f"diversity: {axis_title(cells, diversity)}")
        say_better(axis, higher=sign(cells, diversity) > 0)
        add_legend(figure, look, front=True, title=f"means with 95 % intervals, n = {seeds_of(cells)}")
    return figure


def against(cells: pd.DataFrame, x: str, metrics: Sequence[str]) -> Figure:
    """Metrics of the trained models, a panel each, against another metric (such as `kl_base`) or what was spent.

    Args:
        x: a metric, or a column of the frame: `model_rows`, `seconds`, `reward_calls`.
    """
    with plt.rc_context(PAPER):
        figure, axes = plt.subplots(1, len(metrics), figsize=(COLUMN, 2.2), layout="constrained", squeeze=False)
        look = looks(list(dict.fromkeys(cells["cell"])))
        for axis, metric in zip(axes[0], metrics, strict=True):
            for cell, point in metric_pairs(cells, x, metric).iterrows():
                draw_point(axis, point, look[str(cell)])
            axis.set(xlabel=axis_name(x), ylabel=axis_title(cells, metric))
            few_ticks(axis)
        add_legend(figure, look, title=f"means with 95 % intervals, n = {seeds_of(cells)}")
    return figure


def hypervolumes(runs: pd.DataFrame, reward: str, diversity: str) -> Figure:
    """Bars of `hypervolume_table`: how much of the box below the best reward and diversity each cell dominates."""
    table = hypervolume_table(runs, reward, diversity)
    with plt.rc_context(PAPER | {"axes.grid": False}):
        figure, axis = plt.subplots(figsize=(COLUMN, 0.22 * len(table) + 0.7), layout="constrained")
        look = looks(list(table["cell"]))
        for y, row in enumerate(table.to_dict("records")):
            bounded = np.isfinite([row["lower"], row["upper"]]).all() and row["cell"] != BASE
            error = [[row["value"] - row["lower"]], [row["upper"] - row["value"]]] if bounded else None
            axis.barh(y, row["value"], color=look[row["cell"]].color, xerr=error, capsize=2, error_kw={"linewidth": 0.8})
        counted = [c if c == BASE else f"{c}, n = {n}" for c, n in zip(table["cell"], table["n"], strict=True)]
        axis.set(yticks=range(len(table)), yticklabels=counted, xlabel="hypervolume and 95 % interval", xlim=(0, 1.05))
        axis.invert_yaxis()
    return figure


def hypervolume_table(runs: pd.DataFrame, reward: str, diversity: str) -> pd.DataFrame:
    """Cell, value with lower and upper over seeds, n: the area that one trained model dominates, as a share of a box.

    The box goes from a tenth of the range below the worst of all runs (the base model included) to the best, in each
    coordinate; a model that were best in both has 1.
    """
    wide = runs[runs["metric"].isin([reward, diversity])].copy()
    signs = {m: sign(runs, m) for m in (reward, diversity)}
    for column in ("final", "base"):
        wide[column] *= wide["metric"].map(signs)
    final = wide.pivot(index=["cell", "seed"], columns="metric", values="final")[[reward, diversity]].dropna()
    base = wide.drop_duplicates("metric").set_index("metric")["base"].reindex([reward, diversity]).to_numpy(dtype=np.float64)
    points = np.vstack([final.to_numpy(), base])
    low, high = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
    low = low - BOX_MARGIN * np.where(high > low, high - low, 1.0)
    area = [hypervolume(p, low) / float(np.prod(high - low)) for p in points]
    rows = [{"cell": BASE, "value": area[-1], "lower": area[-1], "upper": area[-1], "n": 1}]
    shares = pd.Series(area[:-1], index=final.index)
    for cell in dict.fromkeys(runs["cell"]):
        if cell in final.index.get_level_values("cell"):
            rows.append({"cell": cell, **mean_interval(shares.loc[cell].to_numpy(dtype=np.float64))._asdict()})
    return pd.DataFrame(rows)


def learning_curves(curves: pd.DataFrame, x: str = "model_rows") -> Figure:
    """Training reward and diversity of the rollouts, means over seeds of running means; the band is from seed to seed.

    Args:
        x: `model_rows`, `training_seconds`, `reward_calls` or `iteration`.
    """
    panels = [m for m in ("reward", "rollout_lgmd") if m in curves]
    shared = (
        "the LGMD of rollouts is lower where a tree's branches share steps: compare it along a method, not between samplers"
    )
    note = shared if curves["cell"].map(sampler_of).nunique() > 1 else ""
    return _panels(curves, x, panels, height=1.9, smooth=SMOOTHED, note=note, title=f"running means of {SMOOTHED} iterations; ")


def diagnostics(curves: pd.DataFrame, columns: Sequence[str] = DIAGNOSTICS) -> Figure:
    """Quantities that reveal a broken training, against the iteration; of several seeds the mean and the range.

    Those that are 0 throughout are named in a line instead.
    """
    recorded = [c for c in columns if c in curves and curves[c].notna().any()]
    panels = [c for c in recorded if (curves[c].fillna(0) != 0).any()]
    silent = [axis_name(c) for c in recorded if c not in panels]
    return _panels(
        curves, "iteration", panels, height=1.1, smooth=1, note=f"0 throughout: {', '.join(silent)}" if silent else ""
    )


def prompt_differences(prompts: pd.DataFrame, metric: str) -> Figure:
    """Trained minus base model for every prompt, seeds averaged, and the mean with its interval over prompts."""
    table = prompts[prompts["metric"] == metric]
    with plt.rc_context(PAPER):
        cells = list(dict.fromkeys(table["cell"]))
        figure, axis = plt.subplots(figsize=(COLUMN, 0.26 * len(cells) + 0.8), layout="constrained")
        look = looks(cells)
        for y, cell in enumerate(cells):
            values = table[table["cell"] == cell].groupby("prompt_index")["difference"].mean().to_numpy(dtype=np.float64)
            shifts = np.random.default_rng(0).uniform(-0.22, 0.22, len(values))  # so that equal values do not hide
            axis.plot(values, y + shifts, ".", color=look[cell].color, markersize=3, alpha=0.6)
            mean = mean_interval(values)
            if np.isfinite(mean[:3]).all():
                axis.errorbar(mean.value, y, xerr=[[mean.value - mean.lower], [mean.upper - mean.value]], fmt="k|", capsize=2)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set(yticks=range(len(cells)), yticklabels=cells, xlabel=f"{axis_name(metric)}, trained minus base")
        count = table["prompt_index"].nunique()
        figure.suptitle(
            f"one dot per prompt, mean of {seeds_of(table)}; mean and 95 % interval, n = {count} prompts", fontsize=6
        )
        few_ticks(axis)
        axis.invert_yaxis()
    return figure


def profiles(prompts: pd.DataFrame, metric: str) -> Figure:
    """Performance profiles (Agarwal et al. 2021): the share of (seed, prompt) scores above each threshold."""
    table = prompts[prompts["metric"] == metric]
    scores = {BASE: table.drop_duplicates("prompt_index")["base"].to_numpy(dtype=np.float64)}
    scores |= {str(cell): part["final"].to_numpy(dtype=np.float64) for cell, part in table.groupby("cell", sort=False)}
    everything = np.concatenate(list(scores.values()))
    thresholds = np.linspace(np.nanmin(everything), np.nanmax(everything), 201)
    with plt.rc_context(PAPER):
        figure, axis = plt.subplots(figsize=(COLUMN, 2.4), layout="constrained")
        look = looks(list(scores))
        for cell, values in scores.items():
            shares = performance_profile(values, thresholds)
            axis.step(thresholds, shares, where="post", color=look[cell].color, linestyle=look[cell].line)
        axis.set(xlabel=f"threshold of {axis_name(metric)}", ylabel="share of scores above", ylim=(-0.02, 1.02))
        add_legend(figure, look, lines=True, title=f"n = {seeds_of(table)} of {table['prompt_index'].nunique()} prompts each")
    return figure


def comparison_figures(results: Results, setup: str) -> dict[str, Figure]:
    """Every plot that the records of a setup allow, by name. What cannot be drawn is a line of `results.unreadable`."""
    figures = {}
    for name, draw in _drawings(results, setup).items():
        with left_out(f"plot {name} of {setup}", results.unreadable.append):
            figure = draw()
            if figure is not None:
                figures[name] = figure
    return figures


def _drawings(results: Results, setup: str) -> dict[str, Callable[[], Figure | None]]:
    """What draws each plot of a setup."""
    reward, diversity = results.reward(setup), results.diversity(setup)
    cells, runs, curves, prompts = (
        frame[frame["setup"] == setup]
        for frame in (results.cells_frame, results.runs_frame, results.curves_frame, results.prompts_frame)
    )
    metrics = [reward, *([diversity] if diversity else [])]
    files = slugs(metrics)
    drawings: dict[str, Callable[[], Figure | None]] = {}
    if diversity and len(metric_pairs(cells, diversity, reward)):
        drawings["trade_off"] = partial(trade_off, cells, reward, diversity)
        drawings["hypervolume"] = partial(hypervolumes, runs, reward, diversity)
    for distance in DISTANCES:
        if distance in set(cells["metric"]):
            drawings[f"against_{distance}"] = partial(against, cells, distance, metrics)
    for spent in ("model_rows", "reward_calls", "seconds"):
        of_cells = cells.loc[cells["cell"] != BASE, spent]
        if of_cells.max() - of_cells.min() > ALIKE * of_cells.max():
            drawings[f"against_{spent}"] = partial(against, cells, spent, metrics)
    if len(curves):
        drawings["curves_by_model_rows"] = partial(learning_curves, curves)
        drawings["curves_by_seconds"] = partial(learning_curves, curves, "training_seconds")
        if any(c in curves and curves[c].notna().any() for c in DIAGNOSTICS):
            drawings["diagnostics"] = partial(diagnostics, curves)
    for metric in metrics:
        if prompts.loc[prompts["metric"] == metric, "final"].nunique() > 1:
            drawings[f"prompts_{files[metric]}"] = partial(prompt_differences, prompts, metric)
            drawings[f"profile_{files[metric]}"] = partial(profiles, prompts, metric)
    return {**drawings, "images": partial(_images, results, setup), "distributions": partial(_distributions, results, setup)}


def _images(results: Results, setup: str) -> Figure | None:
    shown = gallery(results, setup)
    return image_grid(shown) if shown.images else None


def _distributions(results: Results, setup: str) -> Figure | None:
    models = {(objective_of(cell), sampler_of(cell)): table for cell, table in first_distributions(results, setup).items()}
    return distributions.side_by_side(models, setup) if models else None


def setup_hypervolumes(results: Results, setup: str) -> pd.DataFrame:
    """`hypervolume_table` of a setup that has a diversity metric."""
    runs = results.runs_frame[results.runs_frame["setup"] == setup]
    return hypervolume_table(runs, results.reward(setup), str(results.diversity(setup)))


def plots_folder(results: Results, setup: str, folder: Path) -> Path:
    """The folder of a setup's plots: a folder of its own below the folder of all where there are several setups."""
    return folder / results.file_names[setup] if len(results.setups) > 1 else folder


def _panels(
    curves: pd.DataFrame, x: str, panels: Sequence[str], height: float, smooth: int, note: str = "", title: str = ""
) -> Figure:
    """Draws curves in panels, two in a row, over one axis.

    Args:
        smooth: iterations over which each curve is averaged.
        note: a line above all panels.
        title: a line above the legend.
    """
    rows = max(1, -(-len(panels) // 2))
    with plt.rc_context(PAPER):
        size = (COLUMN, height * rows + 0.7)
        figure, axes = plt.subplots(rows, 2, figsize=size, layout="constrained", squeeze=False, sharex=True)
        look = looks([BASE, *dict.fromkeys(curves["cell"])])
        for axis, metric in zip(axes.flat, panels, strict=False):
            for cell, part in curves.groupby("cell", sort=False):
                style = look[str(cell)]
                across, wide = _over_seeds(part, x, metric, smooth)
                marker = "." if len(across) == 1 else ""
                axis.plot(across, wide.mean(axis=0), color=style.color, linestyle=style.line, marker=marker)
                axis.fill_between(across, wide.min(axis=0), wide.max(axis=0), color=style.color, alpha=0.1, linewidth=0)
            axis.set_title(axis_name(metric), fontsize=7)
            few_ticks(axis, whole=x == "iteration")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis in axes.flat[max(0, len(panels) - 2) : len(panels)]:  # the lowest of each column
            axis.set_xlabel(axis_name(x))
            axis.tick_params(labelbottom=True)
        if note:
            figure.suptitle(textwrap.fill(note, NOTE_LETTERS), fontsize=6)
        del look[BASE]
        several = curves.groupby("cell")["seed"].nunique().max() > 1
        spread = f"mean and range, n = {seeds_of(curves)}" if several else "n = 1 seed"
        add_legend(figure, look, lines=True, title=title + spread)
    return figure


def _over_seeds(part: pd.DataFrame, x: str, metric: str, smooth: int) -> tuple[np.ndarray, np.ndarray]:
    """Running means of each seed's curve where all seeds have one: x [N] and values [seeds, N].

    Seeds reach the same x after different numbers of iterations, so that between them only x can be shared.
    """
    curves = []
    for _, of_seed in part.dropna(subset=[metric]).groupby("seed", sort=False):
        in_order = of_seed.sort_values("iteration")
        mean = in_order[metric].rolling(smooth, min_periods=1).mean()
        curves.append((in_order[x].to_numpy(dtype=np.float64), mean.to_numpy(dtype=np.float64)))
    if not curves:
        return np.empty(0), np.empty((1, 0))
    first, last = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    across = np.unique(np.clip(np.concatenate([c[0] for c in curves]), first, last)) if last >= first else np.empty(0)
    return across, np.stack([np.interp(across, *curve) for curve in curves])
