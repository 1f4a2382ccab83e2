"""nft: DiffusionNFT, flow matching towards good images and away from bad ones, without log-probs.

For a final image x_0 with fresh noise at sigma, v the policy's velocity and v_old that of the behaviour policy, which drew the
image:

    v+ = b v + (1 - b) v_old,   v- = (1 + b) v_old - b v
    r  = clip(A / (2 adv_clip) + 1/2, 0, 1),   A = (R - group mean) / deviation of the group or of the batch
    L  = adv_clip mean[ r |x0(v+) - x_0|^2 / (b w+) + (1 - r) |x0(v-) - x_0|^2 / (b w-) ] + kl_beta mean |v - v_ref|^2

where x0(v) = x - sigma v, and w+ and w- are the mean absolute values of the two differences, without gradient. The behaviour
policy follows the policy: after the updates of a rollout, when the policy has had n updates, its weights become
d old + (1 - d) new with d = min(decay_rate (n - decay_start), decay_max). All velocities are the prompt's own, without
classifier-free guidance, whatever guidance the rollouts had. The rollout needs no stochastic step.

Source: Zheng et al. 2025 (arXiv 2509.16117) and its code. How this differs from them: docs/methods/nft.md.

Fixed point: without w and the KL term, the minimum for one rollout is v = v_old + E[(2 r - 1) (noise - x_0 - v_old) | x] / b.
v_old follows v, so this goes on until the rewards of a group are equal; `kl_beta` alone holds the policy near the base model.
"""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from alignbench import Objective, flow, groups
from alignbench.loss_parts import loss_part
from alignbench.objective import Needs, Strength
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import DenoisingRows, Terms, Velocities, part_of_update
from objectives._denoising import DenoisingSettings, noised_leaves, scored_leaves


class NFT(Objective):
    """Negative-aware flow matching against a behaviour policy that lags."""

    class Settings(DenoisingSettings):
        beta: float = Field(1.0, gt=0)
        """b: how far v+ and v- are from v_old. A smaller one makes larger steps."""
        std: Literal["group", "batch"] = "group"
        """Which standard deviation rewards are divided by. group: that of their group. batch: that of all rewards of the
        batch."""
        flat_groups: Literal["keep", "drop"] = "keep"
        """What becomes of groups whose rewards are all equal. keep: they have r = 1/2 and pull v towards a behaviour policy
        that lags. drop: they are left out and cost no model row."""
        adv_clip: float = Field(5.0, gt=0)
        """The advantage from which on an image counts as entirely good (r = 1), and below its negative as entirely bad (r =
        0)."""
        kl_beta: float = Field(1e-4, ge=0)
        """Weight of the squared distance to the base model's velocity; 0 saves the reference's forward pass."""
        parts: int = Field(1, ge=1)
        """Into how many random disjoint parts the images of a rollout are divided. Each update trains on the next part; with 1
        every update trains on all images."""
        decay_rate: float = Field(1e-3, ge=0)
        """By how much the behaviour policy's decay d grows with each update. With 0 the behaviour policy is always the newest
        policy, and costs no model rows."""
        decay_start: int = Field(0, ge=0)
        """How many updates pass before the decay begins to grow from 0."""
        decay_max: float = Field(0.5, ge=0, lt=1)
        """The largest decay."""

    settings: Settings
    strength = Strength("kl_beta", (1e-2, 1e-3, 1e-4))

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.settings.kl_beta > 0, behaviour=True, behaviour_is_ema=self.settings.decay_rate > 0)

    def behaviour_ema_decay(self, updates: int) -> float:
        o = self.settings
        return min(o.decay_rate * max(updates - o.decay_start, 0), o.decay_max)

    def ineffective_settings(self, updates_per_rollout: int) -> dict[str, str]:
        found = super().ineffective_settings(updates_per_rollout)
        if self.settings.decay_rate == 0:
            found |= dict.fromkeys(("decay_start", "decay_max"), "with decay_rate=0 the decay stays 0")
        if self.stays_on_policy(updates_per_rollout):
            found["beta"] = "v+ and v- are both v_old = v, and the gradient is the same for every beta"
        return found

    def ineffective_parts(self, updates_per_rollout: int) -> dict[str, str]:
        if not self.stays_on_policy(updates_per_rollout):
            return {}
        return {
            "behaviour policy": "with decay_rate=0 and updates_per_rollout=1 it is the policy itself",
            "contrast": "v+ and v- are both v_old = v, and what remains is regression that is weighted by the advantage; "
            "set decay_rate above 0, or more updates",
        }

    def reward_weight(self, forest: RolloutForest) -> Tensor:
        """Computes r of each leaf: [G, K], 1/2 where a reward is missing or all rewards of the group are equal."""
        a = groups.standardise(forest.by_group(forest.rewards), std=self.settings.std)
        return (a / (2 * self.settings.adv_clip) + 0.5).clamp(0, 1)

    def rows(self, forest: RolloutForest, update: int) -> DenoisingRows:
        """Makes rows of the images that have a reward, in this update's part."""
        o = self.settings
        leaves = scored_leaves(forest, flat_groups=o.flat_groups == "keep")
        return noised_leaves(forest, leaves[part_of_update(forest, update, len(leaves), o.parts)], update, o)

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        """Computes the terms of some rows, each float32 [R'].

        Returns:
            positive, negative: the normalised squared errors of v+ and v-. reward_weight: r of the row's image. With a
            reference also velocity_distance: |v - v_ref|^2, averaged over latent dimensions.
        """
        v, behaviour = velocities.policy.float(), velocities.behaviour
        assert behaviour is not None  # the engine gives what `needs` asks for
        behaviour = behaviour.float()
        sigma = rows.sigma.view(-1, *[1] * (v.ndim - 1))
        # v+- = v_old +- b (v - v_old): at v = v_old the bits of the two errors are equal, and their gradients are opposite.
        behaviour_error, step = rows.noise - rows.x0 - behaviour, self.settings.beta * (v - behaviour)
        terms = {
            "positive": _normalised(sigma * (behaviour_error - step)),
            "negative": _normalised(sigma * (behaviour_error + step)),
            "reward_weight": self.reward_weight(rows.forest).flatten()[rows.leaf],
        }
        if velocities.reference is not None:
            terms["velocity_distance"] = flow.mean_square(v - velocities.reference.float())
        return terms

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        o, r = self.settings, terms["reward_weight"]
        loss = loss_part("denoising", o.adv_clip / o.beta * (r * terms["positive"] + (1 - r) * terms["negative"]).mean())
        return loss + loss_part("kl_beta", o.kl_beta * terms["velocity_distance"].mean()) if o.kl_beta else loss

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        if not terms:
            return {}
        numbers = {"positive_error": float(terms["positive"].mean()), "negative_error": float(terms["negative"].mean())}
        if "velocity_distance" in terms:
            numbers["distance_reference"] = float(terms["velocity_distance"].mean())
        return numbers


def _normalised(error: Tensor) -> Tensor:
    """Divides the mean square by the mean absolute value, which has no gradient: [R', *latent] -> [R']."""
    return flow.mean_square(error) / flow.mean_absolute(error)
