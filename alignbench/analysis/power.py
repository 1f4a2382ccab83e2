"""How large a difference a number of seeds can show, and how many seeds a difference needs."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import nct, t

from alignbench.statistics import difference

LEVEL, POWER = 0.05, 0.8
MOST_SEEDS = 10_000


def power(effect: float, deviation: float, seeds: int, *, paired: bool, level: float = LEVEL) -> float:
    """Probability that a two-sided t test of two methods finds a true difference (noncentral t; Cohen 1988, chapter 2).

    Args:
        effect: the true difference of the means.
        deviation: standard deviation over seeds; of the differences where `paired`, else of each method.
        seeds: of each method, at least 2.
        level: of the test.
    """
    if seeds < 2:
        return 0.0
    if deviation == 0:
        return float(effect != 0)
    degrees = seeds - 1 if paired else 2 * seeds - 2
    shift = abs(effect) / deviation * np.sqrt(seeds if paired else seeds / 2)
    bound = t.ppf(1 - level / 2, degrees)
    # Far out scipy's noncentral t gives NaN where the probability has long been 1.
    upper = nct.sf(bound, degrees, shift)
    lower = nct.cdf(-bound, degrees, shift)
    return float(np.nan_to_num(upper, nan=1.0) + np.nan_to_num(lower, nan=0.0))


def detectable(deviation: float, seeds: int, *, paired: bool, level: float = LEVEL, wanted: float = POWER) -> float:
    """The smallest true difference that so many seeds show with the wanted power; infinite with fewer than two seeds."""
    if seeds < 2:
        return float("inf")
    if deviation == 0:
        return 0.0
    high = deviation
    while power(high, deviation, seeds, paired=paired, level=level) < wanted:
        high *= 2
    return float(brentq(lambda effect: power(effect, deviation, seeds, paired=paired, level=level) - wanted, 0.0, high))


def seeds_needed(effect: float, deviation: float, *, paired: bool, level: float = LEVEL, wanted: float = POWER) -> int | None:
    """The fewest seeds of each method that show a true difference with the wanted power; None beyond `MOST_SEEDS`."""
    if effect == 0:
        return None
    counts = range(2, MOST_SEEDS + 1)
    first = bisect_left(counts, wanted, key=lambda seeds: power(effect, deviation, seeds, paired=paired, level=level))
    return counts[first] if first < len(counts) else None


def pooled_deviation(samples: Sequence[np.ndarray]) -> float:
    """Standard deviation over seeds, pooled over methods by their degrees of freedom; NaN where no method has two seeds."""
    known = [values[~np.isnan(values)] for values in samples]
    known = [values for values in known if len(values) > 1]
    degrees = sum(len(values) - 1 for values in known)
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in known)
    return float(np.sqrt(squares / degrees)) if degrees else float("nan")


def power_row(values: Mapping[str, pd.Series]) -> dict[str, float | int | None]:
    """What the seeds of a comparison can tell of one metric.

    Args:
        values: method -> its value for each seed.

    Returns:
        `seeds` of each method, the fewest; `deviation` and `paired_deviation`: over seeds, pooled, of a method and of the
        difference of two; `detectable` and `paired_detectable`: the smallest true difference that so many seeds show with a
        power of `POWER`, uncorrected for further tests; `largest`: the largest difference of two means that was observed;
        `smallest`: the smallest; `seeds_needed`: seeds that a true difference of that size needs, paired.
    """
    samples = [series.to_numpy(dtype=np.float64) for series in values.values()]
    seeds = min((int((~np.isnan(sample)).sum()) for sample in samples), default=0)
    aligned = [first.align(second) for first, second in combinations(values.values(), 2)]
    apart = [difference(first.to_numpy(), second.to_numpy()) for first, second in aligned]
    deviation, paired = pooled_deviation(samples), pooled_deviation(apart)
    means = [abs(float(np.nanmean(each))) for each in apart if not np.isnan(each).all()]
    largest, smallest = max(means, default=float("nan")), min(means, default=float("nan"))

    def least(spread: float, *, of_pairs: bool) -> float:
        return float("nan") if np.isnan(spread) else detectable(spread, seeds, paired=of_pairs)

    known = not np.isnan(smallest) and not np.isnan(paired)
    return {
        "seeds": seeds,
        "deviation": deviation,
        "paired_deviation": paired,
        "detectable": least(deviation, of_pairs=False),
        "paired_detectable": least(paired, of_pairs=True),
        "largest": largest,
        "smallest": smallest,
        "seeds_needed": seeds_needed(smallest, paired, paired=True) if known else None,
    }
