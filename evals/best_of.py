"""best_of: what the best of k images of a prompt gets from a scorer, for k = 1, 2, 4, ... up to the number of images.

    pass_at_K      the probability that one of K images reaches the threshold: 1 - C(n - c, K) / C(n, K), c of n images do
    best_of_K      the expected best score of K images: sum_i r_(i) C(i - 1, K - 1) / C(n, K), scores r ascending

Both are unbiased for K images drawn without replacement from the n of a prompt. A training that only sharpens raises both
for K = 1 and leaves or lowers them for large K, where the base model had found the answer too. One that widens what the model
can do raises them for every K.

Source: Chen et al. 2021 (arXiv 2107.03374) for pass at k; Yue et al. 2025 (arXiv 2504.13837) for the comparison over k.
"""

from collections.abc import Iterator, Sequence
from math import comb
from typing import Any

import numpy as np
from pydantic import Field

from alignbench import SetMetric, UserError, load_scorer, settings


def pass_at_k(passed: int, n: int, k: int) -> float:
    """Computes the probability that at least one of k images passes, 1 - C(n - c, k) / C(n, k).

    Args:
        passed: c, how many of the images pass.
        n: the number of images.
        k: 1 to n.
    """
    _check(n, k)
    return 1.0 - comb(n - passed, k) / comb(n, k)


def best_of_k(scores: np.ndarray, k: int) -> float:
    """Computes the expected best score of k images, sum_i r_(i) C(i - 1, k - 1) / C(n, k) with i from 1 to n.

    Args:
        scores: float [n].
        k: 1 to n.
    """
    n = len(scores)
    _check(n, k)
    weights = [comb(i, k - 1) / comb(n, k) for i in range(n)]
    return float(np.sort(scores) @ np.array(weights))


def _check(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise UserError(f"k must be from 1 to the number of images, {n}; got {k}")


class BestOf(SetMetric):
    """What the best of k images of a prompt gets from a scorer."""

    class Settings(settings.Settings):
        eval: str = "ocr"
        """The scorer: a name or a dotted path."""
        settings: dict[str, Any] = Field({})
        """The scorer's settings."""
        threshold: float = 1.0
        """The score from which on an image passes."""

    settings: Settings
    any_sizes = True

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.scorer = load_scorer(settings.eval, **settings.settings)

    def from_hub(self) -> list[str]:
        return self.scorer.from_hub()

    def prepare(self) -> None:
        self.scorer.prepare()

    def check_prompts(self, prompts: Sequence[str]) -> None:
        self.scorer.check_prompts(prompts)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "scorer": self.scorer.describe()}

    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        """Measures the images of one prompt. Images that could not be scored are left out."""
        return self.measure_read(self.read_images(images, latents, prompt), range(len(images)), prompt)

    def read_images(self, images: np.ndarray, latents: Any, prompt: str) -> np.ndarray:
        return np.asarray(self.scorer.score(list(images), [prompt] * len(images)), dtype=np.float64)

    def measure_read(self, read: np.ndarray, members: Sequence[int] | np.ndarray, prompt: str) -> dict[str, float]:
        chosen = read[np.asarray(members)]
        scores = chosen[~np.isnan(chosen)]
        passed = int((scores >= self.settings.threshold).sum())
        metrics = {}
        for k in _powers_of_two(len(chosen)):
            known = k <= len(scores)
            metrics[f"pass_at_{k}"] = pass_at_k(passed, len(scores), k) if known else float("nan")
            metrics[f"best_of_{k}"] = best_of_k(scores, k) if known else float("nan")
        return metrics


def _powers_of_two(largest: int) -> Iterator[int]:
    k = 1
    while k <= largest:
        yield k
        k *= 2
