"""The alarms of a run: a destroyed model, a reward that rises while independent metrics get worse, and modes that died."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from alignbench.records.record import MetricRecord
from alignbench.statistics import ONE_SIDED_LEVEL, holm

MODES_COVERED = "modes_covered"
"""The metric of backbones with known distributions: the share of the target's modes that a model draws, for each prompt."""
MODES_DIED = "modes of the target died"
"""How the alarm about it begins."""
ROUNDING = 1e-6
"""Falls of a share of modes up to this are rounding."""


class Alarm(NamedTuple):
    """One alarm.

    Attributes:
        metric: the metric that got worse; the reward itself if the reward fell.
        sentence: the sentence of the record.
    """

    metric: str
    sentence: str


def alarms(metrics: Mapping[str, MetricRecord], rewards: Sequence[str]) -> list[str]:
    """The sentences of `raised`."""
    return [alarm.sentence for alarm in raised(metrics, rewards)]


def raised(metrics: Mapping[str, MetricRecord], rewards: Sequence[str]) -> list[Alarm]:
    """Finds a destroyed model, and rewards that rise while independent metrics get worse.

    "Rose", "fell" and "worse" are one-sided tests at ONE_SIDED_LEVEL, corrected by Holm's method for the number of trained
    rewards and for the number of independent metrics that have a direction. If no independent metric got worse, the probability
    of an alarm about one is at most that level, however many metrics there are.
    """
    rose = corrected({name: metrics[name].p_rise for name in rewards})
    fell = corrected({name: _opposite(metrics[name].p_rise) for name in rewards})
    judged = judged_metrics(metrics)
    worse = corrected({n: _opposite(m.p_rise) if m.higher_is_better else m.p_rise for n, m in judged.items()})
    found = []
    for name in rewards:
        change = metrics[name].difference.value
        if fell[name] < ONE_SIDED_LEVEL:
            fall = f"{name} fell by {-(change or 0):.3f} although it was trained on"
            found.append(Alarm(name, f"{fall}; a lower learning rate may save the model"))
        if rose[name] < ONE_SIDED_LEVEL:
            for metric, record in judged.items():
                if worse[metric] < ONE_SIDED_LEVEL:
                    went = f"{metric} went from {record.base.value:.3f} to {record.final.value:.3f}"
                    found.append(Alarm(metric, f"{name} rose by {change:.3f} while {went}"))
    return found


def judged_metrics(metrics: Mapping[str, MetricRecord]) -> dict[str, MetricRecord]:
    """The metrics that were not trained on and have a direction."""
    return {name: m for name, m in metrics.items() if m.role == "judge" and m.higher_is_better is not None}


def mode_alarms(evals: pd.DataFrame) -> list[str]:
    """A sentence where modes of the target died: where the trained model draws fewer of them than the base model for a prompt.

    Backbones with known distributions measure this share exactly, so that this is no test and chance has no part in it.

    Args:
        evals: the scores of both models, with the columns phase, prompt_index, metric and value.
    """
    rows = evals[evals["metric"] == MODES_COVERED]
    shares = rows.pivot_table(index="prompt_index", columns="phase", values="value")
    if not {"base", "final"} <= set(shares.columns):
        return []
    died = int((shares["final"] < shares["base"] - ROUNDING).sum())
    if not died:
        return []
    base, final = shares["base"].mean(), shares["final"].mean()
    drawn = f"on average the base model draws {100 * base:.0f} % of a target's modes, the trained model {100 * final:.0f} %"
    return [f"{MODES_DIED} for {died} of {len(shares)} prompts: {drawn}"]


def about_dead_modes(sentence: str) -> bool:
    """Whether it is an alarm of `mode_alarms`, also of an older version's."""
    return MODES_DIED in sentence or " modes died for the prompt " in sentence


def corrected(p_values: Mapping[str, float | None]) -> dict[str, float]:
    """Corrects p values by Holm's method; a test that could not be done (None) becomes NaN, which is below no level."""
    known = [np.nan if p is None else p for p in p_values.values()]
    return dict(zip(p_values, holm(known).tolist(), strict=True))


def _opposite(p: float | None) -> float | None:
    """p of the opposite one-sided test."""
    return None if p is None else 1 - p
