"""crd: centred reward distillation, an implicit reward that is regressed on the reward, without log-probs of paths.

For a final image x_0 with noise at sigma, e(v) = |v - (noise - x_0)|^2, and images of a group with the same noise and sigma:

    z_i = -(w e(v) - w_0 e(v_0)),   the implicit reward, an estimate of log p(x_0) - log p_0(x_0)
    L   = (1 / (2 beta)) mean_i (z_i - mean z - beta (R~_i - mean R~))^2 + mean_i k_i |v - v_ref|^2
    k_i = kl_floor + (kl_beta - kl_floor) r_i,   r_i = clip(R~_i, +- adv_clip) / (2 adv_clip) + 1/2

Means of z and R~ are those of the group, so what the images of a group have in common, such as log Z, cancels. v_0 is the
velocity of a moving average of the policy, or the base model's. All velocities are the prompt's own, without classifier-free
guidance, whatever guidance the rollouts had. The rollout needs no stochastic step.

Source: arXiv 2603.14128, and its trainer in Flow-Factory. How this differs from them: docs/methods/crd.md.

Fixed point: the loss is zero where z - beta R~ is constant in a group. With `anchor: reference`, `weight: exact` and `per:
image` z is an unbiased estimate of log p / p_ref, so with many draws this is the tilted target p_ref exp(beta R~) / Z. For
single rows, and with other weights, it is not: the velocity then moves in the target's direction by an amount that the weight
decides. With `anchor: average` the average follows the policy, so the policy goes on until the rewards of a group are equal,
and `kl_beta` alone holds it near the base model.
"""

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from alignbench import flow, groups
from alignbench.loss_parts import loss_part
from alignbench.objective import Needs, Strength
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import DenoisingRows, Terms, Velocities
from objectives._denoising import (
    DenoisingSettings,
    by_group_and_draw,
    noised_groups,
    scored_leaves,
)
from objectives._target import TargetObjective, TargetSettings


