"""nft: DiffusionNFT, flow matching towards good pictures and away from bad ones, without log-probs.

Zheng et al. 2025 (arXiv 2509.16117). For a picture x_0 with fresh noise at sigma, v the policy's velocity and v_old that
of the policy which drew the picture:

    v+ = b v + (1 - b) v_old,   v- = (1 + b) v_old - b v
    r  = clip(A / (2 adv_clip) + 1/2, 0, 1),   A = (R - group mean) / deviation of the group or of the batch
    L  = adv_clip mean[ r |x0(v+) - x_0|^2 / (b w+) + (1 - r) |x0(v-) - x_0|^2 / (b w-) ] + kl_beta mean |v - v_ref|^2

where x0(v) = x - sigma v and w+- is the mean absolute value of what is squared, without gradient. The behaviour policy
follows the policy: after a rollout's updates, n of them since the start, its weights become d old + (1 - d) new with
d = min(decay_rate (n - decay_start), decay_max). The pictures need no stochastic step. All velocities are the prompt's own,
without classifier-free guidance, whatever guidance the rollouts had. How this differs from the paper: docs/methods/nft.md.
"""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from alignbench import Objective, groups, settings
from alignbench.objective import Needs
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import DenoisingRows, Terms, Times, Velocities, denoising_noise, part_of_update

MIN_WEIGHT = 1e-5


class NFT(Objective):
    class Settings(settings.Settings):
        beta: float = Field(1.0, gt=0)
        """b: how far v+ and v- lie from v_old."""
        std: Literal["group", "batch"] = "group"
        """Deviation that rewards are divided by: their group's, or that of all rewards of the batch."""
        flat_groups: Literal["keep", "drop"] = "keep"
        """Groups whose rewards are all equal have r = 1/2: they pull v to an behaviour policy that lags. drop: they cost no
        row."""
        adv_clip: float = Field(5.0, gt=0)
        """Advantages beyond +- this count as wholly good or wholly bad."""
        kl_beta: float = Field(1e-4, ge=0)
        """Weight of the squared distance to the base model's velocity; 0 saves the reference's forward pass."""
        draws: int = Field(1, ge=1)
        """Noises and times for each picture."""
        times: Times = "schedule"
        """Sigmas of noised images. schedule: logit-normal, shifted as the model's own schedule is. logit_normal: without the
        shift. uniform: between 0 and 1. steps: those of the rollout's steps, each once before any comes again."""
        parts: int = Field(1, ge=1)
        """Disjoint random parts of a rollout's pictures, of which each update takes the next; 1: every update takes all."""
        decay_rate: float = Field(1e-3, ge=0)
        """How fast the behaviour policy's decay grows with the updates; 0: the behaviour policy is the newest, and costs no
        rows."""
        decay_start: int = Field(0, ge=0)
        """Updates during which it stays 0."""
        decay_max: float = Field(0.5, ge=0, lt=1)
        """What it grows to."""

    settings: Settings

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.settings.kl_beta > 0, behaviour=True, behaviour_is_ema=self.settings.decay_rate > 0)

    def behaviour_ema_decay(self, updates: int) -> float:
        o = self.settings
        return min(o.decay_rate * max(updates - o.decay_start, 0), o.decay_max)

    def goodness(self, forest: RolloutForest) -> Tensor:
        """r, [G, K]; a half where a reward is missing or its group has no spread."""
        a = groups.standardise(forest.by_group(forest.rewards), std=self.settings.std)
        return (a / (2 * self.settings.adv_clip) + 0.5).clamp(0, 1)

    def rows(self, forest: RolloutForest, update: int) -> DenoisingRows:
        """Each picture that has a reward, with its own noise and time."""
        o, rewards = self.settings, forest.by_group(forest.rewards)
        counts = groups.valid(rewards) if o.flat_groups == "keep" else groups.usable_leaves(rewards)
        leaf = counts.flatten().nonzero()[:, 0]
        leaf = leaf[part_of_update(forest, update, len(leaf), o.parts)].repeat_interleave(o.draws)
        keys = [(int(i), n) for n, i in enumerate(leaf)]
        return DenoisingRows(forest, leaf, *denoising_noise(forest, update, keys, o.times, o.draws))

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        """Each float32 [R'].

        positive, negative: the normalised squared errors of v+ and v-. goodness: r of the row's picture. move: |v - v_ref|^2.
        """
        v, behaviour = velocities.policy.float(), velocities.behaviour
        assert behaviour is not None  # the engine gives what `needs` asks for
        behaviour = behaviour.float()
        sigma = rows.sigma.view(-1, *[1] * (v.ndim - 1))
        # v+- = v_old +- b (v - v_old): at v = v_old the two errors are equal bits, and their gradients but for the sign.
        of_old, step = rows.noise - rows.x0 - behaviour, self.settings.beta * (v - behaviour)
        terms = {
            "positive": _normalised(sigma * (of_old - step)),
            "negative": _normalised(sigma * (of_old + step)),
            "goodness": self.goodness(rows.forest).flatten()[rows.leaf],
        }
        if velocities.reference is not None:
            terms["move"] = (v - velocities.reference.float()).square().flatten(1).mean(1)
        return terms

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        o, r = self.settings, terms["goodness"]
        loss = o.adv_clip / o.beta * (r * terms["positive"] + (1 - r) * terms["negative"]).mean()
        return loss + o.kl_beta * terms["move"].mean() if o.kl_beta else loss

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        if not terms:
            return {}
        numbers = {"positive_error": float(terms["positive"].mean()), "negative_error": float(terms["negative"].mean())}
        return numbers | ({"distance_reference": float(terms["move"].mean())} if "move" in terms else {})


def _normalised(error: Tensor) -> Tensor:
    """Mean square over the mean absolute value, the latter without gradient; [R', ...] -> [R']."""
    flat = error.flatten(1)
    return flat.square().mean(1) / flat.detach().abs().mean(1).clamp(min=MIN_WEIGHT)
