"""What all plots of a comparison share: size, colours, markers, legends, and what axes call a metric."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import font_manager, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from alignbench.comparison.results import BASE
from alignbench.figures.metric_names import axis_name
from alignbench.figures.style import COLORS, STYLE, legend_name
from alignbench.statistics import non_dominated

USUAL_LINES, LINE_HEIGHT = 4, 0.125
"""Lines of a legend for which figures have room, and the height of a further one, in inches."""
COLUMN = 3.3
"""Inches: the width of one column."""
PAPER: Any = {**STYLE, "font.size": 7, "legend.fontsize": 6, "xtick.labelsize": 6, "ytick.labelsize": 6, "savefig.dpi": 300}
PAPER |= {"svg.hashsalt": "alignbench", "lines.markersize": 4.5, "lines.linewidth": 1.0}
PAPER |= {"figure.max_open_warning": 0}  # all of a setup are drawn before the first is written
PALETTE = (*COLORS[:-1], "#882255", "#999933", "#332288")
"""That of `plots` without black, and three of Paul Tol's muted colours."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
FILLINGS = ("full", "none", "left")
"""Fillings of markers; the second and third are for colours that are taken."""
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
LETTER, BESIDE = 0.6, 3.8
"""Width of a letter of a legend, and of what a column has beside its text, in font sizes."""
SMOOTHED = 8
"""Iterations over which curves are averaged."""
TITLES = {
    "curve_trade_off": "{} against reward",
    "trade_off": "Diversity against reward",
    "hypervolume": "Hypervolume: the area that a model dominates, where 1 is the best run in both",
    "against": "Reward and diversity against {}",
    "curves_by": f"Training against {{}}: running means of {SMOOTHED} iterations",
    "diagnostics": "Diagnostics of the training",
    "prompts": "{} of each prompt, trained minus base",
    "profile": "Share of scores above each threshold of {}",
    "images": "Images: same prompt and noise in each column",
    "reward_kl": "Expected reward against KL to the base model; no distribution can be above the line",
    "distributions": "Distributions of target, base and trained models for one prompt; first seed of each method",
}
"""Titles of plots, by how their names begin; the rest of a name is the metric or column that it shows."""


class Look(NamedTuple):
    """How a cell is drawn."""

    color: str
    marker: str
    line: Any
    fill: Any = "full"
    """How its marker is filled, so that two objectives of one colour differ."""


