"""What is known of the reward-tilted target p_base(x) exp(beta R(x)) / Z of a prompt: Z, rewards, and the masses of its modes.

For a quadratic reward everything is in closed form. For other rewards, in two dimensions, it is computed on a grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, lru_cache

import torch
from scipy.optimize import brentq
from torch import Tensor

from alignbench.backbones.mixture.mixtures import EXTENT, Mixture, midpoints
from alignbench.backbones.mixture.scenarios import Quadratic, World, world

GRID = 240
"""Number of grid points in each direction."""
LARGEST_BETA = 200.0
"""Largest inverse temperature among which the one with a given KL divergence is searched."""


@dataclass(frozen=True)
class KnownPoints:
    """What a problem says of N points.

    Attributes:
        x: the points, float64 [N, d].
        log_joint: the log of weight times density of each component of the base model, float64 [N, M].
        log_base: their log-density under the base model, float64 [N].
        reward: their reward, float64 [N].
        true_reward: the reward that is meant, float64 [N].
    """

    x: Tensor
    log_joint: Tensor
    log_base: Tensor
    reward: Tensor
    true_reward: Tensor

    @classmethod
    def of(cls, w: World, x: Tensor) -> "KnownPoints":
        """Computes it for points x [N, d] of a problem."""
        log_joint, reward = w.base.log_joint(x), w.reward(x)
        true_reward = reward if w.true_reward is w.reward else w.true_reward(x)
        return cls(x, log_joint, torch.logsumexp(log_joint, -1), reward, true_reward)

    def at(self, kept: Tensor) -> "KnownPoints":
        """The points for which `kept`, bool [N], is True."""
        return KnownPoints(*(getattr(self, field.name)[kept] for field in fields(self)))


@lru_cache(maxsize=16)
def known_grid(prompt: str) -> tuple[KnownPoints, float]:
    """The points of the 2-D grid on which targets of a prompt are computed, and the area of a cell."""
    grid, cell = midpoints(2, GRID, EXTENT)
    return KnownPoints.of(world(prompt, 2), grid), cell


@dataclass(frozen=True)
class KnownTarget:
    """The target of one prompt.

    Attributes:
        beta: inverse temperature of the target.
        log_z: log Z, with Z the mean of exp(beta R) under the base model.
        mode_mass: the target's mass of each mode of the base model, float64 [M].
        reward: the expected reward under the target.
        tilt: beta -> the expected reward of the target at that beta, and its KL divergence to the base model in nats.
    """

    beta: float
    log_z: float
    mode_mass: Tensor
    reward: float
    tilt: Callable[[float], tuple[float, float]]

    def log_density(self, points: KnownPoints) -> Tensor:
        """Computes the log-density of the target, float64 [N], at points of its problem."""
        return points.log_base + self.beta * points.reward - self.log_z

    def best_reward(self, kl: float) -> float:
        """Computes the largest expected reward of any distribution with this KL divergence to the base model.

        It is that of the target, at the beta whose target has that divergence.
        """
        if kl <= 0:
            return self.tilt(0.0)[0]
        if self.tilt(LARGEST_BETA)[1] <= kl:
            return self.tilt(LARGEST_BETA)[0]
        return self.tilt(float(brentq(lambda beta: self.tilt(beta)[1] - kl, 0.0, LARGEST_BETA)))[0]


@cache
def known_target(prompt: str, dimension: int, beta: float) -> KnownTarget:
    """Computes what is known of the target of a prompt.

    Raises:
        UserError: the prompt does not name a scenario, or the scenario does not exist in this dimension.
    """
    w = world(prompt, dimension)
    return _quadratic_target(w.base, w.reward, beta) if isinstance(w.reward, Quadratic) else _target_on_grid(prompt, beta)


def _quadratic_target(base: Mixture, reward: Quadratic, beta: float) -> KnownTarget:
    def tilt(beta: float) -> tuple[float, float]:
        distribution, log_z = base.tilted(beta, reward.curvature, reward.centre)
        return reward.mean(distribution), beta * reward.mean(distribution) - log_z

    target, log_z = base.tilted(beta, reward.curvature, reward.centre)
    return KnownTarget(beta, log_z, target.weights, reward.mean(target), tilt)


def _target_on_grid(prompt: str, beta: float) -> KnownTarget:
    grid, cell = known_grid(prompt)
    log_base, reward = grid.log_base, grid.reward  # a target is kept, and with it what its functions name; not the whole grid

    def tilted(beta: float) -> tuple[Tensor, float]:
        """The mass of each cell, and log Z."""
        log_w = log_base + beta * reward + math.log(cell)
        log_z = torch.logsumexp(log_w, 0)
        return torch.exp(log_w - log_z), float(log_z)

    def tilt(beta: float) -> tuple[float, float]:
        mass, log_z = tilted(beta)
        expected = float((mass * reward).sum())
        return expected, beta * expected - log_z

    mass, log_z = tilted(beta)
    mode_mass = torch.zeros(grid.log_joint.shape[1], dtype=torch.float64).index_add(0, grid.log_joint.argmax(1), mass)
    return KnownTarget(beta, log_z, mode_mass, tilt(beta)[0], tilt)
