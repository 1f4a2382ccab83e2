"""Plots and image grids of a run. The colours are those of Okabe and Ito, which colour-blind readers can distinguish."""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import ZipFile

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image
from torch import Tensor

from alignbench import groups
from alignbench.errors import RunError, UserError
from alignbench.evaluation.curve import by_prompt, read_curve
from alignbench.figures import distributions
from alignbench.files.escaping import visible
from alignbench.files.opening import open_regular
from alignbench.files.writing import refuse_links, write_atomically
from alignbench.records.distributions import read_distributions
from alignbench.records.record import Estimate, Result, read_result, visible_record
from alignbench.records.tables import read_metrics
from alignbench.rollouts.forest import RolloutForest
from alignbench.statistics import mean_interval

if TYPE_CHECKING:
    from alignbench.evaluation.evaluate import Evaluation

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHEET_PIXELS = 2**26
"""Largest number of pixels of a sheet of samples."""
SIDE, ACROSS = 256, 4096
"""Largest side of an image and largest width of a row of images in `before_after`, in pixels."""
TREE = Path("samples") / "tree.npz"
"""Place of the rollout tree in a run's folder."""
MAX_TREE_BYTES = 2**30
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


def plot_run(folder: Path, warn: Callable[[str], None] = warnings.warn) -> list[Path]:
    """Draws the plots of a run from the record in its folder; returns the files.

    Args:
        folder: folder of the run.
        warn: called with a sentence for each plot that is left out because its data cannot be read or drawn.

    Raises:
        UserError: the folder has no readable record.
        DiskError: a plot cannot be written.
    """
    result = visible_record(read_result(folder))
    refuse_links(folder, "plots")
    written: list[Path] = []

    def write(name: str, draw: Callable[[], Figure | None]) -> None:
        with left_out(f"plots/{name}.png", warn):
            figure = draw()
            if figure is not None:
                written.append(write_figure(folder / "plots" / f"{name}.png", figure))

    def of_distributions() -> Figure | None:
        kept = read_distributions(folder)
        title = f"{' x '.join(result.pair)}, {result.run.task}, seed {result.run.seed}"
        return None if kept is None else distributions.over_training(kept, title)

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


def curves(frame: pd.DataFrame, result: Result) -> Figure:
    """Draws training reward and rollout diversity over model evaluations, and the evaluation reward before and after."""
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
        rows = frame["model_rows"]
        smooth = frame["reward"].rolling(8, min_periods=1).mean()
        left.plot(rows, frame["reward"], alpha=0.35, linewidth=0.8)
        left.plot(rows, smooth, color=COLORS[0], label="mean of 8 iterations")
        left.set(xlabel="model evaluations", ylabel="training reward", title="reward of the rollouts")
        left.legend()
        if "rollout_lgmd" in frame:
            middle.plot(rows, frame["rollout_lgmd"], color=COLORS[2])
        middle.set(xlabel="model evaluations", ylabel="LGMD within groups", title="diversity of the rollouts")
        rewards = [m for m in result.metrics.values() if m.role == "reward"]
        for x, estimate in enumerate((rewards[0].base, rewards[0].final) if rewards else ()):
            if estimate.value is not None:
                right.errorbar([x], [estimate.value], yerr=error_bars(estimate), fmt="o", capsize=4, color=COLORS[x])
                right.annotate(
                    f"{estimate.value:.3f}", (x, estimate.value), xytext=(8, 0), textcoords="offset points", va="center"
                )
        right.set(
            xlim=(-0.5, 1.7),
            xticks=[0, 1],
            xticklabels=["base", "trained"],
            ylabel="reward",
            title="evaluation prompts (95 % intervals)",
        )
    return figure


