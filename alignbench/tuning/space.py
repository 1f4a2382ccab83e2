"""The search space of an objective, and the quasi-random design by which trials cover it."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from alignbench.objective import Strength

LR, UPDATES_KEY = "optimizer.lr", "updates_per_rollout"
DESIGN_SEED = 20240722
"""Scrambles the design. It is fixed, so that a tuning with more trials begins with the same ones."""
MOST_DIMENSIONS = 3


class Dimension(NamedTuple):
    """A setting that trials vary.

    Attributes:
        key: its dotted key below an objective's settings in a comparison file.
        values: where `ranged`, its two ends; otherwise all its values.
        ranged: whether it takes every value between the ends, evenly in its logarithm if both are above 0.
        zero_share: the share of trials in which it is exactly 0, which has no place on a logarithmic range.
        whole: whether it takes whole numbers alone.
    """

    key: str
    values: tuple[float, ...]
    ranged: bool = True
    zero_share: float = 0.0
    whole: bool = False

    def value(self, unit: float) -> float:
        """The value at a place of the unit interval [0, 1)."""
        if not self.ranged:
            return self.values[min(int(unit * len(self.values)), len(self.values) - 1)]
        if unit < self.zero_share:
            return 0.0
        low, high = self.values
        share = (unit - self.zero_share) / (1 - self.zero_share)
        value = low * (high / low) ** share if low > 0 else low + (high - low) * share
        return round(value) if self.whole else float(f"{value:.4g}")


def strength_dimension(strength: Strength) -> Dimension:
    """The range that an objective's declared values span; 0 keeps the share of trials that it has among the values."""
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
    """What the trials of an objective vary.

    Args:
        lr: the learning rate of its preset, at the middle of the range.
        strength: its declared trade-off, if it has one.
        lr_factor: how far the range of learning rates goes, as a factor to both sides.
        updates: the values of `updates_per_rollout`.
    """
    space = [Dimension(LR, (lr / lr_factor, lr * lr_factor)), Dimension(UPDATES_KEY, tuple(updates), ranged=False)]
    return [*space, strength_dimension(strength)] if strength else space


def design(trials: int) -> np.ndarray:
    """The places of the trials in the unit cube: a scrambled Halton sequence, float [trials, 3].

    The first points do not depend on how many follow, so that trials can be added. All objectives share them.
    """
    from scipy.stats import qmc

    return np.asarray(qmc.Halton(MOST_DIMENSIONS, scramble=True, rng=DESIGN_SEED).random(trials), dtype=np.float64)


def settings_at(space: Sequence[Dimension], place: Sequence[float]) -> dict[str, float]:
    """The settings of one trial: dotted key -> value."""
    return {dimension.key: dimension.value(unit) for dimension, unit in zip(space, place, strict=False)}


def nested(settings: Mapping[str, float]) -> dict[str, object]:
    """Settings by dotted key as the nested keys of a comparison file."""
    found: dict[str, object] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        level = found
        for part in path:
            level = level.setdefault(part, {})  # type: ignore[assignment]
        level[last] = value
    return found


def is_near_an_end(dimension: Dimension, value: float) -> bool:
    """Whether a value lies in the outer twentieth of a range, so that a wider one may hold a better value."""
    if not dimension.ranged or dimension.values[0] <= 0 or value <= 0:
        return False
    low, high = map(math.log, dimension.values)
    return not 0.05 <= (math.log(value) - low) / (high - low) <= 0.95
