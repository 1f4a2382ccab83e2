"""What the objectives that train on final images share: how those images are noised again."""

import torch
from pydantic import Field
from torch import Tensor

from alignbench import groups, settings
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


def noised_groups(forest: RolloutForest, leaves: Tensor, update: int, options: DenoisingSettings) -> DenoisingRows:
    """Makes the rows of some final images, with the same noises and sigmas for all images of a group.

    What the images of a group differ in is then the images alone, so comparisons within a group have less noise.

    Returns:
        N * `draws` rows; those of one image are consecutive.
    """
    group_keys = [(g, d) for g in range(forest.groups) for d in range(options.draws)]
    sigma, noise = denoising_noise(forest, update, group_keys, options.times, options.draws)
    leaf = leaves.repeat_interleave(options.draws)
    draw = torch.arange(len(leaf), device=leaf.device) % options.draws
    row = (leaf // forest.group_size) * options.draws + draw
    return DenoisingRows(forest, leaf, sigma[row], noise[row])


def scored_leaves(forest: RolloutForest, *, flat_groups: bool) -> Tensor:
    """The leaves that have a reward, int64 [N]; those of groups whose rewards are all equal only with `flat_groups`."""
    rewards = forest.by_group(forest.rewards)
    mask = groups.valid(rewards) if flat_groups else groups.usable_leaves(rewards)
    return mask.flatten().nonzero()[:, 0]


def by_group_and_draw(values: Tensor, forest: RolloutForest, leaves: Tensor, draws: int) -> Tensor:
    """Arranges the values of rows by group, image and draw: [N * draws] -> [G, K, draws], 0 for images without rows."""
    every = values.new_zeros(len(forest.leaves), draws).index_copy(0, leaves, values.view(len(leaves), draws))
    return every.view(forest.groups, forest.group_size, draws)
