"""grpo: Flow-GRPO, clipped policy gradient with group-relative advantages and a KL penalty to the base model.

For leaf i and stochastic step t on its path:

    r_it = pi_theta / pi_old of the edge,   A_i = (R_i - group mean) / std, clamped to +- adv_clip
    L    = mean_it max(-A_i r_it, -A_i clip(r_it, 1 - eps, 1 + eps)) + kl_beta mean_it KL(pi_theta || pi_ref)

Source: Liu et al. 2025 (arXiv 2505.05470) and its code. How this differs from the code, and which settings give DanceGRPO,
MixGRPO, TreeGRPO, BranchGRPO and GRPO-Guard: docs/methods/grpo.md.

Fixed point: with `kl_beta: 0` the largest expected reward, so nothing but the clip and the number of updates keeps the policy
from concentrating on the best images of each prompt. With the KL term, a compromise with the base model that has no closed
form: the divergence is penalised step by step, at the states that were visited. On policy the gradient claims to be that of the
expected reward minus the KL penalty.
"""

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from alignbench import Objective, groups, settings
from alignbench.loss_parts import loss_part
from alignbench.objective import Divergence, Needs, Strength
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, edge_std, leaves_of_update, log_ratio, part_of_update


class GRPO(Objective):
    """Clipped policy gradient with advantages relative to the group."""

    class Settings(settings.Settings):
        trust_region: Literal["clip", "kl"] = "clip"
        """What stops the gradient of a step whose ratio has moved in the direction of its advantage. clip: a ratio beyond
        `clip` (PPO). kl: a KL divergence to the behaviour policy of at least `kl_limit`, which does not depend on the noise
        that was drawn (Flow-DPPO)."""
        clip: float = Field(1e-4, gt=0)
        """eps: how far the ratio of a step may move from 1 before its gradient stops. Log-probs are means over latent
        dimensions, so ratios stay very close to 1."""
        kl_limit: float = Field(1e-5, ge=0)
        """With `trust_region: kl`, the KL divergence of a step's two Gaussians from which on its gradient stops. It is a mean
        over latent dimensions, as log-probs are."""
        adv_clip: float = Field(5.0, gt=0)
        """The largest absolute value of an advantage."""
        std: Literal["group", "batch", "none"] = "group"
        """Which standard deviation the advantage is divided by. group: that of the group. batch: that of all rewards of the
        rollout about their common mean. none: it is not divided."""
        std_correction: Literal[0, 1] = 0
        """How that standard deviation is computed. 0: as the population's, sqrt(sum / K). 1: as a sample's,
        sqrt(sum / (K - 1)), as in the code of DanceGRPO, MixGRPO and BranchGRPO."""
        zero_advantage: Literal["keep", "drop"] = "keep"
        """Whether leaves (with another `credit`, edges) of advantage 0, such as all of a group of equal rewards, count in the
        means of the loss. keep: they count. drop: they do not, as in the code of Flow-GRPO and GARDO. Their KL divergence does
        not count then either, and with `credit: leaf` they cost no training row."""
        parts: int = Field(1, ge=1)
        """Into how many disjoint parts the leaves of a rollout are divided. Each update trains on the next part; with 1
        every update trains on all leaves. 2, with two updates per rollout, is what the code of Flow-GRPO and GARDO does. More
        than 1 needs `credit: leaf`."""
        part_by: Literal["random", "step"] = "random"
        """How the leaves are divided into parts. random: at random. step: by the step that they are trained on, from the noise
        end on, so that each update trains on the images of one step, or of several that follow each other; `parts` must divide
        the number of these steps. With as many parts and updates per rollout as steps, each step has an optimizer step of its
        own, as in the code of G2RPO. It needs a sampler whose branches leave at several steps, such as `granular`."""
        credit: Literal["leaf", "edge", "depth", "depth_weighted", "depth_nested"] = "leaf"
        """Which advantage an edge of a tree gets. leaf: that of each descendant, once for each. edge: their mean (TreeGRPO).
        depth: their mean reward, standardised among the group's edges of the same step (BranchGRPO). depth_weighted: the same
        with a mean that is weighted by the probability of the path to each descendant. depth_nested: the same with a mean that
        is weighted at each split by the softmax of the log-probs of its own edges, without the edges between splits (an option
        of BranchGRPO's code)."""
        ratio: Literal["plain", "guard", "path"] = "plain"
        """Which importance ratio is used. plain: pi_theta / pi_old of each step. guard: the regulated ratio exp((mu - mu_old) .
        eps) of GRPO-Guard, whose logarithm has mean zero. path: the product of the plain ratios over the whole path, one for
        each image; with `likelihood: elbo` that of V-GRPO. It needs `credit: leaf`."""
        step_weight: Literal["none", "inverse_dt", "noise"] = "none"
        """How the steps are weighted in the loss; the weights are 1 on average. none: equally. inverse_dt: by
        1 / |sigma_next - sigma| (GRPO-Guard). noise: by the standard deviation of the noise that the step draws (TempFlow-GRPO,
        GARDO)."""
        kl_beta: float = Field(0.0, ge=0)
        """Weight of the KL divergence to the frozen base model; 0 saves the reference's forward pass."""
        kl: Literal["exact", "released"] = "exact"
        """Which KL divergence is penalised. exact: that of the step's two Gaussians. released: that times |sigma_next - sigma|,
        as in Flow-GRPO's code, whose variance leaves out the time step."""

        @model_validator(mode="after")
        def _parts_need_leaves(self) -> Self:
            if self.parts > 1 and self.credit != "leaf":
                raise ValueError(f"parts={self.parts} divides the leaves, which needs credit=leaf, got credit={self.credit}")
            if self.ratio == "path" and self.credit != "leaf":
                raise ValueError(f"ratio=path is that of a leaf, which needs credit=leaf, got credit={self.credit}")
            return self

    settings: Settings
    strength = Strength("kl_beta", (0.1, 0.01, 0.0))
    ratio_settings = ("clip",)
    path_settings: ClassVar[dict[str, Any]] = {"credit": "leaf", "step_weight": "none", "kl": "exact", "part_by": "random"}

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.separable = settings.ratio != "path"

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.settings.kl_beta > 0)

    def descends(self, forest: RolloutForest) -> Divergence:
        return Divergence("expected reward", reward=1, kl=self.settings.kl_beta)

    def target_reward(self, forest: RolloutForest) -> Tensor:
        """Computes the reward in the unit of the advantage, [G, K]."""
        return self._standardised(forest.by_group(forest.rewards))

    def ineffective_settings(self, updates_per_rollout: int) -> dict[str, str]:
        o, found = self.settings, super().ineffective_settings(updates_per_rollout)
        if o.trust_region == "kl":
            found["clip"] = "with trust_region=kl no ratio is clipped"
            if self.stays_on_policy(updates_per_rollout):
                found["kl_limit"] = "with updates_per_rollout=1 no step has moved"
        else:
            found["kl_limit"] = "with trust_region=clip no KL divergence is limited"
        if self.stays_on_policy(updates_per_rollout):
            found["trust_region"] = "with updates_per_rollout=1 no step has moved"
        if o.kl_beta == 0:
            found["kl"] = "with kl_beta=0 no KL divergence is penalised"
        if o.std == "none":
            found["std_correction"] = "with std=none no standard deviation is computed"
        if o.parts == 1:
            found["part_by"] = "with parts=1 every update trains on all leaves"
        return found

    def ineffective_parts(self, updates_per_rollout: int) -> dict[str, str]:
        o, found = self.settings, super().ineffective_parts(updates_per_rollout)
        if o.part_by == "step" and updates_per_rollout < o.parts:
            found["training of later steps"] = (
                f"with part_by=step, parts={o.parts} and updates_per_rollout={updates_per_rollout} no update trains on them"
            )
        return found

    def advantage(self, forest: RolloutForest) -> Tensor:
        """Computes A of each leaf: [G, K], zero where a reward is missing and in groups whose rewards are all equal."""
        z = self._standardised(forest.by_group(forest.rewards))
        return z.clamp(-self.settings.adv_clip, self.settings.adv_clip)

    def _standardised(self, rewards: Tensor) -> Tensor:
        return groups.standardise(rewards, std=self.settings.std, correction=self.settings.std_correction)

    def trained_leaves(self, forest: RolloutForest) -> Tensor | None:
        """Marks the leaves of this update's part, without those that are dropped: bool [G * K]; None for all."""
        o = self.settings
        if o.credit != "leaf" or (o.parts == 1 and o.zero_advantage == "keep"):
            return None
        part = self._part(forest)
        return part & (self.advantage(forest).flatten() != 0) if o.zero_advantage == "drop" else part

    def _part(self, forest: RolloutForest) -> Tensor:
        """Marks the leaves of the part that this update trains on: bool [G * K]."""
        if self.settings.part_by == "step":
            return leaves_of_update(forest, forest.update, self.settings.parts)
        part = torch.zeros(len(forest.leaves), dtype=torch.bool, device=forest.leaves.device)
        part[part_of_update(forest, forest.update, len(part), self.settings.parts)] = True
        return part

    def edge_advantage(self, forest: RolloutForest) -> Tensor:
        """Computes A of each edge for any `credit` but leaf: [E], NaN where no descendant has a reward."""
        rewards = forest.by_group(forest.rewards)
        if self.settings.credit == "edge":
            return forest.descendant_mean(torch.where(groups.valid(rewards), self.advantage(forest), torch.nan))
        log_weights = None
        if self.settings.credit == "depth_weighted":
            log_weights = forest.path_sum(forest.old_log_prob)
        elif self.settings.credit == "depth_nested":
            log_weights = forest.path_sum(forest.log_softmax_of_siblings(forest.old_log_prob))
        node = forest.descendant_mean(rewards, log_weights)
        distinct = groups.has_distinct_rewards(rewards)[:, None]
        a = torch.empty_like(node, dtype=torch.float32)
        for step in forest.edge_step.unique():
            # The edges of one step are ordered by group, and each group that has any has the same number of them.
            at_step = forest.edge_step == step
            has_edges = forest.edge_group[at_step].unique()
            by_group = node[at_step].view(len(has_edges), -1)
            # The means of equal rewards must not differ by their rounding.
            z = torch.where(distinct[has_edges], self._standardised(by_group), 0.0)
            a[at_step] = z.masked_fill(by_group.isnan(), torch.nan).flatten()
        return a.clamp(-self.settings.adv_clip, self.settings.adv_clip)

    def weight(self, forest: RolloutForest) -> Tensor:
        """Computes the weight of each edge in the loss: [E], 1 on average over the edges."""
        match self.settings.step_weight:
            case "none":
                return torch.ones_like(forest.old_log_prob)
            case "inverse_dt":
                weight = 1 / (forest.edge_sigma - forest.edge_sigma_next)
            case "noise":
                weight = edge_std(forest)
        return weight / weight.mean()

    def kl_weight(self, forest: RolloutForest) -> Tensor:
        """Computes how much the KL divergence of each leaf counts, for `credit: leaf`: float32 [G * K]."""
        return torch.ones_like(forest.rewards)

    def divergence(self, terms: Terms, forest: RolloutForest) -> Tensor:
        """Computes the KL divergence of each edge as it is penalised: [E], zero with `kl_beta: 0`."""
        if self.settings.kl_beta == 0:
            return torch.zeros_like(forest.old_log_prob)
        return terms["kl"] * (forest.edge_sigma - forest.edge_sigma_next) if self.settings.kl == "released" else terms["kl"]

    def surrogate(self, ratio: Tensor, a: Tensor, moved: Tensor | None) -> Tensor:
        """Computes what is maximised: r A, without gradient beyond the trust region.

        Args:
            ratio: r of each step.
            a: its advantage.
            moved: its KL divergence to the behaviour policy, with `trust_region: kl`.
        """
        o = self.settings
        if moved is None:
            return groups.clipped(ratio, a, o.clip)
        outward = (ratio - 1) * a > 0
        return torch.where(outward & (moved >= o.kl_limit), 0.0, ratio * a)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        o = self.settings
        change = terms["drift_noise"] if o.ratio == "guard" else log_ratio(terms, forest)
        moved = terms["kl_behaviour"].detach() if o.trust_region == "kl" else None
        if o.ratio == "path":
            change = forest.path_sum(change)
            moved = None if moved is None else forest.path_sum(moved)
        ratio = torch.exp(change)
        weight = self.weight(forest)
        kl = self.divergence(terms, forest)
        if o.credit == "leaf":
            a = self.advantage(forest).reshape(-1, 1)
            count_mask = (groups.valid(forest.rewards) & self._part(forest))[:, None].expand_as(forest.leaf_edges)
            ratio = self._of_paths(ratio, forest)
            moved = None if moved is None else self._of_paths(moved, forest)
            weight, kl = weight[forest.leaf_edges], kl[forest.leaf_edges]
            kl = kl * self.kl_weight(forest)[:, None]
        else:
            a = self.edge_advantage(forest)
            count_mask = groups.valid(a)
            a = torch.where(count_mask, a, 0.0)
        if o.zero_advantage == "drop":
            count_mask = count_mask & (a != 0)
        penalty = o.kl_beta * kl
        if o.kl_beta:
            penalty = loss_part("kl_beta", penalty)
        return groups.mean(penalty - loss_part("policy", weight * self.surrogate(ratio, a, moved)), count_mask)

    def _of_paths(self, values: Tensor, forest: RolloutForest) -> Tensor:
        """Arranges values of edges, or with `ratio: path` of leaves, by leaf and step: [G * K, S]."""
        if self.settings.ratio == "path":
            return values.reshape(-1, 1).expand_as(forest.leaf_edges)
        return values[forest.leaf_edges]

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        if not terms:  # every leaf was dropped
            return {}
        ratio = torch.exp(log_ratio(terms, forest))
        numbers = {
            "advantage_abs": float(self.advantage(forest).abs().mean()),
            "clip_share": float(((ratio - 1).abs() > self.settings.clip).float().mean()),
        }
        if self.settings.kl_beta:
            numbers["kl_reference"] = float(self.divergence(terms, forest).mean())
        return numbers
