"""Means with intervals. Prompts are the units: pictures of one prompt are not independent of one another."""

from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 2000
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
