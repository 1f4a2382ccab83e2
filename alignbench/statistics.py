"""Means with intervals, tests and fronts.

The unit of a single run is the prompt: pictures of one prompt are not independent of one another. The unit of a comparison
is the seed: prompts of one training run are not independent of one another either.

Intervals are Student's t throughout, with a jackknife or bootstrap standard error where the statistic is not a mean. On a few
units a percentile bootstrap is too narrow, and BCa hardly less so; `docs/reading-a-report.md` has the simulation. Values that
differ by rounding alone count as equal, and equal values have no interval and no t test: nothing is known about what varies.

Interquartile mean, probability of improvement and performance profiles are those of Agarwal et al. 2021 (arXiv 2108.13264).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

RESAMPLES = 2000
AT_ONCE = 100
"""Resamples of groups that are in memory together."""
CONFIDENCE = 0.95
ROUNDING = 1e-12
"""Relative to the larger of two float64 numbers, a difference that arithmetic alone can make."""
SMALLEST_P = float(np.finfo(np.float64).tiny)
"""No test gives 0: that is a p value too small for a float64."""


class Interval(NamedTuple):
    """A mean with its 95 % interval, over n units."""

    value: float
    lower: float
    upper: float
    n: int


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """first - second, where rounding alone gives 0; NaN where either is."""
    a, b = np.broadcast_arrays(np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64))
    with np.errstate(invalid="ignore", over="ignore"):  # infinity minus itself is NaN
        apart = a - b
        return np.where(np.abs(apart) <= ROUNDING * np.maximum(np.abs(a), np.abs(b)), 0.0, apart)


def equal_values(values: np.ndarray) -> bool:
    """Whether they differ by rounding at most; NaN values do not count."""
    known = _known(values)
    return len(known) == 0 or float(known.max()) - float(known.min()) <= ROUNDING * float(np.abs(known).max())


def mean_interval(values: np.ndarray) -> Interval:
    """Mean of one value a unit (a prompt, or a seed) with Student's t interval; NaN values are left out.

    Unbounded with one value and where all are equal; all is NaN where there is no value.
    """
    return mean_of_means_interval([values])


def mean_of_means_interval(strata: Sequence[np.ndarray]) -> Interval:
    """Mean of the strata's means, with Welch's (1947) degrees of freedom; NaN values and strata without any other are left out.

    Unbounded where a stratum has one value, and where all values of each are equal.
    """
    known = [values for values in map(_known, strata) if len(values)]
    count = sum(map(len, known))
    if not known:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean, error, degrees = _mean_of_means(known)
    half = _half(error, degrees) if degrees else np.inf
    return Interval(mean, mean - half, mean + half, count)


def rise_test(strata: Sequence[np.ndarray]) -> float:
    """p of the one-sided t test that the mean of the strata's means is above 0; 1 minus it is that of being below.

    Student 1908 for one stratum, with Welch's (1947) degrees of freedom for several. Values without spread have no t: they have
    the p of the sign test, so that few equal values prove nothing. NaN values are left out; NaN where it cannot be told, as
    with one value in a stratum.
    """
    known = [values for values in map(_known, strata) if len(values)]
    if not known or any(len(values) == 1 for values in known):
        return float("nan")
    mean, error, degrees = _mean_of_means(known)
    if degrees:
        return max(float(stdtr(degrees, -mean / error)), SMALLEST_P)
    by_chance = max(float(0.5 ** sum(map(len, known))), SMALLEST_P)
    return 0.5 if mean == 0 else by_chance if mean > 0 else 1 - by_chance


def _known(values: np.ndarray) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    return np.asarray(found[~np.isnan(found)])


def _half(error: float, degrees: float) -> float:
    """Half the width of Student's interval."""
    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * error


