"""What the differences between sets tell about a metric: its power, its false alarms, and whether it ranks degrees rightly.

The test is the alarm's: a one-sided t test of differences paired by prompt, at 2.5 %. Its power with P prompts whose
differences have the mean m and the standard deviation s is that of Student's noncentral distribution,

    P(T < -t),  T ~ t_{P - 1} with noncentrality sqrt(P) m / s,  t = the 97.5 % quantile of t_{P - 1}

m / s is the *effect*. It is estimated over prompts and pairs of sets, and its interval is a jackknife over prompts.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from scipy import stats

from alignbench.statistics import CONFIDENCE, ONE_SIDED_LEVEL, Interval

PROMPTS = (16, 32, 64, 128)
"""Numbers of prompts."""
SIMULATIONS = 4000
"""Simulated experiments with equal sets."""
FURTHEST = 8.0
"""Largest noncentrality; beyond it the power is 1 to all digits."""


def effect(differences: np.ndarray) -> float:
    """Computes the mean of differences, divided by their standard deviation.

    Args:
        differences: [prompts, repetitions].

    Returns:
        Negative for a fall; 0 if all differences are 0, infinite if they are otherwise equal, and NaN for fewer than two.
    """
    if differences.size < 2:
        return float("nan")
    mean, deviation = float(differences.mean()), float(differences.std(ddof=1))
    if deviation <= 1e-12 * max(abs(mean), 1e-12):
        return 0.0 if abs(mean) <= 1e-12 else float(np.copysign(np.inf, mean))
    return mean / deviation


def effects_without(differences: np.ndarray) -> np.ndarray:
    """Computes the effect without each prompt in turn: differences [prompts, repetitions] -> float [prompts]."""
    mean, left = float(differences.mean()), differences.size - differences.shape[1]
    centred = differences - mean
    shift = -centred.sum(axis=1) / left
    squares = (centred**2).sum() - (centred**2).sum(axis=1) - left * shift**2
    if left < 2 or float(squares.min()) <= 1e-9 * float((centred**2).sum()):  # all that is left may be equal
        return np.array([effect(np.delete(differences, i, axis=0)) for i in range(len(differences))])
    return np.asarray((mean + shift) / np.sqrt(squares / (left - 1)))


def effect_interval(differences: np.ndarray) -> Interval:
    """The effect with its interval over prompts."""
    return jackknife(effect(differences), [effects_without(differences)])


def jackknife(value: float, without: Sequence[np.ndarray]) -> Interval:
    """Computes the interval of a statistic by Tukey's jackknife.

    Its squared standard error is sum_s (n_s - 1) / n_s sum_r (T_r - mean T)^2.

    Args:
        value: the statistic.
        without: for each stratum s, the statistic T_r without each of its n_s units.

    Returns:
        The interval, with the degrees of freedom of the smallest stratum; unbounded where the error is 0 or not known.
    """
    n = sum(map(len, without))
    if np.isnan(value):
        return Interval(np.nan, np.nan, np.nan, n)
    finite = all(len(values) > 1 and np.isfinite(values).all() for values in without)
    square = sum((len(v) - 1) / len(v) * float(((v - v.mean()) ** 2).sum()) for v in without) if finite else 0.0
    if not (square > 0 and np.isfinite(value)):
        return Interval(value, -np.inf, np.inf, n)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, min(map(len, without)) - 1)) * square**0.5
    return Interval(value, value - half, value + half, n)


def power(effects: np.ndarray | float, prompts: np.ndarray | int) -> np.ndarray:
    """Computes the probability that the test reports a fall; that of a rise is the power of the opposite effect.

    Args:
        effects: mean / standard deviation of the differences.
        prompts: number of prompts, broadcastable.
    """
    effects, prompts = np.broadcast_arrays(np.asarray(effects, dtype=np.float64), np.asarray(prompts))
    found = np.full(effects.shape, np.nan)
    for count in np.unique(prompts):
        here = (prompts == count) & ~np.isnan(effects)
        shifts, powers = _curve(int(count))
        found[here] = np.interp(np.clip(effects[here], -FURTHEST, FURTHEST) * count**0.5, shifts, powers)
    return found


def effect_with_power(wanted: float, prompts: int) -> float:
    """Computes the effect, below 0, at which a fall is reported with the probability `wanted`."""
    shifts, powers = _curve(prompts)
    return float(np.interp(-wanted, -powers, shifts)) / prompts**0.5


@cache
def _curve(prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """The power at noncentralities in steps so fine that values between them are linear to four digits."""
    shifts = np.linspace(-FURTHEST, FURTHEST, 801)
    return shifts, np.asarray(stats.nct.sf(stats.t.ppf(1 - ONE_SIDED_LEVEL, prompts - 1), prompts - 1, -shifts))


def ranked_rightly(effects: np.ndarray | float, prompts: np.ndarray | int) -> np.ndarray:
    """Computes the probability that the mean over prompts falls from one degree to a higher one (normal approximation)."""
    return np.asarray(stats.norm.sf(np.asarray(effects) * np.sqrt(prompts)))


def false_alarms(differences: np.ndarray, prompts: int, rng: np.random.Generator) -> Interval:
    """Simulates how often the test reports a fall between equal sets.

    Which of two equal sets comes first is a coin toss, so each difference gets a random sign.

    Args:
        differences: [prompts, repetitions], of equal sets.
        prompts: number of prompts of an experiment.
        rng: the generator.

    Returns:
        The share of `SIMULATIONS` experiments, with the exact binomial interval of Clopper and Pearson.
    """
    flat = differences.ravel()
    drawn = rng.choice(flat, size=(SIMULATIONS, prompts)) * rng.choice([-1.0, 1.0], size=(SIMULATIONS, prompts))
    error = drawn.std(axis=1, ddof=1) / prompts**0.5
    falls = drawn.mean(axis=1) < -stats.t.ppf(1 - ONE_SIDED_LEVEL, prompts - 1) * error
    found = stats.binomtest(int(falls.sum()), SIMULATIONS)
    low, high = found.proportion_ci()
    return Interval(float(found.statistic), float(low), float(high), SIMULATIONS)


def through(function: Callable[[np.ndarray], np.ndarray], interval: Interval) -> Interval:
    """Maps an interval of an effect by a decreasing function, such as `power`."""
    bounds = np.array([interval.value, interval.upper, interval.lower])
    value, lower, upper = (float(v) for v in function(bounds))
    return Interval(value, lower, upper, interval.n)
