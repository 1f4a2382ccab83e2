"""What the objectives that train on final images share: how those images are noised again."""

from pydantic import Field
from torch import Tensor

from alignbench import settings
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import DenoisingRows, Times, denoising_noise


class DenoisingSettings(settings.Settings):
    """How often and at which sigmas a final image is noised in an update."""

    draws: int = Field(1, ge=1)
    """How many noises and sigmas each image (in `dpo`, each pair) gets in an update. Each of them costs model rows."""
    times: Times = "schedule"
    """How the sigmas of noised images are drawn. schedule: from a logit-normal distribution, shifted as the model's own
    schedule is. logit_normal: without that shift. uniform: evenly between 0 and 1. steps: from the steps of the rollout, each
    of them once before any is repeated."""


def noised_leaves(forest: RolloutForest, leaves: Tensor, update: int, options: DenoisingSettings) -> DenoisingRows:
    """Makes the rows of some final images, each with noise and sigmas of its own.

    Args:
        forest: the rollout that the images come from.
        leaves: int64 [N], indices of leaves.
        update: the number of this update of the rollout; the noise depends on it.
        options: how often and at which sigmas each image is noised.

    Returns:
        N * `draws` rows; those of one image are consecutive.
    """
    leaf = leaves.repeat_interleave(options.draws)
    keys = [(int(index), row) for row, index in enumerate(leaf)]
    sigma, noise = denoising_noise(forest, update, keys, options.times, options.draws)
    return DenoisingRows(forest, leaf, sigma, noise)
