"""base_coverage: how the images of a prompt lie among the base model's images of it, in features.

Each image has a ball around it that reaches to its k-th nearest neighbour in its own set.

    base_precision   the share of images that lie in a ball of the base model's
    base_recall      the share of the base model's images that lie in a ball of an image
    base_density     the number of the base model's balls that an image lies in, divided by k, on average
    base_coverage    the share of the base model's balls in which an image lies

Recall and coverage fall if a model no longer draws what the base model drew; precision and density fall if it draws what
the base model never did. Of two sets from one distribution, coverage is 1 - prod_{i = 1..k} (N - i) / (M + N - i) on average,
with N images of the base model and M images, so it depends on the number of images.

Source: precision and recall of Kynkäänniemi et al. 2019 (arXiv 1904.06991), density and coverage of Naeem et al. 2020 (arXiv
2002.09797); distances are strictly below a radius, as in the latter's code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from alignbench import Backbone, SetMetric, UserError, load_backbone, settings
from alignbench.rollouts.executor import decode, sample
from evals.embedders.features import features_on_hub, load_features

METRICS = ("base_precision", "base_recall", "base_density", "base_coverage")


def prdc(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Computes precision, recall, density and coverage of fakes among reals.

    Args:
        real: [N, D], N above k.
        fake: [M, D], M above k.
        k: which neighbour is at the radius of a ball.

    Raises:
        UserError: a set has k or fewer members.
    """
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall with k = {k} need more than {k} images in each set")
    between = _distances(real, fake)
    in_real = between < _radii(real, k)[:, None]
    in_fake = between < _radii(fake, k)[None]
    precision, recall = in_real.any(axis=0).mean(), in_fake.any(axis=1).mean()
    return float(precision), float(recall), float(in_real.sum(axis=0).mean() / k), float(in_real.any(axis=1).mean())


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """Of each point, the distance to its k-th nearest other one: [N]."""
    return np.sort(_distances(points, points), axis=1)[:, k]


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(a[:, None] - b[None], axis=2))


@dataclass(frozen=True)
class Read:
    """Features of images and of the base model's images of the same prompt, float64 [N, D] and [M, D]."""

    features: np.ndarray
    base: np.ndarray


class BaseCoverage(SetMetric):
    """Precision, recall, density and coverage of a prompt's images against the base model's."""

    class Settings(settings.Settings):
        features: str = "clip:tiny"
        """The features: `clip:tiny`, `clip:NAME`, `dinov2:NAME` or `open_clip:MODEL/WEIGHTS`, as for `diversity`."""
        k: int = Field(3, ge=1)
        """The neighbour at the radius of a ball. A prompt with k images or fewer gets no number."""
        backbone: str = "tiny"
        """The base model: the name of a backbone, or a local diffusers folder."""
        images: int = Field(16, ge=2)
        """Images of the base model for each prompt."""
        steps: int | None = Field(None, ge=1)
        """Denoising steps of these images. (null: the model's own)"""
        seed: int = Field(1_000_003, ge=0)
        """Seed of their noise. It differs from that of the evaluation, or the base model would be compared with itself."""
        device: settings.Device = "auto"
        """Device of the base model and of the features: `auto`, `cpu`, `cuda` or `cuda:N`."""
        batch: int = Field(64, ge=1)
        """The largest number of images in one call of a model."""

    settings: Settings
    fewest = 2

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.base: dict[str, np.ndarray] = {}
        self.model: Backbone | None = None
        self.encoded: set[str] = set()
        if settings.images <= settings.k:
            raise UserError(f"base_coverage: images={settings.images} must be above k={settings.k}")

    def from_hub(self) -> list[str]:
        return features_on_hub(self.settings.features)

    def prepare(self) -> None:
        self._embed([])
        self._base_model()

    def check_prompts(self, prompts: Sequence[str]) -> None:
        model = self._base_model()
        model.check_prompts(prompts)
        model.prepare(prompts)  # together, since a model may release its text encoders after this
        self.encoded |= set(prompts)

    def take_reference(self, prompt: str, images: np.ndarray, latents: Any) -> None:
        self.base[prompt] = self._embed(list(images))

    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        """Measures the images of one prompt; NaN if there are k images or fewer."""
        return self.measure_read(self.read_images(images, latents, prompt), range(len(images)), prompt)

    def read_images(self, images: np.ndarray, latents: Any, prompt: str) -> Read:
        if prompt not in self.base:
            self.base[prompt] = self._embed(list(self._draw(prompt)))
        return Read(self._embed(list(images)), self.base[prompt])

    def measure_read(self, read: Read, members: Sequence[int] | np.ndarray, prompt: str) -> dict[str, float]:
        if len(members) <= self.settings.k:
            return dict.fromkeys(METRICS, float("nan"))
        return dict(zip(METRICS, prdc(read.base, read.features[np.asarray(members)], self.settings.k), strict=True))

    def _embed(self, images: list[np.ndarray]) -> np.ndarray:
        embed = load_features(self.settings.features, self.settings.device, self.settings.batch)
        return np.asarray(embed(images).double()) if images else np.empty((0, 0))

    def _base_model(self) -> Backbone:
        if self.model is None:
            self.model = load_backbone(self.settings.backbone, device=self.settings.device)
        return self.model

    def _draw(self, prompt: str) -> np.ndarray:
        """Images of the base model, uint8 [N, H, W, 3]."""
        s, model = self.settings, self._base_model()
        if prompt not in self.encoded:
            model.prepare([prompt])
        latents = sample(model, [prompt], s.images, s.steps or model.default_steps, s.seed, micro_batch=s.batch)
        return decode(model, latents, s.batch)
