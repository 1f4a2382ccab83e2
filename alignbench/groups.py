"""Per-group statistics of rewards that ignore missing ones (NaN, where a scorer failed on an image).

All tensors are [G, K] unless a docstring says otherwise. Statistics of rewards are computed in float64, so that an offset or a
scale of the scorer changes nothing; a group whose rewards are equal up to their rounding, or all missing, standardises to
exact zeros.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

MIN_STD = 1e-4
MIN_DISTANCE = 1e-8
ROUNDING_UNITS = 4
"""Rewards that lie within so many units of rounding of each other are taken as equal."""


def valid(rewards: Tensor) -> Tensor:
    """True where a reward is there."""
    return ~torch.isnan(rewards)


def standardise(rewards: Tensor, *, std: str = "group", min_std: float = MIN_STD, correction: int = 0) -> Tensor:
    """z = (r - group mean) / max(std, min_std), float32, zero where a reward is missing.

    Args:
        std: "group" (population deviation of each group), "batch" (of all rewards about the mean of them all: one scale,
            in which prompts that differ count too), or "none" (no division).
        correction: what is taken off the number of rewards in the deviation: 0 for the population's, 1 for a sample's.
    """
    rewards = rewards.double()
    here = valid(rewards)
    centred = _centred(rewards, here)
    if std == "none":
        return centred.float()
    if std == "group":
        scale = _deviation(centred, here, 1, correction)
    elif std == "batch":
        shifted = torch.where(here, rewards - rewards[here].median(), 0.0) if bool(here.any()) else centred
        scale = _deviation(torch.where(here, shifted - mean(shifted, here), 0.0), here, (0, 1), correction)
    else:
        raise ValueError(f"std must be 'group', 'batch' or 'none', got {std!r}")
    return (centred / scale.clamp(min=min_std)).float()


def total(scores: Mapping[str, Tensor], weights: Mapping[str, float], *, normalise: bool) -> Tensor:
    """The one reward that several add up to, float64 [G, K]: sum_m w_m r_m; NaN where one with a weight is missing.

    Args:
        scores: reward -> [G, K]; those without a weight do not count.
        normalise: whether each of several rewards is standardised within its group before the sum (`advantage_aggr` of TMPO's
            code), so that weights compare what is comparable. A single reward stays as it is.
    """
    normalise = standardises(weights, normalise=normalise)
    parts = []
    for name, weight in weights.items():
        raw = scores[name].double()
        # Rewards that are equal up to rounding become equal, before a weight hides what their rounding is.
        raw = torch.where(valid(raw) & ~has_distinct_rewards(raw)[:, None], _first(raw, valid(raw)), raw)
        parts.append(weight * (standardise(raw).double().masked_fill(~valid(raw), torch.nan) if normalise else raw))
    return torch.stack(parts).sum(0)


def standardises(weights: Mapping[str, float], *, normalise: bool) -> bool:
    """Whether `total` adds up standardised rewards: a single one is left as it is."""
    return normalise and len(weights) > 1


def target_reward(rewards: Tensor, *, standardised: bool) -> Tensor:
    """R~ of a Boltzmann target exp(beta R~): in units of the group's deviation, float32 [G, K], zero where it is missing.

    Args:
        standardised: whether `rewards` is a sum of rewards that were each standardised in their group, which is not
            standardised again: weights below 1 then mean a flatter target, as in TMPO's released code.
    """
    if not standardised:
        return standardise(rewards)
    return torch.where(usable_leaves(rewards), rewards, 0.0).float()


def varies(values: Tensor) -> Tensor:
    """bool: whether values [..., N] differ along the last dimension by more than their rounding; NaN counts for nothing.

    Rewards that are all float32 numbers are taken to be rounded as such, whatever type they come in.
    """
    here = valid(values)
    high = torch.where(here, values, -torch.inf).amax(-1)
    low = torch.where(here, values, torch.inf).amin(-1)
    known = values[here]
    unit = torch.finfo(torch.float32 if bool((known == known.float()).all()) else torch.float64).eps
    return high - low > ROUNDING_UNITS * unit * torch.maximum(high.abs(), low.abs())


def has_distinct_rewards(rewards: Tensor) -> Tensor:
    """bool [G]: whether a group has two different rewards, without which there is nothing to prefer."""
    return varies(rewards)


def usable_leaves(rewards: Tensor) -> Tensor:
    """bool [G, K]: the leaves that have a reward, in groups where it differs from another's."""
    return valid(rewards) & has_distinct_rewards(rewards)[:, None]


