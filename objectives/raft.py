"""raft: flow matching on the group's own pictures, weighted by their rewards.

Reward-ranked fine-tuning (Dong et al. 2023, arXiv 2304.06767) for `weights: top`; reward-weighted regression
(Peters and Schaal 2007) for `weights: softmax`. With e_i = |v - (noise - x_0)|^2 averaged over latent dimensions:

    L = (1/G) sum_groups sum_i w_i e_i,      sum_i w_i = 1

v is the prompt's own velocity, without classifier-free guidance, whatever guidance the rollouts had.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from alignbench import Objective, groups, settings
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import DenoisingRows, Terms, Times, Velocities, denoising_noise, denoising_terms


class RAFT(Objective):
    class Settings(settings.Settings):
        weights: Literal["top", "softmax"] = "softmax"
        """top: equal weights for the best `top` pictures of a group. softmax: exp(beta z) of the standardised reward."""
        top: int = Field(1, ge=1)
        """How many pictures of a group `weights: top` keeps."""
        beta: float = Field(2.0, gt=0)
        """Inverse temperature of `weights: softmax`."""
        draws: int = Field(1, ge=1)
        """Noises and times for each picture."""
        times: Times = "schedule"
        """Sigmas of noised images. schedule: logit-normal, shifted as the model's own schedule is. logit_normal: without the
        shift. uniform: between 0 and 1. steps: those of the rollout's steps, each once before any comes again."""

    settings: Settings

    def weights(self, forest: RolloutForest) -> Tensor:
        """[G, K], summing to 1 in each group with spread, 0 in the others."""
        rewards = forest.by_group(forest.rewards)
        counts = groups.usable_leaves(rewards)
        if self.settings.weights == "softmax":
            return counts * groups.log_softmax(self.settings.beta * forest.target_reward, counts).exp()
        ranked = torch.where(counts, rewards, -torch.inf)
        best = torch.zeros_like(rewards).scatter(1, ranked.topk(min(self.settings.top, rewards.shape[1]), dim=1).indices, 1.0)
        best = best * counts
        return best / best.sum(1, keepdim=True).clamp(min=1)

    def rows(self, forest: RolloutForest, update: int) -> DenoisingRows:
        """The pictures whose weight is not zero, each with its own noise and time."""
        leaf = self.weights(forest).flatten().nonzero()[:, 0].repeat_interleave(self.settings.draws)
        keys = [(int(i), n) for n, i in enumerate(leaf)]
        return DenoisingRows(forest, leaf, *denoising_noise(forest, update, keys, self.settings.times, self.settings.draws))

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        return denoising_terms(rows, velocities.policy, velocities.reference)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        weights = self.weights(forest).flatten()
        each = weights[weights != 0].repeat_interleave(self.settings.draws) / self.settings.draws
        return (each * terms["error"]).sum() / forest.groups

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        return {"error": float(terms["error"].mean())} if terms else {}
