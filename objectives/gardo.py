"""gardo: policy gradient that favours good pictures unlike the others, with a KL penalty on doubtful ones alone.

GARDO (official code; TMPO, arXiv 2605.10983, compares with it). For leaf i of a group with mean reward m:

    A_i = (R_i - m) d_i / mean(d) where R_i >= m, else R_i - m
    d_i = the smallest cosine distance of leaf i to another leaf of its group
    L   = mean_it w_t max(-A_i r_it, -A_i clip(r_it, 1 - eps, 1 + eps)) + kl_beta mean_it u_i KL(pi_theta || pi_ref)

w_t is the deviation of the step's noise over its mean. A leaf is doubtful where its reward outdoes its auxiliary rewards, by
rank in the rollout; u_i is 1 for a share of the doubtful leaves, those of most doubt. The share grows when the mean doubt is
above that of all recent rollouts and falls when it is below. How this differs from its code: docs/methods/gardo.md.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from alignbench import groups
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms
from objectives.grpo import GRPO

MIN_DISTANCE = 1e-8
SHARE_STEP, SHARE_RANGE, RECENT = 0.1, (0.2, 2.0), 20
"""By how much the share changes at a time, within which multiples of `kl_share`, and compared with how many rollouts."""


class GARDO(GRPO):
    class Settings(GRPO.Settings):
        clip: float = Field(1e-5, gt=0)
        """eps of the per-step ratio. Log-probs are means over latent dimensions, so ratios stay very close to 1."""
        std: Literal["group", "batch", "none"] = "none"
        """Which deviation the advantage is divided by."""
        credit: Literal["leaf"] = "leaf"
        """Each leaf has its own advantage; the only choice here."""
        step_weight: Literal["none", "inverse_dt", "noise"] = "noise"
        """Weight of a step in the loss, 1 on average. noise: the deviation that the step draws with."""
        kl_beta: float = Field(0.04, ge=0)
        """Weight of the KL divergence to the reference; 0 saves the reference's forward pass."""
        kl: Literal["exact", "released"] = "released"
        """As in `grpo`. The code's `kl_beta` are weights of its own form."""
        kl_share: float = Field(0.1, gt=0, le=1)
        """Share of a rollout's doubtful leaves that the KL counts for, the most doubtful ones, at first; all leaves where the
        task has one reward alone, since nothing then casts doubt."""
        kl_share_adapts: bool = True
        """Whether it follows the mean doubt, between a fifth and twice of `kl_share`."""
        doubt: Literal["overrated", "underrated"] = "overrated"
        """overrated: the reward ranks a picture higher than the auxiliary rewards do. underrated: lower, which is what
        the official code selects."""

    settings: Settings

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.share: float = settings.kl_share
        self.recent: list[float] = []

    def observe(self, forest: RolloutForest) -> None:
        """Adapts the share to the rollout's doubt."""
        doubt = self.doubt(forest)
        if not self.settings.kl_share_adapts or not bool((doubt > 0).any()):
            return
        now = float(doubt[doubt > 0].mean())
        if self.recent:
            change = (now > max(self.recent)) - (now < min(self.recent))
            low, high = (self.settings.kl_share * bound for bound in SHARE_RANGE)
            self.share = min(max(self.share * (1 + SHARE_STEP * change), low), high, 1.0)
        self.recent = [*self.recent, now][-RECENT:]

    def state(self) -> dict[str, Any]:
        return {"share": self.share, "recent": self.recent}

    def load_state(self, state: dict[str, Any]) -> None:
        self.share, self.recent = float(state["share"]), list(state["recent"])

    def advantage(self, forest: RolloutForest) -> Tensor:
        """Of each leaf, [G, K]; zero in groups whose rewards are all equal."""
        rewards = forest.by_group(forest.rewards)
        here = groups.valid(rewards)
        a = self._standardised(rewards)
        d = nearest_distance(forest.leaf_latents.reshape(*rewards.shape, -1), here)
        average = torch.where(here, d, 0.0).sum(1, keepdim=True) / here.sum(1, keepdim=True).clamp(min=1)
        a = torch.where(a > 0, a * d / average.clamp(min=MIN_DISTANCE), a)
        return a.clamp(-self.settings.adv_clip, self.settings.adv_clip)

    def doubt(self, forest: RolloutForest) -> Tensor:
        """By how many ranks each leaf is doubtful, [G * K]; -inf where a reward is missing or nothing casts doubt."""
        if len(forest.scores) < 2:
            return torch.full_like(forest.rewards, -torch.inf)
        main, *auxiliary = forest.scores.values()
        doubt = torch.stack([_rank(a) for a in auxiliary]).mean(0) - _rank(main)
        if self.settings.doubt == "underrated":
            doubt = -doubt
        return torch.where(groups.valid(forest.rewards), doubt, -torch.inf)

    def kl_weight(self, forest: RolloutForest) -> Tensor:
        """u of each leaf, float32 [G * K]."""
        if len(forest.scores) < 2:
            return torch.ones_like(forest.rewards)
        doubt, weight = self.doubt(forest), torch.zeros_like(forest.rewards)
        doubtful = int((doubt > 0).sum())
        if doubtful:
            weight[doubt.topk(max(1, round(self.share * doubtful))).indices] = 1.0
        return weight

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        return super().diagnostics(terms, forest) | {"kl_leaves": float(self.kl_weight(forest).mean())}


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
