"""The base classes of scorers and metrics.

A scorer gives one finite number an image. NaN means that this item failed: it is dropped and counted. An exception means
that the scorer failed: it stops the run. A failure never becomes 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from alignbench import settings
from alignbench.errors import RunError, UserError
from alignbench.files.images import as_rgb

Images = Sequence[Image.Image | np.ndarray] | np.ndarray
"""PIL images, uint8 arrays [H, W, 3], or all in one array [N, H, W, 3]."""


class Metric:
    """What scorers and set metrics have in common."""

    Settings: ClassVar[type[settings.Settings]] = settings.Settings
    skip_settings: ClassVar[dict[str, Any]] = {}
    """Settings by which it gives no score to prompts that it says nothing about, where it would refuse them."""
    name: str = ""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def higher_is_better(self, metric: str) -> bool | None:
        """The direction of a metric that `measure` answers; None where neither is better."""
        return True

    def overall(self, prompts: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Metric -> those of `measure` for these prompts whose mean it is, whatever the number of pictures behind each."""
        return {}

    def from_hub(self) -> list[str]:
        """The weights that it loads from the Hugging Face hub: OWNER/NAME, or OWNER/NAME/FILE; local ones may be among them.

        Raises:
            UserError: what it needs is not there, as can be seen without loading anything.
        """
        return []

    def prepare(self) -> None:
        """Loads what it scores with, so that what is missing is told before anything is drawn."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError for a prompt that it would refuse to score, before images are drawn for it."""

    def describe(self) -> dict[str, Any]:
        """What must be known to score again alike: model, device, precision, settings."""
        return {"settings": self.settings.model_dump()}


class Scorer(Metric, ABC):
    """One number for each image. Subclass it in `evals/NAME.py`; it can reward a run or judge it."""

    @abstractmethod
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """The score of each image for its prompt, float [N]; NaN where an item could not be scored."""

    def measure(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """All that this scorer can tell, metric -> float [N]; `score` under the scorer's name by default."""
        return {self.name: self.score(images, prompts)}


class SetMetric(Metric, ABC):
    """Numbers for all the images of one prompt together, such as their diversity."""

    fewest: ClassVar[int] = 1
    """Images of a prompt that it needs; a prompt that has fewer gets no number."""
    any_sizes: ClassVar[bool] = False
    """Whether it takes images of several sizes, as an array of objects [N]; otherwise a prompt that has them gets no number."""

    @abstractmethod
    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        """Metric -> number, from uint8 images [N, H, W, 3] and final latents, tensor [N, *latent] or None."""

    def read_images(self, images: np.ndarray, latents: Any, prompt: str) -> Any:
        """Reads images once, so that `measure_read` can measure many subsets of them.

        By default what `measure` takes. A metric that embeds or detects something overrides both methods.
        """
        return images, latents

    def measure_read(self, read: Any, members: Sequence[int] | np.ndarray, prompt: str) -> dict[str, float]:
        """What `measure` answers for the images `members` (indices) of those that were read."""
        images, latents = read
        members = np.asarray(members)
        return self.measure(images[members], None if latents is None else latents[members], prompt)


def as_arrays(images: Images) -> list[np.ndarray]:
    """Each image as uint8 [H, W, 3], as a viewer shows it: see `alignbench.files.images`."""
    if isinstance(images, np.ndarray) and images.ndim != 4:
        raise UserError(f"images must be PIL images or uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    return [_as_array(image) for image in images]


def _as_array(image: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise UserError(f"images must be PIL images or uint8 [N, H, W, 3], got one of {image.dtype} {list(image.shape)}")
        return image
    try:
        return np.asarray(as_rgb(image))
    except UserError as error:
        raise UserError(f"an image cannot be scored: {error}") from None


def checked_scores(scores: Any, count: int, name: str) -> np.ndarray:
    """The scorer contract: float64 [count], finite or NaN.

    Raises:
        RunError: a wrong number of scores, or an infinite one.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.shape != (count,):
        raise RunError(f"scorer {name!r} answered {list(array.shape)} scores for {count} images")
    if np.isinf(array).any():
        raise RunError(f"scorer {name!r} answered an infinite score for image {int(np.isinf(array).argmax())}")
    return array