def deviation(rewards: Tensor) -> Tensor:
    """Population standard deviation of each group's rewards, float64 [G]; 0 where there is nothing to prefer."""
    rewards = rewards.double()
    here = valid(rewards)
    return _deviation(_centred(rewards, here), here, 1)[:, 0]


def _centred(rewards: Tensor, here: Tensor) -> Tensor:
    """Rewards minus their group's mean, float64 [G, K]; exact zeros where a group has nothing to prefer, or one is missing."""
    # Values are averaged as differences from one of them, so that a large offset costs no digits.
    apart = torch.where(here, rewards - _first(rewards, here), 0.0)
    centred = apart - apart.sum(1, keepdim=True) / here.sum(1, keepdim=True).clamp(min=1)
    return torch.where(here & has_distinct_rewards(rewards)[:, None], centred, 0.0)


def _first(values: Tensor, here: Tensor) -> Tensor:
    """The first valid value of each group, [G, 1]; 0 where there is none."""
    first = values.gather(1, here.int().argmax(1, keepdim=True))
    return torch.where(here.any(1, keepdim=True), first, 0.0)


def _deviation(centred: Tensor, here: Tensor, dims: int | tuple[int, int], correction: int = 0) -> Tensor:
    """Root of the mean square over the places `here`, by (count - correction); the sum of squares cannot overflow or vanish."""
    peak = centred.abs().amax(dims, keepdim=True)
    unit = torch.where(peak > 0, centred / peak, 0.0)
    return peak * torch.sqrt((unit**2).sum(dims, keepdim=True) / (here.sum(dims, keepdim=True) - correction).clamp(min=1))


def mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the values at the places `where`; 0 where there are none."""
    return torch.where(where, values, 0.0).sum() / where.sum().clamp(min=1)


def clipped(ratio: Tensor, advantage: Tensor, eps: float) -> Tensor:
    """PPO's surrogate min(r A, clip(r, 1 - eps, 1 + eps) A), to be maximised (arXiv 1707.06347, equation 7)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)


def log_softmax(values: Tensor, where: Tensor) -> Tensor:
    """log softmax over the leaves `where` of each group; 0 elsewhere."""
    masked = torch.where(where, values, -torch.inf)
    any_here = where.any(1, keepdim=True)
    return torch.where(where, torch.log_softmax(torch.where(any_here, masked, 0.0), dim=1), 0.0)


def effective_sample_size(log_p: Tensor, where: Tensor) -> Tensor:
    """1 / sum p^2 of each group, between 1 and K; float [G]."""
    return 1.0 / torch.where(where, torch.exp(2 * log_p), 0.0).sum(1).clamp(min=1e-30)


def log_size(where: Tensor) -> Tensor:
    """log of the number of leaves that count; float [G, 1]."""
    return torch.log(where.sum(1, keepdim=True).clamp(min=1).float())


def lgmd(latents: Tensor) -> Tensor:
    """TMPO's diversity of one group (arXiv 2605.10983): the mean over pairs of log(|z_i - z_j| / sqrt(D)).

    Args:
        latents: [K, ...], K at least 2. Distances are floored at 1e-8.
    """
    flat = latents.flatten(1)
    return torch.log((torch.pdist(flat) / flat.shape[1] ** 0.5).clamp(min=MIN_DISTANCE)).mean()
