"""flowrl: trajectory balance with a learnt log Z and a frozen reference, per unit of path length.

Zhu et al. 2025 (arXiv 2509.15207), on the paths of a flow model in place of token sequences. With m_i the mean log-density
of leaf i's stochastic steps and z_i its group-standardised reward:

    L = mean_i w_i ( log Z + m_i - beta z_i - m_i^ref )^2,   w_i = stop_gradient( clip(pi_theta / pi_old of the path) )

How this differs from the paper and its code: docs/methods/flowrl.md.
"""

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from alignbench import Objective, groups, settings
from alignbench.objective import Needs
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, log_ratio, log_ratio_reference


class FlowRL(Objective):
    class Settings(settings.Settings):
        beta: float = Field(15.0, ge=0)
        """Inverse temperature of the target, on group-standardised rewards."""
        ratio_clip: float | None = Field(0.2, gt=0)
        """Keeps the path's importance ratio within 1 +- this (the paper); null leaves it as it is (the official code)."""

    settings: Settings

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.log_z = nn.Parameter(torch.zeros(()))

    @property
    def needs(self) -> Needs:
        return Needs(reference=True)

    def parameters(self) -> Iterable[nn.Parameter]:
        return (self.log_z,)

    def residual(self, terms: Terms, forest: RolloutForest) -> tuple[Tensor, Tensor]:
        """log Z + m - beta z - m_ref, [G, K], and which leaves count."""
        path = forest.path_mean(log_ratio_reference(terms))
        return self.log_z.to(path.device) + path - self.settings.beta * forest.target_reward, groups.usable_leaves(
            forest.by_group(forest.rewards)
        )

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        residual, counts = self.residual(terms, forest)
        weight = torch.exp(forest.path_sum(log_ratio(terms, forest).detach()))
        clip = self.settings.ratio_clip
        if clip is not None:
            weight = weight.clamp(1 - clip, 1 + clip)
        return groups.mean(weight * residual**2, counts)

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        residual, counts = self.residual(terms, forest)
        return {"log_z": float(self.log_z.detach()), "balance_rms": float(groups.mean(residual**2, counts).detach().sqrt())}
