"""Plots and picture grids of a run. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.ticker import ScalarFormatter
from PIL import Image

from alignbench import groups, laws
from alignbench.errors import UserError
from alignbench.files import refuse_links, write_atomically
from alignbench.forest import RolloutForest
from alignbench.record import Estimate, Result, read_result, read_table

if TYPE_CHECKING:
    from alignbench.diagnosis import Diagnosis
    from alignbench.evaluation import Evaluation

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TREE = Path("samples") / "tree.npz"
"""In a run's folder, the tree that is drawn."""
STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=COLORS),
}


def plot_run(folder: Path) -> list[Path]:
    """Draws the plots of a run's folder from its record alone; returns the files.

    Raises:
        UserError: the folder has no readable record.
    """
    result = read_result(folder)
    refuse_links(folder, "plots")
    written = []
    table = folder / "metrics.parquet"
    if table.is_file():
        frame = read_table(table)
        for name, figure in (("curves", curves(frame, result)), ("diagnostics", diagnostics(frame))):
            written.append(write_figure(folder / "plots" / f"{name}.png", figure))
    kept = laws.read_laws(folder)
    if kept is not None:
        title = f"{' x '.join(result.pair)}, {result.run.task}, seed {result.run.seed}"
        written.append(write_figure(folder / "plots" / "laws.png", laws.over_training(kept, title)))
    written.append(write_figure(folder / "plots" / "changes.png", changes(result)))
    if (folder / TREE).is_file():
        written.append(write_figure(folder / "plots" / "tree.png", tree(RolloutTree.read(folder / TREE))))
    return written


def curves(frame: pd.DataFrame, result: Result) -> Figure:
    """Training reward and rollout diversity against model rows, and the reward of the evaluation prompts before and after."""
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
        rows = frame["model_rows"]
        smooth = frame["reward"].rolling(8, min_periods=1).mean()
        left.plot(rows, frame["reward"], alpha=0.35, linewidth=0.8)
        left.plot(rows, smooth, color=COLORS[0], label="mean of 8 iterations")
        left.set(xlabel="model rows", ylabel="training reward", title="reward of the rollouts")
        left.legend()
        middle.plot(rows, frame["rollout_lgmd"], color=COLORS[2])
        middle.set(xlabel="model rows", ylabel="LGMD in a group", title="diversity of the rollouts")
        reward = next(m for m in result.metrics.values() if m.role == "reward")
        for x, estimate in enumerate((reward.base, reward.final)):
            if estimate.value is not None and estimate.lower is not None and estimate.upper is not None:
                error = [[estimate.value - estimate.lower], [estimate.upper - estimate.value]]
                right.errorbar([x], [estimate.value], yerr=error, fmt="o", capsize=4, color=COLORS[x])
                right.annotate(
                    f"{estimate.value:.3f}", (x, estimate.value), xytext=(8, 0), textcoords="offset points", va="center"
                )
        right.set(
            xlim=(-0.5, 1.7),
            xticks=[0, 1],
            xticklabels=["base", "trained"],
            ylabel="reward",
            title="evaluation prompts, 95 %",
        )
    return figure


def diagnostics(frame: pd.DataFrame) -> Figure:
    """Every other number of the metrics table against the iteration, a small panel each."""
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
            axis.set_title(name)
            axis.ticklabel_format(axis="y", useOffset=False)
        for axis in axes.flat[len(numeric) :]:
            axis.set_visible(False)
        figure.supxlabel("iteration", fontsize=8)
    return figure


def changes(result: Result) -> Figure:
    """Paired difference of each metric in units of the base model's half interval, so that all fit on one axis.

    A metric that is the same for all of the base model's prompts, such as the distance to it, has no such unit.
    """
    names, values, lows, highs, colors = [], [], [], [], []
    for name, metric in result.metrics.items():
        d, b = metric.difference, metric.base
        if d.value is None or d.lower is None or d.upper is None or b.lower is None or b.upper is None:
            continue
        unit = (b.upper - b.lower) / 2
        if unit == 0:
            continue
        names.append(f"{name}{' (reward)' if metric.role == 'reward' else ''}")
        values.append(d.value / unit)
        lows.append((d.value - d.lower) / unit)
        highs.append((d.upper - d.value) / unit)
        colors.append(COLORS[1] if metric.role == "reward" else COLORS[0])
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 0.35 * len(names) + 1), layout="constrained")
        for y, (value, low, high, color) in enumerate(zip(values, lows, highs, colors, strict=True)):
            axis.errorbar([value], [y], xerr=[[low], [high]], fmt="o", capsize=3, color=color)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(
            yticks=range(len(names)),
            yticklabels=names,
            xlabel="trained minus base, in half-widths of the base's 95 % interval",
        )
        axis.set_title(f"{' x '.join(result.pair)}, seed {result.run.seed}")
        axis.invert_yaxis()
    return figure


