"""ram: reinforce adjoint matching, regression on the base model's velocity corrected by the reward.

For a final image x_0 with fresh noise at sigma:

    L = mean |v - stop_gradient(v_ref + beta R~ (noise - x_0 - v_0))|^2

averaged over latent dimensions. v_0 is the policy's own velocity, or that of a moving average of the policy, which then draws
the rollouts. R~ is the reward minus its group mean, in the unit of `reward_scale`. All velocities are the prompt's own, without
classifier-free guidance, whatever guidance the rollouts had. The rollout needs no stochastic step.

Source: Bergmeister et al. 2026 (arXiv 2605.10759), equation 17. How this differs from the paper: docs/methods/ram.md.

Fixed point: v = v_ref + beta E[R~ (noise - x_0 - v) | x], the expectation taken over images of the policy. The velocity of the
tilted target p_ref exp(beta R~) / Z obeys this up to a term of second order in beta, the gradient of the path's remaining KL
divergence, which the loss leaves out. For one Gaussian and a linear reward that term is zero. `path_cost` adds an estimate of
it, with which the tilted target is the fixed point:

    (sigma / (1 - sigma)) grad_x C,   C(x) = E[integral_0^sigma ((1 - u) / u) |v - v_ref|^2(x_u) du | x_sigma = x]
    grad_x E[c(x_u) | x] = E[(c(x_u) - c(x)) g],   g = (x + (1 - sigma) v) / sigma - (x - a x_u) / b^2

where x = a x_u + b noise' is the noising from u to sigma, and g the gradient of log p(x_u | x).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from alignbench import flow
from alignbench.loss_parts import loss_part
from alignbench.objective import Needs, Strength
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import DenoisingRows, Terms, Velocities, denoising_noise
from objectives._denoising import DenoisingSettings, noised_leaves, scored_leaves
from objectives._target import RewardScale, TargetObjective, TargetSettings

NEAR_NOISE, NEAR_IMAGE = 1e-3, 1e-4
"""The smallest 1 - sigma that is divided by, and the smallest sigma of an earlier state."""


@dataclass(frozen=True)
class _RowsOfPaths(DenoisingRows):
    """Rows at sigma, then as many at an earlier u on the path from the same image.

    Attributes:
        earlier_sigma: float32 [R], u of the row's path.
        earlier: float32 [R, *latent], the state x_u.
    """

    earlier_sigma: Tensor
    earlier: Tensor

    def part(self, start: int, stop: int) -> "_RowsOfPaths":
        here = slice(start, stop)
        tensors = (self.leaf, self.sigma, self.noise, self.earlier_sigma, self.earlier)
        return _RowsOfPaths(self.forest, *(tensor[here] for tensor in tensors))

    def score(self, v: Tensor) -> Tensor:
        """Computes g of each row: [R', *latent]; it has no meaning at the earlier states."""
        x, s, u = self.x, *(t.view(-1, *[1] * (v.ndim - 1)) for t in (self.sigma, self.earlier_sigma))
        a, variance = _noising(s, u)
        return (x + (1 - s) * v) / s - (x - a * self.earlier) / variance.clamp(min=NEAR_IMAGE**2)


def _noising(s: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The scale a and the variance b^2 of the noising from u to s."""
    a = (1 - s) / (1 - u).clamp(min=NEAR_NOISE)
    return a, s**2 - a**2 * u**2


def _with_earlier_states(rows: DenoisingRows, update: int) -> _RowsOfPaths:
    """Makes the path of each row: its noise leads from the image to u, between 0 and sigma, and another one from u to sigma."""
    forest, s = rows.forest, rows.sigma
    keys = [(int(leaf), row, 1) for row, leaf in enumerate(rows.leaf)]
    share, more = denoising_noise(forest, update, keys, "uniform")
    u = torch.minimum((s * share).clamp(min=NEAR_IMAGE), s)
    s_wide, u_wide = (t.view(-1, *[1] * (more.ndim - 1)) for t in (s, u))
    earlier = (1 - u_wide) * rows.x0 + u_wide * rows.noise
    a, variance = _noising(s_wide, u_wide)
    noise = (a * u_wide * rows.noise + variance.clamp(min=0).sqrt() * more) / s_wide
    doubled = [torch.cat(pair) for pair in ((rows.leaf, rows.leaf), (s, u), (noise, rows.noise), (u, u), (earlier, earlier))]
    return _RowsOfPaths(forest, *doubled)


class RAM(TargetObjective):
    """Regression on a velocity that the reward corrects."""

    class Settings(TargetSettings, DenoisingSettings):
        reward_scale: RewardScale = "batch"
        """The unit of the reward in exp(beta R~). group: its standard deviation in each group; the fixed point then moves as
        the policy learns. batch: its standard deviation within groups, pooled over the rollout, as published. running: the
        same, pooled over all rollouts so far, which converges. raw: no unit; the fixed point is that of p_ref exp(beta R), and
        beta depends on the scorer's scale."""
        beta: float = Field(2.0, gt=0)
        """Inverse temperature of the target, for rewards in the unit of `reward_scale`; eta in the paper's code. A larger one
        asks for more reward and less diversity."""
        centre: Literal["policy", "average"] = "policy"
        """What v_0 is. policy: the policy's own velocity, as in the paper's equation. average: that of a moving average of the
        policy, which draws the rollouts, as in its code."""
        decay_rate: float = Field(0.01, ge=0)
        """By how much the decay of the moving average grows with each update. With 0 it is the policy at the rollout."""
        decay_max: float = Field(0.9, ge=0, lt=1)
        """The largest decay of the moving average."""
        path_cost: bool = False
        """Whether the path's remaining KL divergence is retained, with which the tilted target is the fixed point. Each image
        then has two rows for a noise and sigma."""

    settings: Settings
    strength = Strength("beta", (1.0, 2.0, 4.0))

    @property
    def needs(self) -> Needs:
        average = self.settings.centre == "average"
        return Needs(reference=True, behaviour=average, behaviour_is_ema=average and self.settings.decay_rate > 0)

    def behaviour_ema_decay(self, updates: int) -> float:
        return min(self.settings.decay_rate * updates, self.settings.decay_max)

    def ineffective_settings(self, updates_per_rollout: int) -> dict[str, str]:
        o, found = self.settings, super().ineffective_settings(updates_per_rollout)
        if o.centre == "policy":
            return found | dict.fromkeys(("decay_rate", "decay_max"), "with centre=policy there is no moving average")
        if o.decay_rate == 0:
            found["decay_max"] = "with decay_rate=0 the decay stays 0"
            if updates_per_rollout == 1:
                found["centre"] = "with decay_rate=0 and updates_per_rollout=1 the average is the policy itself"
        return found

    def target_beta(self, iteration: int) -> float:
        return self.settings.beta

    def rows(self, forest: RolloutForest, update: int) -> DenoisingRows:
        """Makes rows of the images that have a reward; those of groups of equal rewards pull the policy to the base model."""
        rows = noised_leaves(forest, scored_leaves(forest, flat_groups=True), update, self.settings)
        return _with_earlier_states(rows, update) if self.settings.path_cost else rows

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        """Computes the terms of some rows, each float32 [R'].

        Returns:
            target_error: |v - target|^2, averaged over latent dimensions.
            With `path_cost` also path_slope: sigma^2 / (1 - sigma) g . v, averaged over latent dimensions, and cost: c.
        """
        v, reference = velocities.policy.float(), velocities.reference
        assert reference is not None  # the engine gives what `needs` asks for
        centre = v if self.settings.centre == "policy" else velocities.behaviour
        assert centre is not None
        reward = self.target_reward(rows.forest).flatten()[rows.leaf].view(-1, *[1] * (v.ndim - 1))
        residual = rows.noise - rows.x0 - centre.detach().float()
        target = reference.float() + self.settings.beta * reward * residual
        terms = {"target_error": flow.mean_square(v - target.detach())}
        if isinstance(rows, _RowsOfPaths):
            s = rows.sigma
            slope = rows.score(v.detach()) * (s**2 / (1 - s).clamp(min=NEAR_NOISE)).view(-1, *[1] * (v.ndim - 1))
            terms["path_slope"] = flow.reduce_latent(slope * v, "mean")
            terms["cost"] = (1 - s) / s * flow.reduce_latent((v.detach() - reference.float()).square(), "sum")
        return terms

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        if not self.settings.path_cost:
            return terms["target_error"].mean()
        (at_sigma, _), (cost, earlier_cost) = terms["target_error"].chunk(2), terms["cost"].chunk(2)
        path = 2 * (earlier_cost - cost) * terms["path_slope"].chunk(2)[0]
        return loss_part("regression", at_sigma.mean()) - loss_part("path_cost", path.mean())

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        return {"target_error": float(terms["target_error"].mean())} if terms else {}
