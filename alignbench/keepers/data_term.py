"""The denoising error on data as a term beside any objective: a forward KL divergence to the data.

    weight E |v(x_s) - (noise - x_0)|^2,   x_s = (1 - s) x_0 + s noise,   x_0 from data, s from the steps of the rollout

It keeps what the data have and the reward does not ask for, where the usual penalty, the reverse KL to the base model, allows
that modes are lost. Its rows are those of final images, so that gradients are exact in micro-batches and on several ranks, as
those of objectives are.

Source: DDRL (arXiv 2512.04332).
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from alignbench.backbone import Backbone
from alignbench.config.keepers import KeepersConfig
from alignbench.embedded.examples import Example, draw_examples
from alignbench.errors import UserError
from alignbench.objective import Objective
from alignbench.rollouts.builder import ForestBuilder
from alignbench.rollouts.executor import sample
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import seed_of
from alignbench.rollouts.plan import Plan, Step
from alignbench.rollouts.terms import DenoisingRows, Terms, Velocities, denoising_noise, denoising_terms
from alignbench.settings import Settings

POOL = 512
"""Number of images that are drawn once for a run, since their prompts must be encoded before the training."""
WORDS_SHARE = 0.1
"""Share of drawn words among them, as in most of the training of `tiny`."""


class DataTerm(Objective):
    """The weighted denoising error of all images of a forest."""

    def __init__(self, weight: float) -> None:
        super().__init__(Settings())
        self.name = "data"
        self.weight = weight

    def rows(self, forest: RolloutForest, update: int) -> DenoisingRows:
        leaf = torch.arange(len(forest.leaves), device=forest.leaves.device)
        # -1: a noise of its own where the objective draws some for final images as well.
        sigma, noise = denoising_noise(forest, update, [(-1, i) for i in range(len(leaf))], "steps")
        return DenoisingRows(forest, leaf, sigma, noise)

    def terms(self, rows: DenoisingRows, velocities: Velocities) -> Terms:
        return denoising_terms(rows, velocities.policy)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return self.weight * terms["error"].mean()


@cache
def drawn_pool(seed: int) -> tuple[Example, ...]:
    """The drawn images of a run, with their prompts."""
    return tuple(draw_examples(seed_of("data", seed), 0, POOL, WORDS_SHARE))


class Data:
    """Makes the data of each iteration as a forest of images without paths; the same on all ranks.

    Attributes:
        prompts: those that must be encoded before the training.
    """

    def __init__(self, config: KeepersConfig, policy: Backbone, seed: int) -> None:
        self.config, self.policy, self.seed = config, policy, seed
        self.prompts: list[str] = []
        if config.data_from == "drawn":
            pool = drawn_pool(seed)
            self.prompts = [example.prompt for example in pool]
            try:
                policy.check_image(pool[0].image)
                policy.encode_images([pool[0].image])
            except UserError as error:
                raise UserError(f"keepers.data_from=drawn: {error}; keepers.data_from=base serves any model") from None

    def model_rows(self, rollout: RolloutForest) -> int:
        """The number of model evaluations that drawing an iteration's data takes."""
        return self.config.data_images * (len(rollout.sigmas) - 1) if self.config.data_from == "base" else 0

    def forest(self, rollout: RolloutForest, micro_batch: int | None) -> RolloutForest:
        """The data of a rollout's iteration: `data_images` groups of one image, with the sigmas of the rollout's steps."""
        count, iteration = self.config.data_images, rollout.iteration
        if self.config.data_from == "drawn":
            chosen = np.random.default_rng(seed_of("data", self.seed, iteration)).choice(POOL, count, replace=count > POOL)
            examples = [drawn_pool(self.seed)[i] for i in chosen]
            prompts = [example.prompt for example in examples]
            latents = self.policy.encode_images([example.image for example in examples]).float()
        else:
            of_iteration = list(dict.fromkeys(rollout.prompts))
            prompts = [of_iteration[i % len(of_iteration)] for i in range(count)]
            with self.policy.reference():
                seed = seed_of("data", self.seed, iteration)
                latents = sample(self.policy, prompts, 1, len(rollout.sigmas) - 1, seed, micro_batch=micro_batch)
        builder = ForestBuilder()
        leaves = builder.add_states(latents)
        return builder.build(
            leaves,
            leaves.new_empty(count, 0),
            prompts=prompts,
            plan=Plan((Step(),)),
            sigmas=rollout.sigmas,
            reduction=rollout.reduction,
            iteration=iteration,
            seed=rollout.seed,
            schedule_shift=rollout.schedule_shift,
        )
