"""flowrl: trajectory balance with a learnt log Z and a frozen reference, per unit of path length.

On the paths of a flow model in place of token sequences. With m_i the mean log-density of leaf i's stochastic steps and z_i the
reward in units of the group's standard deviation:

    L = mean_i w_i ( log Z + m_i - beta z_i - m_i^ref )^2,   w_i = stop_gradient( clip(pi_theta / pi_old of the path) )

Source: Zhu et al. 2025 (arXiv 2509.15207). How this differs from the paper and its code: docs/methods/flowrl.md.

Fixed point: the loss is zero where m_i - m_i^ref = beta z_i - log Z for every leaf. m is a mean over the S stochastic steps, so
path densities are then proportional to p_ref exp(S beta z). On policy the gradient claims to be that of the reverse KL of paths
to this target.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from alignbench import groups
from alignbench.objective import Divergence, Needs, Strength
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, log_ratio, log_ratio_reference
from objectives._target import TargetObjective, TargetSettings


class FlowRL(TargetObjective):
    """Trajectory balance with one learnt log Z."""

    class Settings(TargetSettings):
        beta: float = Field(15.0, ge=0)
        """Inverse temperature of the target, for rewards in the unit of `reward_scale`. A larger one asks for
        more reward and less diversity."""
        ratio_clip: float | None = Field(0.2, gt=0)
        """How far the importance ratio of a path may be from 1 before it is clipped (the paper); null does not clip it (the
        official code)."""

    settings: Settings
    strength = Strength("beta", (5.0, 15.0, 45.0))
    ratio_settings = ("ratio_clip",)

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.log_z = nn.Parameter(torch.zeros(()))

    def target_beta(self, iteration: int) -> float:
        return self.settings.beta

    def descends(self, forest: RolloutForest) -> Divergence:
        return Divergence("reverse KL", forest.plan.path_length * self.settings.beta)

    @property
    def needs(self) -> Needs:
        return Needs(reference=True)

    def parameters(self) -> Iterable[nn.Parameter]:
        return (self.log_z,)

    def residual(self, terms: Terms, forest: RolloutForest) -> tuple[Tensor, Tensor]:
        """Computes log Z + m - beta z - m_ref, [G, K], and marks the leaves that count, bool [G, K]."""
        path = forest.path_mean(log_ratio_reference(terms))
        usable = groups.usable_leaves(forest.by_group(forest.rewards))
        return self.log_z.to(path.device) + path - self.settings.beta * self.target_reward(forest), usable

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        residual, usable = self.residual(terms, forest)
        weight = torch.exp(forest.path_sum(log_ratio(terms, forest).detach()))
        clip = self.settings.ratio_clip
        if clip is not None:
            weight = weight.clamp(1 - clip, 1 + clip)
        return groups.mean(weight * residual**2, usable)

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        residual, usable = self.residual(terms, forest)
        balance = groups.mean(residual**2, usable).detach()
        return {"log_z": float(self.log_z.detach()), "balance_rms": float(balance.sqrt())}
