"""Answers the contrasts that were planned before a comparison was run, by a rule that was fixed with them.

A contrast asks whether one method has more of a metric than another at equal reward: at the highest reward that every run of
both reaches. Of a swept method the strength counts that does best on the other seeds. Where the interval over seeds excludes 0,
the answer is more or less. Otherwise it is that there is no difference that matters, if the seeds would have shown one in 80 %
of cases, and else that it is not known.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd

from alignbench.analysis.curves import RunCurve, at_levels, best_strengths, common_level
from alignbench.analysis.power import detectable, pooled_deviation
from alignbench.comparison.grid import Contrast
from alignbench.statistics import difference, holm, mean_interval, one_sample


class Answer(StrEnum):
    """What the seeds say about a contrast."""

    MORE = "more"
    LESS = "less"
    NONE = "no difference that matters"
    UNKNOWN = "not known"


def planned_frame(
    curves: Sequence[RunCurve],
    contrasts: Sequence[Contrast],
    reward: str,
    diversity: str | None,
    directions: Mapping[str, bool | None],
) -> pd.DataFrame:
    """Computes the planned contrasts, first minus second, paired by seed.

    Args:
        curves: the curves of all runs of a setup.
        contrasts: the contrasts. Those of which a method has no curve here, or whose metric no curve has, are left out.
        reward: name of the reward.
        diversity: the metric of contrasts that name none.
        directions: metric -> whether a higher value is better.

    Returns:
        A row for each contrast with `first`, `second`, `metric`, the reward `level` (NaN if some run of the two never rises
        above the base model), its `gain` over the base model, the difference as `value`, `lower`, `upper` and `n`, p of
        the two-sided t test, `p_holm` over all contrasts, `matters`, the smallest difference that matters, `detectable`, the
        smallest true difference that this many seeds with this spread show in 80 % of cases, and `answer`, an `Answer`.
    """
    rows: list[dict[str, Any]] = []
    for contrast in contrasts:
        metric = contrast.metric or diversity
        pair = [curve for curve in curves if curve.method in (contrast.first, contrast.second)]
        if {curve.method for curve in pair} != {contrast.first, contrast.second}:
            continue
        if metric is None or not all({metric, reward} <= set(curve.points) for curve in pair):
            continue
        level = common_level(pair, reward)
        base = float(np.mean([curve.points[reward].iloc[0] for curve in pair]))
        apart = np.array([]) if level is None else _differences(pair, contrast, reward, level, metric, directions)
        matters = contrast.matters * abs(float(np.mean([curve.points[metric].iloc[0] for curve in pair])))
        rows.append(
            {"first": contrast.first, "second": contrast.second, "metric": metric}
            | ({"level": np.nan, "gain": np.nan} if level is None else {"level": level, "gain": level - base})
            | _judged(apart, matters)
        )
    frame = pd.DataFrame(rows)
    return frame if frame.empty else frame.assign(p_holm=holm(frame["p"].to_numpy(dtype=np.float64)))


def _differences(
    pair: Sequence[RunCurve],
    contrast: Contrast,
    reward: str,
    level: float,
    metric: str,
    directions: Mapping[str, bool | None],
) -> np.ndarray:
    """First minus second at the level, for each seed that both have."""
    table = best_strengths(at_levels(pair, reward, [level], [metric]), directions)
    values = table[table["metric"] == metric].set_index("seed").groupby("method")["value"]
    first, second = values.get_group(contrast.first).align(values.get_group(contrast.second), join="inner")
    return difference(first.to_numpy(), second.to_numpy())


def _judged(apart: np.ndarray, matters: float) -> dict[str, Any]:
    """The interval of the differences, what they could have shown, and the answer."""
    interval = mean_interval(apart)
    shown = detectable(pooled_deviation([apart]), interval.n, paired=True)
    answer = Answer.UNKNOWN
    if interval.lower > 0:
        answer = Answer.MORE
    elif interval.upper < 0:
        answer = Answer.LESS
    elif shown <= matters:
        answer = Answer.NONE
    numbers = {"p": one_sample(apart), "matters": matters, "detectable": shown}
    return {**interval._asdict(), **numbers, "answer": answer}
