"""Bonuses for diversity that are added to rewards, and the choice of images to train on; see `KeepersConfig`.

In a group of N images at distances d_ij, with m_i the mean distance of image i to the others:

    cluster_bonus    sqrt(N / n_i), n_i images in the cluster of image i
    distance_bonus   m_i - mean_j m_j

Source: DiverseGRPO (arXiv 2512.21514) for the first; DRIFT (arXiv 2601.12401) for a shaping by the diversity of the group and
for training on a reward-concentrated subset, whose formulas were not available. What is ours: docs/keepers.md.
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from math import ceil

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from alignbench import groups
from alignbench.config.keepers import KeepersConfig
from alignbench.errors import UserError
from alignbench.evaluation.evaluate import named_failure
from alignbench.load import load_eval
from alignbench.scorer import SetMetric

ROUNDING = 1e-9
"""What a product may exceed a whole number by without counting as more."""
Distances = Callable[[np.ndarray, Tensor, str], np.ndarray]
"""Images of one group, uint8 [N, H, W, 3], their latents and their prompt -> distances, float64 [N, N], NaN if unknown."""


class Bonuses:
    """Measures the bonuses of images; made once for a run."""

    def __init__(self, config: KeepersConfig) -> None:
        self.config = config
        self.weights = config.bonuses
        self.distances: Distances = measured_distances(config) if self.weights else latent_distances

    def measure(self, images: np.ndarray, latents: Tensor, prompts: Sequence[str], *, when: str) -> dict[str, np.ndarray]:
        """Computes each bonus that is on, before it is weighted, for the images of some groups.

        Args:
            images: uint8 [G * N, H, W, 3].
            latents: [G * N, *latent].
            prompts: the prompt of each group.
            when: for the message of an error.

        Returns:
            Bonus -> float64 [G * N]; zeros in groups whose distances are not known.
        """
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.weights}
        if not found:
            return {}
        size = len(latents) // len(prompts)
        for g, prompt in enumerate(prompts):
            here = slice(g * size, (g + 1) * size)
            with named_failure(self.config.distance, when):
                distances = self.distances(images[here], latents[here].cpu(), prompt)
            known = bool(np.isfinite(distances).all())
            for name, values in found.items():
                values.append(self._bonus(name, distances) if known else np.zeros(size))
        return {name: np.concatenate(values) for name, values in found.items()}

    def _bonus(self, name: str, distances: np.ndarray) -> np.ndarray:
        if name == "distance_bonus":
            return distance_bonus(distances)
        return cluster_bonus(spectral_clusters(distances, self.config.bandwidth, self.config.clusters))

    def added(self, rewards: Tensor, bonuses: dict[str, Tensor]) -> Tensor:
        """Adds the weighted bonuses to rewards, [G, K] each."""
        return rewards + sum(weight * bonuses[name] for name, weight in self.weights.items())


def cluster_bonus(clusters: np.ndarray) -> np.ndarray:
    """Computes sqrt(N / n) of each image, where its cluster has n of the N images: int [N] -> float64 [N]."""
    _, which, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    return np.asarray(np.sqrt(len(clusters) / sizes[which]))


def distance_bonus(distances: np.ndarray) -> np.ndarray:
    """Computes the mean distance of each image to the others, minus the group's mean: float64 [N, N] -> float64 [N].

    With Phi the mean distance of all pairs of a group, Phi - Phi(without image i) is 2 / (N - 2) times this number: a
    difference of potentials. It adds up to 0 over the group.
    """
    means = distances.sum(1) / (len(distances) - 1)
    return np.asarray(means - means.mean())


def spectral_clusters(distances: np.ndarray, bandwidth: float, count: int | None = None) -> np.ndarray:
    """Clusters images by the eigenvectors of their normalised affinities exp(-d^2 / (2 h^2)).

    Args:
        distances: float64 [N, N].
        bandwidth: h as a share of the median distance of two images.
        count: the number of clusters; None for the one before the largest gap between eigenvalues.

    Returns:
        The number of each image's cluster, int [N].

    Source: Ng, Jordan and Weiss 2001; the choice of the number: von Luxburg 2007 (arXiv 0711.0189), section 8.3.
    """
    n = len(distances)
    median = float(np.median(squareform(distances, checks=False)))
    # Where at least half of the pairs are equal, any difference is a large one.
    near = (distances == 0).astype(np.float64)
    affinity = np.exp(-(distances**2) / (2 * (bandwidth * median) ** 2)) if median else near
    scale = 1 / np.sqrt(affinity.sum(1))
    values, vectors = np.linalg.eigh(scale[:, None] * affinity * scale)
    descending, vectors = values[::-1], vectors[:, ::-1]
    if count is None:
        count = int(np.argmax(-np.diff([*descending, 0.0]))) + 1
    count = min(count, n)
    if count == 1:
        return np.zeros(n, dtype=int)
    points = vectors[:, :count]
    points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    first = [0]  # the centres are far apart at first, so that no draw decides
    while len(first) < count:
        first.append(int(np.argmax(np.min([np.linalg.norm(points - points[i], axis=1) for i in first], axis=0))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an empty cluster is no fault: there are fewer then
        return np.asarray(kmeans2(points, points[first], minit="matrix")[1])


def concentrated(rewards: Tensor, share: float) -> Tensor:
    """Keeps the share of each group's rewards that is nearest to the group's median; the others become NaN.

    Args:
        rewards: [G, K], NaN where a reward is missing.
        share: of the rewards that are there, rounded up; at least two are kept. Of equal distances the first are kept.
    """
    kept = torch.full_like(rewards, torch.nan)
    for row, values in zip(kept, rewards, strict=True):
        there = groups.valid(values).nonzero()[:, 0]
        if len(there):
            distance = (values[there] - values[there].quantile(0.5)).abs()
            nearest = there[distance.sort(stable=True).indices[: max(2, ceil(share * len(there) - ROUNDING))]]
            row[nearest] = values[nearest]
    return kept


def latent_distances(images: np.ndarray, latents: Tensor, prompt: str) -> np.ndarray:
    """Root mean square differences of latents [N, *latent]."""
    flat = latents.flatten(1).double().numpy()
    return np.asarray(squareform(pdist(flat)) / flat.shape[1] ** 0.5)


def pixel_distances(images: np.ndarray, latents: Tensor, prompt: str) -> np.ndarray:
    """Root mean square differences of pixels, from 0 to 1."""
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    return np.asarray(squareform(pdist(flat)) / flat.shape[1] ** 0.5)


def measured_distances(config: KeepersConfig) -> Distances:
    """Makes the function that measures distances.

    Raises:
        UserError: `distance` names nothing that measures two images, or its metric is not clear.
    """
    if config.distance == "latents":
        return latent_distances
    if config.distance == "pixels":
        return pixel_distances
    metric = load_eval(config.distance)
    if not isinstance(metric, SetMetric) or metric.fewest > 2:
        raise UserError(
            f"keepers.distance={config.distance} does not measure the diversity of two images; choose an eval that does, such "
            "as diversity"
        )
    metric.prepare()

    def distances(images: np.ndarray, latents: Tensor, prompt: str) -> np.ndarray:
        read = metric.read_images(images, latents, prompt)
        found = np.zeros((len(images), len(images)))
        for i, j in combinations(range(len(images)), 2):
            found[i, j] = found[j, i] = _chosen(metric.measure_read(read, [i, j], prompt), config)
        return found

    return distances


def _chosen(numbers: dict[str, float], config: KeepersConfig) -> float:
    """The metric that is the distance."""
    name = config.distance_metric or (next(iter(numbers)) if len(numbers) == 1 else config.distance)
    if name not in numbers:
        raise UserError(f"keepers.distance_metric must be one of {', '.join(numbers)} for keepers.distance={config.distance}")
    return numbers[name]