class CRD(TargetObjective):
    """Regression of an implicit reward on the reward, centred in each group."""

    class Settings(TargetSettings, DenoisingSettings):
        beta: float = Field(0.1, gt=0)
        """How much implicit reward a unit of reward asks for. A larger one goes further from the anchor before the pull back
        sets in; on the first update it changes nothing."""
        anchor: Literal["average", "reference"] = "average"
        """What v_0 is. average: the velocity of a moving average of the policy. reference: that of the base model, which gives
        a fixed target."""
        weight: Literal["adaptive", "uniform", "exact"] = "adaptive"
        """w of a row. adaptive: 1 / (mean absolute error), each model by its own. uniform: 1. exact: (1 - sigma) / sigma with e
        summed over latent dimensions, whose mean over sigma is a log-density up to a constant; it needs `times: uniform`."""
        per: Literal["row", "image"] = "row"
        """What is compared with the reward. row: z of each noise and sigma, as published. image: its mean over the `draws`."""
        adv_clip: float = Field(5.0, gt=0)
        """The largest absolute value of R~."""
        kl_beta: float = Field(0.1, ge=0)
        """Weight of the squared distance to the base model's velocity for the best images; 0 switches the term off."""
        kl_floor: float = Field(1e-4, ge=0)
        """The same for the worst images, which are held less; at most `kl_beta`."""
        decay_first: float = Field(0.25, ge=0, lt=1)
        """The first decay of the moving average."""
        decay_rate: float = Field(0.005, ge=0)
        """By how much the decay of the moving average grows with each update."""
        decay_max: float = Field(0.999, ge=0, lt=1)
        """The largest decay of the moving average."""

        @model_validator(mode="after")
        def _exact_needs_uniform_times(self) -> Self:
            if self.weight == "exact" and self.times != "uniform":
                raise ValueError(f"weight=exact is a mean over sigma, which needs times=uniform, got times={self.times}")
            return self

    settings: Settings
    strength = Strength("kl_beta", (1.0, 0.1, 0.01))

    @property
    def needs(self) -> Needs:
        average = self.settings.anchor == "average"
        return Needs(
            reference=self.settings.kl_beta > 0 or not average,
            behaviour=average,
            behaviour_is_ema=average,
            ema_draws_rollouts=False,
        )

    def behaviour_ema_decay(self, updates: int) -> float:
        o = self.settings
        return min(o.decay_first + o.decay_rate * updates, o.decay_max)

    def ineffective_settings(self, updates_per_rollout: int) -> dict[str, str]:
        o, found = self.settings, super().ineffective_settings(updates_per_rollout)
        if o.anchor == "reference":
            decays = ("decay_first", "decay_rate", "decay_max")
            found |= dict.fromkeys(decays, "with anchor=reference there is no moving average")
        if o.kl_beta == 0:
            found["kl_floor"] = "with kl_beta=0 velocities are not held back"
        if o.per == "image" and o.draws == 1:
            found["per"] = "with draws=1 an image has one row"
        return found

    def target_beta(self, iteration: int) -> float | None:
        return self.settings.beta if self.settings.anchor == "reference" and self.settings.kl_beta == 0 else None

    def clipped_reward(self, forest: RolloutForest) -> Tensor:
        """Computes R~ of each leaf: [G, K], zero where a reward is missing and in groups of equal rewards."""
        return self.target_reward(forest).clamp(-self.settings.adv_clip, self.settings.adv_clip)

    def trained(self, forest: RolloutForest) -> Tensor:
        """The leaves that have rows, int64 [N]."""
        return scored_leaves(forest, flat_groups=True)

    def rows(self, forest: RolloutForest, update: int) -> DenoisingRows:
        """Makes rows of the images that have a reward, with the same noises and sigmas for all images of a group."""
        return noised_groups(forest, self.trained(forest), update, self.settings)

    def likelihood(self, rows: DenoisingRows, velocity: Tensor) -> Tensor:
        """Computes -w e, which stands for the log-likelihood of the rows' images: float32 [R']."""
        error = velocity.float() - (rows.noise - rows.x0)
        match self.settings.weight:
            case "adaptive":
                return -flow.mean_square(error) / flow.mean_absolute(error)
            case "uniform":
                return -flow.mean_square(error)
            case "exact":
                return -(1 - rows.sigma) / rows.sigma * flow.reduce_latent(error.square(), "sum")

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        """Computes the terms of some rows, each float32 [R'].

        Returns:
            implicit_reward: z. With `kl_beta` also velocity_distance: |v - v_ref|^2, averaged over latent dimensions.
        """
        v = velocities.policy.float()
        anchor = velocities.behaviour if self.settings.anchor == "average" else velocities.reference
        assert anchor is not None  # the engine gives what `needs` asks for
        terms = {"implicit_reward": self.likelihood(rows, v) - self.likelihood(rows, anchor).detach()}
        if self.settings.kl_beta:
            assert velocities.reference is not None
            terms["velocity_distance"] = flow.mean_square(v - velocities.reference.float())
        return terms

    def residual(self, terms: Terms, forest: RolloutForest) -> tuple[Tensor, Tensor]:
        """Computes z - mean z - beta (R~ - mean R~), [G, K, draws] or with `per: image` [G, K, 1], and marks what counts."""
        o, leaves = self.settings, self.trained(forest)
        z = by_group_and_draw(terms["implicit_reward"], forest, leaves, o.draws)
        if o.per == "image":
            z = z.mean(2, keepdim=True)
        reward = self.clipped_reward(forest)[:, :, None]
        where = groups.usable_leaves(forest.by_group(forest.rewards))[:, :, None].expand_as(z)
        difference = z - o.beta * reward
        return difference - groups.group_mean(difference, where), where

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        o = self.settings
        residual, where = self.residual(terms, forest)
        loss = loss_part("policy", groups.mean(residual.square(), where) / (2 * o.beta))
        if not o.kl_beta:
            return loss
        floor = min(o.kl_floor, o.kl_beta)
        share = (self.clipped_reward(forest) / (2 * o.adv_clip) + 0.5).flatten()[self.trained(forest)]
        weight = floor + (o.kl_beta - floor) * share.repeat_interleave(o.draws)
        return loss + loss_part("kl_beta", (weight * terms["velocity_distance"]).mean())

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        if not terms:
            return {}
        residual, where = self.residual(terms, forest)
        numbers = {
            "implicit_reward_std": float(terms["implicit_reward"].std(correction=0)),
            "balance_rms": float(torch.sqrt(groups.mean(residual.square(), where))),
        }
        if "velocity_distance" in terms:
            numbers["distance_reference"] = float(terms["velocity_distance"].mean())
        return numbers
