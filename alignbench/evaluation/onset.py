"""Where over-optimisation of one run sets in: an independent metric gets worse while the trained reward goes on rising."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pandas as pd

from alignbench.evaluation.curve import by_prompt
from alignbench.records.record import Estimate, OnsetRecord
from alignbench.statistics import ONE_SIDED_LEVEL, Interval, holm, mean_interval, rise_test

LEAST_EVALUATIONS, LEAST_PROMPTS = 2, 4
RESAMPLES = 1000
"""Number of bootstrap resamples of the prompts."""


class Onset(NamedTuple):
    """Where a metric turns while the trained reward goes on rising.

    Attributes:
        iteration: the evaluation at which the metric is best.
        lower, upper: the 95 % interval of that evaluation over prompts.
        fall: how far the metric is below its best at the end, with its interval; measured on prompts that did not choose
            the best evaluation.
        p: of the one-sided test that the metric does not get worse from its best to the end.
        reward_rises: whether the reward is higher at the end than at the metric's best.
    """

    iteration: int
    lower: int
    upper: int
    fall: Interval
    p: float
    reward_rises: bool

    @property
    def over_optimised(self) -> bool:
        """Whether the fall is beyond chance while the reward rises; of a single metric."""
        return self.reward_rises and self.p < ONE_SIDED_LEVEL


def onset(
    iterations: Sequence[int], rewards: np.ndarray, metric: np.ndarray, *, higher_is_better: bool = True, seed: int = 0
) -> Onset:
    """Finds where over-optimisation of one run sets in.

    The best of many evaluations looks better than it is. So the prompts are halved: one half chooses the best evaluation, the
    fall from there to the end is measured on the other, and the other way round.

    Args:
        iterations: of the evaluations, in order; at least two.
        rewards: the trained reward, float [evaluations, prompts].
        metric: an independent metric or diversity, float [evaluations, prompts].
        higher_is_better: the direction of the metric.
        seed: seed of the bootstrap.

    Raises:
        ValueError: fewer than two evaluations, or fewer than four prompts with a value.
    """
    usable = ~np.isnan(metric).any(0) & ~np.isnan(rewards).any(0)
    rewards, metric = rewards[:, usable], metric[:, usable] * (1.0 if higher_is_better else -1.0)
    count = metric.shape[1]
    if len(iterations) < LEAST_EVALUATIONS or count < LEAST_PROMPTS:
        raise ValueError(f"an onset needs two evaluations and four prompts, got {len(iterations)} and {count}")
    best = int(metric.mean(1).argmax())
    halves = np.arange(count) % 2 == 0
    falls, gains = np.empty(count), np.empty(count)
    for chosen_by in (halves, ~halves):
        peak = int(metric[:, chosen_by].mean(1).argmax())
        falls[~chosen_by] = metric[peak, ~chosen_by] - metric[-1, ~chosen_by]
        gains[~chosen_by] = rewards[-1, ~chosen_by] - rewards[peak, ~chosen_by]
    draws = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    peaks = np.array([metric[:, chosen].mean(1).argmax() for chosen in draws])
    lower, upper = np.percentile(peaks, [2.5, 97.5], method="nearest").astype(int)
    fall = mean_interval(falls)
    rises = float(gains.mean()) > 0
    return Onset(iterations[best], iterations[lower], iterations[upper], fall, rise_test([falls]), rises)


def onsets(table: pd.DataFrame, rewards: Sequence[str], directions: Mapping[str, bool | None]) -> list[OnsetRecord]:
    """The onset for each trained reward and independent metric of one run.

    A metric counts as over-optimised beyond chance after Holm's correction for the number of metrics.

    Args:
        table: the run's curve, see `evaluation.curve`.
        rewards: the rewards that were trained on.
        directions: independent metric -> whether higher is better; those without a direction are left out.

    Returns:
        Nothing where the curve has fewer than two evaluations; metrics with a value for fewer than four prompts are left out.
    """
    found = []
    present = set(table["metric"])
    metrics = {name: higher for name, higher in directions.items() if higher is not None and name in present}
    for reward in rewards:
        if reward not in present:
            continue
        iterations, gained = by_prompt(table, reward)
        own: dict[str, Onset] = {}
        for name, higher in metrics.items():
            with suppress(ValueError):
                own[name] = onset(iterations, *_paired(table, reward, name, gained), higher_is_better=higher)
        corrected = holm([each.p for each in own.values()])
        found += [
            OnsetRecord(
                reward=reward,
                metric=name,
                iteration=each.iteration,
                lower=each.lower,
                upper=each.upper,
                fall=Estimate.of(each.fall),
                over_optimised=each.reward_rises and bool(p < ONE_SIDED_LEVEL),
            )
            for (name, each), p in zip(own.items(), corrected, strict=True)
        ]
    return found


def _paired(table: pd.DataFrame, reward: str, metric: str, rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reward and metric on the prompts that both have: float [evaluations, prompts] each."""
    first, second = (sorted(set(table.loc[table["metric"] == name, "prompt_index"])) for name in (reward, metric))
    common = sorted({*first} & {*second})
    return rewards[:, np.searchsorted(first, common)], by_prompt(table, metric)[1][:, np.searchsorted(second, common)]
