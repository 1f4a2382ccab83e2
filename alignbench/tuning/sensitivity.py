"""How much a method depends on its settings: its score over each of them, and its best against its median trial.

Adkins et al. (2024), arXiv 2412.07165, measure sensitivity as what tuning gains over settings that are not tuned. Here the
trials of one task stand for the settings that somebody might have tried: the median trial is what half of them miss.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from alignbench.tuning.record import MethodRecord, TuningRecord

TABLE = "trials.csv"
THIRDS = ("lower", "middle", "upper")


class Sensitivity(NamedTuple):
    """A method's score over one of its settings.

    Attributes:
        setting: its dotted key.
        thirds: the mean score of the trials in the lower, middle and upper third of the setting's range; NaN where no trial
            of a third has a score.
    """

    setting: str
    thirds: tuple[float, float, float]


def sensitivities(method: MethodRecord) -> list[Sensitivity]:
    """The method's score over each setting; the trial with the preset's settings is left out, since it was not drawn."""
    keys = list(method.trials[0].settings)
    drawn = [trial for trial in method.scored if trial.place]
    scores = np.array([trial.score for trial in drawn], dtype=np.float64)
    found = []
    for i, key in enumerate(keys):
        third = np.array([min(int(3 * trial.place[i]), 2) for trial in drawn], dtype=np.int64)
        means = [float(scores[third == part].mean()) if (third == part).any() else float("nan") for part in range(3)]
        found.append(Sensitivity(key, (means[0], means[1], means[2])))
    return found


def trials_table(record: TuningRecord) -> pd.DataFrame:
    """A row for each trial: objective, sampler, trial, its settings, its score, the number of scored seeds, and its error."""
    rows = [
        {"objective": method.objective, "sampler": method.sampler, "trial": trial.trial, **trial.settings}
        | {"score": trial.score, "seeds": sum(score is not None for score in trial.scores), "error": trial.error}
        for method in record.methods
        for trial in method.trials
    ]
    table = pd.DataFrame(rows)
    last = ["score", "seeds", "error"]
    return table[[column for column in table.columns if column not in last] + last]
