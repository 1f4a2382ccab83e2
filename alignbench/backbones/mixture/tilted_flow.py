"""The flow from noise to the reward-tilted target p_base(x) exp(beta R(x)) / Z, which is known at every sigma.

With x_sigma = (1 - sigma) x_0 + sigma x_1, the base model's posterior of x_0 given x_sigma is a mixture. With

    h(x, sigma) = E[exp(beta R(x_0)) | x_sigma = x]

the target's density at sigma is p_sigma(x) h(x, sigma) / Z, and its velocity is that of the base model plus the optimal drift:

    v*(x, sigma) = v(x, sigma) - sigma / (1 - sigma) grad log h(x, sigma)

Source: Domingo-Enrich et al. 2024 (arXiv 2409.08861), in the convention of `alignbench.flow`. For a quadratic reward the
target is again a mixture and everything is in closed form. For other rewards, in two dimensions, integrals over x_0 are sums
over a grid. For large sigmas the grid is fixed. For small ones it is centred at x_sigma / (1 - sigma), because x_sigma then
determines x_0 more closely than the fixed grid could resolve.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from alignbench.backbones.mixture.mixtures import EXTENT, Mixture, midpoints, mixture_velocity
from alignbench.backbones.mixture.scenarios import Quadratic, world

GRID = 240
"""Number of points, in each direction, of the fixed grid."""
LOCAL = 0.08
"""Deviation of x_0 given x_sigma, under a flat distribution of x_0, up to which the grid around x_sigma is used."""
NODES, REACH = 24, 6.0
"""Number of points, in each direction, of the grid around x_sigma, and half its side in units of that deviation."""
CHUNK = 256
"""Number of states whose grids are in memory at a time."""
SIGMAS = (0.25, 0.5, 0.75, 1.0)
"""The sigmas at which velocities are compared."""
STATES = 64
"""Number of points, in each direction, of the grid of states at which velocities are compared."""
SAMPLES = 2048
"""Number of states at which velocities are compared in more than two dimensions."""
SMALLEST_MASS = 1e-7
"""States of the grid with a smaller mass are left out."""


@dataclass(frozen=True)
class TiltedFlow:
    """The flow to the target of one problem.

    Attributes:
        base: distribution of the base model, in two dimensions unless the reward is quadratic.
        reward: R, a function of points [..., d].
        beta: inverse temperature of the target.
    """

    base: Mixture
    reward: Callable[[Tensor], Tensor]
    beta: float

    def log_expectation(self, x: Tensor, sigma: float) -> Tensor:
        """Computes log E[exp(beta R(x_0)) | x_sigma = x], float64 [N], for x [N, d]. At sigma = 1 it is log Z for every x."""
        return self._log_unnormalised(x, sigma) - self.base.at(sigma).log_density(x)

    def log_density(self, x: Tensor, sigma: float) -> Tensor:
        """Computes the log-density of the target's x_sigma, float64 [N], for x [N, d]."""
        return self._log_unnormalised(x, sigma) - self.log_z

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """Computes v*(x, sigma) = E[x_1 - x_0 | x_sigma = x] under the target.

        Args:
            x: the states, float64 [N, d].
            sigma: above 0, at most 1.

        Returns:
            float64 [N, d]. If no point of the grid can have led to x, this is the base model's velocity: x is then beyond all
            bumps, where exp(beta R) is 1.
        """
        mixture = self.target
        if mixture is not None:
            return _velocity_of(mixture, x, sigma)
        if self._is_local(sigma):
            return torch.cat([self._local(part, sigma)[1] for part in x.split(CHUNK)])
        log_total, mean = self._on_the_plane(x, sigma)
        known = torch.isfinite(log_total)[:, None]
        return torch.where(known, (x - mean) / sigma, _velocity_of(self.base, x, sigma))

    @cached_property
    def log_z(self) -> float:
        """log Z, with Z the mean of exp(beta R) under the base model."""
        origin = torch.zeros(1, self.base.dimension, dtype=torch.float64)
        return float(self.log_expectation(origin, 1.0))

    @cached_property
    def target(self) -> Mixture | None:
        """The target, if it is a mixture."""
        return self._tilted[0] if self._tilted else None

    @cached_property
    def _tilted(self) -> tuple[Mixture, float] | None:
        reward = self.reward
        return self.base.tilted(self.beta, reward.curvature, reward.centre) if isinstance(reward, Quadratic) else None

    @cached_property
    def _line(self) -> Tensor:
        """The coordinates of the fixed grid in each direction, [GRID]."""
        return midpoints(1, GRID, EXTENT)[0][:, 0]

    @cached_property
    def _log_mass(self) -> Tensor:
        """The log of p_base exp(beta R) in each cell of the fixed grid, [GRID, GRID]."""
        points, cell = midpoints(2, GRID, EXTENT)
        return (self._log_tilted(points) + math.log(cell)).view(GRID, GRID)

    def _log_tilted(self, x: Tensor) -> Tensor:
        return self.base.log_density(x) + self.beta * self.reward(x)

    def _log_unnormalised(self, x: Tensor, sigma: float) -> Tensor:
        """The log of Z times the density of the target's x_sigma, [N]."""
        if self._tilted is not None:
            target, log_z = self._tilted
            return target.at(sigma).log_density(x) + log_z
        if sigma == 0:
            return self._log_tilted(x)
        if self._is_local(sigma):
            return torch.cat([self._local(part, sigma)[0] for part in x.split(CHUNK)])
        return self._on_the_plane(x, sigma)[0]

    @staticmethod
    def _is_local(sigma: float) -> bool:
        return sigma <= LOCAL * (1 - sigma)

    def _on_the_plane(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The log of the unnormalised density at x [N, 2], and E[x_0 | x_sigma = x] under the target, [N, 2].

        The density of x_sigma given x_0 is a product over the two coordinates, so a sum over the fixed grid is two products
        of matrices.
        """
        peak = self._log_mass.max()
        mass = torch.exp(self._log_mass - peak)
        exponent = -((x[..., None] - (1 - sigma) * self._line) ** 2) / (2 * sigma**2)  # [N, 2, GRID]
        offset = exponent.amax(-1, keepdim=True)
        first, second = torch.exp(exponent - offset).unbind(1)
        over_first = first @ mass
        total = (over_first * second).sum(1)
        mean_first = (((first * self._line) @ mass) * second).sum(1)
        mean_second = (over_first * (second * self._line)).sum(1)
        mean = torch.stack([mean_first, mean_second], dim=1) / total[:, None]
        log_total = torch.log(total) + peak + offset.sum((1, 2)) - math.log(2 * math.pi * sigma**2)
        return log_total, mean

    def _local(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The log of the unnormalised density at x [N, 2], and the velocity there, from a grid of x_1 for each state."""
        noise, cell = midpoints(2, NODES, REACH)
        start = (x[:, None] - sigma * noise) / (1 - sigma)  # x_0, [N, nodes, 2]
        log_weight = self._log_tilted(start) - 0.5 * noise.square().sum(1)
        mean_noise = torch.softmax(log_weight, dim=1) @ noise
        log_total = torch.logsumexp(log_weight, 1) + math.log(cell / (2 * math.pi)) - 2 * math.log(1 - sigma)
        return log_total, (mean_noise - x) / (1 - sigma)


@dataclass(frozen=True)
class OptimalVelocity:
    """The target's velocity at one sigma, on states that represent the target's distribution there.

    Attributes:
        states: float64 [N, d].
        weights: float64 [N], with sum 1.
        velocity: float64 [N, d].
    """

    states: Tensor
    weights: Tensor
    velocity: Tensor

    def error(self, velocity: Tensor) -> float:
        """Computes the mean squared distance of a model's velocities [N, d] to these, under the target's distribution."""
        return float((self.weights * (velocity.double() - self.velocity).square().sum(1)).sum())


@cache
def tilted_flow(prompt: str, dimension: int, beta: float) -> TiltedFlow:
    """The flow to the target of a prompt of the backbone `gaussian_mixture`."""
    w = world(prompt, dimension)
    return TiltedFlow(w.base, w.reward, beta)


@cache
def optimal_velocity(prompt: str, dimension: int, beta: float, sigma: float) -> OptimalVelocity:
    """Computes the target's velocity at one sigma: on a grid in two dimensions, else at samples of the target."""
    flow = tilted_flow(prompt, dimension, beta)
    if dimension == 2:
        states, cell = midpoints(2, STATES, EXTENT)
        mass = torch.exp(flow.log_density(states, sigma)) * cell
        kept = mass > SMALLEST_MASS
        states, weights = states[kept], mass[kept] / mass[kept].sum()
    else:
        assert flow.target is not None  # only quadratic rewards exist in more dimensions
        states = flow.target.at(sigma).sample(SAMPLES, torch.Generator().manual_seed(0))
        weights = torch.full((SAMPLES,), 1 / SAMPLES, dtype=torch.float64)
    return OptimalVelocity(states, weights, flow.velocity(states, sigma))


def _velocity_of(mixture: Mixture, x: Tensor, sigma: float) -> Tensor:
    """The velocity of the flow to a mixture, [N, d], at x [N, d]."""
    n = len(x)
    return mixture_velocity(
        x,
        torch.full((n,), sigma, dtype=x.dtype),
        mixture.weights.expand(n, -1),
        mixture.means.expand(n, -1, -1),
        mixture.stds.expand(n, -1),
    )
