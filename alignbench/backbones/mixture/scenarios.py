"""The scenarios of the backbone `gaussian_mixture`: base mixtures, and rewards with a known tilted target.

A prompt is the name of a scenario and a number, such as `equal_modes 2`. Each number has its own mixture and its own good
modes. Rewards are sums of 2-D bumps h exp(-|x - c|^2 / (2 w^2)); the reward of `quadratic` is a parabola in any dimension."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from alignbench.backbones.mixture.mixtures import Mixture
from alignbench.errors import UserError
from alignbench.files.text import excerpt

PROMPTS_EACH = 4
"""Number of prompts of each scenario."""
RADIUS, STD, BUMP = 3.0, 0.45, 0.7
"""Radius of the ring of modes, standard deviation of a mode, and width of a reward's bump."""
TURN = 0.4
"""Angle, in radians, between the mixtures of successive prompts."""


@dataclass(frozen=True)
class Bumps:
    """A reward that is a sum of bumps: heights [J], centres [J, 2], widths [J]."""

    heights: Tensor
    centres: Tensor
    widths: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The rewards, [...], of points x [..., 2]."""
        squared = (x[..., None, :] - self.centres.to(x.dtype)).square().sum(-1)
        return (self.heights.to(x.dtype) * torch.exp(-squared / (2 * self.widths.to(x.dtype) ** 2))).sum(-1)


@dataclass(frozen=True)
class Quadratic:
    """The reward -(curvature / 2) |x - centre|^2, whose target is again a mixture (`Mixture.tilted`)."""

    curvature: float
    centre: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The rewards, [...], of points x [..., d]."""
        return -0.5 * self.curvature * (x - self.centre.to(x.dtype)).square().sum(-1)

    def mean(self, distribution: Mixture) -> float:
        """The expected reward under a mixture."""
        squared = (distribution.means - self.centre).square().sum(1) + distribution.dimension * distribution.stds**2
        return -0.5 * self.curvature * float((distribution.weights * squared).sum())


@dataclass(frozen=True)
class World:
    """The problem of one prompt.

    Attributes:
        base: distribution of the untrained model.
        reward: reward that the training sees, without noise.
        true_reward: reward that is meant; it differs from `reward` only for a proxy.
        noise: standard deviation of the noise that a scorer adds to the reward.
    """

    base: Mixture
    reward: Bumps | Quadratic
    true_reward: Bumps | Quadratic
    noise: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """A family of worlds with one name; the task with this name says what it tests.

    Attributes:
        name: name of the scenario.
        world: makes a world from the number of a prompt, and with `any_dimension` also from the dimension.
        any_dimension: whether the dimension can be chosen.
    """

    name: str
    world: Callable[..., World]
    any_dimension: bool = False


def _ring(index: int, count: int, radius: float = RADIUS) -> Tensor:
    angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count) + TURN * index
    return radius * torch.stack([torch.cos(angles), torch.sin(angles)], dim=1)


def _mixture(means: Tensor, std: float = STD, weights: list[float] | None = None) -> Mixture:
    w = torch.full((len(means),), 1 / len(means), dtype=torch.float64) if weights is None else torch.tensor(weights).double()
    return Mixture(w / w.sum(), means, torch.full((len(means),), std, dtype=torch.float64))


def _bumps(means: Tensor, heights: dict[int, float], index: int, width: float = BUMP) -> Bumps:
    """Bumps on the modes with these numbers, counted from mode `index`."""
    places = [(j + index) % len(means) for j in heights]
    return Bumps(
        torch.tensor(list(heights.values()), dtype=torch.float64),
        means[places],
        torch.full((len(places),), width, dtype=torch.float64),
    )


def _with(bumps: Bumps, height: float, centre: Tensor, width: float) -> Bumps:
    return Bumps(
        torch.cat([bumps.heights, torch.tensor([height], dtype=torch.float64)]),
        torch.cat([bumps.centres, centre[None]]),
        torch.cat([bumps.widths, torch.tensor([width], dtype=torch.float64)]),
    )


def _equal_modes(index: int) -> World:
    means = _ring(index, 6)
    reward = _bumps(means, {0: 1.0, 2: 1.0, 4: 1.0}, index)
    return World(_mixture(means), reward, reward)


