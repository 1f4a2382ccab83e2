"""Feynman-Kac steering: particles of an image are resampled by the rewards of their predicted images.

The k particles of an image take stochastic steps. Before some steps the final image of each particle is predicted,
x_0 = x - sigma v, and scored, and its weight is multiplied by a potential of the scores so far:

    max         exp(lambda max_s r_s)
    difference  exp(lambda (r_t - r_{t-1}))
    sum         exp(lambda sum_s r_s)

Where the effective number of particles is below k / 2, k new ones are drawn by their weights, which are then equal. After the
last step the weight is multiplied by exp(lambda r) / (product of the potentials of the particle's ancestors), and one particle
is drawn. As k grows, the distribution of that image approaches p exp(lambda r) / Z for every choice of the potential. With one
particle it is a plain stochastic rollout.

Source: Singhal et al. 2025 (arXiv 2501.06848). Its code drops the weights of a step at which it does not resample; here they
are kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from alignbench import flow
from alignbench.backbone import Backbone
from alignbench.config.inference import InferenceConfig
from alignbench.groups import effective_sample_size
from alignbench.inference.candidates import candidate
from alignbench.inference.reward import Reward
from alignbench.inference.solvers import step_noise
from alignbench.rollouts.executor import FiniteChecks, decode, predict
from alignbench.rollouts.noise import Key, evaluation_keys, normal, seed_of
from alignbench.rollouts.plan import Rule

FIRST, LAST = 0.2, 0.8
"""Shares of the steps between which particles are resampled."""


def resampling_steps(steps: int, resamplings: int) -> list[int]:
    """The steps before which particles may be resampled, evenly from a fifth to four fifths of all: 20, 40, 60, 80 of 100."""
    if resamplings == 1:
        return [round(steps / 2)] if steps > 1 else []
    shares = [FIRST + (LAST - FIRST) * i / (resamplings - 1) for i in range(resamplings)]
    return sorted({round(share * steps) for share in shares} - {0, steps})


def reward_calls(config: InferenceConfig, steps: int) -> int:
    """Counts how many images are scored for one that is drawn."""
    return config.n * (len(resampling_steps(steps, config.resamplings)) + 1)


class Weights:
    """The log-weights of the particles of each image, float64 [I, k].

    Attributes:
        log_weight: since the last resampling.
        applied: the sum of the log-potentials of each particle and its ancestors.
    """

    def __init__(self, images: int, particles: int, strength: float, potential: str) -> None:
        self.strength, self.potential = strength, potential
        self.log_weight = torch.zeros(images, particles, dtype=torch.float64)
        self.applied = torch.zeros_like(self.log_weight)
        self.last = torch.full_like(self.log_weight, torch.nan)  # the reward that the next difference is taken from
        self.largest = torch.full_like(self.log_weight, -torch.inf)
        self.sum = torch.zeros_like(self.log_weight)

    def add(self, rewards: Tensor) -> None:
        """Multiplies the weights by the potential of predicted images.

        A particle without a reward has its last one, or without that the mean of the image's other particles. If no particle
        of an image ever had a reward, its weights stay.
        """
        rewards = torch.where(rewards.isnan(), self.last, rewards)
        rewards = torch.where(rewards.isnan(), rewards.nanmean(1, keepdim=True), rewards)
        before, self.last = self.last.nan_to_num(nan=0.0), rewards
        self.largest = torch.fmax(self.largest, rewards)
        self.sum = self.sum + rewards.nan_to_num(nan=0.0)
        argument = {"max": self.largest, "difference": rewards - before, "sum": self.sum}[self.potential]
        argument = torch.where(rewards.isnan(), 0.0, argument)
        self.log_weight = self.log_weight + self.strength * argument
        self.applied = self.applied + self.strength * argument

    def finish(self, rewards: Tensor) -> None:
        """Makes the weights those of exp(strength reward); a final image without a reward is not drawn if another has one."""
        log_weight = self.log_weight + self.strength * rewards - self.applied
        usable = ~rewards.isnan() | rewards.isnan().all(1, keepdim=True)
        self.log_weight = torch.where(usable, log_weight.nan_to_num(nan=0.0), -torch.inf)

    def degenerate(self) -> Tensor:
        """Marks the images whose effective number of particles is below half of them: bool [I]."""
        log_p = torch.log_softmax(self.log_weight, dim=1)
        return effective_sample_size(log_p, torch.ones_like(log_p, dtype=torch.bool)) < log_p.shape[1] / 2

    def resample(self, image: int, parents: Tensor) -> None:
        """Replaces the particles of one image by copies of these, int64 [k], with equal weights."""
        for values in (self.applied, self.last, self.largest, self.sum):
            values[image] = values[image, parents]
        self.log_weight[image] = 0.0

    def drawn(self, image: int, count: int, key: Key) -> Tensor:
        """Draws particles of one image by their weights, int64 [count]; the draw is a function of the key."""
        chances = torch.softmax(self.log_weight[image], dim=0)
        generator = torch.Generator().manual_seed(seed_of(*key, "resampling"))
        return torch.multinomial(chances, count, replacement=True, generator=generator)


@torch.no_grad()
def steer(
    policy: Backbone,
    prompts: Sequence[str],
    keys: Sequence[Key],
    images: int,
    reward: Reward,
    config: InferenceConfig,
    *,
    steps: int,
    seed: int,
    micro_batch: int | None = None,
) -> Tensor:
    """Draws final latents by Feynman-Kac steering.

    Args:
        policy: the model.
        prompts, keys, images, steps, seed, micro_batch: as for `solvers.draw`.
        reward: what particles are resampled by: the weighted sum of its raw rewards.
        config: the number of particles, the potential and its strength, and the stochastic steps.

    Returns:
        float32 [len(prompts) * images, *latent], prompt by prompt.

    Raises:
        NonFiniteError: naming the step, sigma and dtype where a state or velocity is not finite.
    """
    k, drawn_images = config.n, len(prompts) * images
    of_particle = [evaluation_keys(candidate(keys, j), images, seed) for j in range(k)]
    rows = [of_particle[j][i] for i in range(drawn_images) for j in range(k)]
    owners = [prompt for prompt in prompts for _ in range(images * k)]
    image_keys = evaluation_keys(keys, images, seed)
    group = torch.arange(len(prompts), device=policy.device).repeat_interleave(images * k)
    first = torch.arange(drawn_images) * k
    sigmas, conditioning = policy.sigmas(steps), policy.encode(list(prompts))
    x = normal(rows, policy.latent_shape, policy.device)
    weights = Weights(drawn_images, k, config.strength, config.potential)
    moments = resampling_steps(steps, config.resamplings) if k > 1 else []
    finite = FiniteChecks(sigmas, policy.dtype)

    def rewards(latents: Tensor) -> Tensor:
        return reward.weighted_sum(decode(policy, latents, micro_batch), owners).view(drawn_images, k)

    for t in range(steps):
        sigma, sigma_next = float(sigmas[t]), float(sigmas[t + 1])
        with policy.unscored():
            velocity = predict(policy, x, sigma, conditioning, group, micro_batch)
        if t in moments:
            weights.add(rewards(x - sigma * velocity))
            parents = torch.arange(k).repeat(drawn_images, 1)
            for i in weights.degenerate().nonzero()[:, 0].tolist():
                parents[i] = weights.drawn(i, k, (*image_keys[i], t))
                weights.resample(i, parents[i])
            chosen = (first[:, None] + parents).flatten().to(x.device)
            x, velocity = x[chosen], velocity[chosen]
        stochastic = sigma_next > 0 and (config.eta > 0 or config.rule == "memoryless")
        noise = step_noise(rows, t, policy) if stochastic else None
        rule: Rule = config.rule if stochastic else "ode"
        eta = config.eta if stochastic else 0.0
        x = flow.unchecked_step(x, velocity, sigma, sigma_next, eta, rule, noise=noise).x_next
        finite.add(velocity, x)
    finite.check()
    if k == 1:
        return x
    weights.finish(rewards(x))
    best = torch.stack([weights.drawn(i, 1, (*image_keys[i], "final"))[0] for i in range(drawn_images)])
    return x[(first + best).to(x.device)]