def diagnostics(frame: pd.DataFrame) -> Figure | None:
    """Draws each further column of the metrics table over the iteration in a small panel; None if there is no column."""
    skipped = {
        "iteration",
        "reward",
        "rollout_lgmd",
        "model_rows",
        "model_rows_rollout",
        "model_rows_train",
        "reward_calls",
    }
    numeric = [c for c in frame.columns if c not in skipped and pd.api.types.is_numeric_dtype(frame[c])]
    if not numeric:
        return None
    columns = 4
    height = -(-len(numeric) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(height, columns, figsize=(9, 1.5 * height + 0.3), squeeze=False)
        figure.subplots_adjust(
            hspace=0.7, wspace=0.45, left=0.07, right=0.98, top=1 - 0.35 / (1.5 * height), bottom=0.5 / (1.5 * height)
        )
        for axis, name in zip(axes.flat, numeric, strict=False):
            known = frame[["iteration", name]].dropna()
            axis.plot(known["iteration"], known[name], linewidth=0.9, marker="." if len(known) < len(frame) else "")
            axis.set_title(visible(name))
            axis.ticklabel_format(axis="y", useOffset=False)
        for axis in axes.flat[len(numeric) :]:
            axis.set_visible(False)
        figure.supxlabel("iteration", fontsize=8)
    return figure


def along_training(table: pd.DataFrame, result: Result, most: int = 6) -> Figure:
    """The trained reward, independent metrics and diversity at each evaluation on validation prompts; bands are 95 %."""
    ranked = [name for name, record in result.metrics.items() if record.role == "reward"]
    ranked += [n for n, r in result.metrics.items() if r.role == "judge" and r.higher_is_better is not None and n not in ranked]
    present = set(table["metric"])
    names = [*[name for name in ranked if name in present][: most - 1], *(["path_kl"] if "path_kl" in present else [])]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            lines, columns, figsize=(2.6 * columns, 2.0 * lines), squeeze=False, constrained_layout=True, sharex=True
        )
        for axes, name in zip(grid.flat, names, strict=False):
            iterations, values = by_prompt(table, name)
            intervals = [mean_interval(of_one) for of_one in values]
            axes.plot(iterations, [i.value for i in intervals], marker="o", markersize=3)
            bounds = np.array([[i.lower, i.upper] for i in intervals])
            if np.isfinite(bounds).all():
                axes.fill_between(iterations, bounds[:, 0], bounds[:, 1], alpha=0.15, linewidth=0)
            axes.set_title(f"{name} (trained on)" if name in result.metrics and result.metrics[name].role == "reward" else name)
            axes.set_xlabel("iteration")
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        figure.suptitle(f"{' x '.join(result.pair)}, {result.run.task}: validation prompts along the training", fontsize=9)
    return figure


def changes(result: Result) -> Figure:
    """Draws the paired difference of each metric in units of the base model's half interval, so that all fit on one axis.

    A metric that is equal for all prompts of the base model, such as the distance to it, has no such unit and is left out.
    """
    names, values, bars, colors = [], [], [], []
    for name, metric in result.metrics.items():
        d, b = metric.difference, metric.base
        if d.value is None or b.lower is None or b.upper is None or b.lower == b.upper:
            continue
        unit = (b.upper - b.lower) / 2
        names.append(f"{name}{' (reward)' if metric.role == 'reward' else ''}")
        values.append(d.value / unit)
        bars.append(np.divide(error_bars(d), unit))
        colors.append(COLORS[1] if metric.role == "reward" else COLORS[0])
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 0.35 * len(names) + 1), layout="constrained")
        for y, (value, bar, color) in enumerate(zip(values, bars, colors, strict=True)):
            axis.errorbar([value], [y], xerr=bar, fmt="o", capsize=3, color=color)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(
            yticks=range(len(names)),
            yticklabels=names,
            xlabel="trained minus base, in half-widths of the base model's 95 % interval",
        )
        axis.set_title(f"{' x '.join(result.pair)}, seed {result.run.seed}")
        axis.invert_yaxis()
    return figure


def before_after(base: "Evaluation", final: "Evaluation", reward: str, images_per_prompt: int, prompts: int = 10) -> Figure:
    """Draws images of the base (left) and trained model (right) for the same prompts and noise, with their rewards."""
    n, count = images_per_prompt, min(prompts, len(base.prompts))
    scores = [
        e.table[e.table.metric == reward].pivot(index="prompt_index", columns="image", values="value") for e in (base, final)
    ]
    with plt.rc_context(STYLE):
        # One image for all: laying out separate axes for every image takes seconds.
        size = base.images.shape[1]
        factor = max(ceil(size / SIDE), ceil(2 * n * size / ACROSS))
        before, after = (_shrunk(e.images[: count * n], factor) for e in (base, final))
        size = before.shape[1]
        gap = size // 3
        width = 2 * n * size + gap
        sheet = np.full((count * (size + gap), width, 3), 255, dtype=np.uint8)
        figure, axis = plt.subplots(figsize=(3 + width / 90, count * (size + gap) / 90 + 0.4))
        figure.subplots_adjust(left=2.8 / (3 + width / 90), right=0.99, top=0.95, bottom=0.01)
        for p in range(count):
            top = p * (size + gap) + gap
            for side, drawn in enumerate((before, after)):
                for i in range(n):
                    left = i * size + side * (n * size + gap)
                    sheet[top : top + size, left : left + size] = drawn[p * n + i]
                    score = float(scores[side].to_numpy()[p, i])
                    axis.text(left + size / 2, top - 2, f"{score:.2f}", fontsize=6, ha="center", va="bottom")
            at = (-gap / 2, top + size / 2)
            axis.text(*at, visible(base.prompts[p]), fontsize=7, ha="right", va="center")
        axis.imshow(sheet)
        axis.axis("off")
        figure.suptitle(f"base model (left) and trained model (right), same noise; numbers: {visible(reward)}", fontsize=8)
    return figure


