"""Best-of-n: an image is the best of n independent ones by the trained reward.

Its distribution is p(x) n F(r(x))^(n-1) without ties, where F is the distribution function of the reward under p, and its KL
divergence to p is at most log n - (n - 1) / n (Beirami et al. 2024, arXiv 2401.01879); `alignbench.statistics` has both.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from alignbench.backbone import Backbone
from alignbench.inference import solvers
from alignbench.inference.reward import Reward
from alignbench.rollouts.executor import decode
from alignbench.rollouts.noise import Key


def candidate(keys: Sequence[Key], j: int) -> list[Key]:
    """The noise keys of candidate j of each image; candidate 0 has the noise of the image itself.

    The candidates of best-of-2 are among those of best-of-4, so that values of n can be compared image by image.
    """
    return [*keys] if j == 0 else [(*key, "candidate", j) for key in keys]


def best_of_n(
    policy: Backbone,
    prompts: Sequence[str],
    keys: Sequence[Key],
    images: int,
    reward: Reward,
    *,
    n: int,
    steps: int,
    seed: int,
    solver: str = "euler",
    micro_batch: int | None = None,
) -> Tensor:
    """Draws final latents, each the best of n.

    A candidate that cannot be scored is never chosen, unless no candidate can be. Of equal ones the first is chosen.

    Args:
        policy: the model.
        prompts, keys, images, steps, seed, solver, micro_batch: as for `solvers.draw`.
        reward: what candidates are compared by; several rewards are standardised among the candidates of an image.
        n: number of candidates of an image.

    Returns:
        float32 [len(prompts) * images, *latent], prompt by prompt.
    """
    draw = partial(solvers.draw, policy, prompts, images=images, steps=steps, seed=seed, solver=solver, micro_batch=micro_batch)
    owners = [prompt for prompt in prompts for _ in range(images)]
    latents, scores = [], []
    for j in range(n):
        drawn = draw(candidate(keys, j))
        if n == 1:
            return drawn
        scores.append(reward.scores(decode(policy, drawn, micro_batch), owners))
        latents.append(drawn)
    total = reward.total({name: torch.stack([of_one[name] for of_one in scores], dim=1) for name in reward.weights})
    best = total.nan_to_num(nan=-torch.inf).argmax(1).to(latents[0].device)
    return torch.stack(latents, dim=1)[torch.arange(len(owners), device=best.device), best]
