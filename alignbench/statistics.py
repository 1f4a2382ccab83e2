"""Means with intervals. Prompts are the units: pictures of one prompt are not independent of one another."""

from collections.abc import Callable
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
    found = stats.bootstrap(
        (known,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(known))


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
