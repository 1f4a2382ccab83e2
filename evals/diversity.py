"""diversity: how different the images of one prompt are, in latent space, in pixels and in features.

It has four metrics:

    lgmd               mean over pairs of log(|z_i - z_j| / sqrt(D)), of final latents z with D numbers
    pixel_diversity    mean over pairs of the root-mean-square difference of pixels, 0..1
    cosine_diversity   mean over pairs of 1 - cos(f_i, f_j), of features f
    vendi              the Vendi score of features, an effective number of different images, 1..N

Clips are compared as a whole: by all their latents, all pixels of their scored frames, and the features of these frames, each
of norm 1, one after the other.

LGMD is about log sqrt 2 = 0.35 for independent latents of unit variance, and negative for latents that are closer than a
root-mean-square difference of 1.

Source: LGMD and cosine diversity as in TMPO (arXiv 2605.10983); Vendi score of Friedman and Dieng 2023 (arXiv 2210.02410).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from alignbench import SetMetric, UserError, groups, settings
from alignbench.scorer import CLIPS
from evals.embedders.features import features_on_hub, load_features

COLUMNS = 2**16
"""How many values of each image are multiplied at a time."""
MIN_EIGENVALUE = 1e-12
"""Eigenvalues up to this are rounding errors of 0."""


def lgmd(latents: Tensor | np.ndarray) -> float:
    """Computes LGMD, the mean over pairs of log(|z_i - z_j| / sqrt(D)), with distances floored at 1e-8.

    Args:
        latents: [N, ...], N at least 2.

    Raises:
        UserError: there are fewer than two latents.
    """
    tensor = torch.as_tensor(latents).double()
    _at_least_two(len(tensor))
    return float(groups.lgmd(tensor))


def cosine_diversity(features: Tensor | np.ndarray) -> float:
    """Computes the mean over pairs of 1 - cos(f_i, f_j).

    Args:
        features: [N, D], N at least 2.

    Raises:
        UserError: there are fewer than two features, or one of them is zero.
    """
    similarity = _cosine_similarity(features)
    n = len(similarity)
    return float(1.0 - (similarity.sum() - np.trace(similarity)) / (n * (n - 1)))


def vendi_score(features: Tensor | np.ndarray) -> float:
    """Computes the Vendi score: exp of the entropy of the eigenvalues of K / N, with K the cosine similarities.

    Args:
        features: [N, D], N at least 2.

    Returns:
        1 to N.

    Raises:
        UserError: there are fewer than two features, or one of them is zero.

    Source: Friedman and Dieng 2023 (arXiv 2210.02410).
    """
    similarity = _cosine_similarity(features)
    eigenvalues = np.linalg.eigvalsh(similarity / len(similarity))
    positive = eigenvalues[eigenvalues > MIN_EIGENVALUE]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def pixel_diversity(images: np.ndarray) -> float:
    """Computes the mean over pairs of the root-mean-square difference of pixels, divided by 255: 0 to 1.

    Args:
        images: uint8 [N, H, W, 3], N at least 2.

    Raises:
        UserError: there are fewer than two images.
    """
    flat = np.asarray(images).reshape(len(images), -1)
    _at_least_two(len(flat))
    products = np.zeros((len(flat), len(flat)))
    for start in range(0, flat.shape[1], COLUMNS):  # in parts, because floats take eight times the memory of the images
        part = flat[:, start : start + COLUMNS].astype(np.float64)
        products += part @ part.T  # exact, because all are whole numbers
    squares = np.diag(products)
    pairs = np.triu_indices(len(flat), 1)
    distances = np.sqrt((squares[:, None] + squares - 2 * products)[pairs])
    return float((distances / 255.0 / flat.shape[1] ** 0.5).mean())


def clip_features(embed: Callable[[list[np.ndarray]], Tensor], clips: np.ndarray) -> Tensor:
    """Computes the features of clips: those of their frames, each of norm 1, one after the other.

    The cosine of two clips is then the mean over frames of the cosine of their frames at the same time. A mean of features
    instead would take clips that show the same frames in another order for equal.

    Args:
        embed: images -> features [N, D].
        clips: uint8 [N, F, H, W, 3].

    Returns:
        [N, F * D].
    """
    n, frames = clips.shape[:2]
    features = embed(list(clips.reshape(n * frames, *clips.shape[2:])))
    return F.normalize(features.double(), dim=1).view(n, -1)


@dataclass(frozen=True)
class Read:
    """What diversity uses of N images, as far as the settings need it."""

    images: np.ndarray | None
    """Their pixels, uint8 [N, H, W, 3], or an array of objects [N] if they differ in size."""
    latents: Any
    """Their final latents, a tensor [N, *latent]."""
    features: Any
    """Their features, a tensor [N, D]."""


class Diversity(SetMetric):
    """Distances between the images of one prompt."""

    class Settings(settings.Settings):
        pixels: bool = True
        """Whether pixel diversity is measured; it has no meaning where images only encode something else."""
        features: str = ""
        """The features of cosine diversity and Vendi score: `clip:tiny`, `clip:NAME`, `dinov2:NAME` or
        `open_clip:MODEL/WEIGHTS`, with a hub id, a tag or a local path. If it is empty, neither of the two is measured."""
        device: settings.Device = "auto"
        """Device that the model runs on: `auto` (CUDA if there is one, else the CPU), `cpu`, `cuda` or `cuda:N`."""
        batch: int = Field(64, ge=1)
        """The largest number of images in one call of the model. Results do not depend on it."""

    settings: Settings
    fewest = 2
    clips = True
    any_sizes = True

    def from_hub(self) -> list[str]:
        return features_on_hub(self.settings.features) if self.settings.features else []

    def prepare(self) -> None:
        if self.settings.features:
            load_features(self.settings.features, self.settings.device, self.settings.batch)

    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        """Measures the images of one prompt. Pixel diversity is NaN if they differ in size."""
        return self.measure_read(self.read_images(images, latents, prompt), range(len(images)), prompt)

    def read_images(self, images: np.ndarray, latents: Any, prompt: str) -> Read:
        features = None
        if self.settings.features:
            embed = load_features(self.settings.features, self.settings.device, self.settings.batch)
            features = embed(list(images)) if images.ndim != CLIPS else clip_features(embed, images)
        return Read(images if self.settings.pixels else None, latents, features)

    def measure_read(self, read: Read, members: Sequence[int] | np.ndarray, prompt: str) -> dict[str, float]:
        members, metrics = np.asarray(members), {}
        if read.images is not None:
            same_size = read.images.dtype == np.uint8
            metrics["pixel_diversity"] = pixel_diversity(read.images[members]) if same_size else float("nan")
        if read.latents is not None:
            metrics["lgmd"] = lgmd(read.latents[members])
        if read.features is not None:
            features = read.features[members]
            metrics |= {"cosine_diversity": cosine_diversity(features), "vendi": vendi_score(features)}
        return metrics


def _cosine_similarity(features: Tensor | np.ndarray) -> np.ndarray:
    """The cosine similarity of each pair of features: [N, D] -> float64 [N, N]."""
    array = np.asarray(torch.as_tensor(features).double())
    _at_least_two(len(array))
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise UserError("cosine similarity needs features that are not all zero")
    unit = array / norms
    return np.asarray(unit @ unit.T)


def _at_least_two(count: int) -> None:
    if count < 2:
        raise UserError(f"diversity needs at least two images of a prompt, got {count}")
