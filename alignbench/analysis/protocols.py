"""Whether the ranking of methods survives another evaluation protocol, from their values on the same prompts."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from alignbench.statistics import CONFIDENCE, Interval, holm, mean_interval, rise_test

RESAMPLES = 2000
"""Bootstrap resamples of the prompts."""
RESAMPLES_AT_ONCE = 200
LEVEL = 0.05
"""A flip is beyond chance if its corrected p value is below this."""


@dataclass(frozen=True)
class Flip:
    """Two methods whose order differs between two protocols.

    Attributes:
        first, second: the methods.
        before, after: first minus second, by the reference and by the other protocol, with 95 % intervals over prompts.
        p: that of a true flip, not corrected: both differences have the signs that were seen. See `flips`.
    """

    first: int
    second: int
    before: Interval
    after: Interval
    p: float


def rank_correlation(reference: np.ndarray, other: np.ndarray, seed: int = 0) -> Interval:
    """Computes Kendall's tau-b between the mean values of methods by two protocols, with its bootstrap interval.

    Prompts are resampled, the same ones for all methods and both protocols (percentile interval, Efron 1979). tau is 1 for
    equal rankings, -1 for reversed ones, and NaN where all methods are equal.

    Args:
        reference, other: float [methods, prompts]. A prompt with a NaN in either is left out.
        seed: of the resampling.

    Returns:
        tau with its interval; n is the number of prompts.
    """
    both = np.stack([reference, other]).astype(np.float64)
    both = both[:, :, ~np.isnan(both).any((0, 1))]
    prompts = both.shape[2]
    if prompts == 0 or both.shape[1] < 2:
        return Interval(np.nan, np.nan, np.nan, prompts)
    value = float(_tau(both.mean(2)[None])[0])
    if prompts == 1:
        return Interval(value, -np.inf, np.inf, 1)
    rng, taus = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES_AT_ONCE)
        taus.append(_tau(np.einsum("cmp,bp->bcm", both, counts / prompts)))
    drawn = np.concatenate(taus)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return Interval(value, np.nan, np.nan, prompts)
    lower, upper = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(lower), float(upper), prompts)


def _tau(means: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of two rankings: [B, 2, methods] -> [B]."""
    i, j = np.triu_indices(means.shape[2], 1)
    signs = np.sign(np.round(means[:, :, i] - means[:, :, j], 12))
    a, b = signs[:, 0], signs[:, 1]
    with np.errstate(invalid="ignore"):
        return np.asarray((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1)))


def flips(reference: np.ndarray, other: np.ndarray) -> list[Flip]:
    """Finds the pairs of methods whose mean difference has another sign by the other protocol.

    p is that of an intersection-union test (Berger 1982): the larger of the two one-sided p values of a paired t test over
    prompts, doubled because the direction was not known before.

    Args:
        reference, other: float [methods, prompts]; a prompt with a NaN is left out of a difference.
    """
    found = []
    for first, second in combinations(range(len(reference)), 2):
        before, after = reference[first] - reference[second], other[first] - other[second]
        b, a = mean_interval(before), mean_interval(after)
        if not b.value * a.value < 0:
            continue
        up, down = (before, -after) if b.value > 0 else (-before, after)
        p = float(np.minimum(2 * max(rise_test([up]), rise_test([down])), 1.0))
        found.append(Flip(first, second, b, a, p))
    return found


def corrected(flips_of_all: list[list[Flip]], tests: int) -> list[list[float]]:
    """Corrects the p values of all flips for `tests`, the number of pairs times protocols that were looked at (Holm 1979)."""
    p_values = [flip.p for of_one in flips_of_all for flip in of_one]
    numbers = iter(holm([*p_values, *[1.0] * (tests - len(p_values))]).tolist())
    return [[next(numbers) for _ in of_one] for of_one in flips_of_all]
