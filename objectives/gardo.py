"""gardo: policy gradient that favours good images unlike the others, with a KL penalty on doubtful images only.

For leaf i of a group with mean reward m:

    A_i = (R_i - m) d_i / mean(d) where R_i >= m, else R_i - m
    d_i = the smallest cosine distance of leaf i to another leaf of its group
    L   = mean_it w_t max(-A_i r_it, -A_i clip(r_it, 1 - eps, 1 + eps)) + kl_beta mean_it u_i KL(pi_theta || pi_ref)

w_t is the standard deviation of the step's noise, divided by its mean over the steps. A leaf is doubtful if the reward ranks it
higher in the rollout than the auxiliary rewards do on average; the rank gap is by how many ranks. u_i is 1 for the share of the
doubtful leaves that have the largest gaps, else 0. The share grows when the mean gap is above those of all recent rollouts, and
falls when it is below them.

Source: the official code of GARDO, which TMPO (arXiv 2605.10983) compares with. How this differs from it:
docs/methods/gardo.md.

Fixed point: as that of `grpo`, but among images of equal reward the distance d favours the rare ones, and only doubtful images
are held near the base model.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from alignbench import groups
from alignbench.objective import Strength
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms
from objectives.grpo import GRPO

MIN_DISTANCE = 1e-8
"""The smallest mean distance that a distance is divided by."""
SHARE_STEP = 0.1
"""The fraction of itself by which the share changes at a time."""
SHARE_RANGE = (0.2, 2.0)
"""The smallest and the largest share, in multiples of `kl_share`."""
RECENT = 20
"""How many of the last rollouts a mean gap is compared with."""


class GARDO(GRPO):
    """GRPO with a diversity-weighted advantage and a selective KL penalty."""

    class Settings(GRPO.Settings):
        clip: float = Field(1e-5, gt=0)
        """eps: how far the ratio of a step may move from 1 before its gradient stops. Log-probs are means over latent
        dimensions, so ratios stay very close to 1."""
        std: Literal["group", "batch", "none"] = "none"
        """Which standard deviation the advantage is divided by. group: that of the group. batch: that of all rewards of the
        rollout about their common mean. none: it is not divided (the official code)."""
        credit: Literal["leaf"] = "leaf"
        """Which advantage an edge of a tree gets: that of each descendant, once for each. There is no other choice here."""
        step_weight: Literal["none", "inverse_dt", "noise"] = "noise"
        """How the steps are weighted in the loss; the weights are 1 on average. none: equally. inverse_dt: by
        1 / |sigma_next - sigma|. noise: by the standard deviation of the noise that the step draws."""
        kl_beta: float = Field(0.04, ge=0)
        """Weight of the KL divergence of doubtful images to the reference; 0 saves the reference's forward pass."""
        kl: Literal["exact", "released"] = "released"
        """Which KL divergence is penalised. exact: that of the step's two Gaussians. released: that times |sigma_next - sigma|,
        as in the official code, whose values of `kl_beta` belong to this form."""
        kl_share: float = Field(0.1, gt=0, le=1)
        """Share of a rollout's doubtful leaves, those with the largest rank gaps, that the KL divergence counts for at the
        start. It counts for all leaves if the task has only one reward, because no auxiliary reward can then cast doubt."""
        kl_share_adapts: bool = True
        """Whether that share follows the mean rank gap of the rollouts, between a fifth of `kl_share` and twice `kl_share`."""
        doubt: Literal["overrated", "underrated"] = "overrated"
        """Which images are doubtful. overrated: those that the reward ranks higher than the auxiliary rewards do. underrated:
        those that it ranks lower, which is what the official code selects."""

    settings: Settings
    strength = Strength("kl_beta", (0.4, 0.04, 0.004))

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.share: float = settings.kl_share
        self.recent: list[float] = []

    def ineffective_settings(self, updates_per_rollout: int) -> dict[str, str]:
        found = super().ineffective_settings(updates_per_rollout)
        if self.settings.kl_beta == 0:
            found |= dict.fromkeys(("kl_share", "kl_share_adapts", "doubt"), "with kl_beta=0 no KL divergence is penalised")
        return found

    def observe(self, forest: RolloutForest) -> None:
        """Adapts the share to the rollout's mean rank gap."""
        gap = self.rank_gap(forest)
        if not self.settings.kl_share_adapts or not bool((gap > 0).any()):
            return
        mean_gap = float(gap[gap > 0].mean())
        if self.recent:
            change = (mean_gap > max(self.recent)) - (mean_gap < min(self.recent))
            low, high = (self.settings.kl_share * bound for bound in SHARE_RANGE)
            self.share = min(max(self.share * (1 + SHARE_STEP * change), low), high, 1.0)
        self.recent = [*self.recent, mean_gap][-RECENT:]

    def state(self) -> dict[str, Any]:
        return {"share": self.share, "recent": self.recent}

    def load_state(self, state: dict[str, Any]) -> None:
        self.share, self.recent = float(state["share"]), list(state["recent"])

    def advantage(self, forest: RolloutForest) -> Tensor:
        """Computes A of each leaf: [G, K], zero where a reward is missing and in groups whose rewards are all equal."""
        rewards = forest.by_group(forest.rewards)
        valid_mask = groups.valid(rewards)
        a = self._standardised(rewards)
        d = nearest_distance(forest.leaf_latents.reshape(*rewards.shape, -1), valid_mask)
        a = torch.where(a > 0, a * d / groups.group_mean(d, valid_mask).clamp(min=MIN_DISTANCE), a)
        return a.clamp(-self.settings.adv_clip, self.settings.adv_clip)

    def rank_gap(self, forest: RolloutForest) -> Tensor:
        """Computes by how many ranks the reward and the auxiliary rewards differ about each leaf, in the direction of `doubt`.

        Returns:
            [G * K]; doubtful leaves are above 0. -inf where a reward is missing, and everywhere without an auxiliary reward.
        """
        auxiliary = _auxiliary(forest)
        if not auxiliary:
            return torch.full_like(forest.rewards, -torch.inf)
        by_group = {name: forest.by_group(forest.scores[name]) for name in forest.weights}
        reward = groups.total(by_group, forest.weights, normalise=forest.standardised).flatten()
        gap = torch.stack([_rank(scores) for scores in auxiliary]).mean(0) - _rank(reward)
        if self.settings.doubt == "underrated":
            gap = -gap
        return torch.where(groups.valid(forest.rewards), gap, -torch.inf)

    def kl_weight(self, forest: RolloutForest) -> Tensor:
        """Computes u of each leaf: [G * K], 1 or 0."""
        if not _auxiliary(forest):
            return torch.ones_like(forest.rewards)
        gap, weight = self.rank_gap(forest), torch.zeros_like(forest.rewards)
        doubtful = int((gap > 0).sum())
        if doubtful:
            weight[gap.topk(max(1, round(self.share * doubtful))).indices] = 1.0
        return weight

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        return super().diagnostics(terms, forest) | {"kl_leaves": float(self.kl_weight(forest).mean())}


