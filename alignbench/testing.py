"""A forest whose rewards, paths and log-densities are given as numbers, for tests of objectives."""

from collections.abc import Sequence

import torch

from alignbench.rollouts.builder import ForestBuilder
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.plan import Plan, Step


def hand_made_forest(
    rewards: Sequence[Sequence[float]],
    leaf_edges: Sequence[Sequence[int]],
    old_log_prob: Sequence[float],
    *,
    iteration: int = 0,
) -> RolloutForest:
    """A forest for tests of losses, which read rewards, incidence and old log-probs; its states are zeros.

    Args:
        rewards: one list for each group, with one number for each leaf.
        leaf_edges: the edges on the path to each leaf, group by group.
        old_log_prob: the log-density of each edge under the behaviour policy.
        iteration: of the training.

    Returns:
        A forest in which every edge has a parent row of its own.
    """
    groups, edges, steps = len(rewards), len(old_log_prob), len(leaf_edges[0])
    builder = ForestBuilder()
    children = builder.add_states(torch.zeros(edges, 1))
    leaves = builder.add_states(torch.zeros(len(leaf_edges), 1))
    first = torch.zeros_like(children)
    rows = builder.add_rows(first, group=first, velocity=torch.zeros(edges, 1))
    numbers = torch.tensor([1.0, 0.5, 0.5]).expand(edges, 3)  # sigma, sigma_next, eta
    builder.add_edges(rows, children, torch.zeros_like(rows), numbers, torch.tensor(old_log_prob, dtype=torch.float32))
    forest = builder.build(
        leaves,
        torch.tensor(leaf_edges, dtype=torch.long),
        prompts=[f"prompt {g}" for g in range(groups)],
        plan=Plan((Step("cps", 0.5),) * steps + (Step(),), roots=len(leaves) // groups),
        sigmas=torch.linspace(1, 0, steps + 2),
        iteration=iteration,
    )
    forest.rewards = torch.tensor(rewards, dtype=torch.float32).flatten()
    return forest
