"""Per-group statistics of rewards that ignore missing ones (NaN, where a scorer failed on an image).

All tensors are [G, K] unless a docstring says otherwise: G groups of K leaves. Statistics of rewards are computed in float64,
so an offset or a scale of the scorer changes nothing. A group whose rewards are equal up to their rounding, or are all
missing, standardises to exact zeros.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

MIN_STD = 1e-4
"""The smallest standard deviation that rewards are divided by."""
MIN_DISTANCE = 1e-8
"""The smallest distance between latents whose logarithm is taken."""
MIN_PROBABILITY_SQUARE = 1e-30
"""The smallest sum of squared probabilities that is divided by."""
ROUNDING_UNITS = 4
"""Rewards that lie within this many units of rounding of each other are taken as equal."""


def valid(rewards: Tensor) -> Tensor:
    """Marks the rewards that are not missing: bool, the shape of `rewards`."""
    return ~torch.isnan(rewards)


def standardise(rewards: Tensor, *, std: str = "group", min_std: float = MIN_STD, correction: int = 0) -> Tensor:
    """Standardises rewards: z = (r - group mean) / max(std, min_std).

    Args:
        rewards: [G, K], NaN where a reward is missing.
        std: the deviation to divide by. "group" is that of each group; "batch" is that of all rewards about their common mean,
            so that differences between prompts count too; "none" does not divide.
        min_std: the smallest deviation that is divided by.
        correction: what is subtracted from the number of rewards in the deviation: 0 for the population's deviation, 1 for a
            sample's.

    Returns:
        float32 [G, K], zero where a reward is missing.

    Raises:
        ValueError: `std` has another value.
    """
    rewards = rewards.double()
    valid_mask = valid(rewards)
    centred = _centred(rewards, valid_mask)
    if std == "none":
        return centred.float()
    if std == "group":
        scale = _deviation(centred, valid_mask, 1, correction)
    elif std == "batch":
        any_valid = bool(valid_mask.any())
        shifted = torch.where(valid_mask, rewards - rewards[valid_mask].median(), 0.0) if any_valid else centred
        scale = _deviation(torch.where(valid_mask, shifted - mean(shifted, valid_mask), 0.0), valid_mask, (0, 1), correction)
    else:
        raise ValueError(f"std must be 'group', 'batch' or 'none', got {std!r}")
    return (centred / scale.clamp(min=min_std)).float()


def total(scores: Mapping[str, Tensor], weights: Mapping[str, float], *, normalise: bool) -> Tensor:
    """Adds up several rewards to the one that is trained on: sum_m w_m r_m.

    Args:
        scores: reward -> [G, K]. Rewards without a weight do not count.
        weights: reward -> its weight.
        normalise: whether each of several rewards is standardised within its group before the sum (`advantage_aggr` in TMPO's
            code), so that weights compare quantities on one scale. A single reward is never standardised here.

    Returns:
        float64 [G, K], NaN where a reward that has a weight is missing.
    """
    normalise = standardises(weights, normalise=normalise)
    parts = []
    for name, weight in weights.items():
        raw = scores[name].double()
        # Rewards that are equal up to rounding become exactly equal before a weight changes how large their rounding is.
        raw = torch.where(valid(raw) & ~has_distinct_rewards(raw)[:, None], _first(raw, valid(raw)), raw)
        parts.append(weight * (standardise(raw).double().masked_fill(~valid(raw), torch.nan) if normalise else raw))
    return torch.stack(parts).sum(0)


def standardises(weights: Mapping[str, float], *, normalise: bool) -> bool:
    """Tells whether `total` adds up standardised rewards, which it does only if there are several."""
    return normalise and len(weights) > 1


def target_reward(rewards: Tensor, *, standardised: bool) -> Tensor:
    """Computes R~ of the Boltzmann target exp(beta R~): the reward in units of its group's standard deviation.

    Args:
        rewards: [G, K], NaN where a reward is missing.
        standardised: whether `rewards` is a sum of rewards that were each standardised in their group. Such a sum is not
            standardised again, so weights below 1 give a flatter target, as in TMPO's released code.

    Returns:
        float32 [G, K], zero where a reward is missing and in groups whose rewards are all equal.
    """
    if not standardised:
        return standardise(rewards)
    return torch.where(usable_leaves(rewards), rewards, 0.0).float()


def boltzmann_log_prob(reward: Tensor, beta: float, where: Tensor) -> Tensor:
    """Computes log q of the Boltzmann target over a group, q = softmax(beta R~) (arXiv 2605.10983).

    Args:
        reward: R~, usually from `target_reward`, [G, K].
        beta: the inverse temperature; 0 gives the uniform distribution.
        where: bool [G, K], the leaves that q is a distribution over.

    Returns:
        [G, K] in the type of `reward`, 0 outside `where`.
    """
    return log_softmax(beta * reward, where)


def varies(values: Tensor) -> Tensor:
    """Tells whether values differ along the last dimension by more than their rounding.

    Args:
        values: [..., N]; NaN values are ignored. If all of them are float32 numbers, they are taken to be rounded as such,
            whatever their dtype.

    Returns:
        bool [...].
    """
    valid_mask = valid(values)
    high = torch.where(valid_mask, values, -torch.inf).amax(-1)
    low = torch.where(valid_mask, values, torch.inf).amin(-1)
    numbers = values[valid_mask]
    unit = torch.finfo(torch.float32 if bool((numbers == numbers.float()).all()) else torch.float64).eps
    return high - low > ROUNDING_UNITS * unit * torch.maximum(high.abs(), low.abs())


def has_distinct_rewards(rewards: Tensor) -> Tensor:
    """Marks the groups in which two rewards differ: bool [G]. In the others no leaf can be preferred to another."""
    return varies(rewards)


def usable_leaves(rewards: Tensor) -> Tensor:
    """Marks the leaves that have a reward, in groups where two rewards differ: bool [G, K]."""
    return valid(rewards) & has_distinct_rewards(rewards)[:, None]


def deviation(rewards: Tensor) -> Tensor:
    """Computes the population standard deviation of each group: float64 [G], 0 where no two rewards differ."""
    rewards = rewards.double()
    valid_mask = valid(rewards)
    return _deviation(_centred(rewards, valid_mask), valid_mask, 1)[:, 0]


def _centred(rewards: Tensor, valid_mask: Tensor) -> Tensor:
    """Rewards minus their group's mean, float64 [G, K]; exact zeros for missing rewards and in groups of equal rewards."""
    # Averaging differences from one of the values keeps the digits that a large offset would cost.
    offsets = torch.where(valid_mask, rewards - _first(rewards, valid_mask), 0.0)
    centred = offsets - group_mean(offsets, valid_mask)
    return torch.where(valid_mask & has_distinct_rewards(rewards)[:, None], centred, 0.0)


