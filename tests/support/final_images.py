"""Final images with known distributions, and the velocities of Gaussians in one dimension, for objectives on final images."""

import torch
from torch import Tensor

from alignbench import RolloutForest
from alignbench.backbones.mixture.mixtures import Mixture, mixture_velocity
from alignbench.rollouts.terms import DenoisingRows
from tests.support.toys import hand_made_forest


def forest_of(points: Tensor, rewards: Tensor) -> RolloutForest:
    """One group whose final images are these points, float32 [K, d]."""
    count = len(points)
    forest = hand_made_forest([rewards.tolist()], [[i] for i in range(count)], [0.0] * count)
    forest.states, forest.leaves = points.float(), torch.arange(count)
    return forest


def rows_at(forest: RolloutForest, sigma: float, seed: int) -> DenoisingRows:
    """A row for each image, all at one sigma."""
    noise = torch.randn(forest.states.shape, generator=torch.Generator().manual_seed(seed))
    return DenoisingRows(forest, torch.arange(len(noise)), torch.full((len(noise),), sigma), noise)


def gaussian_velocity(x: Tensor, sigma: Tensor | float, mean: float = 0.0, variance: float = 1.0) -> Tensor:
    """The velocity E[x_1 - x_0 | x_sigma = x] for x_0 from N(mean, variance), by the rules of conditional Gaussians."""
    s = torch.as_tensor(sigma).view(-1, 1)
    away = x - (1 - s) * mean
    return (s - (1 - s) * variance) * away / ((1 - s) ** 2 * variance + s**2) - mean


def velocity_of(mixture: Mixture, x: Tensor, sigma: Tensor) -> Tensor:
    """The velocity of the flow to a mixture, float32 [R, d], at states x [R, d] and their sigmas [R]."""
    n = len(x)
    shapes = mixture.weights.expand(n, -1), mixture.means.expand(n, -1, -1), mixture.stds.expand(n, -1)
    return mixture_velocity(x.double(), sigma.double(), *shapes).float()
