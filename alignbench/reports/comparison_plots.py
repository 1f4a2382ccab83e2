"""Plots of a comparison, a function each, from the frames of `results`. They fit one column of a two-column paper.

Colour tells the objective and marker or line the sampler. Every interval is a 95 % one.
"""

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

from alignbench.backbones.mixture import distributions
from alignbench.errors import UserError
from alignbench.figures.plots import COLORS, STYLE, left_out, legend_name, write_figure
from alignbench.files.escaping import slugs
from alignbench.files.images import open_image
from alignbench.records.record import Protocol
from alignbench.records.results import BASE, RecordedRun, Results
from alignbench.statistics import (
    hypervolume,
    mean_interval,
    non_dominated,
    performance_profile,
)

COLUMN = 3.3
"""Inches: the width of one column."""
PAPER: Any = {**STYLE, "font.size": 7, "legend.fontsize": 6, "xtick.labelsize": 6, "ytick.labelsize": 6, "savefig.dpi": 300}
PAPER |= {"svg.hashsalt": "alignbench", "lines.markersize": 4.5, "lines.linewidth": 1.0}
PAPER |= {"figure.max_open_warning": 0}  # all of a setup are drawn before the first is written
PALETTE = (*COLORS[:-1], "#882255", "#999933", "#332288")
"""That of `plots` without black, and three of Paul Tol's muted colours."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
DIAGNOSTICS = ("ratio_abs_dev_max", "grad_norm", "policy_update_norm", "zero_std_ratio", "ess_target", "ess_policy")
SMOOTHED = 8
"""Iterations of which curves show the mean."""
NAMES = {
    "lgmd": "LGMD",
    "rollout_lgmd": "LGMD of rollouts",
    "vendi": "Vendi score",
    "kl_base": "KL to base (nats)",
    "path_kl": "path KL to base (nats)",
    "reward": "training reward",
    "seconds": "seconds of training",
    "training_seconds": "seconds of training",
    "ratio_abs_dev_max": "max |ratio - 1|",
    "grad_norm": "gradient norm",
    "policy_update_norm": "update norm",
    "zero_std_ratio": "groups of equal rewards",
    "ess_target": "ESS of target q",
    "ess_policy": "ESS of policy p",
}
"""What axes call a metric or a column; others by their own name."""
ALIKE = 0.1
"""Cells whose costs are within this share of one another cost the same: the budget's quantity makes no plot of its own."""
PICTURE_PROMPTS = 6
DISTANCES = ("kl_base", "path_kl")
"""Metrics that say how far a model is from the base."""
TITLES = {
    "trade_off": "Reward against diversity",
    "hypervolume": "Hypervolume: the area that a model dominates, where 1 is the best run in both",
    "against": "Reward and diversity against {}",
    "curves_by": f"Training against {{}}: running means of {SMOOTHED} iterations",
    "diagnostics": "Diagnostics of the training",
    "prompts": "{} of each prompt, trained minus base",
    "profile": "Share of scores above each threshold of {}",
    "pictures": "Pictures: same prompt and noise down a column",
    "distributions": "What target, base and trained models draw for one prompt; first seed of each method",
}
"""Of plots, by how their names begin; the rest of the name is the metric or column that is meant."""
BOX_MARGIN = 0.1
"""The hypervolume's reference point lies this share of the range below the worst of all runs."""


class Look(NamedTuple):
    color: str
    marker: str
    line: Any


def looks(cells: Sequence[str]) -> dict[str, Look]:
    """A look for each cell `objective x sampler`; the base model is a black star."""
    objectives = list(dict.fromkeys(_objective(c) for c in cells if c != BASE))
    samplers = list(dict.fromkeys(_sampler(c) for c in cells if c != BASE))
    found = {BASE: Look("#000000", "*", (0, (1, 1)))}
    for cell in cells:
        if cell != BASE:
            i, j = objectives.index(_objective(cell)), samplers.index(_sampler(cell))
            found[cell] = Look(PALETTE[i % len(PALETTE)], MARKERS[j % len(MARKERS)], LINES[j % len(LINES)])
    return found