def _unequal_modes(index: int) -> World:
    means = _ring(index, 6)
    reward = _bumps(means, {0: 1.0, 1: 0.85, 2: 0.7, 3: 0.55, 4: 0.4, 5: 0.25}, index)
    return World(_mixture(means), reward, reward)


def _narrow_peak(index: int) -> World:
    means = _ring(index, 6)
    broad = _bumps(means, {0: 0.8, 2: 0.8, 4: 0.8}, index)
    beside = means[(1 + index) % 6] * 0.9
    reward = _with(broad, 1.6, beside, 0.15)
    return World(_mixture(means), reward, reward)


def _rare_mode(index: int) -> World:
    means = _ring(index, 6)
    weights = [0.2] * 6
    weights[index % 6] = 0.02
    reward = _bumps(means, {0: 1.0, 3: 0.3}, index)
    return World(_mixture(means, weights=weights), reward, reward)


def _many_modes(index: int) -> World:
    means = torch.cat([_ring(index, 9, radius) for radius in (1.8, 3.4, 5.0)])
    reward = _bumps(means, dict.fromkeys(range(0, 27, 3), 1.0), index, width=0.3)
    return World(_mixture(means, std=0.2), reward, reward)


def _noisy_reward(index: int) -> World:
    plain = _equal_modes(index)
    return World(plain.base, plain.reward, plain.true_reward, noise=0.5)


def _proxy_reward(index: int) -> World:
    means = _ring(index, 6)
    true = _bumps(means, {0: 1.0, 2: 1.0, 4: 1.0, 1: -0.5}, index)
    proxy = _bumps(means, {0: 1.0, 2: 1.0, 4: 1.0, 1: 1.3}, index)
    return World(_mixture(means), proxy, true)


def _quadratic(index: int, dimension: int) -> World:
    ring = _ring(index, 6)
    means = torch.cat([ring, torch.zeros(6, dimension - 2, dtype=torch.float64)], dim=1)
    reward = Quadratic(0.1, means[index % 6])
    return World(_mixture(means), reward, reward)


SCENARIOS = {
    s.name: s
    for s in (
        Scenario("equal_modes", _equal_modes),
        Scenario("unequal_modes", _unequal_modes),
        Scenario("narrow_peak", _narrow_peak),
        Scenario("rare_mode", _rare_mode),
        Scenario("many_modes", _many_modes),
        Scenario("noisy_reward", _noisy_reward),
        Scenario("quadratic", _quadratic, any_dimension=True),
        Scenario("proxy_reward", _proxy_reward),
    )
}


def check_prompt(prompt: str) -> None:
    """Raises UserError where a prompt is not the name of a scenario and a number from 0 to 3."""
    name, _, number = prompt.partition(" ")
    if name not in SCENARIOS or number not in map(str, range(PROMPTS_EACH)):
        raise UserError(f"{excerpt(prompt)} is not a scenario and a number from 0 to {PROMPTS_EACH - 1}, as in 'rare_mode 0'")


@cache
def world(prompt: str, dimension: int = 2) -> World:
    """The problem of a prompt.

    Raises:
        UserError: the prompt is not the name of a scenario and a number from 0 to 3, or the scenario is only 2-D.
    """
    check_prompt(prompt)
    name, _, number = prompt.partition(" ")
    if SCENARIOS[name].any_dimension:
        return SCENARIOS[name].world(int(number), dimension)
    if dimension != 2:
        everywhere = ", ".join(s.name for s in SCENARIOS.values() if s.any_dimension)
        raise UserError(f"scenario {name!r} is only 2-D; in {dimension} dimensions use {everywhere}")
    return SCENARIOS[name].world(int(number))


def scored(points: np.ndarray, prompt: str, *, true: bool) -> np.ndarray:
    """The rewards of points [N, d] for one prompt, float64 [N].

    The noise is a function of the point, so scoring a point twice gives the same reward.

    Args:
        points: the points, [N, d].
        prompt: the prompt.
        true: whether the true reward, without noise, is returned.
    """
    w = world(prompt, points.shape[1])
    x = torch.from_numpy(points)
    if true:
        return w.true_reward(x).numpy()
    clean = w.reward(x).numpy()
    if not w.noise:
        return clean
    codes = (np.round(points * 4096).astype(np.int64) & 0xFFFFFFFF).tolist()
    return clean + w.noise * np.array([np.random.default_rng(code).standard_normal() for code in codes])
