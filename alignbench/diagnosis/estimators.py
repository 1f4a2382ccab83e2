"""The numbers of a diagnosis, estimated from drawn groups, with intervals over groups.

docs/samplers.md says what each number means and what it does not say.
"""

import numpy as np
import torch

from alignbench import groups
from alignbench.diagnosis.draws import Draws, Groups
from alignbench.diagnosis.record import Distance, PartitionFunction, PrefixEntropy, Slope, TotalVariation
from alignbench.records.record import Estimate
from alignbench.statistics import interval_over_groups

LARGEST, FEWEST = 81, 8
"""Several groups are pooled to reach a larger K: up to K = LARGEST, and as long as each prompt has FEWEST pools."""
PROJECTIONS = 8
"""Number of random directions in which the classifier sees a single leaf."""


def distances(draws: Draws) -> list[Distance]:
    """Distances between leaves of a group, by the place where the two leaves diverge; places without a pair are left out."""
    k = draws.shared.latents.shape[2]
    one, other = np.triu_indices(k, 1)
    # Leaf i descends from prefix i // (K / c) of c. At the root and after each split a pair is in one prefix or in two.
    together = np.stack([one // (k // c) == other // (k // c) for c in draws.prefixes])
    level_of = together.sum(0)
    shared, independent = (_pair_distances(part.latents) for part in (draws.shared, draws.independent))
    of_independent = Estimate.of(interval_over_groups(_mean, independent.mean(-1)))
    return [
        Distance(
            apart_since="root" if level == 0 else f"split {level}",
            sampler=Estimate.of(interval_over_groups(_mean, shared[..., level_of == level].mean(-1))),
            independent=of_independent,
        )
        for level in sorted(set(level_of.tolist()))
    ]


def prefix_entropy(draws: Draws, beta: float) -> list[PrefixEntropy]:
    """Entropies for every number of prefixes above one; the last prefixes are the leaves themselves."""
    prompts, n, k = draws.shared.rewards.shape
    rewards = torch.from_numpy(draws.shared.rewards).view(-1, k)
    scored = groups.valid(rewards)
    log_p = torch.log_softmax(torch.from_numpy(draws.shared.log_prob).view(-1, k), dim=1)
    log_q = groups.boltzmann_log_prob(groups.target_reward(rewards, standardised=draws.standardised), beta, scored)
    q = torch.where(scored, log_q.exp(), 0.0)

    def estimate(mass: torch.Tensor, prefixes: int) -> Estimate:
        by_prefix = mass.view(prompts, n, prefixes, -1).sum(-1)
        entropy = torch.special.entr(by_prefix).sum(-1) / np.log(prefixes)
        return Estimate.of(interval_over_groups(_mean, entropy.numpy()))

    return [PrefixEntropy(prefixes=c, policy=estimate(log_p.exp(), c), target=estimate(q, c)) for c in draws.prefixes if c > 1]


def total_variation(draws: Draws) -> TotalVariation:
    """Lower bounds of the total variation distance, by classifiers; see `classifier_advantage`."""

    def whole(part: Groups) -> np.ndarray:
        """Features of a group, [P, n, 1, F]: quantiles and mean of the log distances, and the log of the variance."""
        apart = np.log(np.maximum(_pair_distances(part.latents), groups.MIN_DISTANCE))
        spread = np.log(np.maximum(part.latents.var(2).mean(-1), groups.MIN_DISTANCE))
        quantiles = np.quantile(apart, [0, 0.1, 0.25, 0.5, 0.75, 1], axis=-1)
        return np.stack([*quantiles, apart.mean(-1), spread], axis=-1)[:, :, None]

    def single(part: Groups) -> np.ndarray:
        """Features of each leaf, [P, n, K, F]: its coordinates in a few directions, and their squares."""
        d = part.latents.shape[-1]
        directions = np.linalg.qr(np.random.default_rng(0).normal(size=(d, min(d, PROJECTIONS))))[0]
        coordinates = part.latents @ directions
        return np.concatenate([coordinates, coordinates**2], axis=-1)

    leaf, group = (classifier_advantage(of(draws.shared), of(draws.independent)) for of in (single, whole))
    return TotalVariation(
        leaf=Estimate.of(interval_over_groups(_mean, leaf)), group=Estimate.of(interval_over_groups(_mean, group))
    )


def classifier_advantage(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How much better than chance a classifier distinguishes two samples: P(A) - Q(A) for the set A that it calls `one`.

    No set has a larger difference than the total variation distance, so each value is in expectation a lower bound of it. The
    classifier is a least-squares fit (Fisher's discriminant) to every second group, on features that are centred for each
    prompt, and it is evaluated on the other groups. (Cross-fitting would evaluate all groups, but its values depend on each
    other: with five folds, 95 % intervals miss a difference of 0 in 13 % of cases.)

    Args:
        one, other: float [P, n, K, F], F features of K items in each group.

    Returns:
        float [P, n // 2]: one value between -1 and 1 for each pair of evaluated groups.
    """
    both = np.stack([one, other])
    fitted = both[:, :, ::2]
    centre, scale = fitted.mean((0, 2, 3), keepdims=True), fitted.std((0, 1, 2, 3)) + 1e-12

    def rows(features: np.ndarray) -> np.ndarray:
        return np.concatenate([(features - centre) / scale, np.ones((*features.shape[:-1], 1))], axis=-1)

    x = rows(fitted)
    labels = np.broadcast_to(np.array([1.0, -1.0])[:, None, None, None], x.shape[:-1])
    weights = np.linalg.lstsq(x.reshape(-1, x.shape[-1]), labels.ravel(), rcond=None)[0]
    called_one = (rows(both[:, :, 1::2]) @ weights > 0).mean(-1)
    return called_one[0] - called_one[1]


def partition_function(draws: Draws, beta: float) -> tuple[list[PartitionFunction], list[Slope]]:
    """Bias and standard deviation of log Z_hat for growing K, and how fast they fall.

    A part of a group has one leaf below each prefix, so its distribution is that of the same plan with fewer splits. More
    leaves than a group has come from several groups of the same prompt.
    """
    # One scale for each prompt: with a group's own standard deviation, as in the losses, Z itself would depend on the group.
    pool = draws.reference.rewards.reshape(len(draws.reference.rewards), -1)
    mean, deviation = np.nanmean(pool, 1)[:, None, None], np.nanstd(pool, 1)[:, None, None]

    def weights(part: Groups) -> np.ndarray:
        return np.exp(beta * (part.rewards - mean) / np.maximum(deviation, groups.MIN_STD))

    shared, independent = weights(draws.shared), weights(draws.independent)
    reference = np.nanmean(weights(draws.reference), axis=-1)
    k = shared.shape[2]
    samples = {
        size: tuple(log_means(series, size) for series in (shared, independent))
        for size in _sizes(draws.prefixes, shared.shape[1])
    }
    points = [
        PartitionFunction(
            k=size,
            pooled_groups=max(1, size // k),
            sampler_bias=Estimate.of(interval_over_groups(_bias, of_sampler, reference)),
            independent_bias=Estimate.of(interval_over_groups(_bias, of_independent, reference)),
            sampler_deviation=Estimate.of(interval_over_groups(_deviation, of_sampler)),
            independent_deviation=Estimate.of(interval_over_groups(_deviation, of_independent)),
        )
        for size, (of_sampler, of_independent) in samples.items()
    ]
    slopes = []
    for series, name in enumerate(("sampler", "independent")):
        inside = [p for p in points if name == "independent" or p.k <= k]
        biased = [p.k for p in inside if (upper := getattr(p, f"{name}_bias").upper) is not None and upper < 0]
        for quantity, used in (("bias", biased), ("deviation", [p.k for p in inside])):
            slope = _slope(quantity, used, [samples[size][series] for size in used], reference)
            slopes.append(Slope(quantity=quantity, of=name, sizes=used, slope=slope))
    return points, slopes


def log_means(weights: np.ndarray, size: int) -> np.ndarray:
    """The log of the mean of `size` weights, which are evenly spaced leaves of one group or all leaves of several groups.

    Args:
        weights: float [P, n, K], NaN for missing weights.
        size: number of weights in each mean; a divisor or a multiple of K.

    Returns:
        float [P, n', 2]: mean and variance over the K / size disjoint parts of a group. If size > K, there are
        n' = n // (size / K) pools of several groups, with variance 0. NaN where all weights are missing.
    """
    prompts, n, k = weights.shape
    if size <= k:
        parts = weights.reshape(prompts, n, size, k // size)
    else:
        pooled = size // k
        parts = weights[:, : n // pooled * pooled].reshape(prompts, -1, size, 1)
    present = ~np.isnan(parts)
    logs = np.log(np.where(present, parts, 0.0).sum(2) / np.where(present.any(2), present.sum(2), np.nan))
    return np.stack([logs.mean(-1), logs.var(-1)], axis=-1)


def _sizes(prefixes: tuple[int, ...], rounds: int) -> list[int]:
    """Values of K: the numbers of prefixes, or powers of three that divide an unsplit group; then pools of several groups."""
    k = prefixes[-1]
    splits = [c for c in prefixes if c > 1]
    inside = splits if len(prefixes) > 1 else [size for size in (3**j for j in range(1, 9)) if size < k and k % size == 0] + [k]
    factor = k // prefixes[-2] if len(prefixes) > 1 else 3
    pools = [factor**j for j in range(1, 9)]
    return inside + [k * pool for pool in pools if k * pool <= LARGEST and rounds // pool >= FEWEST]


def _slope(quantity: str, sizes: list[int], samples: list[np.ndarray], reference: np.ndarray) -> Estimate:
    if len(sizes) < 2:
        return Estimate(value=None, lower=None, upper=None, n=0)
    x = np.log(sizes) - np.log(sizes).mean()

    def slope(*resampled: np.ndarray) -> np.ndarray:
        *parts, weights = resampled
        values = [_deviation(part) if quantity == "deviation" else -_bias(part, weights) for part in parts]
        with np.errstate(divide="ignore", invalid="ignore"):
            fitted = (np.log(np.stack(values, axis=-1)) * x).sum(-1) / (x**2).sum()
        return np.where(np.isfinite(fitted), fitted, np.nan)

    return Estimate.of(interval_over_groups(slope, *samples, reference))


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over prompts and groups: [B, P, n] -> [B]."""
    return np.nanmean(values, axis=(1, 2))


def _bias(logs: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The mean over prompts of E[log Z_hat] - log Z.

    Args:
        logs: float [B, P, n, 2], from `log_means`.
        reference: float [B, P, n'], mean weights of independent groups, from which Z is estimated.
    """
    return (np.nanmean(logs[..., 0], axis=2) - np.log(np.nanmean(reference, axis=2))).mean(1)


def _deviation(logs: np.ndarray) -> np.ndarray:
    """Standard deviation of log Z_hat for one prompt, between and within groups, as the root mean square over prompts."""
    n = logs.shape[2]
    between = np.nanvar(logs[..., 0], axis=2) * n / (n - 1)
    return np.sqrt((between + np.nanmean(logs[..., 1], axis=2)).mean(1))


def _pair_distances(latents: np.ndarray) -> np.ndarray:
    """|z_i - z_j| / sqrt(D) for the pairs i < j of each group: [P, n, K, D] -> [P, n, K (K - 1) / 2]."""
    prompts, n, k, d = latents.shape
    pairs = [torch.pdist(torch.from_numpy(group)).numpy() for group in latents.reshape(-1, k, d)]
    return np.stack(pairs).reshape(prompts, n, -1) / np.sqrt(d)
