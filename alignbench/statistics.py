"""Means with confidence intervals, tests, and reward-diversity fronts.

The unit of a single run is the prompt, because images of one prompt are not independent of each other. The unit of a comparison
is the seed, because prompts of one training run are not independent of each other either.

All intervals are Student's t intervals at the level `CONFIDENCE`:

    estimate +- t_{(1 + CONFIDENCE) / 2, degrees of freedom} * standard error

The standard error is that of a mean, or comes from a jackknife or a bootstrap where the statistic is not a mean. With few units
a percentile bootstrap is too narrow, and BCa is hardly better; `docs/reading-a-report.md` has the simulation. Values that
differ only by rounding count as equal. Equal values have an unbounded interval and no t test, because they tell nothing about
the variance.

Interquartile mean, probability of improvement and performance profiles are those of Agarwal et al. 2021 (arXiv 2108.13264).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

RESAMPLES = 2000
"""How many resamples a bootstrap draws."""
RESAMPLES_AT_ONCE = 100
"""How many of these resamples are in memory together."""
CONFIDENCE = 0.95
"""The confidence level of all intervals."""
ONE_SIDED_LEVEL = (1 - CONFIDENCE) / 2
"""Level of one-sided tests: that of either side of an interval."""
ROUNDING = 1e-12
"""The largest relative difference of two float64 numbers that is attributed to rounding."""
SMALLEST_P = float(np.finfo(np.float64).tiny)
"""The smallest p value; one that is too small for a float64 becomes this instead of 0."""


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    """The estimate."""
    lower: float
    """The lower bound, at the level `CONFIDENCE`; minus infinity where the variance is unknown."""
    upper: float
    """The upper bound, likewise."""
    n: int
    """The number of units."""


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Computes first - second, elementwise with broadcasting: float64.

    The result is 0 where the two differ only by rounding, and NaN where either of them is NaN.
    """
    a, b = np.broadcast_arrays(np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64))
    with np.errstate(invalid="ignore", over="ignore"):  # infinity minus itself is NaN
        result = a - b
        is_rounding = (np.abs(result) <= ROUNDING * np.maximum(np.abs(a), np.abs(b))) & np.isfinite(result)
        return np.where(is_rounding, 0.0, result)


def equal_values(values: np.ndarray) -> bool:
    """Tells whether values differ only by rounding; NaN values are ignored."""
    numbers = _without_nan(values)
    return len(numbers) == 0 or float(numbers.max()) - float(numbers.min()) <= ROUNDING * float(np.abs(numbers).max())


def mean_interval(values: np.ndarray) -> Interval:
    """Computes a mean over units with its interval: mean +- t_{n - 1} * sqrt(variance / n) (Student 1908).

    Args:
        values: float [n], one value for each unit (a prompt or a seed); NaN values are left out.

    Returns:
        The interval. It is unbounded if there is one value or if all are equal, and NaN if there is no value.
    """
    return mean_of_means_interval([values])


def mean_of_known(values: np.ndarray, axis: int) -> np.ndarray:
    """Averages a table over one axis, leaving out NaN values; NaN where none is left."""
    known = ~np.isnan(values)
    counts = known.sum(axis)
    return np.where(counts, np.where(known, values, 0.0).sum(axis) / np.maximum(counts, 1), np.nan)


def mean_of_means_interval(strata: Sequence[np.ndarray]) -> Interval:
    """Computes the mean of the strata's means with its interval.

    For m strata with variances s_k^2 and n_k values the squared standard error is sum_k (s_k^2 / n_k) / m^2. The degrees of
    freedom are (sum_k s_k^2 / n_k)^2 / sum_k ((s_k^2 / n_k)^2 / (n_k - 1)) (Welch 1947).

    Args:
        strata: float [n_k] each. NaN values are left out, and so are strata that have no other values.

    Returns:
        The interval, with n the number of all values. It is unbounded if a stratum has one value or if the values of each
        stratum are equal.
    """
    samples = [values for values in map(_without_nan, strata) if len(values)]
    count = sum(map(len, samples))
    if not samples:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean, error, degrees = _mean_of_means(samples)
    half = _half_width(error, degrees) if degrees else np.inf
    return Interval(mean, mean - half, mean + half, count)


