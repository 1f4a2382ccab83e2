"""The exact gradient of a divergence between path distributions, for latents in two dimensions.

The paths are those of the memoryless rule at every step but the last, which is deterministic and counts as a part of the
reward, as it does in every objective on paths. The states of each step are on a grid. Let N(mu, std^2) be the distribution of a
step, delta the difference of its mean to the base model's, and V(x) the expected rest of the sum from x on. The gradient of
E[sum_t l_t - R] is

    sum_t E[ grad mu . h ],     h = delta / std^2 + E[V(x') (x' - mu)] / std^2,     V(x) = |delta|^2 / (2 std^2) + E[V(x')]

by recursion from the last step, and the distribution of x follows by recursion from the first. An alpha divergence weights
paths by exp((alpha - 1) y), which is a product over steps and is carried along in both recursions. Both Gaussians of a step
are products over the two coordinates, so an expectation over the next grid is a product of matrices.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alignbench import flow
from alignbench.backbone import Backbone
from alignbench.errors import UserError
from alignbench.objective import Divergence
from alignbench.rollouts.executor import predict

EXTENT = 8.0
"""Half the side of the grids, in units of a latent."""
SPACING, COARSEST = 1.1, 0.1
"""Spacing of the grid that a step leads to, in standard deviations of the step, and the largest spacing. A sum over a Gaussian
with this spacing has a relative error of 1e-7."""
FINEST = 0.03
"""Smallest spacing that is affordable."""
NEGLIGIBLE = 1e-12
"""Mass of a point below which the point is left out."""
LOST = 1e-3
"""Largest share of the mass that may leave the grid."""
CHUNK = 8192
"""Number of states whose transitions are in memory at a time."""


@dataclass(frozen=True)
class Transition:
    """One stochastic step from the points of a grid that have mass to the next grid.

    Attributes:
        sigma, sigma_next: where the step begins and ends.
        points: float64 [N, 2].
        index: int64 [N], the indices of the points in their flattened grid.
        mass: float64 [N], the probability of each.
        mean: float64 [N, 2], the mean of the step under the policy.
        delta: float64 [N, 2], that mean minus the mean under the base model.
        std: the standard deviation of the step.
        line: float64 [n], the coordinates of the next grid in each direction.
    """

    sigma: float
    sigma_next: float
    points: Tensor
    index: Tensor
    mass: Tensor
    mean: Tensor
    delta: Tensor
    std: float
    line: Tensor

    def _kernels(self, shift: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For chunks of the points: the offsets x' - mean - shift and their probabilities, [N', 2, n] each."""
        cell = float(self.line[1] - self.line[0])
        for start in range(0, len(self.mean), CHUNK):
            here = slice(start, start + CHUNK)
            offset = self.line - (self.mean + shift)[here, :, None]
            density = torch.exp(-0.5 * (offset / self.std) ** 2) / (self.std * math.sqrt(2 * math.pi))
            yield here, offset, density * cell

    def expectation(self, values: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Computes E[V(x')] and E[V(x') (x' - mean - shift)] for x' ~ N(mean + shift, std^2).

        Args:
            values: V on the next grid, [n, n].
            shift: [N, 2].

        Returns:
            [N] and [N, 2].
        """
        means, firsts = [], []
        for _, offset, probability in self._kernels(shift):
            first, second = probability.unbind(1)
            over_first, moved = first @ values, (first * offset[:, 0]) @ values
            means.append((over_first * second).sum(1))
            along = (moved * second).sum(1), (over_first * second * offset[:, 1]).sum(1)
            firsts.append(torch.stack(along, dim=1))
        return torch.cat(means), torch.cat(firsts)

    def forward(self, mass: Tensor, shift: Tensor) -> Tensor:
        """Carries masses [N] of the points to the next grid: [n, n]."""
        n = len(self.line)
        arrived = torch.zeros(n, n, dtype=torch.float64)
        for here, _, probability in self._kernels(shift):
            first, second = probability.unbind(1)
            arrived += (mass[here, None] * first).T @ second
        return arrived


class Paths:
    """The distribution of a policy's paths for one prompt.

    Attributes:
        transitions: the stochastic steps.
        end: indices of the states before the last step in their flattened grid, int64 [N].
        rewards: the reward of the sample that each of these states leads to, float64 [N].
        lost: share of the mass that has left the grids.
    """

    def __init__(self, policy: Backbone, prompt: str, steps: int, score: Callable[[Tensor], Tensor]) -> None:
        """Computes the paths.

        Args:
            policy: a backbone with latents of two values.
            prompt: the prompt.
            steps: denoising steps, at least two.
            score: rewards, float64 [N], of final latents, float32 [N, 2].

        Raises:
            UserError: the steps are too short for a grid, or the policy's states leave it.
        """
        self.policy, self.conditioning = policy, policy.encode([prompt])
        sigmas = policy.sigmas(steps).tolist()
        for step in pairwise(sigmas[:-1]):
            _spacing(*step)  # is checked before anything is computed
        self.transitions: list[Transition] = []
        line = _line(COARSEST)
        normal = torch.exp(-0.5 * line**2)
        mass = torch.outer(normal, normal) / normal.sum() ** 2
        for sigma, sigma_next in pairwise(sigmas[:-1]):
            transition = self._transition(line, mass, sigma, sigma_next)
            self.transitions.append(transition)
            line = transition.line
            mass = transition.forward(transition.mass, torch.zeros_like(transition.mean))
        self.lost = 1 - float(mass.sum())
        if self.lost > LOST:
            raise UserError(
                f"the policy carries {100 * self.lost:.1f} % of its states beyond +-{EXTENT:g}, so the exact gradient is "
                "unknown; diagnose an earlier checkpoint"
            )
        points, self.end, _ = _with_mass(line, mass)
        velocity = self._velocity(points, sigmas[-2])
        self.rewards = score((points + (sigmas[-1] - sigmas[-2]) * velocity).float()).double().cpu()

    def _transition(self, line: Tensor, mass: Tensor, sigma: float, sigma_next: float) -> Transition:
        points, index, kept = _with_mass(line, mass)
        velocity = self._velocity(points, sigma)
        with self.policy.reference():
            base = self._velocity(points, sigma)
        mean, std = _moments(points, velocity, sigma, sigma_next)
        delta = mean - _moments(points, base, sigma, sigma_next)[0]
        return Transition(sigma, sigma_next, points, index, kept, mean, delta, std, _line(_spacing(sigma, sigma_next)))

    @torch.no_grad()
    def _velocity(self, points: Tensor, sigma: float) -> Tensor:
        return self._velocity_with_graph(points, sigma).double().cpu()

    def _velocity_with_graph(self, points: Tensor, sigma: float) -> Tensor:
        x = points.float().to(self.policy.device)
        group = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return predict(self.policy, x, sigma, self.conditioning, group, CHUNK)

    def gradient(self, divergence: Divergence, unit: float) -> list[Tensor]:
        """Computes the gradient of a divergence with respect to the policy's parameters.

        Args:
            divergence: the divergence. If it is not relative to the base model, alpha must be 1, because then the entropy of a
                path does not depend on the policy.
            unit: the change of R~ for a change of the reward by 1.

        Returns:
            One tensor for each parameter of the policy.
        """
        reward = divergence.reward * unit * self.rewards
        kl = divergence.kl if divergence.relative_to_base else 0.0
        pulls = self._additive(reward, kl) if divergence.alpha == 1 else self._product(reward, kl, divergence.alpha - 1)
        parameters = list(self.policy.parameters())
        total = [torch.zeros_like(p) for p in parameters]
        for transition, pull in zip(self.transitions, pulls, strict=True):
            velocity = self._velocity_with_graph(transition.points, transition.sigma)
            mean = flow.moments(
                torch.zeros_like(velocity), velocity, transition.sigma, transition.sigma_next, 1.0, "memoryless"
            )[0]
            surrogate = (pull.to(mean) * mean).sum()
            parts = torch.autograd.grad(surrogate, parameters, allow_unused=True)
            total = [t if part is None else t + part for t, part in zip(total, parts, strict=True)]
        return total

    def _additive(self, reward: Tensor, kl: float) -> list[Tensor]:
        """The factors of grad mu at the points of each step, [N, 2], for the gradient of E[kl sum_t l_t - reward]."""
        pulls: list[Tensor] = []
        index, values = self.end, -(reward - reward.mean())
        for t in reversed(self.transitions):
            value, first = t.expectation(_on_grid(t.line, index, values), torch.zeros_like(t.mean))
            pulls.append(t.mass[:, None] * (kl * t.delta + first) / t.std**2)
            index, values = t.index, kl * t.delta.square().sum(1) / (2 * t.std**2) + value
        return pulls[::-1]

    def _product(self, reward: Tensor, kl: float, slope: float) -> list[Tensor]:
        """The same for E[exp(slope y)] / (slope E[exp(slope y)]) with y = kl sum_t l_t - reward; the mean is held constant."""
        a = slope * kl
        growth = [torch.exp(a * (1 + a) * t.delta.square().sum(1) / (2 * t.std**2)) for t in self.transitions]
        masses = [self.transitions[0].mass]
        for t, grown, following in zip(self.transitions, growth, self.transitions[1:], strict=False):
            masses.append(t.forward(masses[-1] * grown, a * t.delta).flatten()[following.index])
        pulls: list[Tensor] = []
        exponent = -slope * reward
        index, values = self.end, torch.exp(exponent - exponent.max())
        for t, grown, mass in zip(reversed(self.transitions), reversed(growth), reversed(masses), strict=True):
            value, first = t.expectation(_on_grid(t.line, index, values), a * t.delta)
            pulls.append((mass * grown)[:, None] * (first + a * t.delta * value[:, None]) / t.std**2)
            index, values = t.index, grown * value
        mean = float((self.transitions[0].mass * values).sum())
        return [pull / (slope * mean) for pull in pulls[::-1]]


def mean_gradient(paths: Sequence[Paths], divergence: Divergence, units: Sequence[float]) -> Tensor:
    """Computes the gradient of a divergence, averaged over prompts, as one vector of all parameters.

    Args:
        paths: the paths of each prompt.
        divergence: the divergence.
        units: the change of R~ for a change of the reward by 1, for each prompt.
    """
    parts = [of_prompt.gradient(divergence, unit) for of_prompt, unit in zip(paths, units, strict=True)]
    return torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in parts]).mean(0)


def _moments(points: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, float]:
    """Mean, float64 [N, 2], and standard deviation of a memoryless step."""
    mean, std = flow.moments(points, velocity, sigma, sigma_next, 1.0, "memoryless")
    return mean.double(), float(std)


def _spacing(sigma: float, sigma_next: float) -> float:
    """The spacing of the grid that a step leads to; raises UserError if it would be too fine."""
    nothing = torch.zeros(1, 2)
    spacing = min(SPACING * _moments(nothing, nothing, sigma, sigma_next)[1], COARSEST)
    if spacing < FINEST:
        raise UserError(
            f"the step from sigma {sigma:.3g} to {sigma_next:.3g} is too short for the grid of an exact gradient; lower "
            "sampler.steps"
        )
    return spacing


def _line(spacing: float) -> Tensor:
    """The coordinates of a grid over +- EXTENT, float64 [n]."""
    return torch.linspace(-EXTENT, EXTENT, math.ceil(2 * EXTENT / spacing) + 1, dtype=torch.float64)


def _with_mass(line: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The points of a grid whose mass is not negligible, [N, 2], their indices, [N], and their mass, [N]."""
    index = (mass.flatten() > NEGLIGIBLE).nonzero()[:, 0]
    n = len(line)
    return torch.stack([line[index // n], line[index % n]], dim=1), index, mass.flatten()[index]


def _on_grid(line: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Puts values [N] at some indices of a flattened grid; returns the grid, [n, n], with 0 elsewhere."""
    n = len(line)
    return torch.zeros(n * n, dtype=torch.float64).index_copy(0, index, values).view(n, n)
