"""ftb: f-divergence trajectory balance; one number, alpha, leads from the forward KL to log-variance TB and beyond.

For the K leaves of a group, with s_i the log-density of leaf i's path and y_i = s_i - s_i^ref - beta R~_i, the log-ratio of the
policy's path and the target, up to log Z:

    L_alpha(y) = (exp((alpha - 1) y) - 1) / (alpha - 1)^2 - y / (alpha - 1),     L_1(y) = y^2 / 2
    L          = min_C (1/K) sum_i L_alpha(y_i + C)
               = (log mean_i exp((alpha - 1) y_i) - (alpha - 1) mean_i y_i) / (alpha - 1)^2,     Var(y) / 2 at alpha = 1

C replaces log Z and is fitted to the group in closed form. On-policy the gradient is that of an f-divergence from the policy to
the target: alpha = 0 is the forward KL, which punishes missed modes; 1/2 is Hellinger; 1 is the reverse KL of log-variance
trajectory balance (`vargrad`); 2 is Pearson's chi-square. With `sharpness` b the loss is L(b y) / b^2; a smaller b tempers the
exponential.

Source: Fawkes and Hartford 2026 (arXiv 2605.15417). There is no public code: docs/methods/ftb.md.

Fixed point: for any alpha the loss is zero where the path densities of a group's leaves are proportional to p_ref exp(beta R~).
"""

import torch
from pydantic import Field
from torch import Tensor

from alignbench import groups
from alignbench.objective import Divergence, Needs, Strength
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, log_ratio_reference
from objectives._target import TargetObjective, TargetSettings

NEAR_ONE = 1e-3
"""The distance of alpha from 1 below which the variance is the better approximation in float32."""


class FTB(TargetObjective):
    """Trajectory balance by an alpha divergence, with log Z fitted to each group."""

    class Settings(TargetSettings):
        beta: float = Field(2.0, ge=0)
        """Inverse temperature of the target, for rewards in the unit of `reward_scale`. A larger one asks for more reward and
        less diversity."""
        alpha: float = Field(0.75, ge=-1, le=3)
        """The divergence at the start of the training. 0 is the forward KL, 0.5 Hellinger, 1 the reverse KL (half of
        `vargrad`'s loss), 2 chi-square. Below 1 missed modes are punished more. The paper finds 0.75 to 1.2 usable."""
        alpha_end: float | None = Field(None, ge=-1, le=3)
        """The divergence at the end of the training, to which it changes linearly; null keeps `alpha`. The paper goes from 0.75
        to 1.2."""
        sharpness: float = Field(1.0, gt=0)
        """b in the loss L(b y) / b^2. Log-ratios of paths that are sums over many latent dimensions need a small one."""

    settings: Settings
    strength = Strength("beta", (1.0, 2.0, 4.0))

    def target_beta(self, iteration: int) -> float:
        return self.settings.beta

    def descends(self, forest: RolloutForest) -> Divergence:
        # L(b y) / b^2 has the gradient of the divergence with (alpha - 1) b in place of alpha - 1.
        alpha = 1 + self.settings.sharpness * (self.alpha(forest.progress) - 1)
        return Divergence(f"alpha divergence, {alpha:.3g}", self.settings.beta, alpha=alpha)

    @property
    def follows_progress(self) -> bool:  # type: ignore[override]
        return self.settings.alpha_end is not None

    @property
    def needs(self) -> Needs:
        return Needs(reference=True)

    def alpha(self, progress: float) -> float:
        """Computes the divergence at a training progress from 0 to 1."""
        o = self.settings
        return o.alpha if o.alpha_end is None else o.alpha + (o.alpha_end - o.alpha) * min(max(progress, 0.0), 1.0)

    def imbalance(self, terms: Terms, forest: RolloutForest) -> tuple[Tensor, Tensor]:
        """Computes y minus its group mean, [G, K], which does not change the loss, and marks the leaves that count, bool [G,
        K]."""
        usable = groups.usable_leaves(forest.by_group(forest.rewards))
        y = forest.path_sum(log_ratio_reference(terms)) - self.settings.beta * self.target_reward(forest)
        return torch.where(usable, y - groups.group_mean(y, usable), 0.0), usable

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        y, usable = self.imbalance(terms, forest)
        b, slope = self.settings.sharpness, self.alpha(forest.progress) - 1
        if abs(slope) < NEAR_ONE:
            return groups.mean(y**2, usable) / 2
        # Each group's value is weighted by its number of leaves, as in a mean over leaves.
        sizes = usable.sum(1)
        masked = torch.where(usable, slope * b * y, -torch.inf)
        usable_groups = sizes > 0
        log_mean = torch.logsumexp(masked[usable_groups], dim=1) - groups.log_size(usable)[usable_groups, 0]
        values = log_mean / (slope * b) ** 2  # y has mean 0 in its group
        return (values * sizes[usable_groups]).sum() / sizes.sum().clamp(min=1) + 0.0 * y.sum()

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        y, usable = self.imbalance(terms, forest)
        return {"alpha": self.alpha(forest.progress), "balance_rms": float(groups.mean(y**2, usable).sqrt())}
