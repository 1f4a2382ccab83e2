"""awm: advantage-weighted matching, flow matching whose weight is the advantage, without log-probs of paths.

For a final image x_0 with fresh noise at sigma, e = |v - (noise - x_0)|^2 averaged over latent dimensions, stands for the
negative log-likelihood of the image:

    f = -w(sigma) e,   rho = exp(f - f_old),   A = clip((R - group mean) / deviation, +- adv_clip) / adv_clip
    L = mean max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) + kl_beta mean |v - v_ref|^2 + ema_beta mean |v - v_ema|^2

As in the code, f_old is by default f itself without gradient, so rho is 1 and the policy part is A w(sigma) e. v_ema is a
moving average of the policy, with the decay min(decay_rate n, decay_max) after n updates. All velocities are the prompt's own,
without classifier-free guidance, whatever guidance the rollouts had. The rollout needs no stochastic step.

Source: Xue et al. 2025 (arXiv 2509.25050) and its code. How this differs from them: docs/methods/awm.md.

Fixed point: with `weight: uniform`, against an average that does not move and without the reference, the minimum for one
rollout is v = v_ema + E[A (noise - x_0 - v) | x] / ema_beta. The average follows, so this goes on until the rewards of a group
are equal; `kl_beta` alone holds the policy near the base model.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from alignbench import Objective, flow, groups
from alignbench.loss_parts import loss_part
from alignbench.objective import Needs, Strength
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import DenoisingRows, Terms, Velocities
from objectives._denoising import DenoisingSettings, noised_leaves, scored_leaves

POWER, SHIFT = 0.25, 1e-10
"""The generalised Huber weight of AWM's code is (sigma / POWER) ((e + SHIFT)^POWER - SHIFT^POWER)."""


