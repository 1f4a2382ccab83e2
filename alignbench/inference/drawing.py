"""How the images of an evaluation are drawn, and what one of them costs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from alignbench.backbone import Backbone
from alignbench.config.inference import InferenceConfig
from alignbench.errors import UserError
from alignbench.inference import candidates, interpolation, solvers, steering
from alignbench.inference.reward import Reward
from alignbench.rollouts.noise import Key
from alignbench.statistics import best_of_n_kl_bound


@dataclass(frozen=True)
class ImageCost:
    """What it takes to draw one image.

    Attributes:
        model_rows: model evaluations.
        reward_calls: scores of candidates or particles; those of the evaluation itself do not count.
    """

    model_rows: int
    reward_calls: int = 0


@dataclass(frozen=True)
class Drawing:
    """A method of drawing images, with the reward that it reads.

    Attributes:
        config: the method and its settings.
        reward: the trained reward; None for methods that read none.
    """

    config: InferenceConfig = field(default_factory=InferenceConfig)
    reward: Reward | None = None

    @property
    def is_plain(self) -> bool:
        """Whether images are drawn from the model as it is."""
        return self.config.method == "ode"

    @property
    def candidates(self) -> int:
        """Number of independent images of which each image is the best; 1 where none is chosen."""
        return self.config.n if self.config.method == "best_of_n" else 1

    @property
    def has_model(self) -> bool:
        """Whether the distribution of images follows from one model's velocity; that of steering does not."""
        return self.config.method != "fk"

    @property
    def keeps_paths(self) -> bool:
        """Whether images are rollouts of one model, so that a KL divergence over denoising paths is theirs."""
        return self.config.method in ("ode", "interpolation")

    @property
    def kl_bound(self) -> float | None:
        """A bound of the KL divergence of the images' distribution to the model's own, in nats; None where none is known."""
        return best_of_n_kl_bound(self.candidates) if self.config.method == "best_of_n" else None

    def cost(self, steps: int, solver: str) -> ImageCost:
        """Computes what an image takes, before any is drawn."""
        config, plain = self.config, solvers.model_rows(solver, steps)
        calls = 0 if self.reward is None or config.n == 1 else self.reward.calls
        if config.method == "best_of_n":
            return ImageCost(config.n * plain, config.n * calls)
        if config.method == "fk":
            return ImageCost(config.n * steps, steering.reward_calls(config, steps) * calls)
        if config.method == "interpolation" and config.of == "velocity":
            return ImageCost(interpolation.rows_of_mixed_velocity(config.weight) * plain)
        return ImageCost(plain)

    @contextmanager
    def model(self, policy: Backbone) -> Iterator[Backbone]:
        """While entered: the model that images are drawn from, which is not the policy under interpolation."""
        if self.config.method != "interpolation":
            yield policy
        elif self.config.of == "velocity":
            yield interpolation.mixed_velocity(policy, self.config.weight)
        else:
            with interpolation.mixed_weights(policy, self.config.weight):
                yield policy

    def latents(
        self,
        model: Backbone,
        prompts: Sequence[str],
        keys: Sequence[Key],
        images: int,
        *,
        steps: int,
        seed: int,
        solver: str,
        micro_batch: int | None = None,
    ) -> Tensor:
        """Draws final latents of `model`, as `solvers.draw` does for the plain method.

        Raises:
            UserError: the method reads a reward, and there is none.
        """
        config = self.config
        if config.method in ("best_of_n", "fk") and not (self.reward and self.reward.weights):
            raise UserError(f"inference.method={config.method} chooses images by the task's reward, and there is none here")
        if config.method == "fk":
            assert self.reward is not None
            return steering.steer(
                model, prompts, keys, images, self.reward, config, steps=steps, seed=seed, micro_batch=micro_batch
            )
        if config.method == "best_of_n":
            assert self.reward is not None
            return candidates.best_of_n(
                model,
                prompts,
                keys,
                images,
                self.reward,
                n=config.n,
                steps=steps,
                seed=seed,
                solver=solver,
                micro_batch=micro_batch,
            )
        return solvers.draw(model, prompts, keys, images, steps=steps, seed=seed, solver=solver, micro_batch=micro_batch)


PLAIN = Drawing()
"""Images of the model as it is."""