def _auxiliary(forest: RolloutForest) -> list[Tensor]:
    """The scores of the rewards that are not trained on."""
    return [scores for name, scores in forest.scores.items() if name not in forest.weights]


def nearest_distance(latents: Tensor, valid_mask: Tensor) -> Tensor:
    """Computes the cosine distance of each leaf to the nearest other leaf that has a reward.

    Args:
        latents: [G, K, D].
        valid_mask: bool [G, K], the leaves that have a reward.

    Returns:
        [G, K] in 0..2; 1 in groups in which fewer than two leaves have a reward.
    """
    unit = functional.normalize(latents, dim=-1)
    distance = 1 - unit @ unit.mT
    itself = torch.eye(latents.shape[1], dtype=torch.bool, device=latents.device)
    nearest = distance.masked_fill(itself | ~valid_mask[:, None, :], torch.inf).amin(-1)
    return torch.where(valid_mask.sum(1, keepdim=True) < 2, 1.0, nearest).clamp(min=0)


def _rank(scores: Tensor) -> Tensor:
    """Ranks scores, 1 for the best: float32 [N]. Equal scores share their mean rank; missing ones come last."""
    filled = scores.nan_to_num(nan=-torch.inf)
    better = (filled[None, :] > filled[:, None]).sum(1)
    equal = (filled[None, :] == filled[:, None]).sum(1)
    return better + (equal + 1) / 2