def _first(values: Tensor, valid_mask: Tensor) -> Tensor:
    """The first valid value of each group, [G, 1]; 0 where there is none."""
    first = values.gather(1, valid_mask.int().argmax(1, keepdim=True))
    return torch.where(valid_mask.any(1, keepdim=True), first, 0.0)


def _deviation(centred: Tensor, valid_mask: Tensor, dims: int | tuple[int, int], correction: int = 0) -> Tensor:
    """sqrt(sum of squares / (count - correction)) over the valid values; the sum of squares cannot overflow or underflow."""
    peak = centred.abs().amax(dims, keepdim=True)
    unit = torch.where(peak > 0, centred / peak, 0.0)
    return peak * torch.sqrt((unit**2).sum(dims, keepdim=True) / (valid_mask.sum(dims, keepdim=True) - correction).clamp(min=1))


def mean(values: Tensor, where: Tensor) -> Tensor:
    """Averages the values at the places `where` (bool, the same shape): a scalar, 0 if there are no such places."""
    return torch.where(where, values, 0.0).sum() / where.sum().clamp(min=1)


def group_mean(values: Tensor, where: Tensor) -> Tensor:
    """Averages each group's values at the places `where` (bool [G, K]): [G, 1], 0 in groups without such places."""
    return torch.where(where, values, 0.0).sum(1, keepdim=True) / where.sum(1, keepdim=True).clamp(min=1)


def clipped(ratio: Tensor, advantage: Tensor, eps: float) -> Tensor:
    """Computes PPO's clipped surrogate min(r A, clip(r, 1 - eps, 1 + eps) A), which is to be maximised.

    Args:
        ratio: r, the importance ratio.
        advantage: A, broadcastable to `ratio`.
        eps: how far the ratio may move from 1 before its gradient stops.

    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)


def log_softmax(values: Tensor, where: Tensor) -> Tensor:
    """Computes the log softmax over the leaves `where` (bool [G, K]) of each group: [G, K], 0 elsewhere."""
    masked = torch.where(where, values, -torch.inf)
    group_has_leaves = where.any(1, keepdim=True)
    return torch.where(where, torch.log_softmax(torch.where(group_has_leaves, masked, 0.0), dim=1), 0.0)


def effective_sample_size(log_p: Tensor, where: Tensor) -> Tensor:
    """Computes each group's effective sample size 1 / sum_i p_i^2 over the leaves `where`: [G], between 1 and K."""
    return 1.0 / torch.where(where, torch.exp(2 * log_p), 0.0).sum(1).clamp(min=MIN_PROBABILITY_SQUARE)


def log_size(where: Tensor) -> Tensor:
    """Computes the log of the number of leaves `where` (bool [G, K]) in each group: float32 [G, 1], 0 for none."""
    return torch.log(where.sum(1, keepdim=True).clamp(min=1).float())


def lgmd(latents: Tensor) -> Tensor:
    """Computes TMPO's diversity of one group: the mean over pairs of log(|z_i - z_j| / sqrt(D)) (arXiv 2605.10983).

    Args:
        latents: [K, ...] with K at least 2 and D numbers in each. Distances are floored at `MIN_DISTANCE`.

    Returns:
        A scalar in nats; it is negative where latents are closer than a root-mean-square difference of 1.
    """
    flat = latents.flatten(1)
    return torch.log((torch.pdist(flat) / flat.shape[1] ** 0.5).clamp(min=MIN_DISTANCE)).mean()