def grid(images: np.ndarray, columns: int, scale: int = 2) -> Image.Image:
    """Arranges images, uint8 [N, H, W, 3], on one sheet, with a block of columns for each prompt.

    Small images are enlarged without smoothing. Large ones are reduced by an integer factor so that the sheet has at most
    SHEET_PIXELS, which viewers and reports can open.

    Args:
        images: the images.
        columns: number of images per prompt.
        scale: factor by which small images are enlarged.
    """
    wide = columns * max(1, 16 // columns)
    missing = -len(images) % wide
    pixels = (len(images) + missing) * images.shape[1] * images.shape[2]
    images = _shrunk(images, ceil(sqrt(pixels / SHEET_PIXELS)))
    padded = np.concatenate([images, np.full((missing, *images.shape[1:]), 255, dtype=np.uint8)])
    rows = padded.reshape(-1, wide, *images.shape[1:])
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    image = Image.fromarray(sheet)
    return (
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        if images.shape[1] <= 128 and pixels * scale**2 <= SHEET_PIXELS
        else image
    )


def _shrunk(images: np.ndarray, factor: int) -> np.ndarray:
    """Images, uint8 [N, H, W, 3], reduced by an integer factor; unchanged if it is at most 1."""
    return images if factor <= 1 else np.stack([np.asarray(Image.fromarray(image).reduce(factor)) for image in images])


class RolloutTree(NamedTuple):
    """What is needed to draw the rollout of one group, with K leaves and T steps.

    Attributes:
        prompt: prompt of the group.
        reward: name of the reward.
        beta: inverse temperature of q.
        stochastic: bool [T], whether each step is stochastic.
        children: int [T], number of children of each branch at each step.
        images: uint8 [K, H, W, 3].
        rewards: float [K], NaN for images that could not be scored.
        p: softmax of the path log-probabilities, [K].
        q: softmax(beta R~), the target, [K].
    """

    prompt: str
    reward: str
    beta: float
    stochastic: np.ndarray
    children: np.ndarray
    images: np.ndarray
    rewards: np.ndarray
    p: np.ndarray
    q: np.ndarray

    @classmethod
    def of(
        cls,
        forest: RolloutForest,
        images: np.ndarray,
        reward: str,
        beta: float,
        group: int = 0,
        target_reward: Tensor | None = None,
    ) -> "RolloutTree":
        """Takes one group of a scored forest.

        Args:
            images: uint8 [G * K, H, W, 3], of all leaves of the forest.
            target_reward: R~ of the target, [G, K]; by default `RolloutForest.target_reward`.
        """
        k, this = forest.group_size, slice(group, group + 1)
        rewards = forest.by_group(forest.rewards.cpu())[this]
        here = groups.valid(rewards)
        p = groups.log_softmax(forest.path_sum(forest.old_log_prob).cpu()[this], here).exp()[0]
        target = forest.target_reward if target_reward is None else target_reward
        q = groups.boltzmann_log_prob(target.cpu()[this], beta, here).exp()[0]
        steps = forest.plan.steps
        plan = np.array([s.stochastic for s in steps]), np.array([s.children for s in steps])
        of_group = np.asarray(images[group * k : (group + 1) * k])
        return cls(forest.prompts[group], reward, beta, *plan, of_group, rewards[0].numpy(), p.numpy(), q.numpy())

    def write(self, file: Path) -> None:
        write_atomically(file, lambda p: np.savez_compressed(p, **self._asdict()))

    @classmethod
    def read(cls, file: Path) -> "RolloutTree":
        """Reads a file from `write`; raises UserError for any other file."""
        try:
            with open_regular(file) as opened:
                size = sum(part.file_size for part in ZipFile(opened).infolist())
                if size > MAX_TREE_BYTES:
                    raise ValueError(f"it takes {size:,} bytes in memory")
                with np.load(opened, allow_pickle=False) as found:
                    kept = {name: found[name] for name in cls._fields}
            read = cls(**{name: value.item() if value.ndim == 0 else value for name, value in kept.items()})
            read._check()
        except UserError:
            raise
        except Exception as error:  # zipfile, zlib and numpy raise their own errors for damaged bytes
            raise UserError(f"{file} is not a drawing of a rollout tree ({type(error).__name__}: {error})") from None
        return read

    def _check(self) -> None:
        """Raises an error if the shapes or types of the parts do not match."""
        k, steps = len(self.images), len(self.children)
        fits = (
            isinstance(self.prompt, str)
            and isinstance(self.reward, str)
            and isinstance(self.beta, float)
            and self.images.ndim == 4
            and self.images.shape[3] == 3
            and self.images.dtype == np.uint8
            and min(self.images.shape) > 0
            and self.stochastic.shape == (steps,)
            and all(values.shape == (k,) and values.dtype.kind == "f" for values in (self.rewards, self.p, self.q))
            and self.children.dtype.kind in "iu"
            and bool((self.children >= 1).all())
            and k % math.prod(map(int, self.children)) == 0
        )
        if not fits:
            raise ValueError("the shapes or types of its parts do not match")


def tree(drawn: RolloutTree) -> Figure:
    """Draws the branches over the steps, images at the leaves with their rewards, and p and q."""
    k, steps = len(drawn.images), len(drawn.children)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, (axis, bars) = plt.subplots(
            1, 2, figsize=(8, max(2.5, 0.42 * k)), layout="constrained", width_ratios=[3, 1], sharey=True
        )
        _branches(axis, drawn)
        for leaf, image in enumerate(drawn.images):
            leaf_image = OffsetImage(image, zoom=0.36 * 64 / drawn.images.shape[1])
            axis.add_artist(AnnotationBbox(leaf_image, (steps + 0.35, leaf), frameon=False))
        axis.set(xlim=(-0.3, steps + 0.8), ylim=(k - 0.4, -0.6), yticks=[], xticks=range(steps + 1), xlabel="denoising step")
        splits = ", ".join(str(t) for t in np.flatnonzero(drawn.children > 1)) or "none"
        axis.set_title(f"{visible(drawn.prompt)}\n{k} leaves; splits at steps {splits}")
        axis.spines["left"].set_visible(False)
        y = np.arange(k)
        bars.barh(y - 0.2, drawn.p, height=0.38, color=COLORS[0], label="p (policy)")
        bars.barh(y + 0.2, drawn.q, height=0.38, color=COLORS[1], label=f"q (target, beta = {drawn.beta:.3g})")
        for leaf, (p, q, reward) in enumerate(zip(drawn.p, drawn.q, drawn.rewards, strict=True)):
            bars.text(float(max(p, q)), leaf, f" {reward:.2f}", va="center", fontsize=6)
        bars.set(xlabel="probability within the group", title=f"numbers: {visible(drawn.reward)}")
        figure.legend(*bars.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure


def _branches(axis: Any, drawn: RolloutTree) -> None:
    """Draws lines from right to left; a parent is at the mean height of its children."""
    heights = np.arange(len(drawn.images), dtype=np.float64)
    for t in reversed(range(len(drawn.children))):
        of_parent = heights.reshape(-1, int(drawn.children[t]))
        heights = of_parent.mean(1)
        color, width = (COLORS[1], 1.1) if drawn.stochastic[t] else ("#999999", 0.8)
        for parent, children in zip(heights, of_parent, strict=True):
            for child in children:
                axis.plot([t, t + 1], [parent, child], color=color, linewidth=width)
    axis.plot([], [], color=COLORS[1], label="stochastic")
    axis.plot([], [], color="#999999", label="deterministic")
    axis.legend(loc="upper left", fontsize=6)


def error_bars(estimate: Estimate) -> np.ndarray:
    """How far the interval extends below and above the value, [2, 1]; NaN, which is not drawn, if it is unbounded."""
    if estimate.value is None or estimate.lower is None or estimate.upper is None:
        return np.full((2, 1), np.nan)
    return np.maximum([[estimate.value - estimate.lower], [estimate.upper - estimate.value]], 0.0)


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
