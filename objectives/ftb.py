"""ftb: f-divergence trajectory balance, from forward KL to log-variance TB by one number, alpha.

Fawkes and Hartford 2026 (arXiv 2605.15417). For the K leaves of a group, with s_i the log-probability of leaf i's path and
y_i = s_i - s_i^ref - beta R~_i, how far the policy's path is from the target up to log Z:

    L_alpha(y) = (exp((alpha - 1) y) - 1) / (alpha - 1)^2 - y / (alpha - 1),     L_1(y) = y^2 / 2
    L          = min_C (1/K) sum_i L_alpha(y_i + C)
               = (log mean_i exp((alpha - 1) y_i) - (alpha - 1) mean_i y_i) / (alpha - 1)^2,     Var(y) / 2 at alpha = 1

C stands for log Z and is fitted to the group in closed form. On-policy the gradient is that of an f-divergence from the
policy to the target: alpha = 0 is the forward KL, which punishes missed modes, 1/2 Hellinger, 1 the reverse KL of log-variance
trajectory balance (`vargrad`), 2 Pearson's chi-square. For any alpha the minimum, zero, is at p_theta proportional to
p_ref exp(beta R~) on the group. With `sharpness` b the loss is (1/b^2) L(b y): a smaller b tempers the exponential.
"""

import torch
from pydantic import Field
from torch import Tensor

from alignbench import groups
from alignbench.objective import Needs
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms, log_ratio_reference
from objectives._target import TargetObjective, TargetSettings

NEAR_ONE = 1e-3
"""Below this distance of alpha from 1 the variance is the better approximation in float32."""


class FTB(TargetObjective):
    """Trajectory balance by an f-divergence of the alpha family, with log Z fitted to each group."""

    class Settings(TargetSettings):
        beta: float = Field(2.0, ge=0)
        """Inverse temperature of the target, on rewards in the unit of `reward_scale`."""
        alpha: float = Field(0.75, ge=-1, le=3)
        """The divergence at the start of the training: 0 is the forward KL, 0.5 Hellinger, 1 the reverse KL (half of
        `vargrad`'s loss), 2 chi-square. The paper finds 0.75 to 1.2 usable; below 1 missed modes are punished more."""
        alpha_end: float | None = Field(None, ge=-1, le=3)
        """The divergence at the end, reached linearly; null keeps `alpha`. The paper anneals 0.75 to 1.2."""
        sharpness: float = Field(1.0, gt=0)
        """b: the loss is L(b y) / b^2. Path log-ratios that are sums over many latent dimensions need a small one."""

    settings: Settings

    @property
    def needs(self) -> Needs:
        return Needs(reference=True)

    def alpha(self, progress: float) -> float:
        """The divergence at a training progress from 0 to 1."""
        o = self.settings
        return o.alpha if o.alpha_end is None else o.alpha + (o.alpha_end - o.alpha) * min(max(progress, 0.0), 1.0)

    def imbalance(self, terms: Terms, forest: RolloutForest) -> tuple[Tensor, Tensor]:
        """y minus its group mean, [G, K], and which leaves count; a constant of the group does not change the loss."""
        counts = groups.usable_leaves(forest.by_group(forest.rewards))
        y = forest.path_sum(log_ratio_reference(terms)) - self.settings.beta * self.target_reward(forest)
        mean = torch.where(counts, y, 0.0).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
        return torch.where(counts, y - mean, 0.0), counts

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        y, counts = self.imbalance(terms, forest)
        b, slope = self.settings.sharpness, self.alpha(forest.progress) - 1
        if abs(slope) < NEAR_ONE:
            return groups.mean(y**2, counts) / 2
        # Each group's value counts as often as it has leaves, as a mean over leaves does.
        sizes = counts.sum(1)
        masked = torch.where(counts, slope * b * y, -torch.inf)
        some = sizes > 0
        log_mean = torch.logsumexp(masked[some], dim=1) - groups.log_size(counts)[some, 0]
        values = log_mean / (slope * b) ** 2  # y has mean 0 in its group
        return (values * sizes[some]).sum() / sizes.sum().clamp(min=1) + 0.0 * y.sum()

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        y, counts = self.imbalance(terms, forest)
        return {"alpha": self.alpha(forest.progress), "balance_rms": float(groups.mean(y**2, counts).sqrt())}
