"""Runs any plan, with one model call for each place in the schedule over all branches of all prompts that are there."""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from alignbench import flow
from alignbench.backbone import Backbone
from alignbench.errors import NonFiniteError, UserError
from alignbench.flow import Reduction
from alignbench.rollouts.builder import grow
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import Key, evaluation_keys, group_keys, normal
from alignbench.rollouts.plan import Plan


@torch.no_grad()
def rollout(
    policy: Backbone,
    prompts: Sequence[str],
    plan: Plan,
    seed: int,
    iteration: int = 0,
    *,
    reduction: Reduction = "mean",
    micro_batch: int | None = None,
    progress: float = 0.0,
    keys: Sequence[Key] | None = None,
    keep_graph: bool = False,
) -> RolloutForest:
    """Draws images for each prompt by the plan: one group, or `plan.groups` of them.

    Args:
        policy: the backbone with the weights to sample from.
        prompts: the plan is run once for each; a prompt may occur more than once.
        plan: what each denoising step does, the same for all prompts.
        seed: determines all noise, together with the iteration, the prompt and the node.
        iteration: the number of the training iteration.
        reduction: how log-densities are reduced over latent dimensions.
        micro_batch: the most rows in one model call; None for all rows of a step.
        progress: of the training, from 0 to 1; the forest carries it to the objective.
        keys: the noise keys of the prompts, for prompts that are shared between ranks; `group_keys(prompts)` by default.
        keep_graph: whether scored rows are evaluated with their graph, which the forest keeps for the first update
            (`RolloutForest.live_velocity`). The numbers are the same; the memory is that of a training pass over all rows. With
            side branches no graph is kept.

    Returns:
        The forest of G = len(prompts) * plan.groups groups, without rewards.

    Raises:
        UserError: there are no prompts.
        NonFiniteError: naming the step, sigma and dtype where a state or velocity is not finite.
    """
    if not prompts:
        raise UserError("a rollout needs at least one prompt")
    keys = group_keys(prompts) if keys is None else keys
    sigmas = policy.sigmas(plan.schedule_indices[-1])[list(plan.schedule_indices)]
    conditioning = policy.encode(list(prompts))
    keep_graph = keep_graph and not plan.sides  # a call would keep that of rows that are not scored

    def noise(node: str, branches: int) -> Tensor:
        row_keys = [(seed, iteration, *key, node, b) for key in keys for b in range(branches)]
        return normal(row_keys, policy.latent_shape, policy.device)

    finite = FiniteChecks(sigmas, policy.dtype)
    scored_calls = plan.scored_calls
    with_graph: list[Tensor] = []

    def evaluate(t: int, x: Tensor, group: Tensor) -> Tensor:
        scored = t in scored_calls
        kept = keep_graph and scored
        with torch.set_grad_enabled(kept), nullcontext() if scored else policy.unscored():
            velocity = predict(policy, x, float(sigmas[t]), conditioning, group, micro_batch)
        if kept:
            with_graph.append(velocity)
            velocity = velocity.detach()
        finite.add_velocity(velocity)
        return velocity

    def take(m: int, x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
        step = plan.moves[m].step
        if not step.stochastic:
            drawn = flow.unchecked_step(x, velocity, sigma, sigma_next, 0.0, "ode")
            finite.add_state(drawn.x_next)
            return drawn.x_next, drawn.log_prob
        drawn = flow.unchecked_step(
            x.repeat_interleave(step.children, 0),
            velocity.repeat_interleave(step.children, 0),
            sigma,
            sigma_next,
            step.eta,
            step.rule,
            noise=noise(f"step {m}", plan.branches_at(m + 1)) * step.noise_scale,
            reduction=reduction,
        )
        finite.add_state(drawn.x_next, drawn.log_prob)
        return drawn.x_next, drawn.log_prob

    forest, leaves, paths = grow(plan, noise("root", plan.roots), len(prompts), sigmas, evaluate, take)
    finite.check()
    built = forest.build(
        leaves,
        paths,
        prompts=[prompt for prompt in prompts for _ in range(plan.groups)],
        plan=plan,
        sigmas=sigmas,
        reduction=reduction,
        iteration=iteration,
        progress=progress,
        seed=seed,
        schedule_shift=policy.schedule_shift(),
    )
    if with_graph:
        with torch.enable_grad():
            built.live_velocity = torch.cat(with_graph)  # in the order of the replay rows
    return built


def predict(
    policy: Backbone,
    x: Tensor,
    sigma: float | Tensor,
    conditioning: object,
    group: Tensor,
    micro_batch: int | None = None,
) -> Tensor:
    """The model's velocities, in calls of at most `micro_batch` rows.

    Args:
        x: [B, *latent], the states.
        sigma: one for all rows, or [B].
        conditioning: what `policy.encode` made of the prompts.
        group: int64 [B], the prompt of each row.

    Returns:
        [B, *latent].
    """
    all_sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
    if len(x) == 0:  # FSDP needs the same number of forward calls on every rank: run a dummy row and drop the result
        dummy = x.new_zeros(1, *x.shape[1:]), all_sigmas.new_full((1,), 0.5), conditioning, group.new_zeros(1)
        return policy.velocity(*dummy)[:0]
    size = micro_batch or len(x)
    parts = [
        policy.velocity(x[i : i + size], all_sigmas[i : i + size], conditioning, group[i : i + size])
        for i in range(0, len(x), size)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def decode(policy: Backbone, latents: Tensor, micro_batch: int | None = None) -> np.ndarray:
    """Decodes final latents [B, *latent] into images, uint8 [B, H, W, 3], at most `micro_batch` at a time."""
    return np.concatenate([policy.decode(part) for part in latents.split(micro_batch or len(latents))])


@torch.no_grad()
def sample(
    policy: Backbone,
    prompts: Sequence[str],
    images_per_prompt: int,
    steps: int,
    seed: int,
    *,
    micro_batch: int | None = None,
    keys: Sequence[Key] | None = None,
) -> Tensor:
    """Samples final latents with the deterministic ODE.

    The initial noise depends on (seed, prompt, image) alone, so that two policies can be compared image by image.

    Args:
        steps: denoising steps.
        micro_batch: as for `rollout`.
        keys: as for `rollout`.

    Returns:
        float32 [len(prompts) * images_per_prompt, *latent], prompt by prompt.

    Raises:
        NonFiniteError: naming the step, sigma and dtype where a state or velocity is not finite.
    """
    keys = group_keys(prompts) if keys is None else keys
    sigmas = policy.sigmas(steps)
    conditioning = policy.encode(list(prompts))
    group = torch.arange(len(prompts), device=policy.device).repeat_interleave(images_per_prompt)
    x = normal(evaluation_keys(keys, images_per_prompt, seed), policy.latent_shape, policy.device)
    finite = FiniteChecks(sigmas, policy.dtype)
    for t in range(steps):
        with policy.unscored():
            velocity = predict(policy, x, float(sigmas[t]), conditioning, group, micro_batch)
        x = flow.unchecked_step(x, velocity, float(sigmas[t]), float(sigmas[t + 1]), 0.0, "ode").x_next
        finite.add(velocity, x)
    finite.check()
    return x


class FiniteChecks:
    """Notes for each model call whether its tensors are finite, and looks at the answers once, after the last step.

    The answers stay on the device until then, since reading one would wait for the model.
    """

    def __init__(self, sigmas: Tensor, dtype: torch.dtype) -> None:
        self.sigmas, self.dtype = sigmas, dtype
        self.answers: list[Tensor] = []

    def add(self, velocity: Tensor, state: Tensor) -> None:
        """Notes the velocity of the next model call and the only state that it leads to."""
        self.add_velocity(velocity)
        self.add_state(state)

    def add_velocity(self, velocity: Tensor) -> None:
        """Notes the velocity of the next model call."""
        finite = torch.isfinite(velocity).all()
        self.answers.append(torch.stack([finite, torch.ones_like(finite)]))

    def add_state(self, state: Tensor, log_prob: Tensor | None = None) -> None:
        """Notes a state that a step from the last call leads to and, of a stochastic step, its log-density."""
        after = torch.isfinite(state).all()
        if log_prob is not None:
            after = after & torch.isfinite(log_prob).all()
        self.answers[-1][1] &= after

    def check(self) -> None:
        """Raises NonFiniteError for the first call whose velocity, or next state with its density, is not finite."""
        for t, (velocity, after) in enumerate(torch.stack(self.answers).tolist()):
            if not (velocity and after):
                tensor = "next state or its density" if velocity else "velocity"
                interval = f"sigma {float(self.sigmas[t]):.4f} to {float(self.sigmas[t + 1]):.4f}"
                raise NonFiniteError(f"the {tensor} at step {t} ({interval}) is not finite; the model runs in {self.dtype}")
