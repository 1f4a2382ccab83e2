"""Expectations under a tilted target, from samples of the base model alone.

The target of every matching objective is p(x) = p_base(x) exp(beta R(x)) / Z. Its expectations are ratios of expectations
under p_base, so N base samples with their rewards give them by self-normalised importance weights
w_i = exp(beta R_i) / sum_j exp(beta R_j). Nothing is trained. Best-of-n is the same with other weights.

Metrics of sets (diversity, coverage) are computed on sets of K different samples: a set S has the weight prod_{i in S} w_i
(conditional Poisson sampling). For independent base samples,

    E[ sum_{|S| = K} prod_{i in S} exp(beta R_i) m(S) ] = C(N, K) Z^K E_{x_1..x_K ~ p}[ m(x_1, ..., x_K) ],

so numerator and denominator are unbiased for the metric of K independent images of the target, whatever bias m has at K. Sets
drawn with replacement would contain copies, which look like a collapse.
"""

from math import comb

import numpy as np
from scipy.special import logsumexp

ROUNDING = 1e-12
"""If all samples but one have a smaller share of the weight than this, their weight counts as 0."""


def tilted_log_weights(rewards: np.ndarray, beta: float) -> np.ndarray:
    """Computes the log weights log w_i of the target p_base exp(beta R) / Z, normalised over the last axis.

    Args:
        rewards: R_i of samples of the base model, float [..., N]. NaN for a sample without reward, which gets weight 0.
        beta: inverse temperature on raw rewards.
    """
    scaled = np.where(np.isnan(rewards), -np.inf, beta * np.asarray(rewards, dtype=np.float64))
    return np.asarray(scaled - logsumexp(scaled, axis=-1, keepdims=True))


