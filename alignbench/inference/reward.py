"""The trained reward as a method of inference reads it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from alignbench import groups

Score = Callable[[np.ndarray, Sequence[str]], Mapping[str, np.ndarray]]
"""Images, uint8 [N, H, W, 3], and their prompts -> the scores of each reward, float [N], NaN where an image has none."""


class Reward:
    """Several rewards with their weights, as a training adds them up.

    Attributes:
        weights: name of each reward that counts -> its weight.
        calls: number of scores of one image.
    """

    def __init__(self, score: Score, weights: Mapping[str, float], *, calls: int | None = None, normalise: bool = True) -> None:
        """Takes the function that scores, the weights, and `normalise_rewards` of the configuration."""
        self.score, self.weights, self.normalise = score, weights, normalise
        self.calls = len(weights) if calls is None else calls

    def scores(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores images: name of the reward -> float64 [N]."""
        found = self.score(images, prompts)
        return {name: torch.from_numpy(np.asarray(found[name], dtype=np.float64)) for name in self.weights}

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Adds up scores [G, K] of G groups as the training does, each of several rewards standardised in its group."""
        return groups.total(scores, self.weights, normalise=self.normalise)

    def weighted_sum(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """Scores images and adds up their raw rewards, which unlike `total` is a function of the image alone: float64 [N]."""
        scores = self.scores(images, prompts)
        return torch.stack([weight * scores[name] for name, weight in self.weights.items()]).sum(0)
