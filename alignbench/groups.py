"""Statistics inside a group of rollouts, blind to the leaves whose scorer gave up (NaN rewards).

All tensors are [G, K]; a group whose rewards are all equal, or all missing, standardises to exact zeros.
"""

import torch
from torch import Tensor

MIN_STD = 1e-4
MIN_DISTANCE = 1e-8


def valid(rewards: Tensor) -> Tensor:
    """True where a reward is there."""
    return ~torch.isnan(rewards)


def standardise(rewards: Tensor, *, std: str = "group", min_std: float = MIN_STD, correction: int = 0) -> Tensor:
    """z = (r - group mean) / max(std, min_std), zero where a reward is missing.

    Args:
        std: "group" (population deviation of each group), "batch" (of all rewards about the mean of them all: one scale,
            in which prompts that differ count too), or "none" (no division).
        correction: what is taken off the number of rewards in the deviation: 0 for the population's, 1 for a sample's.
    """
    here = valid(rewards)
    count = here.sum(1, keepdim=True).clamp(min=1)
    filled = torch.where(here, rewards, 0.0)
    centred = torch.where(here, rewards - filled.sum(1, keepdim=True) / count, 0.0)
    # Equal rewards must give exact zeros, whatever the rounding of their mean.
    centred = torch.where(spread(rewards)[:, None], centred, 0.0)
    if std == "none":
        return centred
    if std == "group":
        scale = torch.sqrt((centred**2).sum(1, keepdim=True) / (count - correction).clamp(min=1))
    elif std == "batch":
        number = here.sum()
        variance = mean((rewards - mean(rewards, here)) ** 2, here) * number / (number - correction).clamp(min=1)
        scale = torch.sqrt(variance).expand_as(centred)
    else:
        raise ValueError(f"std must be 'group', 'batch' or 'none', got {std!r}")
    return centred / scale.clamp(min=min_std)


def spread(rewards: Tensor) -> Tensor:
    """bool [G]: whether a group has two different rewards, without which there is nothing to prefer."""
    here = valid(rewards)
    high = torch.where(here, rewards, -torch.inf).amax(1)
    low = torch.where(here, rewards, torch.inf).amin(1)
    return high > low


def comparable(rewards: Tensor) -> Tensor:
    """bool [G, K]: the leaves that have a reward, in groups where it differs from another's."""
    return valid(rewards) & spread(rewards)[:, None]


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
