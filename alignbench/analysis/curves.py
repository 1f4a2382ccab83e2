"""Compares methods as curves: their metrics at equal reward, and the cost of a reward.

A run's curve consists of the evaluations along its training. A method's value at a reward level is taken where its reward first
reaches the level, by linear interpolation between the evaluations before and after. Methods are then compared at levels of
equal reward, paired by seed. A run that never reaches a level has no value there, and is counted.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from alignbench.analysis.contrasts import corrected
from alignbench.evaluation.curve import by_prompt
from alignbench.evaluation.onset import LEAST_EVALUATIONS, Onset, onset
from alignbench.statistics import Interval, difference, first_reached, hypervolume, mean_interval, one_sample

ROWS = "model_rows"
LEVELS = (0.25, 0.5, 0.75, 0.9)
"""Default reward levels, as fractions of the way from the base model's reward to the best method's mean of best rewards."""


class RunCurve(NamedTuple):
    """The evaluations along the training of one run.

    Attributes:
        method: the name under which runs are compared; strengths of one objective may share it.
        strength: label of the strength; empty for a method without a sweep.
        seed: seed of the run.
        points: a row for each evaluation, in the order of the training: metric -> mean over prompts, with `model_rows`.
    """

    method: str
    strength: str
    seed: int
    points: pd.DataFrame


def point_at(points: pd.DataFrame, reward: str, level: float) -> pd.Series | None:
    """Interpolates a curve where its reward first reaches a level; None if it never does.

    Args:
        points: a row for each evaluation; the first is that of the base model.
        reward: name of the column with the reward.
        level: the reward level.
    """
    place = first_reached(points[reward].to_numpy(dtype=np.float64), level)
    if place is None:
        return None
    before, after, share = place
    if before == after:
        return points.iloc[after]
    interpolated: pd.Series = points.iloc[before] + share * (points.iloc[after] - points.iloc[before])
    return interpolated


def reward_levels(curves: Sequence[RunCurve], reward: str, shares: Sequence[float] = LEVELS) -> list[float]:
    """Chooses reward levels between the base model's reward and what the best method reaches, averaged over seeds.

    Args:
        curves: the curves of all runs.
        reward: name of the reward.
        shares: the levels as fractions of the way.

    Returns:
        The levels in the order of the shares; an empty list if no method gains reward.
    """
    base = float(np.mean([curve.points[reward].iloc[0] for curve in curves]))
    best: dict[tuple[str, str], list[float]] = {}
    for curve in curves:
        best.setdefault((curve.method, curve.strength), []).append(float(curve.points[reward].max()))
    top = max(float(np.mean(values)) for values in best.values())
    return [base + share * (top - base) for share in shares] if top > base else []


def common_level(curves: Sequence[RunCurve], reward: str) -> float | None:
    """Finds the highest reward that every method reaches with every seed, each at its strength with the highest reward.

    Returns:
        The level; None if it is not above the base model's reward.
    """
    best: dict[tuple[str, int], float] = {}
    for curve in curves:
        key = (curve.method, curve.seed)
        best[key] = max(best.get(key, -np.inf), float(curve.points[reward].max()))
    base = float(np.mean([curve.points[reward].iloc[0] for curve in curves]))
    lowest = min(best.values())
    return lowest if lowest > base else None


def at_levels(curves: Sequence[RunCurve], reward: str, levels: Sequence[float], metrics: Sequence[str]) -> pd.DataFrame:
    """Computes the metrics of each run at each reward level, and the model rows that it took.

    Returns:
        A row for each run, level and metric, with method, strength, seed, level, metric, value. The value is NaN if the run
        does not reach the level.

    Raises:
        ValueError: a curve has fewer than two evaluations.
    """
    rows = []
    for curve in curves:
        if len(curve.points) < LEAST_EVALUATIONS:
            raise ValueError(f"{curve.method}, seed {curve.seed}: a curve needs at least two evaluations")
        for level in levels:
            point = point_at(curve.points, reward, level)
            rows += [
                (curve.method, curve.strength, curve.seed, level, metric, np.nan if point is None else float(point[metric]))
                for metric in (*metrics, ROWS)
            ]
    return pd.DataFrame(rows, columns=["method", "strength", "seed", "level", "metric", "value"])


def best_strengths(table: pd.DataFrame, directions: Mapping[str, bool | None]) -> pd.DataFrame:
    """Chooses the best strength of each method: for each seed, the one with the best mean over the other seeds.

    No run is therefore evaluated by a choice that it made itself. With a single seed, the choice is that of the seed itself.
    The best strength for `model_rows` is the one with the fewest.

    Args:
        table: from `at_levels`.
        directions: metric -> whether a higher value is better.

    Returns:
        The table with one row for each method, seed, level and metric.
    """
    rows = []
    for (method, level, metric), part in table.groupby(["method", "level", "metric"], sort=False):
        wide = part.pivot(index="strength", columns="seed", values="value")
        sign = 1.0 if directions.get(str(metric)) is True else -1.0
        for seed in wide.columns:
            others = wide.drop(columns=seed) if wide.shape[1] > 1 else wide
            reached = others.notna().mean(axis=1)
            score = (sign * others.mean(axis=1)).where(reached == reached.max(), -np.inf).fillna(-np.inf)
            strength = score.index[int(np.argmax(score.to_numpy()))]
            rows.append((method, strength, seed, level, metric, wide.loc[strength, seed]))
    return pd.DataFrame(rows, columns=list(table.columns))


def equal_reward_differences(table: pd.DataFrame) -> pd.DataFrame:
    """Computes differences between methods at equal reward, paired by seed.

    Args:
        table: from `at_levels` with one strength per method, or from `best_strengths`.

    Returns:
        A row for each level, metric and pair of methods, with the difference, its interval over the seeds that reach the level
        with both methods, the numbers `reached_first` and `reached_second` of all `seeds`, p of the two-sided t test, `p_holm`
        corrected for all rows of the metric, and the number of `tests`. p is NaN if fewer than two seeds reach the level with
        both, or if their differences are equal.
    """
    rows = []
    for (level, metric), part in table.groupby(["level", "metric"], sort=False):
        of_method = {str(m): rows.set_index("seed")["value"] for m, rows in part.groupby("method", sort=False)}
        for first, second in combinations(of_method, 2):
            a, b = of_method[first].align(of_method[second])
            apart = difference(a.to_numpy(), b.to_numpy())
            interval = mean_interval(apart)
            rows.append(
                {"level": level, "metric": metric, "first": first, "second": second}
                | {"difference": interval.value, "lower": interval.lower, "upper": interval.upper, "n": interval.n}
                | {"reached_first": int(a.notna().sum()), "reached_second": int(b.notna().sum()), "seeds": len(a)}
                | {"p": one_sample(apart)}
            )
    frame = corrected(rows)
    return frame if frame.empty else frame.assign(tests=frame.groupby("metric")["p"].transform("count"))


class RowsToReward(NamedTuple):
    """The training cost of a reward level. Runs that never reach it are censored instead of being left out.

    Attributes:
        method: the method.
        level: the reward level.
        reached: the number of runs that reached the level.
        seeds: the number of all runs.
        median: model rows after which half of the runs had reached it; infinite if fewer than half ever did.
        budget: the largest number of model rows of a run.
    """

    method: str
    level: float
    reached: int
    seeds: int
    median: float
    budget: float


def rows_to_reward(curves: Sequence[RunCurve], reward: str, levels: Sequence[float]) -> list[RowsToReward]:
    """Computes the model rows until each method's runs reach each level, as the Kaplan-Meier median of equally long runs.

    For each seed, the strength is used that needs the fewest rows on the other seeds.
    """
    if not levels:
        return []
    table = best_strengths(at_levels(curves, reward, levels, []), {})
    budgets = pd.Series([curve.points[ROWS].max() for curve in curves]).groupby([c.method for c in curves]).max()
    costs = []
    groups: Any = table.groupby(["method", "level"], sort=False)
    for (method, level), part in groups:
        rows = part["value"].fillna(np.inf).sort_values().to_numpy(dtype=np.float64)
        reached, median = int(np.isfinite(rows).sum()), float(rows[(len(rows) - 1) // 2])
        costs.append(RowsToReward(str(method), float(level), reached, len(rows), median, float(budgets[str(method)])))
    return costs


def front_areas(curves: Sequence[RunCurve], reward: str, metric: str, *, higher_is_better: bool = True) -> dict[str, Interval]:
    """Computes each method's hypervolume over all its evaluations and strengths, with its interval over seeds.

    The reference point is the base model's reward and the worst value of the metric on any curve.
    """
    sign = 1.0 if higher_is_better else -1.0
    base = float(np.mean([curve.points[reward].iloc[0] for curve in curves]))
    worst = min(float((sign * curve.points[metric]).min()) for curve in curves)
    areas: dict[str, list[float]] = {}
    for method in dict.fromkeys(curve.method for curve in curves):
        for seed in sorted({curve.seed for curve in curves if curve.method == method}):
            own = pd.concat([c.points for c in curves if (c.method, c.seed) == (method, seed)])
            area = hypervolume(own[[reward, metric]].to_numpy(dtype=np.float64) * (1.0, sign), (base, worst))
            areas.setdefault(method, []).append(area)
    return {method: mean_interval(np.array(values)) for method, values in areas.items()}


def onset_frame(
    curves: Sequence[RunCurve],
    tables: Mapping[tuple[str, str, int], pd.DataFrame],
    reward: str,
    directions: Mapping[str, bool | None],
) -> pd.DataFrame:
    """Finds where metrics begin to fall along the training, over seeds.

    Args:
        curves: the curves of all runs.
        tables: (method, strength, seed) -> the run's evaluations by prompt.
        reward: name of the reward.
        directions: metric -> whether a higher value is better.

    Returns:
        A row for each method, strength and metric with a direction. `iteration`, `earliest` and `latest` are the median and the
        range over seeds of the evaluation with the best value. `value`, `lower`, `upper` and `n` are the fall from there to the
        end, over seeds. `over_optimised` counts the `seeds` in which the fall is significant over prompts while the reward
        rises. Runs with fewer than four prompts are left out.
    """
    rows = []
    by_method: dict[tuple[str, str], list[RunCurve]] = {}
    for curve in curves:
        by_method.setdefault((curve.method, curve.strength), []).append(curve)
    for (method, strength), runs in by_method.items():
        for metric, higher in directions.items():
            of_runs = [_onset_of(tables[method, strength, run.seed], reward, metric, higher) for run in runs]
            onsets = [each for each in of_runs if each is not None]
            if higher is None or not onsets:
                continue
            places = [each.iteration for each in onsets]
            rows.append(
                {"method": method, "strength": strength, "metric": metric}
                | {"iteration": float(np.median(places)), "earliest": min(places), "latest": max(places)}
                | mean_interval(np.array([each.fall.value for each in onsets]))._asdict()
                | {"over_optimised": sum(each.over_optimised for each in onsets), "seeds": len(onsets)}
            )
    return pd.DataFrame(rows)


def _onset_of(table: pd.DataFrame, reward: str, metric: str, higher: bool | None) -> Onset | None:
    """The onset of one run; None if it does not have the metric, or has too few prompts."""
    if metric not in set(table["metric"]):
        return None
    iterations, rewards = by_prompt(table, reward)
    _, values = by_prompt(table, metric)
    try:
        return onset(iterations, rewards, values, higher_is_better=higher is not False)
    except ValueError:
        return None