def _mean_of_means(strata: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean, standard error and degrees of freedom; 0 degrees where no spread is known. Of values without NaN."""
    scale = max(float(np.abs(values).max()) for values in strata)
    if not 0 < scale < np.inf:
        return float(np.mean([values.mean() for values in strata])), np.nan, 0.0
    scaled = [values / scale for values in strata]  # so that squares neither overflow nor vanish
    mean = scale * float(np.mean([values.mean() for values in scaled]))
    if any(len(values) == 1 for values in strata) or all(map(equal_values, strata)):
        return mean, np.nan, 0.0
    variances = [0.0 if equal_values(values) else values.var(ddof=1) / len(values) for values in scaled]
    parts = np.array(variances) / sum(variances)
    degrees = 1 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, strata, strict=True))
    return mean, scale * float(np.sqrt(sum(variances))) / len(strata), float(degrees)


def interval_over_groups(statistic: Callable[..., np.ndarray], *samples: np.ndarray, seed: int = 0) -> Interval:
    """A statistic of groups of rollouts with Student's t interval for these prompts, by a bootstrap standard error.

    The groups of each prompt are drawn anew, those of each sample apart; the prompts stay. Resamples in which the statistic
    is NaN are left out. Unbounded with one group a prompt, and where all resamples give the same.

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
    found = _known(np.concatenate([statistic(*map(resampled, samples)) for _ in range(max(1, RESAMPLES // AT_ONCE))]))
    prompts, n = samples[0].shape[:2]
    if np.isnan(value) or len(found) == 0:
        return Interval(np.nan, np.nan, np.nan, prompts * n)
    groups = min(sample.shape[1] for sample in samples)
    if groups == 1 or len(found) == 1 or equal_values(found):
        return Interval(value, -np.inf, np.inf, prompts * n)
    # Values drawn with replacement from n have a variance of (n - 1) / n of the values' own.
    error = float(found.std(ddof=1)) * (groups / (groups - 1)) ** 0.5
    half = _half(error, prompts * (groups - 1))
    return Interval(value, value - half, value + half, prompts * n)


def interquartile_mean(values: np.ndarray) -> float:
    """Mean of the middle half: a quarter of the values, rounded down, is cut off at each end; NaN where there is none."""
    known = np.asarray(values, dtype=np.float64).ravel()
    known = np.sort(known[~np.isnan(known)])  # scipy's trim_mean takes ten times as long, and a bootstrap asks 2,000 times
    cut = len(known) // 4
    return float(known[cut : len(known) - cut].mean()) if len(known) else float("nan")


def interval_over_runs(scores: np.ndarray, statistic: Callable[[np.ndarray], float] = interquartile_mean) -> Interval:
    """A statistic of scores [runs, prompts] with Student's t interval over runs, by the jackknife (Tukey 1958).

    Whole runs are left out, one after the other: prompts of one run are not independent, and to take them for it would make
    the interval too narrow. `n` is the number of runs; with one, or where it makes no difference which one is left out, the
    interval is unbounded.

    Raises:
        ValueError: `scores` has not two axes.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"scores must be [runs, prompts], got {table.ndim} axes")
    runs = len(table)
    value = statistic(table) if table.size else np.nan
    if np.isnan(value):
        return Interval(np.nan, np.nan, np.nan, runs)
    without = np.array([statistic(np.delete(table, run, axis=0)) for run in range(runs)]) if runs > 1 else np.empty(0)
    if np.isnan(without).any() or equal_values(without):
        return Interval(value, -np.inf, np.inf, runs)
    error = float(np.sqrt((runs - 1) / runs * ((without - without.mean()) ** 2).sum()))
    half = _half(error, runs - 1)
    return Interval(value, value - half, value + half, runs)


def welch(first: np.ndarray, second: np.ndarray) -> float:
    """p of the two-sided t test without equal variances (Welch 1947).

    NaN where it cannot be told: fewer than two values on a side, or no spread on either side.
    """
    a, b = _known(first), _known(second)
    if min(len(a), len(b)) < 2:
        return float("nan")
    mean, error, degrees = _mean_of_means([a, -b])
    return max(float(2 * stdtr(degrees, -abs(mean) / error)), SMALLEST_P) if degrees else float("nan")


def one_sample(values: np.ndarray) -> float:
    """p of the two-sided t test that the mean of the values is 0 (Student 1908); NaN values are left out.

    NaN where there is no such test: fewer than two values, or no spread.
    """
    return welch(values, np.zeros(2))  # zeros have no variance, so they add neither error nor degrees of freedom


def welch_interval(first: np.ndarray, second: np.ndarray) -> Interval:
    """Difference of the means with the interval that belongs to `welch`; n is the smaller number of values.

    Unbounded where that test can tell nothing; NaN where a side has no value.
    """
    a, b = _known(first), _known(second)
    if min(len(a), len(b)) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    half_of_it = mean_of_means_interval([a, -b])  # the mean of both means is half of the difference
    apart = float(difference(a.mean(), b.mean()))
    return Interval(apart, 2 * half_of_it.lower, 2 * half_of_it.upper, min(len(a), len(b)))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """p values corrected for being the best of many (Holm 1979): below 0.05 in 5 % of the families where nothing differs.

    NaN values were no tests: they stay NaN and do not count.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]  # NaN sorts last
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def probability_of_improvement(first: np.ndarray, second: np.ndarray) -> float:
    """How often a run of the first beats one of the second, ties counting half, averaged over strata.

    Args:
        first, second: [runs, strata]; the numbers of runs may differ. Higher is better.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (first, second))
    apart = difference(a[:, None, :], b[None, :, :])
    wins = np.where(np.isnan(apart), np.nan, (np.sign(apart) + 1) / 2)
    return float(np.nanmean(wins)) if (~np.isnan(wins)).any() else float("nan")


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of all scores above each threshold; NaN scores are left out. float64 [len(thresholds)]"""
    known = np.asarray(scores, dtype=np.float64).ravel()
    known = known[~np.isnan(known)]
    return np.asarray((known[None, :] > np.asarray(thresholds)[:, None]).mean(axis=1))


def paired_interval(first: np.ndarray, second: np.ndarray) -> Interval:
    """Mean of first - second, unit by unit, with the interval of `mean_interval`; pairs with a NaN are left out."""
    return mean_interval(difference(first, second))


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which points no other point beats: at least as high in both coordinates and higher in one. bool [N] of [N, 2]

    Nothing is beaten by rounding alone. Points with a NaN are not on the front, and beat none.
    """
    p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    apart = difference(p[None], p[:, None])
    better = np.all(apart >= 0, axis=2) & np.any(apart > 0, axis=2)
    return np.asarray(~np.any(better, axis=1) & ~np.any(np.isnan(p), axis=1))


def hypervolume(points: np.ndarray, reference: Sequence[float]) -> float:
    """Area that the points [N, 2] dominate above the reference point (2 numbers); higher is better in both coordinates."""
    p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    p = p[non_dominated(p)] - np.asarray(reference, dtype=np.float64)
    p = p[(p > 0).all(1)]
    p = p[np.argsort(-p[:, 0])]  # on a front, the second coordinate then rises
    return float((p[:, 0] * np.diff(p[:, 1], prepend=0.0)).sum())
