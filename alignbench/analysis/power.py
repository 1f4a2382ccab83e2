"""Statistical power: which difference a number of seeds can show, and how many seeds a difference needs."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import nct, t

from alignbench.statistics import difference

LEVEL, POWER = 0.05, 0.8
"""Level of the tests, and the power that counts as enough."""
MOST_SEEDS = 10_000
"""Largest number of seeds that is considered."""


def power(effect: float, deviation: float, seeds: int, *, paired: bool, level: float = LEVEL) -> float:
    """Computes the power of a two-sided t test of two methods, by the noncentral t distribution (Cohen 1988, chapter 2).

    Args:
        effect: the true difference of the means.
        deviation: standard deviation over seeds: of the differences if `paired`, otherwise of each method.
        seeds: number of seeds of each method.
        paired: whether the test is paired by seed.
        level: level of the test.

    Returns:
        The probability that the test finds the difference; 0 with fewer than two seeds.
    """
    if seeds < 2:
        return 0.0
    if deviation == 0:
        return float(effect != 0)
    degrees = seeds - 1 if paired else 2 * seeds - 2
    shift = abs(effect) / deviation * np.sqrt(seeds if paired else seeds / 2)
    bound = t.ppf(1 - level / 2, degrees)
    # For large shifts scipy's noncentral t gives NaN instead of a probability of 1.
    upper = nct.sf(bound, degrees, shift)
    lower = nct.cdf(-bound, degrees, shift)
    return float(np.nan_to_num(upper, nan=1.0) + np.nan_to_num(lower, nan=0.0))


def detectable(deviation: float, seeds: int, *, paired: bool, level: float = LEVEL, target: float = POWER) -> float:
    """Computes the smallest true difference that is found with the power `target`; infinite with fewer than two seeds.

    The other arguments are those of `power`.
    """
    if seeds < 2:
        return float("inf")
    if deviation == 0:
        return 0.0
    high = deviation
    while power(high, deviation, seeds, paired=paired, level=level) < target:
        high *= 2
    return float(brentq(lambda effect: power(effect, deviation, seeds, paired=paired, level=level) - target, 0.0, high))


def seeds_needed(effect: float, deviation: float, *, paired: bool, level: float = LEVEL, target: float = POWER) -> int | None:
    """Computes the smallest number of seeds that finds a difference with the power `target`; None above `MOST_SEEDS`.

    The other arguments are those of `power`.
    """
    if effect == 0:
        return None
    counts = range(2, MOST_SEEDS + 1)
    first = bisect_left(counts, target, key=lambda seeds: power(effect, deviation, seeds, paired=paired, level=level))
    return counts[first] if first < len(counts) else None


def pooled_deviation(samples: Sequence[np.ndarray]) -> float:
    """Computes the standard deviation over seeds, pooled over methods by their degrees of freedom.

    Args:
        samples: float [n_k] for each method; NaN values are left out.

    Returns:
        The deviation; NaN if no method has two seeds.
    """
    present = [values[~np.isnan(values)] for values in samples]
    present = [values for values in present if len(values) > 1]
    degrees = sum(len(values) - 1 for values in present)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in present)
    return float(np.sqrt(squares / degrees)) if degrees else float("nan")


def power_row(values: Mapping[str, pd.Series]) -> dict[str, float | int | None]:
    """Computes what the seeds of a comparison can show for one metric.

    Args:
        values: method -> its value for each seed.

    Returns:
        `seeds`: the smallest number of seeds of a method. `deviation` and `paired_deviation`: the pooled standard deviations
        over seeds, of a method and of the difference of two. `detectable` and `paired_detectable`: the smallest true difference
        that is found with a power of `POWER`, without a correction for several tests. `largest` and `smallest`: the largest and
        the smallest observed difference of two means. `seeds_needed`: the seeds that a paired test needs to find the smallest.
    """
    samples = [series.to_numpy(dtype=np.float64) for series in values.values()]
    seeds = min((int((~np.isnan(sample)).sum()) for sample in samples), default=0)
    aligned = [first.align(second) for first, second in combinations(values.values(), 2)]
    apart = [difference(first.to_numpy(), second.to_numpy()) for first, second in aligned]
    deviation, paired = pooled_deviation(samples), pooled_deviation(apart)
    means = [abs(float(np.nanmean(each))) for each in apart if not np.isnan(each).all()]
    largest, smallest = max(means, default=float("nan")), min(means, default=float("nan"))

    def smallest_detectable(spread: float, *, of_pairs: bool) -> float:
        return float("nan") if np.isnan(spread) else detectable(spread, seeds, paired=of_pairs)

    has_pairs = not np.isnan(smallest) and not np.isnan(paired)
    return {
        "seeds": seeds,
        "deviation": deviation,
        "paired_deviation": paired,
        "detectable": smallest_detectable(deviation, of_pairs=False),
        "paired_detectable": smallest_detectable(paired, of_pairs=True),
        "largest": largest,
        "smallest": smallest,
        "seeds_needed": seeds_needed(smallest, paired, paired=True) if has_pairs else None,
    }
