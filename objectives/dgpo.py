"""dgpo: direct group preference optimisation, the loss of DPO for a whole group whose images are weighted by their advantages.

For the K images of a group, all with the same noise and the same sigma, and e_i = |v - (noise - x_0)|^2, averaged over latent
dimensions, of image i:

    S = (beta / K) sum_i A_i (e_i - e_i^ref),   A = (R - group mean) / deviation
    L = mean -log sigmoid(-S) / beta + kl_beta mean |v - v_ref|^2

An image of negative advantage is a loser, one of positive advantage a winner; sum_i A_i = 0, so the normaliser of the policy
cancels. With `clip` an image whose error has already changed far enough, against a moving average of the policy, has no
gradient. All velocities are the prompt's own, without classifier-free guidance, whatever guidance the rollouts had. The rollout
needs no stochastic step.

Source: Luo et al. 2025 (arXiv 2510.08425) and its code. How this differs from them: docs/methods/dgpo.md.

Fixed point: as in `dpo` the margin -S has no finite optimum. On the first update the gradient is that of A e / 2; it fades as
the better images of a group are separated from the worse ones, the sooner the larger beta is.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from alignbench import Objective, flow, groups
from alignbench.loss_parts import loss_part
from alignbench.objective import Needs, Strength
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import DenoisingRows, Terms, Velocities, denoising_terms
from objectives._denoising import DenoisingSettings, by_group_and_draw, noised_groups, scored_leaves


class DGPO(Objective):
    """Direct preference optimisation of whole groups on denoising errors."""

    class Settings(DenoisingSettings):
        beta: float = Field(100.0, gt=0)
        """Strength of the implicit KL penalty, in units of 1 / (difference of squared velocity errors, averaged over latent
        dimensions). A larger one keeps the policy closer to the reference."""
        std: Literal["group", "batch", "none"] = "group"
        """Which standard deviation the advantage is divided by. group: that of the group. batch: that of all rewards of the
        rollout about their common mean. none: it is not divided."""
        kl_beta: float = Field(0.02, ge=0)
        """Weight of the squared distance to the base model's velocity."""
        clip: float | None = Field(None, gt=0)
        """How far exp(e_old - e) of an image may move from 1, in the direction of its advantage, before its gradient stops;
        null saves the forward pass of the moving average, which gives e_old."""
        decay_rate: float = Field(1e-3, ge=0)
        """By how much the decay of the moving average grows with each update. With 0 it is the policy at the rollout."""
        decay_max: float = Field(0.3, ge=0, lt=1)
        """The largest decay of the moving average."""
        drawn_by: Literal["policy", "average"] = "policy"
        """Which model draws the images, where there is a moving average."""

    settings: Settings
    strength = Strength("beta", (1000.0, 100.0, 10.0))

    @property
    def needs(self) -> Needs:
        o, clips = self.settings, self.settings.clip is not None
        return Needs(
            reference=True,
            behaviour=clips,
            behaviour_is_ema=clips and o.decay_rate > 0,
            ema_draws_rollouts=o.drawn_by == "average",
        )

    def behaviour_ema_decay(self, updates: int) -> float:
        return min(self.settings.decay_rate * updates, self.settings.decay_max)

    def ineffective_settings(self, updates_per_rollout: int) -> dict[str, str]:
        o, found = self.settings, super().ineffective_settings(updates_per_rollout)
        if o.clip is None:
            return found | dict.fromkeys(("decay_rate", "decay_max", "drawn_by"), "with clip=null there is no moving average")
        if o.decay_rate == 0:
            found |= dict.fromkeys(("decay_max", "drawn_by"), "with decay_rate=0 the average is the policy at the rollout")
            if updates_per_rollout == 1:
                found["clip"] = "with decay_rate=0 and updates_per_rollout=1 no error has changed"
        return found

    def advantage(self, forest: RolloutForest) -> Tensor:
        """Computes A of each leaf: [G, K], with sum 0; zero where a reward is missing and in groups of equal rewards."""
        return groups.standardise(forest.by_group(forest.rewards), std=self.settings.std)

    def trained(self, forest: RolloutForest) -> Tensor:
        """The leaves that have rows, int64 [N]; those of groups of equal rewards only for the KL term."""
        return scored_leaves(forest, flat_groups=self.settings.kl_beta > 0)

    def rows(self, forest: RolloutForest, update: int) -> DenoisingRows:
        """Makes rows of the images that have a reward, with the same noises and sigmas for all images of a group."""
        return noised_groups(forest, self.trained(forest), update, self.settings)

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        """Computes the terms of some rows, each float32 [R'].

        Returns:
            error, error_reference: the denoising errors. error_old: that of the moving average, with `clip`. velocity_distance:
            |v - v_ref|^2, averaged over latent dimensions, with `kl_beta`.
        """
        assert velocities.reference is not None  # the engine gives what `needs` asks for
        terms = denoising_terms(rows, velocities.policy, velocities.reference)
        if self.settings.clip is not None:
            assert velocities.behaviour is not None
            terms["error_old"] = denoising_terms(rows, velocities.behaviour)["error"]
        if self.settings.kl_beta:
            terms["velocity_distance"] = flow.mean_square(velocities.policy.float() - velocities.reference.float())
        return terms

    def margins(self, terms: Terms, forest: RolloutForest) -> Tensor:
        """Computes -S, by how much the implicit reward prefers the winners of a group: [G, draws]."""
        o, a = self.settings, self.advantage(forest)[:, :, None]
        leaves = self.trained(forest)
        counts = groups.valid(forest.by_group(forest.rewards)).sum(1, keepdim=True).clamp(min=1)
        error = terms["error"]
        if o.clip is not None:
            ratio = torch.exp(terms["error_old"] - error).detach()
            direction = torch.sign(a.flatten())[leaves].repeat_interleave(o.draws)
            error = torch.where(direction * (ratio - 1) > o.clip, error.detach(), error)
        change = by_group_and_draw(error - terms["error_reference"], forest, leaves, o.draws)
        return -o.beta * (a * change).sum(1) / counts

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        o = self.settings
        loss = loss_part("policy", -functional.logsigmoid(self.margins(terms, forest)).mean() / o.beta)
        return loss + loss_part("kl_beta", o.kl_beta * terms["velocity_distance"].mean()) if o.kl_beta else loss

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        if not terms:
            return {}
        margins = self.margins(terms, forest)[groups.has_distinct_rewards(forest.by_group(forest.rewards))]
        numbers = {"error": float(terms["error"].mean())}
        if len(margins):
            # A tie, as on the first update, counts half.
            numbers["implicit_accuracy"] = float(((margins > 0).float() + 0.5 * (margins == 0).float()).mean())
            numbers["loss_weight"] = float(torch.sigmoid(-margins).mean())
        return numbers