class AWM(Objective):
    """Flow matching on the policy's own images, weighted by their advantages."""

    class Settings(DenoisingSettings):
        weight: Literal["uniform", "sigma", "sigma_squared", "huber", "ghuber", "adaptive"] = "ghuber"
        """How the error e at a sigma enters f. uniform: e. sigma: sigma e. sigma_squared: sigma^2 e, the error of the predicted
        image. huber: sigma sqrt(e). ghuber: sigma e^(1/4) / (1/4), the default of the code. adaptive: sigma e divided by the
        mean absolute error, as in `nft`."""
        std: Literal["group", "batch", "none"] = "batch"
        """Which standard deviation the advantage is divided by. group: that of the group. batch: that of all rewards of the
        rollout about their common mean. none: it is not divided."""
        adv_clip: float = Field(5.0, gt=0)
        """The largest absolute value of an advantage before it is divided by this number."""
        kl_beta: float = Field(3e-3, ge=0)
        """Weight of the squared distance to the base model's velocity; 0 saves the reference's forward pass."""
        ema_beta: float = Field(1.0, ge=0)
        """Weight of the squared distance to the velocity of the policy's moving average; 0 saves its forward pass."""
        decay_rate: float = Field(1e-3, ge=0)
        """By how much the decay of the moving average grows with each update."""
        decay_max: float = Field(0.3, ge=0, lt=1)
        """The largest decay of the moving average."""
        ratio: Literal["none", "average"] = "none"
        """What f_old is. none: f itself, so that rho is 1. average: f of the moving average, which then draws the rollouts."""
        clip: float = Field(1.0, gt=0)
        """How far rho may move from 1 before its gradient stops."""

    settings: Settings
    strength = Strength("kl_beta", (3e-2, 3e-3, 3e-4))

    @property
    def needs(self) -> Needs:
        o = self.settings
        average = o.ema_beta > 0 or o.ratio == "average"
        return Needs(
            reference=o.kl_beta > 0,
            behaviour=average,
            behaviour_is_ema=average and o.decay_rate > 0,
            ema_draws_rollouts=o.ratio == "average",
        )

    def behaviour_ema_decay(self, updates: int) -> float:
        return min(self.settings.decay_rate * updates, self.settings.decay_max)

    def ineffective_settings(self, updates_per_rollout: int) -> dict[str, str]:
        o, found = self.settings, super().ineffective_settings(updates_per_rollout)
        if o.decay_rate == 0:
            found["decay_max"] = "with decay_rate=0 the decay stays 0"
            if updates_per_rollout == 1 and o.ema_beta > 0:
                found["ema_beta"] = "with decay_rate=0 and updates_per_rollout=1 the average is the policy itself"
        if o.ratio == "none":
            found["clip"] = "with ratio=none every importance ratio is 1"
        elif self.stays_on_policy(updates_per_rollout):
            found["clip"] = "with decay_rate=0 and updates_per_rollout=1 every importance ratio is 1"
        if not self.needs.behaviour:
            found |= dict.fromkeys(("decay_rate", "decay_max"), "with ema_beta=0 and ratio=none there is no moving average")
        return found

    def ineffective_parts(self, updates_per_rollout: int) -> dict[str, str]:
        found = super().ineffective_parts(updates_per_rollout)
        return {**found, "ema_beta": "the moving average is the policy itself"} if found and self.settings.ema_beta else found

    def advantage(self, forest: RolloutForest) -> Tensor:
        """Computes A of each leaf: [G, K], between -1 and 1, zero where a reward is missing and in groups of equal rewards."""
        o = self.settings
        z = groups.standardise(forest.by_group(forest.rewards), std=o.std)
        return z.clamp(-o.adv_clip, o.adv_clip) / o.adv_clip

    def rows(self, forest: RolloutForest, update: int) -> DenoisingRows:
        """Makes rows of the images that have a reward; groups of equal rewards count where velocities are held back."""
        o = self.settings
        return noised_leaves(forest, scored_leaves(forest, flat_groups=o.kl_beta + o.ema_beta > 0), update, o)

    def likelihood(self, rows: DenoisingRows, velocity: Tensor) -> Tensor:
        """Computes f of some rows, which stands for the log-likelihood of their images: float32 [R']."""
        error = velocity.float() - (rows.noise - rows.x0)
        e = flow.mean_square(error)
        match self.settings.weight:
            case "uniform":
                return -e
            case "sigma":
                return -rows.sigma * e
            case "sigma_squared":
                return -(rows.sigma**2) * e
            case "huber":
                return -rows.sigma * torch.sqrt(e + SHIFT)
            case "ghuber":
                return -rows.sigma / POWER * ((e + SHIFT) ** POWER - SHIFT**POWER)
            case "adaptive":
                return -rows.sigma * e / flow.mean_absolute(error)

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        """Computes the terms of some rows, each float32 [R'].

        Returns:
            likelihood: f of the policy. advantage: A of the row's image. likelihood_old: f of the moving average, where it is
            f_old. velocity_distance, ema_distance: |v - v_ref|^2 and |v - v_ema|^2, averaged over latent dimensions, where
            they have a weight.
        """
        o, v = self.settings, velocities.policy.float()
        terms = {
            "likelihood": self.likelihood(rows, v),
            "advantage": self.advantage(rows.forest).flatten()[rows.leaf],
        }
        if velocities.reference is not None:
            terms["velocity_distance"] = flow.mean_square(v - velocities.reference.float())
        if velocities.behaviour is not None:
            if o.ratio == "average":
                terms["likelihood_old"] = self.likelihood(rows, velocities.behaviour)
            if o.ema_beta:
                terms["ema_distance"] = flow.mean_square(v - velocities.behaviour.float())
        return terms

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        o, likelihood, a = self.settings, terms["likelihood"], terms["advantage"]
        old = terms["likelihood_old"] if o.ratio == "average" else likelihood.detach()
        loss = loss_part("policy", -groups.clipped(torch.exp(likelihood - old), a, o.clip).mean())
        if o.kl_beta:
            loss = loss + loss_part("kl_beta", o.kl_beta * terms["velocity_distance"].mean())
        if o.ema_beta:
            loss = loss + loss_part("ema_beta", o.ema_beta * terms["ema_distance"].mean())
        return loss

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        if not terms:
            return {}
        numbers = {"likelihood": float(terms["likelihood"].mean())}
        for term, name in (("velocity_distance", "distance_reference"), ("ema_distance", "distance_average")):
            if term in terms:
                numbers[name] = float(terms[term].mean())
        return numbers
