"""Draws final latents by the solver that the evaluation's protocol names.

The noise of each image is a function of (seed, prompt, image) alone, so that two models, or two methods of inference, can be
compared image by image.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alignbench import flow
from alignbench.backbone import Backbone
from alignbench.rollouts.executor import FiniteChecks, predict, sample
from alignbench.rollouts.noise import Key, evaluation_keys, normal
from alignbench.rollouts.plan import Rule

SDE_ETA = 0.7
"""Amount of noise of each step of the solver `sde` (Flow-GRPO's value)."""
STOCHASTIC: Mapping[str, tuple[Rule, float]] = {"sde": ("sde", SDE_ETA), "memoryless": ("memoryless", 1.0)}
"""Solver -> the rule and the eta of all its steps but the last, which is Euler's; `memoryless` has no use for eta."""


def model_rows(solver: str, steps: int) -> int:
    """Counts the model evaluations that one image takes: steps, or 2 steps - 1 for `heun`, whose last step is Euler's."""
    return 2 * steps - 1 if solver == "heun" else steps


def step_noise(keys: Sequence[Key], t: int, policy: Backbone) -> Tensor:
    """The noise of stochastic step `t` of the images with these keys, float32 [len(keys), *latent]."""
    return normal([(*key, f"step {t}") for key in keys], policy.latent_shape, policy.device)


@torch.no_grad()
def draw(
    policy: Backbone,
    prompts: Sequence[str],
    keys: Sequence[Key],
    images: int,
    *,
    steps: int,
    seed: int,
    solver: str = "euler",
    micro_batch: int | None = None,
) -> Tensor:
    """Draws final latents of a model.

    Args:
        policy: the model.
        prompts: the prompts.
        keys: the noise key of each prompt, from `group_keys`.
        images: of each prompt.
        steps: denoising steps.
        seed: of the evaluation noise.
        solver: `euler`, `heun`, `ab2`, `sde` or `memoryless`; see `evaluation.solver`.
        micro_batch: the most rows in one model call; None for all rows of a step.

    Returns:
        float32 [len(prompts) * images, *latent], prompt by prompt.

    Raises:
        NonFiniteError: naming the step, sigma and dtype where a state or velocity is not finite.

    Source: Heun's method as in Karras et al. 2022 (arXiv 2206.00364), algorithm 1, with an Euler step to sigma 0; the
    Adams-Bashforth method of second order for unequal steps, x + h ((1 + r / 2) v_t - (r / 2) v_{t-1}), r = h / h_previous.
    """
    if solver == "euler":
        return sample(policy, prompts, images, steps, seed, micro_batch=micro_batch, keys=keys)
    sigmas = policy.sigmas(steps)
    conditioning = policy.encode(list(prompts))
    group = torch.arange(len(prompts), device=policy.device).repeat_interleave(images)
    rows = evaluation_keys(keys, images, seed)
    x = normal(rows, policy.latent_shape, policy.device)
    finite = FiniteChecks(sigmas, policy.dtype)
    before: tuple[Tensor, float] | None = None  # the velocity and the length of the last step
    for t in range(steps):
        sigma, sigma_next = float(sigmas[t]), float(sigmas[t + 1])
        h = sigma_next - sigma
        with policy.unscored():
            direction = velocity = predict(policy, x, sigma, conditioning, group, micro_batch)
            if solver == "heun" and sigma_next > 0:
                ahead = predict(policy, x + h * velocity, sigma_next, conditioning, group, micro_batch)
                direction = (velocity + ahead) / 2
        if solver == "ab2" and before is not None:
            r = h / before[1]
            direction = (1 + r / 2) * velocity - r / 2 * before[0]
        if solver in STOCHASTIC and sigma_next > 0:
            rule, eta = STOCHASTIC[solver]
            x = flow.unchecked_step(x, velocity, sigma, sigma_next, eta, rule, noise=step_noise(rows, t, policy)).x_next
        else:
            x = flow.unchecked_step(x, direction, sigma, sigma_next, 0.0, "ode").x_next
        before = velocity, h
        finite.add(direction, x)
    finite.check()
    return x
