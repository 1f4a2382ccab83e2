"""Bias, noise and direction of a gradient estimate, from repetitions of it and the exact gradient.

With g_i the N repetitions, the square of their mean is estimated without bias by leaving out the product of a repetition with
itself: |E g|^2 = mean over i != k of g_i . g_k. The numbers are therefore not biased by the number of parameters or of
repetitions. Intervals are by the jackknife over repetitions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor

from alignbench.records.record import Estimate
from alignbench.statistics import CONFIDENCE


@dataclass(frozen=True)
class Products:
    """Inner products of gradients.

    Attributes:
        trials: float64 [N, N], the products of the repetitions with each other.
        cross: float64 [N], the products of the repetitions with the exact gradient.
        exact: the squared norm of the exact gradient.
    """

    trials: np.ndarray
    cross: np.ndarray
    exact: float

    @classmethod
    def of(cls, trials: Tensor, exact: Tensor | None) -> "Products":
        """Computes the products of N gradients, [N, D], and of the exact gradient, [D]; None stands for zeros."""
        g = trials.double()
        e = g.new_zeros(g.shape[1]) if exact is None else exact.double()
        return cls((g @ g.T).cpu().numpy(), (g @ e).cpu().numpy(), float(e @ e))

    def without(self, i: int) -> "Products":
        """Returns the products without repetition i."""
        kept = np.arange(len(self.trials)) != i
        return Products(self.trials[np.ix_(kept, kept)], self.cross[kept], self.exact)


def square_of_mean(products: np.ndarray) -> float:
    """Estimates |E g|^2 without bias from the products of n gradients, [n, n]; it can be below 0 if they are mostly noise."""
    n = len(products)
    return float(products.sum() - np.trace(products)) / (n * (n - 1))


def signal_to_noise(products: Products) -> float:
    """Computes |E g| / sqrt(E |g - E g|^2) of a single estimate.

    It is 0 if the mean cannot be distinguished from 0, infinite without noise, and NaN where every estimate is 0.
    """
    signal = square_of_mean(products.trials)
    noise = float(np.trace(products.trials)) / len(products.trials) - signal
    if noise <= 1e-12 * abs(signal):
        return float("inf") if signal > 0 else float("nan")
    return float(np.sqrt(max(signal, 0.0) / noise))


def cosine(products: Products) -> float:
    """Computes the cosine of the angle between the mean of the estimates and the exact gradient.

    It is NaN if one of the two cannot be distinguished from 0.
    """
    square = square_of_mean(products.trials)
    if min(square, products.exact) <= 0:
        return float("nan")
    return float(products.cross.mean() / np.sqrt(square * products.exact))


def scale(products: Products) -> float:
    """Computes the multiple c of the exact gradient g* that is nearest to the mean of the estimates: E g . g* / |g*|^2."""
    return float(products.cross.mean() / products.exact) if products.exact > 0 else float("nan")


def relative_bias(products: Products) -> float:
    """Computes |E g - c g*| / |E g| with the best multiple c: the part of the mean that no learning rate corrects."""
    return _sine(cosine(products))


def estimate(statistic: Callable[[Products], float], products: Products) -> Estimate:
    """Computes a statistic with its 95 % interval over repetitions, by the jackknife."""
    value, error = statistic(products), _jackknife_error(statistic, products)
    return _interval(value, value - error, value + error, len(products.trials))


def bias_estimate(products: Products) -> Estimate:
    """Computes `relative_bias` with its interval, which comes from that of the squared cosine.

    The sine is not differentiable where the bias is 0, so that its own jackknife would fail there.
    """

    def squared(part: Products) -> float:
        return cosine(part) ** 2

    value, error = squared(products), _jackknife_error(squared, products)
    lower, upper = (float(np.sqrt(np.clip(1 - at, 0, 1))) for at in (value + error, value - error))
    return _interval(relative_bias(products), lower, upper, len(products.trials))


def unknown(repetitions: int) -> Estimate:
    """Makes an estimate without a value."""
    return Estimate(value=None, lower=None, upper=None, n=repetitions)


def _sine(cosine: float) -> float:
    return float(np.sqrt(np.clip(1 - cosine**2, 0, 1)))


def _interval(value: float, lower: float, upper: float, n: int) -> Estimate:
    return Estimate(value=value, lower=lower, upper=upper, n=n) if np.isfinite(value) else unknown(n)


def _jackknife_error(statistic: Callable[[Products], float], products: Products) -> float:
    """Half the width of the 95 % interval; NaN if the statistic is NaN without one of the repetitions."""
    n = len(products.trials)
    values = [statistic(products.without(i)) for i in range(n)]
    return float(np.sqrt((n - 1) * np.var(values)) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
