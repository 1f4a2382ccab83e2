"""The drawing of one rollout: its branches, the images at its leaves, and the probabilities p and q."""

import math
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
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
LEAF, SPACING = 0.6, 0.78
"""Side of the image at a leaf, and the distance between leaves, in inches."""


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
            images: uint8 [G * K, H, W, 3], of all leaves of the forest, or their clips [G * K, F, H, W, 3].
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
    """Draws the branches over the steps, images at the leaves with their rewards, and p and, where there is one, q."""
    k, steps = len(drawn.images), len(drawn.children)
    has_target = not math.isnan(drawn.beta)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, (axis, bars) = plt.subplots(
            1, 2, figsize=(8, max(2.5, SPACING * k + 1.2)), layout="constrained", width_ratios=[3, 1], sharey=True
        )
        _branches(axis, drawn)
        for leaf, image in enumerate(drawn.images):
            leaf_image = OffsetImage(image, zoom=72 * LEAF / drawn.images.shape[1], interpolation="nearest")
            axis.add_artist(AnnotationBbox(leaf_image, (steps + 0.45, leaf), frameon=False))
        axis.set(xlim=(-0.3, steps + 1.0), ylim=(k - 0.4, -0.6), yticks=[], xticks=range(steps + 1), xlabel="denoising step")
        splits = ", ".join(str(t) for t in np.flatnonzero(drawn.children > 1)) or "none"
        axis.set_title(f"{visible(drawn.prompt)}\n{k} leaves; splits at steps {splits}")
        axis.spines["left"].set_visible(False)
        y = np.arange(k)
        shift = 0.2 if has_target else 0.0
        bars.barh(y - shift, drawn.p, height=0.38, color=COLORS[0], label="p (policy)")
        if has_target:
            bars.barh(y + shift, drawn.q, height=0.38, color=COLORS[1], label=f"q (target, beta = {drawn.beta:.3g})")
        for leaf, (p, q, reward) in enumerate(zip(drawn.p, drawn.q, drawn.rewards, strict=True)):
            bars.text(float(max(p, q) if has_target else p), leaf, f" {reward:.2f}", va="center", fontsize=6)
        bars.set(xlabel="probability within the group", title=f"beside the bars: {visible(axis_name(drawn.reward))}")
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