def trade_off(cells: pd.DataFrame, reward: str, diversity: str) -> Figure:
    """Reward against diversity of each cell with both intervals, and the non-dominated front.

    Args:
        cells: rows of `Results.cells_frame` of one setup.
    """
    points = metric_pairs(cells, diversity, reward)
    with plt.rc_context(PAPER):
        figure, axis = plt.subplots(figsize=(COLUMN, 2.9), layout="constrained")
        look = looks(list(points.index))
        for cell, point in points.iterrows():
            _cross(axis, point, look[str(cell)])
        front = points[points["front"]].sort_values("x")
        axis.step(front["x"], front["y"], where="pre" if sign(cells, diversity) > 0 else "post", color="#777777", zorder=0)
        axis.set(xlabel=f"diversity: {_titled(cells, diversity)}", ylabel=f"reward: {_titled(cells, reward)}")
        _legend(figure, look, front=True, title=f"means with 95 % intervals, n = {seeds_of(cells)}")
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
                _cross(axis, point, look[str(cell)])
            axis.set(xlabel=_name(x), ylabel=_titled(cells, metric))
            _few_ticks(axis)
        _legend(figure, look, title=f"means with 95 % intervals, n = {seeds_of(cells)}")
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
    return _panels(curves, x, panels, height=1.9, smooth=SMOOTHED, title=f"running means of {SMOOTHED} iterations; ")


def diagnostics(curves: pd.DataFrame, columns: Sequence[str] = DIAGNOSTICS) -> Figure:
    """What tells that a method is broken, against the iteration; of several seeds the mean and the range.

    What is 0 throughout is said in words.
    """
    known = [c for c in columns if c in curves and curves[c].notna().any()]
    panels = [c for c in known if (curves[c].fillna(0) != 0).any()]
    silent = [_name(c) for c in known if c not in panels]
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
        axis.set(yticks=range(len(cells)), yticklabels=cells, xlabel=f"{_name(metric)}, trained minus base")
        count = table["prompt_index"].nunique()
        figure.suptitle(f"a dot a prompt, mean of {seeds_of(table)}; mean and 95 % interval, n = {count} prompts", fontsize=6)
        _few_ticks(axis)
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
        axis.set(xlabel=f"threshold of {_name(metric)}", ylabel="share of scores above", ylim=(-0.02, 1.02))
        _legend(figure, look, lines=True, title=f"n = {seeds_of(table)} of {table['prompt_index'].nunique()} prompts each")
    return figure


def picture_grid(rows: dict[str, list[Image.Image]], prompts: Sequence[str]) -> Figure:
    """One row of pictures a method, one column a prompt; all of one column were drawn from the same noise."""
    with plt.rc_context(PAPER | {"axes.grid": False}):
        left, gap = 0.26, 0.04  # shares of the width, and of a picture
        size = COLUMN * (0.995 - left) / (len(prompts) + gap * (len(prompts) - 1))
        titles = [_wrapped(prompt, int(size * 72 / 3.5)) for prompt in prompts]  # points; a letter takes about 3.5
        head = 0.06 + 0.1 * max(title.count("\n") + 1 for title in titles)
        height = size * (len(rows) + gap * (len(rows) - 1)) + head
        figure, axes = plt.subplots(len(rows), len(prompts), figsize=(COLUMN, height), squeeze=False)
        figure.subplots_adjust(left=left, right=0.995, top=1 - head / height, bottom=0, wspace=gap, hspace=gap)
        for line, (name, pictures) in zip(axes, rows.items(), strict=True):
            for axis, picture in zip(line, pictures, strict=True):
                axis.imshow(np.asarray(picture), interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            line[0].set_ylabel(name.replace(" x ", "\n"), rotation=0, ha="right", va="center", fontsize=6)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=6, pad=2)
    return figure


