"""Rollouts of a toy policy that has been updated since, and comparisons of the engine's gradient with another one."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import Objective, Plan, RolloutForest, Sampler, load_objective, load_sampler, registry, rollout
from alignbench.flow import Reduction
from alignbench.training.engine import backward
from tests.support.by_hand import snapshot
from tests.support.toys import PROMPTS, ToyBackbone, ToyNet

TRAINING = [name for name in registry.names("objectives") if load_objective(name).needs.training]
"""Every objective that trains."""
SMALL: dict[str, dict[str, object]] = {
    "independent": {"steps": 3, "group_size": 4},
    "fixed_tree": {"steps": 5, "children": 2, "levels": 2, "splits": (1, 3)},
    "dynamic_tree": {"steps": 5, "children": 2, "levels": 2, "early": (1, 2), "late": (1, 3)},
    "sliding_window": {"steps": 5, "group_size": 4, "window": 2},
    "flash": {"steps": 7, "group_size": 4, "window": 2},
    "tree_window": {"steps": 6, "children": 2, "levels": 2},
    "branch": {"steps": 5, "children": 2, "levels": 2, "splits": (0, 2), "depth_pruning": 1},
    "trunk_tree": {"steps": 4, "roots": 2, "children": 2, "last_branch": 1},
    "granular": {"steps": 5, "children": 4, "last_branch": 1},
}
"""Settings with which each sampler draws groups of four; the last two draw several groups for each prompt."""
REWARDS = [[0.5, 2.0, -1.0, 0.25], [1.0, 0.0, 0.0, 3.5]]
MICRO_BATCHES = (1, 3, None)

# Gradients here are between 1e-4 and 1 in size; float32 sums over other splits of the rows differ by less than this.
ROUNDING = 1e-6


def small_sampler(name: str) -> Sampler:
    """Loads any sampler; those that ship get groups of four."""
    return load_sampler(name, **SMALL.get(name, {}))


def plan_of(sampler: str) -> Plan:
    return small_sampler(sampler).plan(0.5, np.random.default_rng(0))


def two_splits(*rewards: list[float]) -> RolloutForest:
    """Groups of four leaves from a split into two and another of each of these; rewards of each group, float64."""
    plan = load_sampler("fixed_tree", steps=4, levels=2, children=2, splits=(1, 2)).plan(0, np.random.default_rng(0))
    forest = rollout(ToyBackbone(), [f"prompt {i}" for i in range(len(rewards))], plan, seed=0)
    forest.rewards = torch.tensor(rewards, dtype=torch.float64).flatten()
    return forest


def drawn(
    plan: Plan, *, move: float = 0.1, reduction: Reduction = "mean", rewards: list[list[float]] | None = None
) -> tuple[ToyBackbone, ToyNet, RolloutForest]:
    """Makes a policy that differs from its reference, the network that drew the forest, and the forest with rewards.

    Args:
        move: how far the policy has gone since the rollout; 0 for the first update.
    """
    toy = ToyBackbone()
    toy.nudge(0.1, seed=1)
    behaviour = snapshot(toy)
    forest = rollout(toy, PROMPTS, plan, seed=4, iteration=3, reduction=reduction)
    forest.rewards = torch.arange(len(forest.leaves)) % 5 / 2  # of a sampler that was dropped in
    if rewards is not None or forest.group_size == 4:
        forest.rewards = torch.tensor(rewards or REWARDS * plan.groups).flatten()
    if move:
        toy.nudge(move, seed=2)
    return toy, behaviour, forest


def by_autograd(toy: ToyBackbone, loss: Tensor) -> tuple[float, Tensor]:
    """Computes a loss and its gradient for all parameters of the policy."""
    gradients = torch.autograd.grad(loss, list(toy.net.parameters()), retain_graph=True)
    return loss.item(), torch.cat([g.flatten() for g in gradients])


def check(
    toy: ToyBackbone,
    objective: Objective,
    forest: RolloutForest,
    loss: float,
    gradient: Tensor,
    rounding: float = ROUNDING,
    *,
    update: int = 0,
    old: Sequence[Tensor] | None = None,
) -> None:
    """Checks that the engine computes this loss, and this gradient of policy and objective, at any microbatch."""
    parameters = [*toy.parameters(), *objective.parameters()]
    size = gradient.abs().max().item()
    assert size > 1e-4
    for micro_batch in MICRO_BATCHES:
        for parameter in parameters:
            parameter.grad = None
        found = backward(toy, objective, forest, update=update, micro_batch=micro_batch, behaviour=old)
        assert found.loss == pytest.approx(loss, abs=rounding, rel=1e-5)
        engines = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        assert (engines - gradient).abs().max().item() < rounding * max(1.0, size), f"microbatch {micro_batch}"