def before_after(base: "Evaluation", final: "Evaluation", reward: str, images_per_prompt: int, prompts: int = 10) -> Figure:
    """The same prompts and noise before (left) and after (right), with each picture's reward above it."""
    n, count = images_per_prompt, min(prompts, len(base.prompts))
    scores = [
        e.table[e.table.metric == reward].pivot(index="prompt_index", columns="image", values="value") for e in (base, final)
    ]
    with plt.rc_context(STYLE):
        # One picture a side: a grid of axes for every single picture takes seconds to lay out.
        size, gap = base.images.shape[1], base.images.shape[1] // 3
        width = 2 * n * size + gap
        sheet = np.full((count * (size + gap), width, 3), 255, dtype=np.uint8)
        figure, axis = plt.subplots(figsize=(3 + width / 90, count * (size + gap) / 90 + 0.4))
        figure.subplots_adjust(left=2.8 / (3 + width / 90), right=0.99, top=0.95, bottom=0.01)
        for p in range(count):
            top = p * (size + gap) + gap
            for side, found in enumerate((base, final)):
                for i in range(n):
                    left = i * size + side * (n * size + gap)
                    sheet[top : top + size, left : left + size] = found.images[p * n + i]
                    score = float(scores[side].to_numpy()[p, i])
                    axis.text(left + size / 2, top - 2, f"{score:.2f}", fontsize=6, ha="center", va="bottom")
            at = (-gap / 2, top + size / 2)
            axis.text(*at, base.prompts[p], fontsize=7, ha="right", va="center", parse_math=False)  # a price is no formula
        axis.imshow(sheet)
        axis.axis("off")
        figure.suptitle(f"base (left) and trained (right), same noise; above each picture its {reward}", fontsize=8)
    return figure