def sample_pictures(run: RecordedRun, name: str, prompts: int = PICTURE_PROMPTS) -> list[Image.Image]:
    """The first picture of each of the first prompts, cut from `samples/<name>.png`; empty without a sheet.

    Args:
        name: `base` or `final`.
    """
    sheet = _opened(run.folder / "samples" / f"{name}.png")
    if sheet is None:
        return []
    protocol: Protocol = run.result.protocol
    wide = protocol.images_per_prompt * max(1, 16 // protocol.images_per_prompt)  # as plots.grid lays them out
    size = sheet.width // wide
    if size == 0:  # no sheet of that many pictures
        return []
    found = []
    for p in range(min(prompts, protocol.prompts)):
        row, column = divmod(p * protocol.images_per_prompt, wide)
        found.append(sheet.crop((column * size, row * size, (column + 1) * size, (row + 1) * size)))
    return found


def _opened(file: Path) -> Image.Image | None:
    """None where there is no image that can be opened: a report can do without it."""
    try:
        return open_image(file)
    except UserError:
        return None


def metric_pairs(cells: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """A row a cell: x and y with lower and upper, and whether it is on the front; cells that lack one are left out."""
    table = cells[cells["metric"] == y].set_index("cell")
    if x in cells.columns:
        across = table[[x]].rename(columns={x: "x"}).assign(x_lower=np.nan, x_upper=np.nan)
        directions = np.array([-1.0, sign(cells, y)])  # less spent is better
    else:
        other = cells[cells["metric"] == x].set_index("cell")
        across = other[["mean", "mean_lower", "mean_upper"]].set_axis(["x", "x_lower", "x_upper"], axis=1)
        directions = np.array([sign(cells, x), sign(cells, y)])
    up = table[["mean", "mean_lower", "mean_upper"]].set_axis(["y", "y_lower", "y_upper"], axis=1)
    points = across.join(up, how="inner").dropna(subset=["x", "y"])
    return points.assign(front=non_dominated(points[["x", "y"]].to_numpy(dtype=np.float64) * directions))


def comparison_figures(results: Results, setup: str, diversity: str | None = None) -> dict[str, Figure]:
    """Every plot that the records of a setup allow, by name; what cannot be drawn is a line of `results.unreadable`."""
    reward, diversity = results.reward(setup), diversity or results.diversity(setup)
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

    def of_pictures() -> Figure | None:
        rows, texts = gallery(results, setup)
        return picture_grid(rows, texts) if rows else None

    def of_distributions() -> Figure | None:
        models = kept_laws(results, setup)
        return distributions.side_by_side(models, setup) if models else None

    found = {}
    for name, draw in (*drawings.items(), ("pictures", of_pictures), ("distributions", of_distributions)):
        with left_out(f"plot {name} of {setup}", results.unreadable.append):
            figure = draw()
            if figure is not None:
                found[name] = figure
    return found


def gallery(results: Results, setup: str) -> tuple[dict[str, list[Image.Image]], list[str]]:
    """Pictures of the base model and of the first seed of each cell that kept any, and the prompts."""
    rows: dict[str, list[Image.Image]] = {}
    texts: list[str] = []
    for run in results.of(setup):
        pictures = sample_pictures(run, "final") if run.cell not in rows else []
        if pictures:
            if not rows:
                rows[BASE] = sample_pictures(run, "base")
                texts = _prompts_of(run, len(pictures))
            rows[run.cell] = pictures
    return {name: pictures for name, pictures in rows.items() if len(pictures) == len(texts)}, texts


def tree_drawings(results: Results, setup: str, width: int = 900) -> dict[str, Image.Image]:
    """The drawing of a rollout tree that the first seed of each cell left, at most so many pixels wide."""
    found: dict[str, Image.Image] = {}
    for run in results.of(setup):
        picture = _opened(run.folder / "plots" / "tree.png") if run.cell not in found else None
        if picture is not None:
            picture.thumbnail((width, picture.height))
            found[run.cell] = picture.quantize(64)  # a quarter of the bytes; the drawing has few colours
    return found


def setup_hypervolumes(results: Results, setup: str) -> pd.DataFrame:
    """`hypervolume_table` of a setup that has a diversity metric."""
    runs = results.runs_frame[results.runs_frame["setup"] == setup]
    return hypervolume_table(runs, results.reward(setup), str(results.diversity(setup)))


def figure_title(name: str) -> str:
    """What the plot of that name shows, in words."""
    kind = next((kind for kind in TITLES if name == kind or name.startswith(f"{kind}_")), None)
    title = _name(name) if kind is None else TITLES[kind].format(_name(name[len(kind) + 1 :]))
    return title[0].upper() + title[1:]


def seeds_of(frame: pd.DataFrame) -> str:
    """`3 seeds`, or `3 to 5 seeds`: of each cell of a frame that has a column `seeds`, or `seed` and a row for each."""
    cells = frame[frame["cell"] != BASE]
    counts = cells["seeds"] if "seeds" in cells else cells.groupby("cell")["seed"].nunique()
    low, high = int(counts.min()), int(counts.max())
    return f"{low} seed{'s' * (low > 1)}" if low == high else f"{low} to {high} seeds"


def plots_folder(results: Results, setup: str, folder: Path) -> Path:
    """Where the plots of a setup are below the folder of all: a folder of its own where there are several."""
    return folder / results.file_names[setup] if len(results.setups) > 1 else folder


def kept_laws(results: Results, setup: str) -> dict[tuple[str, str], pd.DataFrame]:
    """(objective, sampler) -> the distributions of the first run of each cell that kept any."""
    found: dict[tuple[str, str], pd.DataFrame] = {}
    for run in results.of(setup):
        key = (_objective(run.cell), _sampler(run.cell))
        try:
            kept = distributions.read_distributions(run.folder) if key not in found else None
        except UserError as error:
            results.unreadable.append(str(error))
            continue
        if kept is not None:
            found[key] = kept
    return found


def plot_comparison(results: Results, folder: Path) -> list[Path]:
    """Writes every plot of every setup as PNG and SVG into `folder`; returns the files."""
    written = []
    for setup in results.setups:
        below = plots_folder(results, setup, folder)
        for name, figure in comparison_figures(results, setup).items():
            with left_out(f"plot {name} of {setup}", results.unreadable.append), plt.rc_context(PAPER):
                written += [write_figure(below / f"{name}{suffix}", figure) for suffix in (".png", ".svg")]
    return written


def _prompts_of(run: RecordedRun, count: int) -> list[str]:
    if run.evals is None:
        return [f"prompt {i}" for i in range(count)]
    return [str(p) for p in run.evals.drop_duplicates("prompt_index").sort_values("prompt_index")["prompt"][:count]]


def _panels(
    curves: pd.DataFrame, x: str, panels: Sequence[str], height: float, smooth: int, note: str = "", title: str = ""
) -> Figure:
    """Two panels a row, each below its name, over one axis; `title` is of the legend, `note` of the whole."""
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
            axis.set_title(_name(metric), fontsize=7)
            _few_ticks(axis, whole=x == "iteration")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis in axes.flat[max(0, len(panels) - 2) : len(panels)]:  # the lowest of each column
            axis.set_xlabel(_name(x))
            axis.tick_params(labelbottom=True)
        if note:
            figure.suptitle(note, fontsize=6)
        del look[BASE]
        several = curves.groupby("cell")["seed"].nunique().max() > 1
        spread = f"mean and range, n = {seeds_of(curves)}" if several else "n = 1 seed"
        _legend(figure, look, lines=True, title=title + spread)
    return figure


def _over_seeds(part: pd.DataFrame, x: str, metric: str, smooth: int) -> tuple[np.ndarray, np.ndarray]:
    """Running means of each seed's curve where all seeds have one: x [N] and values [seeds, N].

    Seeds reach the same x after different numbers of iterations, so that between them only x can be shared.
    """
    curves = []
    for _, of_seed in part.dropna(subset=[metric]).groupby("seed", sort=False):
        in_order = of_seed.sort_values("iteration")
        enough = max(1, smooth // 2) if len(in_order) > smooth else 1
        mean = in_order[metric].rolling(smooth, min_periods=enough).mean()
        curves.append((in_order[x].to_numpy(dtype=np.float64)[enough - 1 :], mean.to_numpy(dtype=np.float64)[enough - 1 :]))
    if not curves:
        return np.empty(0), np.empty((1, 0))
    first, last = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    across = np.unique(np.clip(np.concatenate([c[0] for c in curves]), first, last)) if last >= first else np.empty(0)
    return across, np.stack([np.interp(across, *curve) for curve in curves])


def _cross(axis: Axes, point: pd.Series, look: Look) -> None:
    """A point with its intervals; an unbounded one has no bar."""
    errors: dict[str, Any] = {}
    for c in ("x", "y"):
        low, high = point[c] - point[f"{c}_lower"], point[f"{c}_upper"] - point[c]
        if np.isfinite([low, high]).all():
            errors[f"{c}err"] = [[low], [high]]
    # The base model's interval is over prompts, the others' over seeds: it must not look like theirs.
    base: dict[str, Any] = {"markersize": 8, "ecolor": "#bbbbbb", "zorder": 1}
    style = base if look.marker == "*" else {}
    style |= {"markeredgecolor": "white", "markeredgewidth": 0.4}  # parts marks that lie on one another
    axis.errorbar(point["x"], point["y"], **errors, color=look.color, marker=look.marker, elinewidth=0.7, **style)


def _legend(figure: Figure, look: dict[str, Look], *, lines: bool = False, front: bool = False, title: str = "") -> None:
    """Below the plot, what it shows, the colours of objectives, and the markers (or lines) of samplers."""
    colors: dict[str, Line2D] = {}
    shapes: dict[str, Line2D] = {}
    for cell in (c for c in look if c != BASE):
        style: dict[str, Any] = {"linestyle": look[cell].line} if lines else {"linestyle": "", "marker": look[cell].marker}
        objective, sampler = _objective(cell), _sampler(cell)
        colors.setdefault(objective, Line2D([], [], color=look[cell].color, linewidth=3, label=legend_name(objective)))
        shapes.setdefault(sampler, Line2D([], [], color="#555555", label=legend_name(sampler), **style))
    if BASE in look:
        style = {"linestyle": look[BASE].line} if lines else {"linestyle": "", "marker": "*", "markersize": 6}
        shapes[BASE] = Line2D([], [], color="black", label=BASE, **style)
    if front:
        shapes["front"] = Line2D([], [], color="#777777", label="front")
    wide = min(4, max(len(colors), len(shapes)))
    lines_of_legend = [
        several[i : i + wide]
        for several in (list(colors.values()), list(shapes.values()))
        for i in range(0, len(several), wide)
    ]
    # Matplotlib fills a legend column by column.
    handles = [
        line[column] if column < len(line) else Line2D([], [], linestyle="", label="")
        for column in range(wide)
        for line in lines_of_legend
    ]
    style = {"ncols": wide, "handlelength": 1.8, "columnspacing": 1.0, "title_fontsize": 6}
    figure.legend(handles=handles, loc="outside lower center", title=title, **style)


def _objective(cell: str) -> str:
    return cell.partition(" x ")[0]


def _sampler(cell: str) -> str:
    return cell.partition(" x ")[2]


def sign(frame: pd.DataFrame, metric: str) -> float:
    """1, or -1 where lower is better, so that higher is better after multiplying."""
    return -1.0 if (frame.loc[frame["metric"] == metric, "higher_is_better"] == False).any() else 1.0  # noqa: E712


def _name(column: str) -> str:
    return NAMES.get(column, column.replace("_", " "))


def _titled(frame: pd.DataFrame, metric: str) -> str:
    """The metric's name, and where better is if that is below."""
    return _name(metric) + (" (lower is better)" if sign(frame, metric) < 0 else "")


def _few_ticks(axis: Axes, whole: bool = False) -> None:
    """Labels that do not touch in half a column: `50k` for 50000."""
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=whole))
    if axis.get_xlim()[1] >= 1e4:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _wrapped(text: str, width: int, lines: int = 5) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))
