"""attribute_difference: how often two images of a drawn prompt differ in colour, place, size or background.

For each aspect that the prompt leaves open there is

    difference_ASPECT   the share of pairs of images whose values differ: 1 - sum_v N_v (N_v - 1) / (N (N - 1))

and `attribute_difference` is their mean. Aspects and values are those of `mode_coverage`, which takes the entropy of the values
instead. The expected number of different values among two images is 1 + difference_ASPECT, so this is the rarefied count of
values (arXiv 2511.10547 counts values of attributes) at two images. Unlike an entropy its expected value does not depend on the
number of images, so figures with 4 and with 16 images can be compared.

Source: Simpson 1949, unbiased.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from alignbench import SetMetric
from evals.mode_coverage import ASPECTS, ModeCoverage, Read


def share_of_different_pairs(values: Sequence[Hashable]) -> float:
    """Computes the share of pairs of values that differ, 1 - sum_v N_v (N_v - 1) / (N (N - 1)).

    Args:
        values: N values.

    Returns:
        0 to 1, or NaN if there are fewer than two values.
    """
    n = len(values)
    if n < 2:
        return float("nan")
    return 1.0 - sum(count * (count - 1) for count in Counter(values).values()) / (n * (n - 1))


class AttributeDifference(SetMetric):
    """How often two images of a prompt differ in an attribute that it leaves open."""

    fewest = 2

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.reader = ModeCoverage(ModeCoverage.Settings())

    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        """Measures the images of one prompt; NaN for aspects that the prompt determines, and for prompts of other tasks."""
        return self.measure_read(self.read_images(images, latents, prompt), range(len(images)), prompt)

    def read_images(self, images: np.ndarray, latents: Any, prompt: str) -> Read:
        return self.reader.read_images(images, latents, prompt)

    def measure_read(self, read: Read, members: Sequence[int] | np.ndarray, prompt: str) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for aspect in ASPECTS:
            seen = [value for i in members if (value := read.values[aspect][i]) is not None]
            varies = seen and read.possible[aspect] > 1
            metrics[f"difference_{aspect}"] = share_of_different_pairs(seen) if varies else float("nan")
        known = [value for value in metrics.values() if not np.isnan(value)]
        return {"attribute_difference": float(np.mean(known)) if known else float("nan"), **metrics}

    def higher_is_better(self, metric: str) -> bool | None:
        """Tells the direction of a metric: none for single aspects, which would only repeat the alarms of `mode_coverage`."""
        return True if metric == "attribute_difference" else None
