"""The rollout forest: the one structure that samplers fill and objectives read.

A forest of denoising states. Nodes are kept only where they are needed: parents and children of stochastic edges, and
leaves. Independent rollouts are the forest whose trees are chains. Notation in shapes: G groups (prompts), K leaves of a
group, S stochastic steps that are scored, N nodes, R distinct parents (replay rows), E edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from alignbench import groups
from alignbench.flow import Reduction
from alignbench.rollouts.plan import Plan
from alignbench.runtime.processes import Processes


@dataclass
class RolloutForest:
    """States, edges and leaves of one rollout, ordered group by group; see the module's docstring for the letters.

    Attributes:
        prompts: one for each group.
        plan: the plan that all groups share.
        seed: of the rollout's noise.
        update: how many updates the rollout has already served; the engine sets it.
        iteration, progress: when in the training it was made; progress is 0 at the start and 1 at the end.
        reduction: how log-probabilities are taken over latent dimensions.
        states: float32 [N, *latent].
        rows: int64 [R], the node of each replay row, i.e. each distinct parent of a stochastic edge.
        row_group: int64 [R], its group. row_step: int64 [R], its step. row_velocity: float32 [R, *latent], what the
            behaviour policy answered there.
        edge_row: int64 [E], non-decreasing: the parent of each edge as an index into `rows`.
        edge_child: int64 [E], its child as an index into `states`.
        edge_sigma, edge_sigma_next, edge_eta: float32 [E], of the edge itself.
        old_log_prob: float32 [E], under the behaviour policy.
        leaves: int64 [G * K], indices into `states`; leaf g * K + k belongs to group g.
        leaf_edges: int64 [G * K, S], the edges on the path to each leaf in the order of steps.
        trained: bool [R], the replay rows that the policy is asked about again; None for all. The others keep
            `row_velocity`, as constants: they cost no training row and teach nothing.
        sigmas: float32 [T + 1], sigma before each step of the plan and at its end; empty if unknown.
        schedule_shift: of the backbone's schedule.
        rewards: float64 [G * K], NaN where a scorer gave up on that picture; filled after scoring.
        scores: reward -> float64 [G * K], what the task's rewards answered before they were weighted into `rewards`.
        standardised: whether `rewards` is a sum of several rewards, each of which was standardised in its group.
    """

    prompts: list[str]
    plan: Plan
    iteration: int
    reduction: Reduction
    states: Tensor
    rows: Tensor
    row_group: Tensor
    row_step: Tensor
    row_velocity: Tensor
    edge_row: Tensor
    edge_child: Tensor
    edge_sigma: Tensor
    edge_sigma_next: Tensor
    edge_eta: Tensor
    old_log_prob: Tensor
    leaves: Tensor
    leaf_edges: Tensor
    progress: float = 0.0
    seed: int = 0
    update: int = 0
    trained: Tensor | None = None
    sigmas: Tensor = field(default_factory=lambda: torch.empty(0))
    schedule_shift: float = 1.0
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    scores: dict[str, Tensor] = field(default_factory=dict)
    standardised: bool = False

    @classmethod
    def joined(cls, parts: "Sequence[RolloutForest]") -> "RolloutForest":
        """One forest of the groups of several rollouts that differ in nothing but their prompts."""
        if len(parts) == 1:
            return parts[0]

        def shifted(name: str, counts: Sequence[int]) -> Tensor:
            offsets = accumulate(counts, initial=0)
            return torch.cat([getattr(part, name) + offset for part, offset in zip(parts, offsets, strict=False)])

        def together(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        states, rows = [len(p.states) for p in parts], [len(p.rows) for p in parts]
        return replace(
            parts[0],
            prompts=[prompt for part in parts for prompt in part.prompts],
            rows=shifted("rows", states),
            row_group=shifted("row_group", [part.groups for part in parts]),
            edge_row=shifted("edge_row", rows),
            edge_child=shifted("edge_child", states),
            leaves=shifted("leaves", states),
            leaf_edges=shifted("leaf_edges", [len(part.old_log_prob) for part in parts]),
            states=together("states"),
            row_step=together("row_step"),
            row_velocity=together("row_velocity"),
            edge_sigma=together("edge_sigma"),
            edge_sigma_next=together("edge_sigma_next"),
            edge_eta=together("edge_eta"),
            old_log_prob=together("old_log_prob"),
        )

    def gathered(self, processes: Processes) -> "RolloutForest":
        """One forest of the groups that each process rolled out, in the order of ranks; not scored yet."""
        if processes.count == 1:
            return self
        prompts = processes.all_gather_object(self.prompts)
        apart = ("rewards", "trained", "scores", "standardised", "sigmas")  # not there yet, or the same in all
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        gathered = {name: processes.all_gather(value) for name, value in values.items() if isinstance(value, Tensor)}
        parts = []
        for rank, of_rank in enumerate(prompts):
            own: dict[str, Any] = {name: tensors[rank] for name, tensors in gathered.items()}
            parts.append(replace(self, prompts=of_rank, **own))
        return RolloutForest.joined(parts)

    @property
    def groups(self) -> int:
        return len(self.prompts)

    @property
    def group_size(self) -> int:
        """K, the leaves of each group."""
        return len(self.leaves) // self.groups

    @property
    def leaf_latents(self) -> Tensor:
        """Final latents, float32 [G * K, *latent]."""
        return self.states[self.leaves]

    @property
    def row_sigma(self) -> Tensor:
        """Sigma of each replay row, float32 [R]."""
        first_edge = torch.searchsorted(self.edge_row, torch.arange(len(self.rows), device=self.edge_row.device))
        return self.edge_sigma[first_edge]

    @property
    def edge_group(self) -> Tensor:
        """Group of each edge, int64 [E]."""
        return self.row_group[self.edge_row]

    @property
    def edge_step(self) -> Tensor:
        """Step of each edge, int64 [E]."""
        return self.row_step[self.edge_row]

    @property
    def leaf_prompts(self) -> list[str]:
        """Prompt of each leaf, in leaf order."""
        return [prompt for prompt in self.prompts for _ in range(self.group_size)]

    def train_only(self, leaves: Tensor) -> None:
        """Trains on the paths to some leaves, bool [G * K]; edges to other leaves count where they leave the same row."""
        self.trained = self.rows_to(leaves)

    def rows_to(self, leaves: Tensor) -> Tensor:
        """The replay rows on the paths to some leaves, bool [G * K] -> bool [R]."""
        rows = torch.zeros(len(self.rows), dtype=torch.bool, device=self.rows.device)
        rows[self.edge_row[self.leaf_edges[leaves]]] = True
        return rows

    def by_group(self, leaf_values: Tensor) -> Tensor:
        """[G * K] -> [G, K]."""
        return leaf_values.view(self.groups, self.group_size)

    @property
    def target_reward(self) -> Tensor:
        """R~ of a Boltzmann target, float32 [G, K]; see `groups.target_reward`."""
        return groups.target_reward(self.by_group(self.rewards), standardised=self.standardised)

    def path_sum(self, edge_values: Tensor) -> Tensor:
        """Sum over the stochastic steps of each leaf's path: [E] -> [G, K]. Shared edges enter every descendant."""
        return self.by_group(edge_values[self.leaf_edges].sum(1))

    def descendant_mean(self, leaf_values: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """Mean over the leaves below each edge, blind to NaN and NaN where all are: [G, K] -> float64 [E].

        Args:
            log_weights: [G, K], of the leaves in a weighted mean; a constant in them does not matter.
        """
        values = leaf_values.double().flatten()[:, None].expand_as(self.leaf_edges)
        here = ~torch.isnan(values)
        edges, values = self.leaf_edges[here], values[here]
        zeros, weights = values.new_zeros(len(self.old_log_prob)), torch.ones_like(values)
        if log_weights is not None:
            logs = log_weights.double().flatten()[:, None].expand_as(self.leaf_edges)[here]
            # Over the largest below each edge: a softmax that cannot underflow to nothing.
            weights = torch.exp(logs - (zeros - torch.inf).scatter_reduce(0, edges, logs, "amax")[edges])
        total, count = zeros.index_add(0, edges, weights * values), zeros.index_add(0, edges, weights)
        return torch.where(count > 0, total / count, torch.nan)

    def log_softmax_of_siblings(self, edge_values: Tensor) -> Tensor:
        """log softmax of the values over the edges that leave the same row: [E] -> [E]; 0 where an edge is the only one."""
        of_row = edge_values.new_full((len(self.rows),), -torch.inf)
        largest = of_row.scatter_reduce(0, self.edge_row, edge_values, "amax")[self.edge_row]
        exponentials = torch.exp(edge_values - largest)
        totals = torch.zeros_like(of_row).index_add(0, self.edge_row, exponentials)
        return edge_values - largest - torch.log(totals[self.edge_row])

    def path_mean(self, edge_values: Tensor) -> Tensor:
        """Mean over the stochastic steps of each leaf's path: [E] -> [G, K]."""
        return self.by_group(edge_values[self.leaf_edges].mean(1))
