"""For tests of objectives: a forest whose rewards, paths and log-probs are written down by hand."""

from collections.abc import Sequence

import torch

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
        rewards: one list for each group.
        leaf_edges: edges on the path of each leaf, group by group.
        old_log_prob: one number for each edge.
    """
    groups, edges, leaves = len(rewards), len(old_log_prob), len(leaf_edges)
    return RolloutForest(
        prompts=[f"prompt {g}" for g in range(groups)],
        plan=Plan((Step("cps", 0.5),) * len(leaf_edges[0]) + (Step(),), roots=leaves // groups),
        iteration=iteration,
        reduction="mean",
        states=torch.zeros(edges + leaves, 1),
        rows=torch.zeros(edges, dtype=torch.long),
        row_group=torch.zeros(edges, dtype=torch.long),
        row_step=torch.zeros(edges, dtype=torch.long),
        row_velocity=torch.zeros(edges, 1),
        edge_row=torch.arange(edges),
        edge_child=torch.arange(edges),
        edge_sigma=torch.ones(edges),
        edge_sigma_next=torch.full((edges,), 0.5),
        edge_eta=torch.full((edges,), 0.5),
        old_log_prob=torch.tensor(old_log_prob, dtype=torch.float32),
        leaves=torch.arange(edges, edges + leaves),
        leaf_edges=torch.tensor(leaf_edges, dtype=torch.long),
        sigmas=torch.linspace(1, 0, len(leaf_edges[0]) + 2),
        rewards=torch.tensor(rewards, dtype=torch.float32).flatten(),
    )
