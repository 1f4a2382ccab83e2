"""vargrad: log-variance trajectory balance, in which the group's mean takes the place of log Z.

For the K leaves of a group, with s_i the log-density of leaf i's path and R~_i the reward in units of the group's standard
deviation:

    delta_i = s_i - s_i^ref - beta R~_i,      L = (1/K) sum_i (delta_i - mean_k delta_k)^2

Source: the log-variance loss of Richter et al. 2020 (arXiv 2010.10436); as a GFlowNet loss Zhang et al. 2023 (arXiv
2302.05446). There is no published configuration for images: docs/methods/vargrad.md.

Fixed point: the loss is zero where all delta of a group are equal, that is where the path densities of its leaves are
proportional to p_ref exp(beta R~); with `reference: none`, to exp(beta R~).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from alignbench import groups
from alignbench.objective import Needs
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, log_ratio_reference
from objectives._target import TargetObjective, TargetSettings


class VarGrad(TargetObjective):
    """Log-variance trajectory balance against a tilted base model."""

    class Settings(TargetSettings):
        beta: float = Field(2.0, ge=0)
        """Inverse temperature of the target, for rewards in the unit of `reward_scale`. A larger one asks for
        more reward and less diversity."""
        reference: Literal["none", "frozen"] = "frozen"
        """What the target is relative to. frozen: it is p_ref exp(beta R), with p_ref the path density of the base model. none:
        it is exp(beta R)."""

    settings: Settings

    def target_beta(self, iteration: int) -> float:
        return self.settings.beta

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.settings.reference == "frozen")

    def deviation(self, terms: Terms, forest: RolloutForest) -> tuple[Tensor, Tensor]:
        """Computes delta_i minus its group mean, [G, K], and marks the leaves that count, bool [G, K]."""
        usable = groups.usable_leaves(forest.by_group(forest.rewards))
        s = forest.path_sum(log_ratio_reference(terms) if self.settings.reference == "frozen" else terms["log_prob"])
        delta = torch.where(usable, s - self.settings.beta * self.target_reward(forest), 0.0)
        return torch.where(usable, delta - groups.group_mean(delta, usable), 0.0), usable

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        deviation, usable = self.deviation(terms, forest)
        return groups.mean(deviation**2, usable)

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        deviation, usable = self.deviation(terms, forest)
        return {"balance_rms": float(groups.mean(deviation**2, usable).sqrt())}
