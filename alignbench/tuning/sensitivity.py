"""How much a method depends on its settings: its score over each of them, and its best against its median trial.

Adkins et al. (2024), arXiv 2412.07165, measure sensitivity as what tuning gains over settings that are not tuned. Here the
trials of one task stand for the settings that somebody might have tried: the median trial is what half of them miss.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from alignbench.tuning.record import MethodRecord, TuningRecord
from alignbench.tuning.space import Dimension

TABLE = "trials.csv"
PARTS = 3
"""Parts of equal share into which a range is divided."""
INSIDE = 1e-9


class Sensitivity(NamedTuple):
    """A method's score over one of its settings.

    Attributes:
        setting: its dotted key.
        means: values of the setting, in words -> the mean score of the trials with such a value; NaN where there are none.
    """

    setting: str
    means: dict[str, float]


def sensitivities(method: MethodRecord, space: Sequence[Dimension]) -> list[Sensitivity]:
    """The method's score over each setting: over the thirds of a range, or over single values.

    The trial with the preset's settings is left out, since it was not drawn from the space.

    Args:
        space: what the method's trials vary, in the order of their settings.
    """
    drawn = [trial for trial in method.scored if trial.place]
    scores = np.array([trial.score for trial in drawn], dtype=np.float64)
    found = []
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
        found.append(Sensitivity(dimension.key, means))
    return found


def _part_in_words(dimension: Dimension, part: int) -> str:
    """The values that a part of a range spans: `0.001 to 0.0046`, or `0` where they are all equal."""
    low, high = (f"{dimension.value(place):.2g}" for place in (part / PARTS + INSIDE, (part + 1) / PARTS - INSIDE))
    return low if low == high else f"{low} to {high}"


def trials_table(record: TuningRecord) -> pd.DataFrame:
    """A row for each trial: objective, sampler, trial, its settings, its score, the number of scored seeds, and its error."""
    rows: list[dict[str, Any]] = []
    for method in record.methods:
        for trial in method.trials:
            key = {"objective": method.objective, "sampler": method.sampler, "trial": trial.trial}
            scored = sum(score is not None for score in trial.scores)
            rows.append({**key, **trial.settings, "score": trial.score, "seeds": scored, "error": trial.error})
    table = pd.DataFrame(rows)
    last = ["score", "seeds", "error"]
    return table[[column for column in table.columns if column not in last] + last]
