"""quality: signs of broken images that no reward measures: sharpness, brightness, entropy, black or white pixels.

Reward hacking often shows here first: images become black, white or blurred while the training reward rises.

    sharpness        the variance of the Laplacian of the grey image, grey in 0..1
    brightness       the mean of the grey image, 0..1
    entropy          Shannon entropy of the histogram of 256 grey levels, in bits
    black_or_white   the fraction of pixels within 8 grey levels of black or white
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from alignbench import Scorer
from alignbench.scorer import Images, as_arrays

METRICS = ("sharpness", "brightness", "entropy", "black_or_white")
NEAR = 8
"""How many grey levels a pixel may be from 0 or 255 to count as black or white."""


class Quality(Scorer):
    """Simple statistics of the grey image."""

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        """Computes the sharpness of each image: float64 [N]."""
        return np.array([sharpness(grey(array)) for array in as_arrays(images)])

    def measure(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        # One grey image is in memory at a time, because it takes 8 bytes per pixel.
        values = [image_metrics(grey(array)) for array in as_arrays(images)]
        return {metric: np.array([of_image[metric] for of_image in values]) for metric in METRICS}

    def higher_is_better(self, metric: str) -> bool | None:
        return {"brightness": None, "black_or_white": False}.get(metric, True)


def image_metrics(luma: np.ndarray) -> dict[str, float]:
    """Computes every metric of a grey image, float64 [H, W] in 0..1: metric -> number."""
    return {
        "sharpness": sharpness(luma),
        "brightness": float(luma.mean()),
        "entropy": entropy(luma),
        "black_or_white": float(((luma < NEAR / 255) | (luma > 1 - NEAR / 255)).mean()),
    }


def grey(image: np.ndarray) -> np.ndarray:
    """Converts an image to grey by the luma of Rec. 601: uint8 [H, W, 3] -> float64 [H, W] in 0..1."""
    return np.asarray(image[..., :3] @ np.array([0.299, 0.587, 0.114]) / 255.0)


def sharpness(luma: np.ndarray) -> float:
    """Computes the variance of the Laplacian of a grey image, [H, W] in 0..1."""
    return float(ndimage.laplace(luma, mode="nearest").var())


def entropy(luma: np.ndarray) -> float:
    """Computes the Shannon entropy of the histogram of 256 grey levels of an image, [H, W] in 0..1: 0 to 8 bits."""
    counts = np.bincount(np.round(luma * 255).astype(int).ravel(), minlength=256)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())