def best_of_log_weights(rewards: np.ndarray, n: int) -> np.ndarray:
    """Computes the log probability that sample i is the best of n different samples of the N, float [N]; ties share it.

    With the samples in ascending order of reward, sample i is the best in C(i - 1, n - 1) of the C(N, n) subsets, which makes
    the expected reward the unbiased estimate of best-of-n (as pass@k is: Chen et al. 2021, arXiv 2107.03374, equation 1).

    Args:
        rewards: float [N]; NaN for a sample without reward.
        n: the number of samples of which the best is taken.

    Raises:
        ValueError: fewer than n samples have a reward.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    valid = np.flatnonzero(~np.isnan(rewards))
    count = len(valid)
    if not 1 <= n <= count:
        raise ValueError(f"best of {n} needs at least {n} samples, got {count}")
    order = valid[np.argsort(rewards[valid], kind="stable")]
    chance = np.zeros(count)
    for place in range(n - 1, count):
        chance[place] = comb(place, n - 1) / comb(count, n)
    sorted_rewards = rewards[order]
    for value in np.unique(sorted_rewards):
        tied = sorted_rewards == value
        chance[tied] = chance[tied].mean()
    log_weights = np.full(len(rewards), -np.inf)
    with np.errstate(divide="ignore"):
        log_weights[order] = np.log(chance)
    return log_weights


def effective_sample_size(log_weights: np.ndarray) -> np.ndarray:
    """Computes the effective sample size 1 / sum_i w_i^2 over the last axis, between 1 and N (Kish 1965)."""
    return np.asarray(np.exp(-logsumexp(2 * log_weights, axis=-1)))


def kl_to_base(log_weights: np.ndarray) -> np.ndarray:
    """Computes KL(target || base model) in nats over the last axis: sum_i w_i log(N w_i), with N the samples with a weight."""
    count = np.isfinite(log_weights).sum(-1)
    weights = np.exp(log_weights)
    with np.errstate(invalid="ignore"):
        terms = np.where(weights > 0, weights * log_weights, 0.0)
    return np.asarray(terms.sum(-1) + np.log(count))


def weighted_mean(values: np.ndarray, log_weights: np.ndarray) -> float:
    """Computes sum_i w_i v_i over the samples with a value, with weights normalised over these; NaN if none has a value."""
    valid = ~np.isnan(values) & np.isfinite(log_weights)
    if not valid.any():
        return float("nan")
    weights = np.exp(log_weights[valid] - log_weights[valid].max())
    return float((weights * values[valid]).sum() / weights.sum())


def tilted_mean(values: np.ndarray, log_weights: np.ndarray) -> float:
    """Computes `weighted_mean` without the ratio's bias of order 1/N, by the jackknife over samples (Quenouille 1956).

    The estimate without sample i is (sum w v - w_i v_i) / (sum w - w_i). The result is NaN if fewer than two samples count.
    """
    valid = ~np.isnan(values) & np.isfinite(log_weights)
    count = int(valid.sum())
    if count < 2:
        return float("nan")
    weights = np.exp(log_weights[valid] - log_weights[valid].max())
    v = values[valid] - values[valid].mean()  # differences, so that an offset costs no digits
    total, weight = (weights * v).sum(), weights.sum()
    rest = weight - weights
    if not (rest > ROUNDING * weight).all():
        return weighted_mean(values, log_weights)  # one sample has all the weight: nothing is left without it
    without = (total - weights * v) / rest
    estimate = count * total / weight - (count - 1) * without.mean()
    return float(np.clip(estimate, v.min(), v.max()) + values[valid].mean())


def tilted_kl(log_weights: np.ndarray) -> float:
    """Computes `kl_to_base` of one prompt's samples without its bias of order 1/N, by the jackknife; at least 0.

    Without sample i the weights are w_j / (1 - w_i), whose sum of w log w is (H - w_i log w_i) / (1 - w_i) - log(1 - w_i).
    """
    log_w = log_weights[np.isfinite(log_weights)]
    count, w = len(log_w), np.exp(log_w)
    plain = float(kl_to_base(log_w))
    if count < 3 or not (1 - w > ROUNDING).all():
        return plain
    entropy_terms = w * log_w
    without = (entropy_terms.sum() - entropy_terms) / (1 - w) - np.log1p(-w) + np.log(count - 1)
    return max(0.0, float(count * plain - (count - 1) * without.mean()))


def set_mean(values: np.ndarray, sets: np.ndarray, *, debias: bool = True) -> float:
    """Averages a metric over sets of samples, without the ratio's bias of order K^2/N, by the jackknife over samples.

    Sets without sample i are sets of the other samples. Their mean is the estimate without sample i, so the jackknife needs no
    further evaluation of the metric.

    Args:
        values: the metric of each set, float [B]; NaN for a set without a value.
        sets: int [B, K], from `draw_sets`.
        debias: False for weights that are not those of a tilted target, such as best-of-n's.
    """
    valid = ~np.isnan(values)
    if not valid.any():
        return float("nan")
    values, sets = values[valid], sets[valid]
    mean = float(values.mean())
    if not debias:
        return mean
    members, flat = np.unique(sets, return_inverse=True)
    flat = flat.reshape(sets.shape)
    counts = np.bincount(flat.ravel(), minlength=len(members))
    sums = np.bincount(flat.ravel(), weights=np.repeat(values - mean, sets.shape[1]), minlength=len(members))
    rest = len(values) - counts
    if not (rest > 0).all():
        return mean
    shift = (-sums / rest).sum()  # the shifts of the estimates without one sample; samples that are in no set add 0
    return float(np.clip(mean - shift, values.min(), values.max()))


def draw_sets(log_weights: np.ndarray, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draws sets of different samples with probability proportional to the product of their weights.

    Conditional Poisson sampling (Chen, Dempster and Liu 1994): sample i belongs to a set of k from the first i samples with
    probability w_i e_{k-1}(w_1..w_{i-1}) / e_k(w_1..w_i), e_k being the elementary symmetric polynomials.

    Args:
        log_weights: float [N], -inf for samples that are never drawn.
        size: K, at most the number of samples with a weight.
        count: the number of sets.
        rng: the generator.

    Returns:
        int [count, size], indices in ascending order.

    Raises:
        ValueError: too few samples have a weight.
    """
    usable = np.flatnonzero(np.isfinite(log_weights))
    if len(usable) < size:
        raise ValueError(f"sets of {size} need as many samples with a weight, got {len(usable)}")
    log_w = log_weights[usable]
    log_e = np.full((len(usable) + 1, size + 1), -np.inf)
    log_e[:, 0] = 0.0
    for i, value in enumerate(log_w):
        log_e[i + 1, 1:] = np.logaddexp(log_e[i, 1:], value + log_e[i, :-1])
    missing = np.full(count, size)
    sets = np.zeros((count, size), dtype=np.int64)
    for i in range(len(usable), 0, -1):
        with np.errstate(invalid="ignore"):
            log_chance = log_w[i - 1] + log_e[i - 1, np.maximum(missing - 1, 0)] - log_e[i, missing]
        taken = (missing > 0) & (np.log(rng.random(count)) < log_chance)
        sets[taken, missing[taken] - 1] = usable[i - 1]
        missing -= taken
    return sets
