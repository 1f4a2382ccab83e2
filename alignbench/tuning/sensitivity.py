"""How much a method depends on its settings: its score against each setting, and its best trial against the median one.

Adkins et al. (2024), arXiv 2412.07165, measure sensitivity by what tuning gains over untuned settings. Here the trials of one
task represent the settings that someone might have tried; half of them score below the median trial.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from alignbench.tuning.record import MethodRecord, TuningRecord
from alignbench.tuning.space import Dimension

TABLE = "trials.csv"
PARTS = 3
"""Number of equal parts into which a range is divided."""
INSIDE = 1e-9
"""Distance from the border of a part at which its end values are taken."""


class Sensitivity(NamedTuple):
    """A method's score against one of its settings.

    Attributes:
        setting: dotted key of the setting.
        means: values of the setting, in words -> the mean score of the trials with these values; NaN if there are none.
    """

    setting: str
    means: dict[str, float]


def sensitivities(method: MethodRecord, space: Sequence[Dimension]) -> list[Sensitivity]:
    """Computes the method's mean score against each setting, for the thirds of a range or for single values.

    The trial with the preset's settings is left out, because it is not a point of the design.

    Args:
        method: the method with its trials.
        space: the settings that its trials vary, in the order of their settings.
    """
    drawn = [trial for trial in method.scored if trial.place]
    scores = np.array([trial.score for trial in drawn], dtype=np.float64)
    by_setting = []
    for i, dimension in enumerate(space):
        if dimension.ranged:
            groups = np.array([min(int(PARTS * trial.place[i]), PARTS - 1) for trial in drawn], dtype=np.float64)
            labels = {_part_in_words(dimension, part): float(part) for part in range(PARTS)}
        else:
            groups = np.array([trial.settings[dimension.key] for trial in drawn], dtype=np.float64)
            labels = {f"{value:g}": float(value) for value in dimension.values}
        means = {
            label: float(scores[groups == group].mean()) if (groups == group).any() else float("nan")
            for label, group in labels.items()
        }
        by_setting.append(Sensitivity(dimension.key, means))
    return by_setting


def _part_in_words(dimension: Dimension, part: int) -> str:
    """The values that a part of a range spans, such as `0.001 to 0.0046`, or `0` if they are all equal."""
    low, high = (f"{dimension.value(place):.2g}" for place in (part / PARTS + INSIDE, (part + 1) / PARTS - INSIDE))
    return low if low == high else f"{low} to {high}"


def trials_table(record: TuningRecord) -> pd.DataFrame:
    """Makes a table with a row for each trial: objective, sampler, trial, settings, score, scored seeds and error."""
    rows: list[dict[str, Any]] = []
    for method in record.methods:
        for trial in method.trials:
            key = {"objective": method.objective, "sampler": method.sampler, "trial": trial.trial}
            scored = sum(score is not None for score in trial.scores)
            rows.append({**key, **trial.settings, "score": trial.score, "seeds": scored, "error": trial.error})
    table = pd.DataFrame(rows)
    last = ["score", "seeds", "error"]
    return table[[column for column in table.columns if column not in last] + last]
