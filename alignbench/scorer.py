"""The base classes of scorers and set metrics.

A scorer gives one finite number for each image. NaN means that this image could not be scored: it is left out and counted. An
exception means that the scorer failed: it stops the run. A failure never becomes 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeGuard

import numpy as np
from PIL import Image

from alignbench import settings
from alignbench.errors import RunError, UserError
from alignbench.files.images import as_rgb

Images = Sequence[Image.Image | np.ndarray] | np.ndarray
"""PIL images, uint8 arrays [H, W, 3], or all in one array [N, H, W, 3]."""
CLIPS = 5
"""Number of dimensions of clips, uint8 [N, F, H, W, 3], of which scorers see the F frames."""


class Metric:
    """The common base of scorers and set metrics. Derive from `Scorer` or `SetMetric`."""

    Settings: ClassVar[type[settings.Settings]] = settings.Settings
    skip_settings: ClassVar[dict[str, Any]] = {}
    """Settings that give NaN, instead of an error, for prompts that the metric does not apply to."""
    name: str = ""
    """The name that the plug-in is loaded by."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def higher_is_better(self, metric: str) -> bool | None:
        """Tells the direction of a metric that `measure` returns; None if neither direction is better."""
        return True

    def overall(self, prompts: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Names the metrics that are means of other metrics.

        Args:
            prompts: the prompts that are evaluated.

        Returns:
            Metric -> those metrics of `measure` whose unweighted mean it is, however many images are behind each of them.
        """
        return {}

    def from_hub(self) -> list[str]:
        """Names the weights that the metric loads from the Hugging Face hub: OWNER/NAME, or OWNER/NAME/FILE.

        Local folders and files may be among them.

        Raises:
            UserError: something that the metric needs is missing, as far as this shows without loading anything.
        """
        return []

    def prepare(self) -> None:
        """Loads the models of the metric, so that a missing one is reported before any image is drawn."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UserError for a prompt that the metric would refuse to score, before images are drawn for it."""

    def describe(self) -> dict[str, Any]:
        """Describes what must be known to reproduce the scores: model, device, precision, settings."""
        return {"settings": self.settings.model_dump()}


class Scorer(Metric, ABC):
    """A metric with one number for each image, which can be a reward or a judge. Subclass it in `evals/NAME.py`."""

    @abstractmethod
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """Scores each image for its prompt.

        Args:
            images: N images.
            prompts: the prompt of each image.

        Returns:
            float [N], NaN where an image could not be scored.
        """

    def measure(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Computes all metrics of this scorer: metric -> float [N]. By default that is `score` under the scorer's name."""
        return {self.name: self.score(images, prompts)}


class SetMetric(Metric, ABC):
    """A metric with numbers for all images of one prompt together, such as their diversity. Subclass it in `evals/NAME.py`."""

    fewest: ClassVar[int] = 1
    """The smallest number of images of a prompt that it can measure. A prompt with fewer images gets no number."""
    clips: ClassVar[bool] = False
    """Whether it measures clips, uint8 [N, F, H, W, 3], as a whole. If not, it gets the first frames of a prompt's clips as
    images, then the second ones and so on, and the mean over the frames counts."""
    any_sizes: ClassVar[bool] = False
    """Whether it can measure images of several sizes, given as an array of objects [N]. If not, a prompt with images of several
    sizes gets no number."""

    @abstractmethod
    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        """Measures the images of one prompt.

        Args:
            images: uint8 [N, H, W, 3].
            latents: the final latents of these images, a tensor [N, *latent]; None for images from files.
            prompt: their prompt.

        Returns:
            Metric -> number, NaN where the metric does not apply.
        """

    def take_reference(self, prompt: str, images: np.ndarray, latents: Any) -> None:
        """Takes images of a prompt that later sets are compared with, in place of those that the metric would get itself.

        Args:
            prompt: the prompt.
            images: uint8 [N, H, W, 3].
            latents: their final latents, a tensor [N, *latent].
        """

    def read_images(self, images: np.ndarray, latents: Any, prompt: str) -> Any:
        """Reads images once, so that `measure_read` can measure many subsets of them.

        By default the images and latents themselves are kept. A metric that embeds or detects something overrides both methods.

        Args:
            images: as for `measure`.
            latents: as for `measure`.
            prompt: as for `measure`.
        """
        return images, latents

    def measure_read(self, read: Any, members: Sequence[int] | np.ndarray, prompt: str) -> dict[str, float]:
        """Computes what `measure` returns for some of the images that were read.

        Args:
            read: what `read_images` returned.
            members: indices of the images.
            prompt: their prompt.
        """
        images, latents = read
        members = np.asarray(members)
        return self.measure(images[members], None if latents is None else latents[members], prompt)


def frames_in(images: Images) -> int:
    """The number of frames of each clip; 1 for images."""
    return images.shape[1] if _are_clips(images) else 1


def of_frames(score: Callable[[Images, Sequence[str]], Any], images: Images, prompts: Sequence[str]) -> Any:
    """Scores images, or the frames of clips as images with the prompt of their clip.

    Args:
        score: `Scorer.score` or `Scorer.measure`.
        images: N images, or clips [N, F, H, W, 3].
        prompts: the prompt of each.

    Returns:
        What `score` returns; of clips, scores of N * F frames, clip by clip.
    """
    if not _are_clips(images):
        return score(images, prompts)
    return score(images.reshape(-1, *images.shape[2:]), [prompt for prompt in prompts for _ in range(frames_in(images))])


def read_sets(metric: SetMetric, images: np.ndarray, latents: Any, prompt: str) -> list[Any]:
    """Reads the images of one prompt once, or its clips frame by frame if the metric does not measure clips as a whole."""
    return [metric.read_images(one, latents, prompt) for one in _sets(metric, images)]


def measure_set(metric: SetMetric, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
    """Measures the images of one prompt, or its clips as `measure_sets` does."""
    return _mean([metric.measure(one, latents, prompt) for one in _sets(metric, images)])


def measure_sets(metric: SetMetric, read: Sequence[Any], members: Sequence[int] | np.ndarray, prompt: str) -> dict[str, float]:
    """Measures some of the images that `read_sets` read; of clips, the mean over frames, NaN if one of them has no number."""
    return _mean([metric.measure_read(one, members, prompt) for one in read])


def _are_clips(images: Images) -> TypeGuard[np.ndarray]:
    return isinstance(images, np.ndarray) and images.ndim == CLIPS


def _sets(metric: SetMetric, images: np.ndarray) -> list[np.ndarray]:
    """What the metric measures at once: all images, or each frame of clips unless it measures clips as a whole."""
    return list(images.swapaxes(0, 1)) if _are_clips(images) and not metric.clips else [images]


def _mean(of_frames: Sequence[dict[str, float]]) -> dict[str, float]:
    if len(of_frames) == 1:
        return of_frames[0]
    return {name: float(np.mean([of_frame[name] for of_frame in of_frames])) for name in of_frames[0]}


def as_arrays(images: Images) -> list[np.ndarray]:
    """Converts images to uint8 arrays [H, W, 3], as a viewer shows them (see `alignbench.files.images`).

    Raises:
        UserError: an image has another type or shape, or cannot be converted.
    """
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


def checked_scores(scores: Any, count: int, name: str, frames: int = 1) -> np.ndarray:
    """Checks that a scorer keeps its contract.

    Args:
        scores: what the scorer returned.
        count: the number of images, or of clips.
        name: the scorer's name, for the message.
        frames: the number of frames of a clip.

    Returns:
        The scores as float64 [count], each finite or NaN. That of a clip is the mean over its frames, and NaN if a frame
        could not be scored.

    Raises:
        RunError: the number of scores is wrong, or a score is infinite.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.shape != (count * frames,):
        raise RunError(f"scorer {name!r} returned scores of shape {list(array.shape)} for {count * frames} images")
    if np.isinf(array).any():
        raise RunError(f"scorer {name!r} returned an infinite score for image {int(np.isinf(array).argmax())}")
    return array.reshape(count, frames).mean(1) if frames > 1 else array
