"""diversity: how different the pictures of one prompt are, in latent space, in pixels and in features.

LGMD is TMPO's measure (arXiv 2605.10983): the mean log root-mean-square distance of final latents over pairs. It is about
0.35 for independent latents of unit variance (log sqrt 2), and negative for pairs closer than unit RMS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from alignbench import SetMetric, UserError, groups, settings
from evals.embedders.features import features_on_hub, load_features

COLUMNS = 2**16
"""Values of each image whose products are summed at a time."""


def lgmd(latents: Tensor | np.ndarray) -> float:
    """Mean over pairs of log(|z_i - z_j| / sqrt(D)), distances floored at 1e-8; latents [N, ...], N at least 2."""
    tensor = torch.as_tensor(latents).double()
    _at_least_two(len(tensor))
    return float(groups.lgmd(tensor))


def cosine_diversity(features: Tensor | np.ndarray) -> float:
    """Mean over pairs of 1 - cos(f_i, f_j); features [N, D], N at least 2."""
    similarity = _cosine_similarity(features)
    n = len(similarity)
    return float(1.0 - (similarity.sum() - np.trace(similarity)) / (n * (n - 1)))


def vendi_score(features: Tensor | np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of K / N, K the cosine similarities of features [N, D]; 1 to N.

    Friedman and Dieng 2023 (arXiv 2210.02410).
    """
    similarity = _cosine_similarity(features)
    eigenvalues = np.linalg.eigvalsh(similarity / len(similarity))
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def pixel_diversity(images: np.ndarray) -> float:
    """Mean over pairs of the root-mean-square pixel difference, 0 to 1; images uint8 [N, H, W, 3], N at least 2."""
    flat = np.asarray(images).reshape(len(images), -1)
    _at_least_two(len(flat))
    products = np.zeros((len(flat), len(flat)))
    for start in range(0, flat.shape[1], COLUMNS):  # in parts: floats take eight times the memory of the images
        part = flat[:, start : start + COLUMNS].astype(np.float64)
        products += part @ part.T  # exact, as all are whole numbers
    squares = np.diag(products)
    apart = np.triu_indices(len(flat), 1)
    distances = np.sqrt((squares[:, None] + squares - 2 * products)[apart])
    return float((distances / 255.0 / flat.shape[1] ** 0.5).mean())


@dataclass(frozen=True)
class Read:
    """What diversity reads of N images: their pixels, final latents and features, as far as these are asked for."""

    images: np.ndarray | None
    latents: Any
    features: Any


class Diversity(SetMetric):
    class Settings(settings.Settings):
        pixels: bool = True
        """Measure it in pixels too, which says nothing where pictures stand for something else."""
        features: str = ""
        """Of cosine diversity and Vendi score: `clip:tiny`, `clip:NAME`, `dinov2:NAME`, `open_clip:MODEL/WEIGHTS` (see
        `evals.embedders.features`); without it neither is measured."""
        device: settings.Device = "auto"
        """Device that the model runs on; `auto` takes CUDA where there is one."""
        batch: int = Field(64, ge=1)
        """Images in one call of the model; results do not depend on it."""

    settings: Settings
    fewest = 2
    any_sizes = True

    def from_hub(self) -> list[str]:
        return features_on_hub(self.settings.features) if self.settings.features else []

    def prepare(self) -> None:
        if self.settings.features:
            load_features(self.settings.features, self.settings.device, self.settings.batch)

    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        """In pixels NaN where the images differ in size; their features can be compared all the same."""
        return self.measure_read(self.read_images(images, latents, prompt), range(len(images)), prompt)

    def read_images(self, images: np.ndarray, latents: Any, prompt: str) -> Read:
        embedded = None
        if self.settings.features:
            embedded = load_features(self.settings.features, self.settings.device, self.settings.batch)(list(images))
        return Read(images if self.settings.pixels else None, latents, embedded)

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
    array = np.asarray(torch.as_tensor(features).double())
    _at_least_two(len(array))
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise UserError("cosine similarity needs features that are not all zero")
    unit = array / norms
    return np.asarray(unit @ unit.T)


def _at_least_two(count: int) -> None:
    if count < 2:
        raise UserError(f"diversity needs at least two pictures of a prompt, got {count}")
