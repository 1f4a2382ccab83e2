"""The executor: runs any plan, with one model call for each denoising step over all live branches of all prompts."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from alignbench import flow
from alignbench.backbone import Backbone
from alignbench.errors import NonFiniteError, UserError
from alignbench.flow import Reduction
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.noise import Key, group_keys, normal
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
) -> RolloutForest:
    """Draws one group for each prompt by the plan.

    Args:
        policy: the backbone with the weights to sample from.
        prompts: one for each group; a prompt may occur more than once.
        seed, iteration: with the prompt and the node they determine all noise.
        reduction: of log-probabilities over latent dimensions.
        micro_batch: at most this many rows in one model call; None for all.
        keys: noise keys of the groups, for prompts that are spread over processes; `group_keys(prompts)` by default.

    Raises:
        UserError: no prompts.
        NonFiniteError: naming the step, sigma and dtype where a state or velocity is not finite.
    """
    if not prompts:
        raise UserError("a rollout needs at least one prompt")
    keys = group_keys(prompts) if keys is None else keys
    sigmas = policy.sigmas(plan.schedule_indices[-1])[list(plan.schedule_indices)]
    conditioning = policy.encode(list(prompts))
    groups = len(prompts)

    def noise(node: str, branches: int) -> Tensor:
        row_keys = [(seed, iteration, *key, node, b) for key in keys for b in range(branches)]
        return normal(row_keys, policy.latent_shape, policy.device)

    x = noise("root", plan.roots)
    group = torch.arange(groups, device=policy.device).repeat_interleave(plan.roots)
    # Which edges lead to each live branch, one column for each scored step so far.
    path = torch.empty(len(x), 0, dtype=torch.long, device=policy.device)
    kept: list[Tensor] = []
    kept_count = 0
    node: Tensor | None = None  # index of each live branch in the kept states, where it is kept already

    def keep(states: Tensor) -> Tensor:
        nonlocal kept_count
        kept.append(states)
        kept_count += len(states)
        return torch.arange(kept_count - len(states), kept_count, device=states.device)

    rows, row_groups, row_steps, velocities = [], [], [], []
    edge_rows, edge_children, edge_numbers, log_probs = [], [], [], []
    finite: list[tuple[Tensor, Tensor]] = []
    row_count = edge_count = 0
    for t, plan_step in enumerate(plan.steps):
        sigma, sigma_next = float(sigmas[t]), float(sigmas[t + 1])
        velocity = predict(policy, x, sigma, conditioning, group, micro_batch)
        if not plan_step.stochastic:
            x, node = flow.unchecked_step(x, velocity, sigma, sigma_next, 0.0, "ode").x_next, None
            finite.append((_all_finite(velocity), _all_finite(x)))
            continue
        children = plan_step.children
        drawn = flow.unchecked_step(
            x.repeat_interleave(children, 0),
            velocity.repeat_interleave(children, 0),
            sigma,
            sigma_next,
            plan_step.eta,
            plan_step.rule,
            noise=noise(f"step {t}", plan.branches_before(t + 1)) * plan_step.noise_scale,
            reduction=reduction,
        )
        finite.append((_all_finite(velocity), _all_finite(drawn.x_next) & _all_finite(drawn.log_prob)))
        row_group, path = group, path.repeat_interleave(children, 0)
        group = group.repeat_interleave(children)
        if not plan_step.scored:
            x, node = drawn.x_next, None
            continue
        rows.append(keep(x) if node is None else node)
        row_groups.append(row_group)
        row_steps.append(torch.full_like(row_group, t))
        velocities.append(velocity.float())
        of_row = torch.arange(row_count, row_count + len(x), device=x.device).repeat_interleave(children)
        row_count += len(x)
        x = drawn.x_next
        node = keep(x)
        edge_rows.append(of_row)
        edge_children.append(node)
        edge_numbers.append(x.new_tensor([sigma, sigma_next, plan_step.eta]).expand(len(x), 3))
        log_probs.append(drawn.log_prob)
        new_edges = torch.arange(edge_count, edge_count + len(x), device=x.device)
        edge_count += len(x)
        path = torch.cat([path, new_edges[:, None]], dim=1)
    _check(finite, [float(s) for s in sigmas], policy.dtype)
    leaves = keep(x) if node is None else node
    none = path.new_empty(0)
    numbers = torch.cat(edge_numbers) if edge_numbers else x.new_empty(0, 3)
    return RolloutForest(
        prompts=list(prompts),
        plan=plan,
        iteration=iteration,
        reduction=reduction,
        states=torch.cat(kept),
        rows=torch.cat(rows) if rows else none,
        row_group=torch.cat(row_groups) if rows else none,
        row_step=torch.cat(row_steps) if rows else none,
        row_velocity=torch.cat(velocities) if rows else x.new_empty(0, *x.shape[1:]),
        edge_row=torch.cat(edge_rows) if rows else none,
        edge_child=torch.cat(edge_children) if rows else none,
        edge_sigma=numbers[:, 0],
        edge_sigma_next=numbers[:, 1],
        edge_eta=numbers[:, 2],
        old_log_prob=torch.cat(log_probs) if log_probs else x.new_empty(0),
        leaves=leaves,
        leaf_edges=path,
        progress=progress,
        seed=seed,
        sigmas=sigmas,
        schedule_shift=policy.schedule_shift(),
    )


def predict(
    policy: Backbone,
    x: Tensor,
    sigma: float | Tensor,
    conditioning: object,
    group: Tensor,
    micro_batch: int | None = None,
) -> Tensor:
    """Velocities [B, *latent] of states [B, *latent] at `sigma` (a float or [B]) for the prompts `group` [B]."""
    all_sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
    if len(x) == 0:  # sharded weights want as many calls of each process: a made-up row, of which nothing is kept
        made_up = x.new_zeros(1, *x.shape[1:]), all_sigmas.new_full((1,), 0.5), conditioning, group.new_zeros(1)
        return policy.velocity(*made_up)[:0]
    size = micro_batch or len(x)
    parts = [
        policy.velocity(x[i : i + size], all_sigmas[i : i + size], conditioning, group[i : i + size])
        for i in range(0, len(x), size)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def decode(policy: Backbone, latents: Tensor, micro_batch: int | None = None) -> np.ndarray:
    """Pictures of final latents, uint8 [B, H, W, 3], at most `micro_batch` at a time."""
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
    """Final latents [len(prompts) * images_per_prompt, *latent] by the deterministic ODE, prompt by prompt.

    The initial noise depends on (seed, prompt, image) alone, so that two policies can be compared pair by pair. `keys` as for
    `rollout`.
    """
    keys = group_keys(prompts) if keys is None else keys
    sigmas = policy.sigmas(steps)
    conditioning = policy.encode(list(prompts))
    group = torch.arange(len(prompts), device=policy.device).repeat_interleave(images_per_prompt)
    row_keys = [("evaluation", seed, *key, i) for key in keys for i in range(images_per_prompt)]
    x = normal(row_keys, policy.latent_shape, policy.device)
    finite = []
    for t in range(steps):
        velocity = predict(policy, x, float(sigmas[t]), conditioning, group, micro_batch)
        x = flow.unchecked_step(x, velocity, float(sigmas[t]), float(sigmas[t + 1]), 0.0, "ode").x_next
        finite.append((_all_finite(velocity), _all_finite(x)))
    _check(finite, [float(s) for s in sigmas], policy.dtype)
    return x


def _all_finite(values: Tensor) -> Tensor:
    """A bool that stays on the device: looking at it would wait for the model."""
    return torch.isfinite(values).all()


def _check(finite: Sequence[tuple[Tensor, Tensor]], sigmas: Sequence[float], dtype: torch.dtype) -> None:
    """Raises NonFiniteError for the first step whose velocity, or next state with its density, is not finite."""
    whole = torch.stack([torch.stack(both) for both in finite]).tolist()
    for t, (velocity, state) in enumerate(whole):
        if not (velocity and state):
            what = "next state or its density" if velocity else "velocity"
            between = f"sigma {sigmas[t]:.4f} to {sigmas[t + 1]:.4f}"
            raise NonFiniteError(f"the {what} at step {t} ({between}) is not finite; the model runs in {dtype}")