def rise_test(strata: Sequence[np.ndarray]) -> float:
    """Computes p of the one-sided t test that the mean of the strata's means is above 0.

    With t = mean / standard error as in `mean_of_means_interval` (Student 1908; Welch 1947 for several strata), p is the
    probability of a larger t if the mean is 0. 1 - p is the p value of the mean being below 0. If the values of each stratum
    are equal there is no t. p is then that of the sign test, 2^-n for n values, so that a few equal values prove nothing.

    Args:
        strata: float [n_k] each. NaN values are left out, and so are strata that have no other values.

    Returns:
        p, or NaN if there is no value or a stratum has only one.
    """
    samples = [values for values in map(_without_nan, strata) if len(values)]
    if not samples or any(len(values) == 1 for values in samples):
        return float("nan")
    mean, error, degrees = _mean_of_means(samples)
    if degrees:
        return max(float(stdtr(degrees, -mean / error)), SMALLEST_P)
    sign_test = max(float(0.5 ** sum(map(len, samples))), SMALLEST_P)
    return 0.5 if mean == 0 else sign_test if mean > 0 else 1 - sign_test


def _without_nan(values: np.ndarray) -> np.ndarray:
    """The values that are not NaN, float64 [n]."""
    numbers = np.asarray(values, dtype=np.float64)
    return np.asarray(numbers[~np.isnan(numbers)])


def _half_width(error: float, degrees: float) -> float:
    """Half the width of Student's interval, from the standard error and the degrees of freedom."""
    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * error


