"""The drawing of one rollout: its branches, the images at its leaves, and the probabilities p and q."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Patch
from torch import Tensor

from alignbench import groups
from alignbench.errors import UserError
from alignbench.figures.metric_names import axis_name
from alignbench.figures.sheets import squares
from alignbench.figures.style import COLORS, STYLE
from alignbench.files.escaping import visible
from alignbench.files.opening import open_regular
from alignbench.files.writing import write_atomically
from alignbench.rollouts.forest import RolloutForest

TREE = Path("samples") / "tree.npz"
"""Place of the rollout tree in a run's folder."""
MAX_TREE_BYTES = 2**30
LEAF, SPACING = 128 / 150, 0.95
"""Side of the image at a leaf, 128 pixels of a plot, and the distance between leaves, in inches."""
PREDICTED = 96 / 150
"""Largest side of the image that the model predicts at a split, in inches."""
WIDTH = 9.6
"""Width of the drawing in inches: 1440 pixels."""
AXIS_WIDTH = 6.7
"""About the width of the axis with the branches, in inches."""
NOTHING = np.zeros((0, 1, 1, 3), dtype=np.uint8)


class RolloutTree(NamedTuple):
    """What is needed to draw the rollout of one group, with K leaves and T steps.

    Attributes:
        prompt: prompt of the group.
        reward: name of the reward.
        beta: inverse temperature of q; NaN for an objective that has no target q.
        stochastic: bool [T], whether each step is stochastic.
        children: int [T], number of children of each branch at each step.
        images: uint8 [K, H, W, 3].
        rewards: float [K], NaN for images that could not be scored.
        p: softmax of the path log-probabilities, [K].
        q: softmax(beta R~), the target, [K]; NaN where there is none.
        predicted: uint8 [P, H, W, 3], the images that the model predicts where branches split, in the order of `split_states`.
            Drawings of earlier versions have none.
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
    predicted: np.ndarray = NOTHING

    @classmethod
    def of(
        cls,
        forest: RolloutForest,
        images: np.ndarray,
        reward: str,
        beta: float,
        group: int = 0,
        target_reward: Tensor | None = None,
        predicted: np.ndarray = NOTHING,
    ) -> "RolloutTree":
        """Takes one group of a scored forest.

        Args:
            images: uint8 [G * K, H, W, 3], of all leaves of the forest, or their clips [G * K, F, H, W, 3].
            predicted: images or clips of the latents that `predictions` gives for the group.
            target_reward: R~ of the target, [G, K]; by default `RolloutForest.target_reward`.
        """
        k, this = forest.group_size, slice(group, group + 1)
        rewards = forest.by_group(forest.rewards.cpu())[this]
        here = groups.valid(rewards)
        p = groups.log_softmax(forest.path_sum(forest.old_log_prob).cpu()[this], here).exp()[0]
        target = forest.target_reward if target_reward is None else target_reward
        q = torch.full_like(p, torch.nan)
        if not math.isnan(beta):
            q = groups.boltzmann_log_prob(target.cpu()[this], beta, here).exp()[0]
        steps = forest.plan.steps
        plan = np.array([s.stochastic for s in steps]), np.array([s.children for s in steps])
        of_group = squares(np.asarray(images[group * k : (group + 1) * k]))
        at_splits = squares(np.asarray(predicted))
        return cls(forest.prompts[group], reward, beta, *plan, of_group, rewards[0].numpy(), p.numpy(), q.numpy(), at_splits)

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
                    kept = {name: found[name] for name in cls._fields if name in found or name not in cls._field_defaults}
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
            and self.predicted.ndim == 4
            and self.predicted.shape[3] == 3
            and self.predicted.dtype == np.uint8
            and len(self.predicted) in (0, len(self.split_states))
        )
        if not fits:
            raise ValueError("the shapes or types of its parts do not match")

    @property
    def split_states(self) -> list[tuple[int, int]]:
        """The step and the branch, counted from 0, of each state at which branches split."""
        return _split_states(len(self.images), self.children)


def _split_states(leaves: int, children: np.ndarray) -> list[tuple[int, int]]:
    return [
        (int(t), branch) for t in np.flatnonzero(children > 1) for branch in range(leaves // math.prod(map(int, children[t:])))
    ]


def predictions(forest: RolloutForest, group: int = 0) -> Tensor:
    """The final latents x - sigma v that the model predicts at the states at which a group's branches split.

    Returns:
        float32 [P, *latent], in the order of `RolloutTree.split_states`; empty if the training does not visit all these states.
    """
    children = np.array([step.children for step in forest.plan.steps])
    splits = torch.from_numpy(np.flatnonzero(children > 1)).to(forest.rows.device)
    here = (forest.row_group == group) & torch.isin(forest.row_step, splits)
    if int(here.sum()) != len(_split_states(forest.group_size, children)):
        here = torch.zeros_like(here)
    sigma = forest.row_sigma[here].view(-1, *[1] * (forest.states.ndim - 1))
    return forest.states[forest.rows[here]] - sigma * forest.row_velocity[here]


def tree(drawn: RolloutTree, until: int | None = None) -> Figure:
    """Draws the branches over the steps, images at the leaves with their rewards, and p and, where there is one, q.

    Where branches split is the image that the model predicts there.

    Args:
        until: the steps that have been taken, for a tree that is still growing; None for all of them and what they give.
    """
    k, steps = len(drawn.images), len(drawn.children)
    has_target, is_grown = not math.isnan(drawn.beta), until is None
    taken = steps if until is None else until
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, (axis, bars) = plt.subplots(
            1, 2, figsize=(WIDTH, max(2.5, SPACING * k + 1.2)), layout="constrained", width_ratios=[3.4, 1], sharey=True
        )
        beside = (LEAF + 0.1) / AXIS_WIDTH  # the share of the axis that the leaves take
        axis.set(xlim=(-0.35, steps + (steps + 0.35) * beside / (1 - beside)), ylim=(k - 0.4, -0.6), yticks=[])
        axis.set(xticks=range(steps + 1), xlabel="denoising step")
        heights = _branches(axis, drawn, taken)
        nearest = min(np.diff(np.flatnonzero(drawn.children > 1)), default=steps)
        side = min(PREDICTED, 0.9 * nearest * AXIS_WIDTH * (1 - beside) / (steps + 0.35))
        for (t, branch), image in zip(drawn.split_states, drawn.predicted, strict=False):
            if t <= taken:
                _add_image(axis, image, side, (t, heights[t][branch]))
        for leaf, image in enumerate(drawn.images if taken == steps else ()):
            _add_image(axis, image, LEAF, (steps, leaf), at_its_left=True)
        splits = ", ".join(str(t) for t in np.flatnonzero(drawn.children > 1)) or "none"
        what = "; at each split the image that the model predicts there" if len(drawn.predicted) else ""
        axis.set_title(f"{visible(drawn.prompt)}\n{k} leaves; splits at steps {splits}{what}")
        axis.spines["left"].set_visible(False)
        y = np.arange(k)
        shift = 0.2 if has_target else 0.0
        of_policy = bars.barh(y - shift, drawn.p, height=0.38, color=COLORS[0], label="p (policy)")
        of_target: Sequence[Patch] = ()
        if has_target:
            label = f"q (target, beta = {drawn.beta:.3g})"
            of_target = bars.barh(y + shift, drawn.q, height=0.38, color=COLORS[1], label=label)
        for leaf, (p, q, reward) in enumerate(zip(drawn.p, drawn.q, drawn.rewards, strict=True)):
            end = float(max(p, q) if has_target else p)
            bars.text(end, leaf, f" {reward:.2f}", va="center", fontsize=6, alpha=float(is_grown))
        bars.set(xlabel="probability within the group", title=f"beside the bars: {visible(axis_name(drawn.reward))}")
        figure.legend(*bars.get_legend_handles_labels(), loc="outside lower right", ncols=2)
        for bar in (*of_policy, *of_target):  # after the legend, which shows them; the layout stays that of the grown tree
            bar.set_alpha(float(is_grown))
    return figure


def _add_image(axis: Axes, image: np.ndarray, side: float, at: tuple[float, float], *, at_its_left: bool = False) -> None:
    """Draws an image around a point, or with the point in the middle of its left side.

    Args:
        image: uint8 [S, S, 3].
        side: its side in inches.
    """
    box = OffsetImage(image, zoom=72 * side / image.shape[0], interpolation="antialiased")
    alignment = (0.0, 0.5) if at_its_left else (0.5, 0.5)
    axis.add_artist(AnnotationBbox(box, at, frameon=False, pad=0, box_alignment=alignment))


def _branches(axis: Axes, drawn: RolloutTree, taken: int) -> list[np.ndarray]:
    """Draws the lines of the first `taken` steps; a parent is at the mean height of its children.

    Returns:
        The heights of the branches before each step, and of the leaves.
    """
    heights = [np.arange(len(drawn.images), dtype=np.float64)]
    for children in reversed(drawn.children):
        heights.insert(0, heights[0].reshape(-1, int(children)).mean(1))
    for t in range(taken):
        color, width = (COLORS[1], 1.1) if drawn.stochastic[t] else ("#999999", 0.8)
        of_parent = heights[t + 1].reshape(-1, int(drawn.children[t]))
        for parent, of_children in zip(heights[t], of_parent, strict=True):
            for child in of_children:
                axis.plot([t, t + 1], [parent, child], color=color, linewidth=width)
    axis.plot([], [], color=COLORS[1], label="stochastic")
    axis.plot([], [], color="#999999", label="deterministic")
    axis.legend(loc="upper left", fontsize=6)
    return heights