def grid(images: np.ndarray, columns: int, scale: int = 2) -> Image.Image:
    """All pictures, a prompt a column block; uint8 [N, H, W, 3], small pictures enlarged without smoothing."""
    wide = columns * max(1, 16 // columns)
    missing = -len(images) % wide
    padded = np.concatenate([images, np.full((missing, *images.shape[1:]), 255, dtype=np.uint8)])
    rows = padded.reshape(-1, wide, *images.shape[1:])
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    picture = Image.fromarray(sheet)
    return (
        picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        if images.shape[1] <= 128
        else picture
    )


class RolloutTree(NamedTuple):
    """One group's rollout as it is drawn: K leaves over T steps.

    Attributes:
        prompt: of the group. reward: the name of its reward.
        beta: the inverse temperature of q.
        stochastic: bool [T]. children: int [T], of each branch that is alive before the step.
        images: uint8 [K, H, W, 3].
        rewards: float [K], NaN where a scorer gave up.
        p: softmax of the path's log-probability, [K]. q: softmax(beta z) of the standardised reward, [K].
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
    def of(cls, forest: RolloutForest, images: np.ndarray, reward: str, beta: float, group: int = 0) -> "RolloutTree":
        """A group of a forest whose rewards are known, with the pictures of all its leaves."""
        k, this = forest.group_size, slice(group, group + 1)
        rewards = forest.by_group(forest.rewards.cpu())[this]
        here = groups.valid(rewards)
        p = groups.log_softmax(forest.path_sum(forest.old_log_prob).cpu()[this], here).exp()[0]
        q = groups.log_softmax(beta * groups.standardise(rewards), here).exp()[0]
        steps = forest.plan.steps
        plan = np.array([s.stochastic for s in steps]), np.array([s.children for s in steps])
        pictures = np.asarray(images[group * k : (group + 1) * k])
        return cls(forest.prompts[group], reward, beta, *plan, pictures, rewards[0].numpy(), p.numpy(), q.numpy())

    def write(self, file: Path) -> None:
        write_atomically(file, lambda p: np.savez_compressed(p, **self._asdict()))

    @classmethod
    def read(cls, file: Path) -> "RolloutTree":
        """What `write` wrote; raises UserError where the file is anything else."""
        try:
            with np.load(file) as found:
                kept = {name: found[name] for name in cls._fields}
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise UserError(f"{file} is no drawing of a rollout tree ({type(error).__name__}: {error})") from error
        return cls(**{name: value.item() if value.ndim == 0 else value for name, value in kept.items()})


def tree(drawn: RolloutTree) -> Figure:
    """Branches by step, pictures at the leaves with their rewards, and p and q."""
    k, steps = len(drawn.images), len(drawn.children)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, (axis, bars) = plt.subplots(
            1, 2, figsize=(8, max(2.5, 0.42 * k)), layout="constrained", width_ratios=[3, 1], sharey=True
        )
        _branches(axis, drawn)
        for leaf, image in enumerate(drawn.images):
            picture = OffsetImage(image, zoom=0.36 * 64 / drawn.images.shape[1])
            axis.add_artist(AnnotationBbox(picture, (steps + 0.35, leaf), frameon=False))
        axis.set(xlim=(-0.3, steps + 0.8), ylim=(k - 0.4, -0.6), yticks=[], xticks=range(steps + 1), xlabel="denoising step")
        splits = ", ".join(str(t) for t in np.flatnonzero(drawn.children > 1)) or "none"
        axis.set_title(f"{drawn.prompt}\n{k} leaves; splits at steps {splits}", parse_math=False)
        axis.spines["left"].set_visible(False)
        y = np.arange(k)
        bars.barh(y - 0.2, drawn.p, height=0.38, color=COLORS[0], label="p (policy)")
        bars.barh(y + 0.2, drawn.q, height=0.38, color=COLORS[1], label=f"q (target, beta {drawn.beta:.3g})")
        for leaf, (p, q, reward) in enumerate(zip(drawn.p, drawn.q, drawn.rewards, strict=True)):
            bars.text(float(max(p, q)), leaf, f" {reward:.2f}", va="center", fontsize=6)
        bars.set(xlabel="probability in the group", title=f"numbers: {drawn.reward}")
        figure.legend(*bars.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    return figure


def _branches(axis: Any, drawn: RolloutTree) -> None:
    """Lines from right to left: a parent stands at the mean height of its children."""
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


def diagnosis(found: "Diagnosis") -> Figure:
    """Everything that `diagnose` measured, with 95 % intervals."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic("AABBCC;DDDEEE", figsize=(9, 5), layout="constrained")
        places = range(len(found.distances))
        _estimates(axes["A"], places, [d.sampler for d in found.distances], found.sampler, COLORS[0])
        _estimates(axes["A"], places, [d.unshared for d in found.distances], "unshared", COLORS[1])
        axes["A"].set(xticks=places, xticklabels=[d.apart_since for d in found.distances], xlim=(-0.5, len(places) - 0.5))
        axes["A"].set(ylim=(0, None), ylabel="|z - z'| / sqrt(D)", title="distance of two leaves, by where they part")
        prefixes = [str(e.prefixes) for e in found.prefix_entropy]
        places = range(len(prefixes))
        _estimates(axes["B"], places, [e.policy for e in found.prefix_entropy], "p (policy)", COLORS[0])
        label = f"q (target, beta {found.beta:g})"
        _estimates(axes["B"], places, [e.target for e in found.prefix_entropy], label, COLORS[1])
        axes["B"].set(xticks=places, xticklabels=prefixes, xlim=(-0.5, len(places) - 0.5), ylim=(0, 1.05))
        axes["B"].set(xlabel="prefixes", ylabel="entropy / maximum", title="prefix entropy")
        variation = found.total_variation
        _estimates(axes["C"], [0, 1], [variation.leaf, variation.group], None, COLORS[0])
        axes["C"].axhline(0, color="black", linewidth=0.8)
        axes["C"].set(xticks=[0, 1], xticklabels=["single leaves", "groups"], xlim=(-0.5, 1.5), ylim=(-0.15, 1.05))
        axes["C"].set_title("total variation to unshared, at least")
        sizes = [p.k for p in found.partition]
        for name, label, color in (("sampler", found.sampler, COLORS[0]), ("unshared", "unshared", COLORS[1])):
            for axis, quantity in (("D", "bias"), ("E", "deviation")):
                values = [getattr(p, f"{name}_{quantity}") for p in found.partition]
                _estimates(axes[axis], sizes, values, label, color, linestyle="-")
        axes["D"].axhline(0, color="black", linewidth=0.8)
        axes["D"].set(xscale="log", ylabel="E log Z_hat - log Z", title="bias of log Z_hat")
        axes["E"].set(xscale="log", ylabel="deviation", title="standard deviation of log Z_hat")
        first = found.partition[0].unshared_deviation.value
        if first:
            axes["E"].set_yscale("log")
            for formatted in (axes["E"].yaxis.set_major_formatter, axes["E"].yaxis.set_minor_formatter):
                formatted(ScalarFormatter())
            guide = [first * (size / sizes[0]) ** -0.5 for size in sizes]
            axes["E"].plot(sizes, guide, color="#999999", linestyle=":", label="1 / sqrt(K)")
        for axis in ("D", "E"):
            axes[axis].axvline(found.group_size, color="#999999", linewidth=0.8)
            axes[axis].set(
                xticks=sizes, xticklabels=[str(size) for size in sizes], xlabel="K (behind the line: several groups)"
            )
            axes[axis].tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        for axis in "ABDE":
            axes[axis].legend()
        of = f"{len(found.prompts)} prompts x {found.groups} groups of {found.group_size}"
        figure.suptitle(f"{found.sampler} on {found.backbone}, {of}", fontsize=9)
    return figure


def _estimates(
    axis: Any, x: Iterable[float], estimates: Sequence[Estimate], label: str | None, color: str, linestyle: str = ""
) -> None:
    """Points with their intervals; those that cannot be told are left out."""
    known = [
        (at, e.value, e.value - e.lower, e.upper - e.value)
        for at, e in zip(x, estimates, strict=True)
        if e.value is not None and e.lower is not None and e.upper is not None
    ]
    if known:
        at, value, below, above = (list(column) for column in zip(*known, strict=True))
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "capsize": 3, "linewidth": 1, "linestyle": linestyle}
        axis.errorbar(at, value, yerr=[below, above], label=label, color=color, **style)


def write_figure(path: Path, figure: Figure) -> Path:
    """Saves and closes the figure; the file is there whole or not at all."""
    write_atomically(path, lambda p: figure.savefig(p))
    plt.close(figure)
    return path