def _mean_of_means(strata: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean, standard error and degrees of freedom of values without NaN; 0 degrees if the variance is unknown."""
    scale = max(float(np.abs(values).max()) for values in strata)
    if not 0 < scale < np.inf:
        return float(np.mean([values.mean() for values in strata])), np.nan, 0.0
    scaled = [values / scale for values in strata]  # so that squares neither overflow nor underflow
    mean = scale * float(np.mean([values.mean() for values in scaled]))
    if any(len(values) == 1 for values in strata) or all(map(equal_values, strata)):
        return mean, np.nan, 0.0
    variances = [0.0 if equal_values(values) else values.var(ddof=1) / len(values) for values in scaled]
    parts = np.array(variances) / sum(variances)
    degrees = 1 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, strata, strict=True))
    return mean, scale * float(np.sqrt(sum(variances))) / len(strata), float(degrees)


def interval_over_groups(statistic: Callable[..., np.ndarray], *samples: np.ndarray, seed: int = 0) -> Interval:
    """Computes a statistic of groups of rollouts with its interval for these prompts, by a bootstrap standard error.

    The groups of each prompt are resampled with replacement, separately for each sample; the prompts are fixed. The standard
    error is sqrt(n / (n - 1)) times the standard deviation over `RESAMPLES` resamples, because values drawn with replacement
    from n have (n - 1) / n of their variance (Efron and Tibshirani 1993). There are P (n - 1) degrees of freedom, with n the
    smallest number of groups per prompt. Resamples in which the statistic is NaN are left out.

    Args:
        statistic: takes one array [B, P, n, ...] for each sample and returns float [B].
        samples: float [P, n, ...], n groups for each of P prompts; n may differ between samples.
        seed: of the resampling.

    Returns:
        The interval, with n the number of groups in the first sample. It is unbounded with one group per prompt, or if all
        resamples give the same.
    """
    rng = np.random.default_rng(seed)

    def resampled(sample: np.ndarray) -> np.ndarray:
        prompts, groups = sample.shape[:2]
        indices = rng.integers(groups, size=(RESAMPLES_AT_ONCE, prompts, groups))
        return sample[np.arange(prompts)[:, None], indices]

    value = float(statistic(*(sample[None] for sample in samples))[0])
    rounds = max(1, RESAMPLES // RESAMPLES_AT_ONCE)
    statistics = _without_nan(np.concatenate([statistic(*map(resampled, samples)) for _ in range(rounds)]))
    prompts, n = samples[0].shape[:2]
    if np.isnan(value) or len(statistics) == 0:
        return Interval(np.nan, np.nan, np.nan, prompts * n)
    groups = min(sample.shape[1] for sample in samples)
    if groups == 1 or len(statistics) == 1 or equal_values(statistics):
        return Interval(value, -np.inf, np.inf, prompts * n)
    error = float(statistics.std(ddof=1)) * (groups / (groups - 1)) ** 0.5
    half = _half_width(error, prompts * (groups - 1))
    return Interval(value, value - half, value + half, prompts * n)


def interquartile_mean(values: np.ndarray) -> float:
    """Computes the mean of the middle half of the values (Agarwal et al. 2021).

    A quarter of the values, rounded down, is left out at each end. NaN values are ignored; the result is NaN if there are no
    others.
    """
    # scipy's trim_mean takes ten times as long, which matters in a bootstrap.
    numbers = np.sort(_without_nan(np.ravel(values)))
    cut = len(numbers) // 4
    return float(numbers[cut : len(numbers) - cut].mean()) if len(numbers) else float("nan")


def interval_over_runs(scores: np.ndarray, statistic: Callable[[np.ndarray], float] = interquartile_mean) -> Interval:
    """Computes a statistic of scores with its interval over runs, by a jackknife standard error (Tukey 1958).

    With T_r the statistic without run r, and R runs, the squared standard error is (R - 1) / R sum_r (T_r - mean T)^2, with R -
    1 degrees of freedom. Whole runs are left out because the prompts of one run are not independent; treating them as
    independent would make the interval too narrow.

    Args:
        scores: float [runs, prompts].
        statistic: takes scores and returns one number.

    Returns:
        The interval, with n the number of runs. It is unbounded with one run, or if it makes no difference which run is left
        out.

    Raises:
        ValueError: `scores` does not have two axes.
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
    half = _half_width(error, runs - 1)
    return Interval(value, value - half, value + half, runs)


def welch(first: np.ndarray, second: np.ndarray) -> float:
    """Computes p of the two-sided t test of two means without assuming equal variances (Welch 1947).

    t is the difference of the means divided by sqrt(s_1^2 / n_1 + s_2^2 / n_2), with Welch's degrees of freedom.

    Args:
        first: float [n_1]; NaN values are left out.
        second: float [n_2], likewise.

    Returns:
        p, or NaN if a side has fewer than two values, or if the values of each side are equal.
    """
    a, b = _without_nan(first), _without_nan(second)
    if min(len(a), len(b)) < 2:
        return float("nan")
    mean, error, degrees = _mean_of_means([a, -b])
    return max(float(2 * stdtr(degrees, -abs(mean) / error)), SMALLEST_P) if degrees else float("nan")


def one_sample(values: np.ndarray) -> float:
    """Computes p of the two-sided t test that the mean of the values is 0 (Student 1908).

    Args:
        values: float [n]; NaN values are left out.

    Returns:
        p, or NaN if there are fewer than two values or all of them are equal.
    """
    return welch(values, np.zeros(2))  # zeros have no variance, so they add neither error nor degrees of freedom


def first_reached(values: np.ndarray, level: float) -> tuple[int, int, float] | None:
    """Finds where a series first reaches a level, by linear interpolation.

    Args:
        values: float [n].
        level: the level.

    Returns:
        The indices of the last known value before and of the first at the level, and the fraction of the way between them;
        both are the latter's if no value before it is known. None if no value is at the level or above.
    """
    reached = np.flatnonzero(values >= level)
    if not len(reached):
        return None
    after = int(reached[0])
    known = np.flatnonzero(~np.isnan(values[:after]))
    if not len(known):
        return after, after, 0.0
    before = int(known[-1])
    return before, after, float((level - values[before]) / (values[after] - values[before]))


def welch_interval(first: np.ndarray, second: np.ndarray) -> Interval:
    """Computes the difference of two means, first minus second, with the interval that belongs to `welch`.

    Args:
        first: float [n_1]; NaN values are left out.
        second: float [n_2], likewise.

    Returns:
        The interval, with n the smaller number of values. It is unbounded where `welch` is NaN, and NaN if a side has no value.
    """
    a, b = _without_nan(first), _without_nan(second)
    if min(len(a), len(b)) == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    half = mean_of_means_interval([a, -b])  # the mean of the two means is half of the difference
    return Interval(float(difference(a.mean(), b.mean())), 2 * half.lower, 2 * half.upper, min(len(a), len(b)))


def within(interval: Interval, low: float | None, high: float | None) -> Interval:
    """The interval of a mean whose values lie in [low, high]; None for an end that does not exist.

    An end of Student's interval that leaves the range is taken on the logarithm of the distance to the end of the range that
    it passes, and carried back (delta method): at distance d of the mean and with half-width h it is d exp(-h / d) from
    there. The other end stays what it is, and so do all intervals inside the range.
    """
    value, lower, upper, n = interval
    if low is not None and np.isfinite(lower) and lower < low < value:
        lower = low + (value - low) * float(np.exp(-(value - lower) / (value - low)))
    if high is not None and np.isfinite(upper) and value < high < upper:
        upper = high - (high - value) * float(np.exp(-(upper - value) / (high - value)))
    return Interval(value, lower, upper, n)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Corrects p values for multiple tests (Holm 1979).

    The i-th smallest of m p values becomes max_{j <= i} min(1, (m - j + 1) p_j). If no null hypothesis of the family is false,
    any of the results is below a level with at most that probability.

    Args:
        p_values: float [m]. NaN stands for a test that could not be done; it does not count and stays NaN.

    Returns:
        float64 [m], in the order of `p_values`.
    """
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]  # NaN sorts last
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


def probability_of_improvement(first: np.ndarray, second: np.ndarray) -> float:
    """Computes how often a run of the first beats a run of the second: P(first > second) + P(equal) / 2, averaged over strata.

    This is the Mann-Whitney U statistic divided by the number of pairs (Agarwal et al. 2021).

    Args:
        first: float [runs, strata], higher is better; NaN values are left out.
        second: likewise, possibly with another number of runs.

    Returns:
        0 to 1, or NaN if there is no pair.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (first, second))
    differences = difference(a[:, None, :], b[None, :, :])
    wins = np.where(np.isnan(differences), np.nan, (np.sign(differences) + 1) / 2)
    return float(np.nanmean(wins)) if (~np.isnan(wins)).any() else float("nan")


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Computes the fraction of all scores above each threshold (Agarwal et al. 2021): float64 [thresholds].

    NaN scores are left out.
    """
    numbers = _without_nan(np.ravel(scores))
    return np.asarray((numbers[None, :] > np.asarray(thresholds)[:, None]).mean(axis=1))


def paired_interval(first: np.ndarray, second: np.ndarray) -> Interval:
    """Computes the mean of first - second over pairs with its interval (`mean_interval`).

    Args:
        first: float [n], one value for each unit.
        second: float [n], the same units in the same order. Pairs with a NaN are left out.
    """
    return mean_interval(difference(first, second))


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Marks the points of the Pareto front, which no other point dominates.

    A point dominates another if it is at least as high in both coordinates and higher in one, by more than rounding. Points
    with a NaN are not on the front and dominate none.

    Args:
        points: float [N, 2]; higher is better in both coordinates.

    Returns:
        bool [N].
    """
    p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    differences = difference(p[None], p[:, None])
    better = np.all(differences >= 0, axis=2) & np.any(differences > 0, axis=2)
    return np.asarray(~np.any(better, axis=1) & ~np.any(np.isnan(p), axis=1))