def looks(cells: Sequence[str]) -> dict[str, Look]:
    """The colour, marker and line of each cell `objective x sampler`; the base model is a black star."""
    objectives = list(dict.fromkeys(objective_of(c) for c in cells if c != BASE))
    samplers = list(dict.fromkeys(sampler_of(c) for c in cells if c != BASE))
    look = {BASE: Look("#000000", "*", (0, (1, 1)))}
    for cell in cells:
        if cell != BASE:
            i, j = objectives.index(objective_of(cell)), samplers.index(sampler_of(cell))
            fill = FILLINGS[i // len(PALETTE) % len(FILLINGS)]
            look[cell] = Look(PALETTE[i % len(PALETTE)], MARKERS[j % len(MARKERS)], LINES[j % len(LINES)], fill)
    return look


def metric_pairs(cells: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """A row per cell: x and y with lower and upper, and whether it is on the front. Cells that lack a value are left out."""
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


def draw_point(axis: Axes, point: pd.Series, look: Look) -> None:
    """Draws a point with its intervals; an unbounded interval has no bar."""
    errors: dict[str, Any] = {}
    for c in ("x", "y"):
        low, high = point[c] - point[f"{c}_lower"], point[f"{c}_upper"] - point[c]
        if np.isfinite([low, high]).all():
            errors[f"{c}err"] = [[low], [high]]
    # The base model's interval is over prompts, the others' over seeds: it must not look like theirs.
    base: dict[str, Any] = {"markersize": 8, "ecolor": "#bbbbbb", "zorder": 1}
    style = base if look.marker == "*" else {"fillstyle": look.fill}
    if look.fill == "full":
        style |= {"markeredgecolor": "white", "markeredgewidth": 0.4}  # separates marks that lie on one another
    axis.errorbar(point["x"], point["y"], **errors, color=look.color, marker=look.marker, elinewidth=0.7, **style)


def add_legend(figure: Figure, look: dict[str, Look], *, lines: bool = False, front: bool = False, title: str = "") -> None:
    """Draws, below the plot, a title, the colours of objectives, and the markers (or lines) of samplers."""
    colors: dict[str, Line2D] = {}
    shapes: dict[str, Line2D] = {}
    for cell in (c for c in look if c != BASE):
        style: dict[str, Any] = {"linestyle": look[cell].line} if lines else {"linestyle": "", "marker": look[cell].marker}
        objective, sampler = objective_of(cell), sampler_of(cell)
        colors.setdefault(objective, Line2D([], [], color=look[cell].color, linewidth=3, label=legend_name(objective)))
        shapes.setdefault(sampler, Line2D([], [], color="#555555", label=legend_name(sampler), **style))
    if BASE in look:
        style = {"linestyle": look[BASE].line} if lines else {"linestyle": "", "marker": "*", "markersize": 6}
        shapes[BASE] = Line2D([], [], color="black", label=BASE, **style)
    if front:
        shapes["front"] = Line2D([], [], color="#777777", label="no other is better in both")
    longest = max(len(str(handle.get_label())) for handle in (*colors.values(), *shapes.values()))
    size = font_manager.FontProperties(size=rcParams["legend.fontsize"]).get_size_in_points()
    fitting = int(figure.get_figwidth() * 72 / (size * (LETTER * longest + BESIDE)))
    wide = max(1, min(4, max(len(colors), len(shapes)), fitting))
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
    make_room(figure, len(lines_of_legend))


def make_room(figure: Figure, lines: int) -> None:
    """Makes a figure higher by the lines of its legend that are beyond `USUAL_LINES`, so that its axes keep their height."""
    figure.set_figheight(figure.get_figheight() + LINE_HEIGHT * max(0, lines - USUAL_LINES))


def objective_of(cell: str) -> str:
    """The objective in the name of a cell, with the name of its part."""
    return cell.partition(" x ")[0]


def sampler_of(cell: str) -> str:
    """The sampler in the name of a cell."""
    return cell.partition(" x ")[2]


def sign(frame: pd.DataFrame, metric: str) -> float:
    """1, or -1 where lower is better, so that higher is better after multiplying."""
    return -1.0 if (frame.loc[frame["metric"] == metric, "higher_is_better"] == False).any() else 1.0  # noqa: E712


def seeds_of(frame: pd.DataFrame) -> str:
    """`3 seeds`, or `3 to 5 seeds`, per cell of a frame that has a column `seeds`, or `seed` with a row for each."""
    cells = frame[frame["cell"] != BASE]
    counts = cells["seeds"] if "seeds" in cells else cells.groupby("cell")["seed"].nunique()
    low, high = int(counts.min()), int(counts.max())
    return f"{low} seed{'s' * (low != 1)}" if low == high else f"{low} to {high} seeds"


def axis_title(frame: pd.DataFrame, metric: str) -> str:
    """The metric's name, with a note if lower is better."""
    return axis_name(metric) + (" (lower is better)" if sign(frame, metric) < 0 else "")


def say_better(axis: Axes, *, higher: bool) -> None:
    """Says above the axes where more reward and more diversity are."""
    arrow = "\N{NORTH EAST ARROW}" if higher else "\N{SOUTH EAST ARROW}"
    axis.set_title(f"better {arrow}", loc="right", fontsize=7, color="#555555")


def few_ticks(axis: Axes, whole: bool = False) -> None:
    """Gives the x axis so few ticks that labels do not touch in half a column: `50k` for 50000."""
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=whole))
    if axis.get_xlim()[1] >= 1e4:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def figure_title(name: str) -> str:
    """The title of the plot of that name."""
    kind = next((kind for kind in TITLES if name == kind or name.startswith(f"{kind}_")), None)
    title = axis_name(name) if kind is None else TITLES[kind].format(axis_name(name[len(kind) + 1 :]))
    return title[0].upper() + title[1:]
