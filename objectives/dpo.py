"""dpo: Diffusion-DPO for flow matching, on pairs formed from the pictures of a group.

Wallace et al. 2023 (arXiv 2311.12908), in the flow form of Flow-GRPO's code. For a pair of samples w (preferred) and l, with
the same noise and the same time for both, and e = |v - (noise - x_0)|^2 averaged over latent dimensions:

    L = -log sigmoid( -(beta / 2) [ (e_w - e_w^ref) - (e_l - e_l^ref) ] )

The pictures need no stochastic step; the sampler's group is where pairs come from. Both velocities are the prompt's own,
without classifier-free guidance, whatever guidance the rollouts had.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from alignbench import Objective, groups, settings
from alignbench.objective import Needs
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import DenoisingRows, Terms, Times, Velocities, denoising_noise, denoising_terms, part_of_update


class DPO(Objective):
    class Settings(settings.Settings):
        beta: float = Field(100.0, gt=0)
        """Strength of the implicit KL, in units of 1 / (difference of squared velocity errors averaged over dimensions)."""
        pairs: Literal["best_worst", "all"] = "best_worst"
        """best_worst: one pair a group. all: every pair whose rewards differ by more than `margin`."""
        margin: float = Field(0.0, ge=0)
        """Smallest difference of rewards that makes a pair."""
        draws: int = Field(1, ge=1)
        """Noises and times for each pair."""
        times: Times = "schedule"
        """Sigmas of noised images. schedule: logit-normal, shifted as the model's own schedule is. logit_normal: without the
        shift. uniform: between 0 and 1. steps: those of the rollout's steps, each once before any comes again."""
        parts: int = Field(1, ge=1)
        """Disjoint random parts of a rollout's pairs, of which each update takes the next; 1: every update takes all."""
        drawn_by: Literal["policy", "reference"] = "policy"
        """Whose pictures form the pairs."""

    settings: Settings

    @property
    def needs(self) -> Needs:
        return Needs(reference=True, rollouts_from_reference=self.settings.drawn_by == "reference")

    def pairs(self, forest: RolloutForest) -> tuple[Tensor, Tensor]:
        """Leaves that won and that lost, int64 [P] each."""
        winners, losers = [], []
        rewards = forest.by_group(forest.rewards)
        for g, row in enumerate(rewards):
            known = groups.valid(row).nonzero()[:, 0]
            if len(known) < 2:
                continue
            order = known[torch.argsort(row[known], stable=True)]
            candidates = (
                [(order[-1], order[0])]
                if self.settings.pairs == "best_worst"
                else [(order[j], order[i]) for j in range(len(order)) for i in range(j)]
            )
            for w, lost in candidates:
                if row[w] - row[lost] > self.settings.margin:
                    winners.append(g * forest.group_size + w)
                    losers.append(g * forest.group_size + lost)
        empty = forest.leaves.new_empty(0)
        return (torch.stack(winners), torch.stack(losers)) if winners else (empty, empty)

    def rows(self, forest: RolloutForest, update: int) -> DenoisingRows:
        """Winners, then losers in the same order, with the same noise and time for the two of a pair."""
        winners, losers = self.pairs(forest)
        chosen = part_of_update(forest, update, len(winners), self.settings.parts)
        winners, losers = winners[chosen], losers[chosen]
        draws = self.settings.draws
        keys = [(int(w), int(lost), d) for w, lost in zip(winners, losers, strict=True) for d in range(draws)]
        sigma, noise = denoising_noise(forest, update, keys, self.settings.times, draws)
        leaf = torch.cat([winners.repeat_interleave(draws), losers.repeat_interleave(draws)])
        return DenoisingRows(forest, leaf, torch.cat([sigma, sigma]), torch.cat([noise, noise]))

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        return denoising_terms(rows, velocities.policy, velocities.reference)

    def margins(self, terms: Terms) -> Tensor:
        """-(beta / 2) [...], the implicit reward by which the winner leads, [P * draws]."""
        change_w, change_l = (terms["error"] - terms["error_reference"]).chunk(2)
        return -0.5 * self.settings.beta * (change_w - change_l)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return -functional.logsigmoid(self.margins(terms)).mean()

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        if not terms:
            return {"pairs": 0.0}
        lead = self.margins(terms)
        winner, loser = terms["error"].chunk(2)
        return {
            "pairs": float(len(lead) / self.settings.draws),
            # A tie, as on the first update, counts half.
            "implicit_accuracy": float(((lead > 0).float() + 0.5 * (lead == 0).float()).mean()),
            "winner_error": float(winner.mean()),
            "loser_error": float(loser.mean()),
        }
