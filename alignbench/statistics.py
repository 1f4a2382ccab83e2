"""Means with intervals. Prompts are the units: pictures of one prompt are not independent of one another."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 2000
AT_ONCE = 100
"""Resamples of groups that are in memory together."""
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean with its 95 % interval, over n units."""

    value: float
    lower: float
    upper: float
    n: int


def mean_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean of one value a unit, with its percentile-bootstrap interval; NaN values are left out.

    Equal values give an interval of no width; with one value the interval is unbounded, with none all is NaN.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(known.mean())
    if len(known) == 1:
        return Interval(mean, -np.inf, np.inf, 1)
    if np.ptp(known) == 0:
        return Interval(mean, mean, mean, len(known))
    return Interval(mean, *_bootstrap([known], seed), len(known))


def mean_of_means_interval(strata: Sequence[np.ndarray], seed: int = 0) -> Interval:
    """Mean of the strata's means, each stratum resampled by itself; NaN values and strata without any other are left out."""
    known = [values[~np.isnan(values)] for values in (np.asarray(s, dtype=np.float64) for s in strata)]
    known = [values for values in known if len(values)]
    count = sum(map(len, known))
    if not known:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(np.mean([values.mean() for values in known]))
    if any(len(values) == 1 for values in known):
        return Interval(mean, -np.inf, np.inf, count)
    if all(np.ptp(values) == 0 for values in known):
        return Interval(mean, mean, mean, count)
    return Interval(mean, *_bootstrap(known, seed), count)


def _bootstrap(strata: Sequence[np.ndarray], seed: int) -> tuple[float, float]:
    found = stats.bootstrap(
        strata,
        lambda *samples, axis: np.mean([sample.mean(axis=axis) for sample in samples], axis=0),
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def interval_over_groups(statistic: Callable[..., np.ndarray], *samples: np.ndarray, seed: int = 0) -> Interval:
    """A statistic of groups of rollouts with its percentile-bootstrap interval, for these prompts.

    The groups of each prompt are drawn anew, those of each sample apart; the prompts stay. Resamples in which the statistic
    is NaN are left out.

    Args:
        statistic: of one array [B, P, n, ...] for each sample, to float [B].
        samples: float [P, n, ...], n groups for each of P prompts; n may differ from sample to sample.

    Returns:
        The statistic of the samples as they are, with n the groups of the first one.
    """
    rng = np.random.default_rng(seed)

    def resampled(sample: np.ndarray) -> np.ndarray:
        prompts, groups = sample.shape[:2]
        chosen = rng.integers(groups, size=(AT_ONCE, prompts, groups))
        return sample[np.arange(prompts)[:, None], chosen]

    value = float(statistic(*(sample[None] for sample in samples))[0])
    found = np.concatenate([statistic(*map(resampled, samples)) for _ in range(RESAMPLES // AT_ONCE)])
    known = found[~np.isnan(found)]
    n = samples[0].shape[0] * samples[0].shape[1]
    if np.isnan(value) or len(known) == 0:
        return Interval(np.nan, np.nan, np.nan, n)
    outside = (1 - CONFIDENCE) / 2
    lower, upper = np.quantile(known, [outside, 1 - outside])
    return Interval(value, float(lower), float(upper), n)
