"""gardo: policy gradient that favours good pictures unlike the others, with a KL penalty on doubtful ones alone.

GARDO (official code; TMPO, arXiv 2605.10983, compares with it). For leaf i of a group with mean reward m:

    A_i = (R_i - m) d_i / mean(d) where R_i >= m, else R_i - m
    d_i = the smallest cosine distance of leaf i to another leaf of its group
    L   = mean_it w_t max(-A_i r_it, -A_i clip(r_it, 1 - eps, 1 + eps)) + kl_beta mean_it u_i KL(pi_theta || pi_ref)

w_t is the deviation of the step's noise over its mean. u_i is 1 for the `kl_share` of leaves whose reward most outdoes their
auxiliary rewards, by rank in the rollout. How this differs from its code: docs/methods/gardo.md.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from alignbench import groups
from alignbench.forest import RolloutForest
from objectives.grpo import GRPO

MIN_DISTANCE = 1e-8


class GARDO(GRPO):
    class Settings(GRPO.Settings):
        clip: float = Field(1e-5, gt=0)
        """eps of the per-step ratio. Log-probs are means over latent dimensions, so ratios stay very close to 1."""
        std: Literal["group", "batch", "none"] = "none"
        """Which deviation the advantage is divided by."""
        credit: Literal["leaf"] = "leaf"
        step_weight: Literal["none", "inverse_dt", "noise"] = "noise"
        """Weight of a step in the loss, 1 on average. noise: the deviation that the step draws with."""
        kl_beta: float = Field(0.04, ge=0)
        """Weight of the KL divergence to the reference; 0 saves the reference's forward pass."""
        kl_share: float = Field(0.1, gt=0, le=1)
        """Share of a rollout's leaves that the KL counts for, the most doubtful ones; all where the task has one reward
        alone, since nothing then casts doubt."""
        doubt: Literal["overrated", "underrated"] = "overrated"
        """overrated: the reward ranks a picture higher than the auxiliary rewards do. underrated: lower, which is what
        the official code selects."""

    settings: Settings

    def advantage(self, forest: RolloutForest) -> Tensor:
        """Of each leaf, [G, K]; zero in groups whose rewards are all equal."""
        rewards = forest.by_group(forest.rewards)
        here = groups.valid(rewards)
        a = groups.standardise(rewards, std=self.settings.std)
        d = nearest_distance(forest.leaf_latents.reshape(*rewards.shape, -1), here)
        average = torch.where(here, d, 0.0).sum(1, keepdim=True) / here.sum(1, keepdim=True).clamp(min=1)
        a = torch.where(a > 0, a * d / average.clamp(min=MIN_DISTANCE), a)
        return a.clamp(-self.settings.adv_clip, self.settings.adv_clip)

    def kl_weight(self, forest: RolloutForest) -> Tensor:
        """u of each leaf, float32 [G * K]."""
        if len(forest.scores) < 2:
            return torch.ones_like(forest.rewards)
        main, *auxiliary = forest.scores.values()
        doubt = torch.stack([_rank(a) for a in auxiliary]).mean(0) - _rank(main)
        if self.settings.doubt == "underrated":
            doubt = -doubt
        doubt = torch.where(groups.valid(forest.rewards), doubt, -torch.inf)
        chosen = doubt.topk(max(1, round(self.settings.kl_share * len(doubt)))).indices
        weight = torch.zeros_like(forest.rewards)
        weight[chosen] = (doubt[chosen] > 0).to(weight.dtype)
        return weight


def nearest_distance(latents: Tensor, here: Tensor) -> Tensor:
    """Cosine distance of each leaf to the nearest other one that has a reward; [G, K, D], [G, K] -> [G, K].

    1 for all of a group of which fewer than two leaves have one.
    """
    unit = functional.normalize(latents, dim=-1)
    distance = 1 - unit @ unit.mT
    itself = torch.eye(latents.shape[1], dtype=torch.bool, device=latents.device)
    nearest = distance.masked_fill(itself | ~here[:, None, :], torch.inf).amin(-1)
    return torch.where(here.sum(1, keepdim=True) < 2, 1.0, nearest).clamp(min=0)


def _rank(scores: Tensor) -> Tensor:
    """1 for the best of the rollout, float32 [N]; equal scores share their mean rank, missing ones come last."""
    filled = scores.nan_to_num(nan=-torch.inf)
    better = (filled[None, :] > filled[:, None]).sum(1)
    equal = (filled[None, :] == filled[:, None]).sum(1)
    return better + (equal + 1) / 2
