"""raft: flow matching on the group's own images, weighted by their rewards.

With e_i = |v - (noise - x_0)|^2, averaged over latent dimensions, for the final image x_0 of leaf i, noised at sigma:

    L = (1/G) sum_groups sum_i w_i e_i,      sum_i w_i = 1

v is the prompt's own velocity, without classifier-free guidance, whatever guidance the rollouts had.

Source: reward-ranked fine-tuning (Dong et al. 2023, arXiv 2304.06767) for `weights: top`; reward-weighted regression (Peters
and Schaal 2007) for `weights: softmax`. How this differs from Flow-GRPO's code for it: docs/methods/raft.md.

Fixed point: the minimum for one rollout is the flow of its reweighted images, with `softmax` p exp(beta z). The next rollout is
drawn from that and reweighted again, so the distribution narrows until all images of a group have one reward.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from alignbench import groups
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import DenoisingRows, Terms, Velocities, denoising_terms
from objectives._denoising import DenoisingSettings, noised_leaves
from objectives._target import TargetObjective, TargetSettings


class RAFT(TargetObjective):
    """Flow matching on the policy's own images, weighted by reward."""

    class Settings(TargetSettings, DenoisingSettings):
        weights: Literal["top", "softmax"] = "softmax"
        """How the images of a group are weighted. top: the best `top` images equally, the others not at all. softmax: by
        exp(beta z), with z the reward in units of the group's standard deviation."""
        top: int = Field(1, ge=1)
        """With `weights: top`, how many images of a group are trained on."""
        beta: float = Field(2.0, gt=0)
        """With `weights: softmax`, the inverse temperature. A larger one trains on fewer, better images."""

    settings: Settings

    def target_beta(self, iteration: int) -> float | None:
        return self.settings.beta if self.settings.weights == "softmax" else None

    def weights(self, forest: RolloutForest) -> Tensor:
        """Computes the weights w of the leaves: [G, K], summing to 1 in each group with distinct rewards, 0 in the others."""
        rewards = forest.by_group(forest.rewards)
        usable = groups.usable_leaves(rewards)
        if self.settings.weights == "softmax":
            return usable * groups.boltzmann_log_prob(self.target_reward(forest), self.settings.beta, usable).exp()
        ranked = torch.where(usable, rewards, -torch.inf)
        best = torch.zeros_like(rewards).scatter(1, ranked.topk(min(self.settings.top, rewards.shape[1]), dim=1).indices, 1.0)
        best = best * usable
        return best / best.sum(1, keepdim=True).clamp(min=1)

    def rows(self, forest: RolloutForest, update: int) -> DenoisingRows:
        """Makes rows of the images whose weight is not zero."""
        return noised_leaves(forest, self.weights(forest).flatten().nonzero()[:, 0], update, self.settings)

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        return denoising_terms(rows, velocities.policy, velocities.reference)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        weights = self.weights(forest).flatten()
        row_weights = weights[weights != 0].repeat_interleave(self.settings.draws) / self.settings.draws
        return (row_weights * terms["error"]).sum() / forest.groups

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        return {"error": float(terms["error"].mean())} if terms else {}
