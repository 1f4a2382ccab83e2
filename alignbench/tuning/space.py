"""The search space of an objective, and the quasi-random design with which trials cover it."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from alignbench.objective import Strength

LR, UPDATES_KEY = "optimizer.lr", "updates_per_rollout"
DESIGN_SEED = 20240722
"""Seed of the design. It is fixed, so that a tuning with more trials begins with the same trials."""
MOST_DIMENSIONS = 3
"""Number of dimensions of the design; a search space uses the first of them."""


class Dimension(NamedTuple):
    """A setting that trials vary.

    Attributes:
        key: dotted key of the setting below an objective in a comparison file.
        values: the two ends of a range, or else all values.
        ranged: whether the setting takes every value between two ends, evenly in its logarithm if both ends are above 0.
        zero_share: the share of trials in which the setting is exactly 0, which is not on a logarithmic range.
        whole: whether the setting takes only whole numbers.
    """

    key: str
    values: tuple[float, ...]
    ranged: bool = True
    zero_share: float = 0.0
    whole: bool = False

    def value(self, unit: float) -> float:
        """Returns the value at a point of the unit interval [0, 1)."""
        if not self.ranged:
            return self.values[min(int(unit * len(self.values)), len(self.values) - 1)]
        if unit < self.zero_share:
            return 0.0
        low, high = self.values
        share = (unit - self.zero_share) / (1 - self.zero_share)
        value = low * (high / low) ** share if low > 0 else low + (high - low) * share
        return round(value) if self.whole else float(f"{value:.4g}")


def strength_dimension(strength: Strength) -> Dimension:
    """Makes the range of an objective's declared strengths. 0 keeps the share of trials that it has among the values."""
    values, key = sorted(strength.values), f"objective.{strength.setting}"
    whole = all(isinstance(value, int) for value in values)
    above = [value for value in values if value > 0]
    if len(set(values)) == 1:
        return Dimension(key, (values[0],), ranged=False)
    if values[0] == 0 and len(set(above)) > 1:
        return Dimension(key, (above[0], above[-1]), zero_share=1 - len(above) / len(values), whole=whole)
    if values[0] == 0:
        return Dimension(key, tuple(values), ranged=False)
    return Dimension(key, (values[0], values[-1]), whole=whole)


def search_space(lr: float, strength: Strength | None, lr_factor: float, updates: Sequence[int]) -> list[Dimension]:
    """Chooses the settings that the trials of an objective vary.

    Args:
        lr: the learning rate of its preset, which is the middle of the range.
        strength: the setting that it declares as its strength, if any.
        lr_factor: the factor from the middle to either end of the range of learning rates.
        updates: the values of `updates_per_rollout`.
    """
    space = [Dimension(LR, (lr / lr_factor, lr * lr_factor)), Dimension(UPDATES_KEY, tuple(updates), ranged=False)]
    return [*space, strength_dimension(strength)] if strength else space


def design(trials: int) -> np.ndarray:
    """Returns the points of the trials in the unit cube, float [trials, 3]: a scrambled Halton sequence.

    The first points do not depend on how many follow, so trials can be added. All objectives have the same points.
    """
    from scipy.stats import qmc

    return np.asarray(qmc.Halton(MOST_DIMENSIONS, scramble=True, rng=DESIGN_SEED).random(trials), dtype=np.float64)


def settings_at(space: Sequence[Dimension], place: Sequence[float]) -> dict[str, float]:
    """Returns the settings of the trial at a point of the design: dotted key -> value."""
    return {dimension.key: dimension.value(unit) for dimension, unit in zip(space, place, strict=False)}


def nested(settings: Mapping[str, float]) -> dict[str, object]:
    """Converts settings with dotted keys to the nested keys of a comparison file."""
    tree: dict[str, object] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        level = tree
        for part in path:
            level = level.setdefault(part, {})  # type: ignore[assignment]
        level[last] = value
    return tree


def is_near_an_end(dimension: Dimension, value: float) -> bool:
    """Tells whether a value lies in the outer twentieth of a range, so that a wider range may contain a better value."""
    if not dimension.ranged or dimension.values[0] <= 0 or value <= 0:
        return False
    low, high = map(math.log, dimension.values)
    return not 0.05 <= (math.log(value) - low) / (high - low) <= 0.95
