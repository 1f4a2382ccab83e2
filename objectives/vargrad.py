"""vargrad: log-variance trajectory balance, whose log Z is the group's own mean.

Richter et al. 2020 (arXiv 2010.10436); as a GFlowNet loss Zhang et al. 2023 (arXiv 2302.05446). For the K leaves of a
group, with s_i the log-probability of leaf i's path:

    delta_i = s_i - s_i^ref - beta R~_i,      L = (1/K) sum_i (delta_i - mean_k delta_k)^2

The minimum, zero, is at p_theta proportional to p_ref exp(beta R~) on the group.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from alignbench import Objective, groups, settings
from alignbench.objective import Needs
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, log_ratio_reference


class VarGrad(Objective):
    class Settings(settings.Settings):
        beta: float = Field(2.0, ge=0)
        """Inverse temperature of the target, on group-standardised rewards."""
        reference: Literal["none", "frozen"] = "frozen"
        """frozen: the target is p_ref exp(beta R), p_ref the base model's path density. none: it is exp(beta R)."""

    settings: Settings

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.settings.reference == "frozen")

    def deviation(self, terms: Terms, forest: RolloutForest) -> tuple[Tensor, Tensor]:
        """delta_i minus its group mean, [G, K], and which leaves count."""
        counts = groups.usable_leaves(forest.by_group(forest.rewards))
        s = forest.path_sum(log_ratio_reference(terms) if self.settings.reference == "frozen" else terms["log_prob"])
        delta = torch.where(counts, s - self.settings.beta * forest.target_reward, 0.0)
        mean = delta.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
        return torch.where(counts, delta - mean, 0.0), counts

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        deviation, counts = self.deviation(terms, forest)
        return groups.mean(deviation**2, counts)

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        deviation, counts = self.deviation(terms, forest)
        return {"balance_rms": float(groups.mean(deviation**2, counts).sqrt())}
