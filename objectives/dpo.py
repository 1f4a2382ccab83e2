"""dpo: Diffusion-DPO for flow matching, on pairs formed from the images of a group.

For a pair of final images w (preferred) and l (rejected), with the same noise and the same sigma for both, and
e = |v - (noise - x_0)|^2, averaged over latent dimensions:

    L = -log sigmoid( -(beta / 2) [ (e_w - e_w^ref) - (e_l - e_l^ref) ] )

Both velocities are the prompt's own, without classifier-free guidance, whatever guidance the rollouts had. The rollout needs no
stochastic step: its groups are only where pairs come from.

Source: Wallace et al. 2023 (arXiv 2311.12908), equation 14, in the flow-matching form of Flow-GRPO's code. How this differs
from that code: docs/methods/dpo.md.

Fixed point: if preferences follow the Bradley-Terry model with reward R, and -(e - e^ref) / 2 stands for log pi / pi_ref, then
pi is proportional to pi_ref exp(R / beta). Here the image with the higher reward always wins, so the margin has no finite
optimum, and only the number of updates bounds it.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from alignbench import Objective, groups
from alignbench.objective import Needs, Strength
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import DenoisingRows, Terms, Velocities, denoising_noise, denoising_terms, part_of_update
from objectives._denoising import DenoisingSettings


class DPO(Objective):
    """Direct preference optimisation on the denoising errors of pairs of images."""

    class Settings(DenoisingSettings):
        beta: float = Field(100.0, gt=0)
        """Strength of the implicit KL penalty, in units of 1 / (difference of squared velocity errors, averaged over latent
        dimensions). A larger one keeps the policy closer to the reference."""
        pairs: Literal["best_worst", "all"] = "best_worst"
        """Which pairs a group gives. best_worst: its best and its worst image. all: every two images whose rewards differ by
        more than `margin`."""
        margin: float = Field(0.0, ge=0)
        """The difference of rewards, in the reward's own units, that a pair must exceed."""
        parts: int = Field(1, ge=1)
        """Into how many random disjoint parts the pairs of a rollout are divided. Each update trains on the next part; with 1
        every update trains on all pairs."""
        drawn_by: Literal["policy", "reference"] = "policy"
        """Which model draws the images that pairs are formed from."""

    settings: Settings
    strength = Strength("beta", (1000.0, 100.0, 10.0))

    @property
    def needs(self) -> Needs:
        return Needs(reference=True, rollouts_from_reference=self.settings.drawn_by == "reference")

    def pairs(self, forest: RolloutForest) -> tuple[Tensor, Tensor]:
        """Forms the pairs of a rollout: indices of the preferred leaves and of the rejected ones, int64 [P] each."""
        winners, losers = [], []
        rewards = forest.by_group(forest.rewards)
        for g, row in enumerate(rewards):
            scored = groups.valid(row).nonzero()[:, 0]
            if len(scored) < 2:
                continue
            order = scored[torch.argsort(row[scored], stable=True)]
            candidates = (
                [(order[-1], order[0])]
                if self.settings.pairs == "best_worst"
                else [(order[j], order[i]) for j in range(len(order)) for i in range(j)]
            )
            for winner, loser in candidates:
                if row[winner] - row[loser] > self.settings.margin:
                    winners.append(g * forest.group_size + winner)
                    losers.append(g * forest.group_size + loser)
        empty = forest.leaves.new_empty(0)
        return (torch.stack(winners), torch.stack(losers)) if winners else (empty, empty)

    def rows(self, forest: RolloutForest, update: int) -> DenoisingRows:
        """Makes rows of the preferred images, then of the rejected ones in the same order, with the same noise and sigma."""
        winners, losers = self.pairs(forest)
        part = part_of_update(forest, update, len(winners), self.settings.parts)
        winners, losers = winners[part], losers[part]
        draws = self.settings.draws
        keys = [(int(winner), int(loser), d) for winner, loser in zip(winners, losers, strict=True) for d in range(draws)]
        sigma, noise = denoising_noise(forest, update, keys, self.settings.times, draws)
        leaf = torch.cat([winners.repeat_interleave(draws), losers.repeat_interleave(draws)])
        return DenoisingRows(forest, leaf, torch.cat([sigma, sigma]), torch.cat([noise, noise]))

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        return denoising_terms(rows, velocities.policy, velocities.reference)

    def margins(self, terms: Terms) -> Tensor:
        """Computes -(beta / 2) [...], by how much the implicit reward prefers the winner: [P * draws]."""
        change_w, change_l = (terms["error"] - terms["error_reference"]).chunk(2)
        return -0.5 * self.settings.beta * (change_w - change_l)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return -functional.logsigmoid(self.margins(terms)).mean()

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        if not terms:
            return {"pairs": 0.0}
        margins = self.margins(terms)
        winner_error, loser_error = terms["error"].chunk(2)
        return {
            "pairs": float(len(margins) / self.settings.draws),
            # A tie, as on the first update, counts half.
            "implicit_accuracy": float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean()),
            "winner_error": float(winner_error.mean()),
            "loser_error": float(loser_error.mean()),
        }