def hypervolume(points: np.ndarray, reference: Sequence[float]) -> float:
    """Computes the area that points dominate above a reference point (Zitzler and Thiele 1999).

    Args:
        points: float [N, 2]; higher is better in both coordinates. Points that are not above the reference point count for
            nothing.
        reference: the two coordinates of the reference point.

    Returns:
        The area, in the product of the two units.
    """
    p = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    p = p[non_dominated(p)] - np.asarray(reference, dtype=np.float64)
    p = p[(p > 0).all(1)]
    p = p[np.argsort(-p[:, 0])]  # on a front, the second coordinate then rises
    return float((p[:, 0] * np.diff(p[:, 1], prepend=0.0)).sum())


def best_of_n_mass(mass: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """Computes the distribution of the best of n independent draws: P(y) (F(y)^n - F(y-)^n) / (F(y) - F(y-)).

    F is the distribution function of the score, and F(y-) its limit from below. The mass of a score is shared by the points
    that have it in proportion to their own mass, as it is where the first of equal draws is chosen.

    Args:
        mass: float [N], the probability of each point.
        scores: float [N].
        n: how many are drawn.

    Returns:
        float64 [N]; the sum is that of `mass`.
    """
    mass = np.asarray(mass, dtype=np.float64)
    _, level = np.unique(scores, return_inverse=True)
    of_level = np.bincount(level, weights=mass)
    total = of_level.sum()
    upper = np.cumsum(of_level) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        # F^n - (F - m)^n without the loss of digits of a difference of nearly equal numbers
        share = np.minimum(of_level / total / upper, 1.0)
        best = upper**n * -np.expm1(n * np.log1p(-share))
        factor = np.where(of_level > 0, best / of_level * total, 0.0)
    return np.asarray(mass * factor[level])


def best_of_n_kl_bound(n: int) -> float:
    """Computes log n - (n - 1) / n, a bound of the KL divergence of best-of-n to its base distribution, in nats.

    It is reached if no two draws have the same score (Beirami et al. 2024, arXiv 2401.01879).
    """
    return float(np.log(n)) - (n - 1) / n
