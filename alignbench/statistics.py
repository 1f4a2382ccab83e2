"""Means with intervals, tests and fronts.

The unit of a single run is the prompt: pictures of one prompt are not independent of one another. The unit of a comparison
is the seed: prompts of one training run are not independent of one another either. Interquartile mean, stratified bootstrap,
probability of improvement and performance profiles are those of Agarwal et al. 2021 (arXiv 2108.13264).
"""

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


def rise_test(strata: Sequence[np.ndarray]) -> float:
    """p of the one-sided t test that the mean of the strata's means is above 0; 1 minus it is that of being below.

    Student 1908 for one stratum, with Welch's (1947) degrees of freedom for several. Values without spread have no t: they have
    the p of the sign test, so that few equal values prove nothing. NaN values are left out; NaN where it cannot be told, as
    with one value in a stratum.
    """
    known = [values[~np.isnan(values)] for values in (np.asarray(s, dtype=np.float64) for s in strata)]
    known = [values for values in known if len(values)]
    if not known or any(len(values) == 1 for values in known):
        return float("nan")
    mean = float(np.mean([values.mean() for values in known]))
    if all(np.ptp(values) == 0 for values in known):
        by_chance = float(0.5 ** sum(map(len, known)))
        return 0.5 if mean == 0 else by_chance if mean > 0 else 1 - by_chance
    parts = np.array([values.var(ddof=1) / len(values) for values in known]) / len(known) ** 2
    degrees = parts.sum() ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, known, strict=True))
    return float(stats.t.sf(mean / np.sqrt(parts.sum()), degrees))


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


def seed_interval(values: np.ndarray) -> Interval:
    """Mean of one value a seed, with Student's t interval; NaN values are left out.

    A handful of seeds is too few for a percentile bootstrap, which then covers far less often than it says. One seed has an
    unbounded interval.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) < 2 or np.ptp(known) == 0:
        return mean_interval(known)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(known) - 1) * stats.sem(known))
    mean = float(known.mean())
    return Interval(mean, mean - half, mean + half, len(known))


def interquartile_mean(values: np.ndarray) -> float:
    """Mean of the middle half: a quarter of the values, rounded down, is cut off at each end; NaN where there is none."""
    known = np.asarray(values, dtype=np.float64).ravel()
    known = np.sort(known[~np.isnan(known)])  # scipy's trim_mean takes ten times as long, and a bootstrap asks 2,000 times
    cut = len(known) // 4
    return float(known[cut : len(known) - cut].mean()) if len(known) else float("nan")


def stratified_interval(
    scores: np.ndarray,
    statistic: Callable[[np.ndarray], float] = interquartile_mean,
    *,
    shared_runs: bool = False,
    seed: int = 0,
) -> Interval:
    """A statistic of scores [runs, strata] with its percentile-bootstrap interval over runs; `n` is the number of runs.

    Args:
        shared_runs: False where each stratum has runs of its own (tasks): runs are drawn apart in each, as in Agarwal et al.
            True where a row is one run scored on all strata (prompts of one task): whole rows are drawn, because drawing
            apart would take the prompts of one run for independent and make the interval too narrow.

    Raises:
        ValueError: `scores` has not two axes.
    """
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"scores must be [runs, strata], got {table.ndim} axes")
    runs, strata = table.shape
    if runs == 0 or strata == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    value = statistic(table)
    if np.isnan(value):
        return Interval(np.nan, np.nan, np.nan, runs)
    if runs == 1:
        return Interval(value, -np.inf, np.inf, 1)
    rng = np.random.default_rng(seed)
    width = 1 if shared_runs else strata
    drawn = rng.integers(runs, size=(RESAMPLES, runs, width))
    found = [statistic(np.take_along_axis(table, np.broadcast_to(rows, table.shape), axis=0)) for rows in drawn]
    low, high = np.nanquantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high), runs)


def welch(first: np.ndarray, second: np.ndarray) -> float:
    """p of the two-sided t test without equal variances (Welch 1947).

    NaN where it cannot be told: fewer than two values on a side, or no spread on either side.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (first, second))
    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    if min(len(a), len(b)) < 2 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return float("nan")
    if np.ptp(b) == 0:  # the same test; scipy warns of cancellation in the variance of equal values
        return float(stats.ttest_1samp(a, b[0]).pvalue)
    if np.ptp(a) == 0:
        return float(stats.ttest_1samp(b, a[0]).pvalue)
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def welch_interval(first: np.ndarray, second: np.ndarray) -> Interval:
    """Difference of the means with the interval that belongs to `welch`; n is the smaller number of values.

    Unbounded where that test can tell nothing; NaN where a side has no value.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (first, second))
    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    n = min(len(a), len(b))
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    difference = float(a.mean() - b.mean())
    if n == 1 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return Interval(difference, -np.inf, np.inf, n)
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    degrees = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees) * np.sqrt(va + vb))
    return Interval(difference, difference - half, difference + half, n)


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
    difference = a[:, None, :] - b[None, :, :]
    wins = np.where(np.isnan(difference), np.nan, (np.sign(difference) + 1) / 2)
    return float(np.nanmean(wins)) if (~np.isnan(wins)).any() else float("nan")


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of all scores above each threshold; NaN scores are left out. float64 [len(thresholds)]"""
    known = np.asarray(scores, dtype=np.float64).ravel()
    known = known[~np.isnan(known)]
    return np.asarray((known[None, :] > np.asarray(thresholds)[:, None]).mean(axis=1))


def paired_interval(first: np.ndarray, second: np.ndarray) -> Interval:
    """Mean of first - second, unit by unit, with the interval of `mean_interval`; pairs with a NaN are left out."""
    return mean_interval(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64))


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which points no other point beats: at least as high in both coordinates and higher in one. bool [N] of [N, 2]

    Points with a NaN are not on the front, and beat none.
    """
    p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    better = np.all(p[None] >= p[:, None], axis=2) & np.any(p[None] > p[:, None], axis=2)
    return np.asarray(~np.any(better, axis=1) & ~np.any(np.isnan(p), axis=1))


def hypervolume(points: np.ndarray, reference: Sequence[float]) -> float:
    """Area that the points [N, 2] dominate above the reference point (2 numbers); higher is better in both coordinates."""
    p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    p = p[non_dominated(p)] - np.asarray(reference, dtype=np.float64)
    p = p[(p > 0).all(1)]
    p = p[np.argsort(-p[:, 0])]  # on a front, the second coordinate then rises
    return float((p[:, 0] * np.diff(p[:, 1], prepend=0.0)).sum())
