"""grpo: Flow-GRPO, clipped policy gradient with group-relative advantages and a KL penalty to the base model.

Liu et al. 2025 (arXiv 2505.05470). For leaf i and stochastic step t on its path:

    r_it = pi_theta / pi_old of the edge,   A_i = (R_i - group mean) / std, clamped to +- adv_clip
    L    = mean_it max(-A_i r_it, -A_i clip(r_it, 1 - eps, 1 + eps)) + kl_beta mean_it KL(pi_theta || pi_ref)

The KL is the exact divergence of the step's two Gaussians. How this differs from the public code: docs/methods/grpo.md.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from alignbench import Objective, groups, settings
from alignbench.forest import RolloutForest
from alignbench.objective import Needs
from alignbench.terms import Terms


class GRPO(Objective):
    class Settings(settings.Settings):
        clip: float = Field(1e-4, gt=0)
        """eps of the per-step ratio. Log-probs are means over latent dimensions, so ratios stay very close to 1."""
        adv_clip: float = Field(5.0, gt=0)
        """Advantages are clamped to +- this."""
        std: Literal["group", "batch", "none"] = "group"
        """Which deviation the advantage is divided by."""
        kl_beta: float = Field(0.0, ge=0)
        """Weight of the KL divergence to the frozen base model; 0 saves the reference's forward pass."""

    settings: Settings

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.settings.kl_beta > 0)

    def advantage(self, forest: RolloutForest) -> Tensor:
        """[G, K], zero in groups whose rewards are all equal."""
        z = groups.standardise(forest.by_group(forest.rewards), std=self.settings.std)
        return z.clamp(-self.settings.adv_clip, self.settings.adv_clip)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        o = self.settings
        counts = groups.valid(forest.rewards)[:, None].expand_as(forest.leaf_edges)
        a = self.advantage(forest).reshape(-1, 1)
        r = torch.exp(terms["log_prob"] - forest.old_log_prob)[forest.leaf_edges]
        loss = -groups.mean(groups.clipped(r, a, o.clip), counts)
        if o.kl_beta:
            loss = loss + o.kl_beta * groups.mean(terms["kl"][forest.leaf_edges], counts)
        return loss

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        ratio = torch.exp(terms["log_prob"] - forest.old_log_prob)
        numbers = {
            "advantage_abs": float(self.advantage(forest).abs().mean()),
            "clip_share": float(((ratio - 1).abs() > self.settings.clip).float().mean()),
        }
        if "kl" in terms:
            numbers["kl_reference"] = float(terms["kl"].mean())
        return numbers
