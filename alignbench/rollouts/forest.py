"""The rollout forest: the one structure that holds a rollout and that objectives read.

It is a forest of denoising states. A state is kept only where it is needed: parents and children of stochastic edges, and
leaves. Independent rollouts are a forest whose trees are chains. Letters in shapes: G groups, K leaves of a group, S scored
stochastic steps on the path to a leaf, N kept states (nodes), R distinct parents (replay rows), E edges. A group is what images
are compared in: all images of a prompt, or those of one class where the plan's side branches say so.
"""

from collections.abc import Mapping, Sequence
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
    """States, edges and leaves of one rollout, ordered group by group; the module's docstring explains the letters.

    Attributes:
        prompts: the prompt of each group.
        plan: the plan that all prompts share.
        seed: the seed of the rollout's noise.
        update: how many updates the rollout has already served; the engine sets it.
        iteration: the number of the rollout in the training.
        progress: how much of the training has been done, from 0 at its start to 1 at its end.
        reduction: how log-densities are reduced over latent dimensions.
        states: float32 [N, *latent].
        rows: int64 [R], the node of each replay row, i.e. each distinct parent of a stochastic edge.
        row_group: int64 [R], the group of each replay row; the first of them for a state whose leaves are in several groups.
        row_velocity: float32 [R, *latent], the velocity that the behaviour policy predicted there.
        edge_row: int64 [E], non-decreasing: the parent of each edge as an index into `rows`.
        edge_child: int64 [E], its child as an index into `states`.
        edge_step: int64 [E], its step, an index into `Plan.moves`; without side branches that in `Plan.steps`.
        edge_sigma: float32 [E], the position in the noise schedule before the edge.
        edge_sigma_next: float32 [E], the position after the edge.
        edge_eta: float32 [E], how much noise the edge's step draws.
        old_log_prob: float32 [E], the log-density of the child under the behaviour policy.
        leaves: int64 [G * K], indices into `states`; leaf g * K + k belongs to group g.
        leaf_edges: int64 [G * K, S], the edges on the path to each leaf in the order of steps.
        trained: bool [R], the replay rows at which the policy is evaluated in training; None for all. The others keep
            `row_velocity` as a constant: they cost no model row and get no gradient.
        sigmas: float32 [T + 1], sigma at each model call of the plan and at its end; empty if unknown.
        schedule_shift: the shift of the backbone's schedule.
        rewards: float64 [G * K], filled after scoring; NaN where an image could not be scored.
        scores: for each reward of the task its scores, float64 [G * K], before they were weighted into `rewards`.
        weights: the weight of each reward that is in `rewards`; the other scores only inform the objective.
        bonuses: what keepers of diversity added to `rewards`, before it was weighted, float64 [G * K] each.
        left_out: how many images with a reward a keeper leaves out; their `rewards` are NaN.
        standardised: whether `rewards` is a sum of several rewards, each of which was standardised in its group.
        live_velocity: `row_velocity` with the graph of the policy's parameters, where the rollout kept it; the first update
            takes it, see `take_live_velocity`.
    """

    prompts: list[str]
    plan: Plan
    iteration: int
    reduction: Reduction
    states: Tensor
    rows: Tensor
    row_group: Tensor
    row_velocity: Tensor
    edge_row: Tensor
    edge_child: Tensor
    edge_step: Tensor
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
    weights: Mapping[str, float] = field(default_factory=dict)
    bonuses: dict[str, Tensor] = field(default_factory=dict)
    left_out: int = 0
    standardised: bool = False
    live_velocity: Tensor | None = field(default=None, repr=False)

    @classmethod
    def joined(cls, parts: "Sequence[RolloutForest]") -> "RolloutForest":
        """Joins rollouts that differ only in their prompts into one forest of all their groups."""
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
            row_velocity=together("row_velocity"),
            edge_step=together("edge_step"),
            edge_sigma=together("edge_sigma"),
            edge_sigma_next=together("edge_sigma_next"),
            edge_eta=together("edge_eta"),
            old_log_prob=together("old_log_prob"),
            live_velocity=None,
        )

    def gathered(self, processes: Processes) -> "RolloutForest":
        """Joins the groups that each rank rolled out into one forest, in the order of ranks; it is not scored yet."""
        if processes.count == 1:
            return self
        prompts = processes.all_gather_object(self.prompts)
        # not set yet, equal on all ranks, or with a graph of this rank alone
        excluded = ("rewards", "trained", "scores", "weights", "standardised", "sigmas", "live_velocity")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in excluded}
        gathered = {name: processes.all_gather(value) for name, value in values.items() if isinstance(value, Tensor)}
        parts = []
        for rank, rank_prompts in enumerate(prompts):
            rank_tensors: dict[str, Any] = {name: tensors[rank] for name, tensors in gathered.items()}
            parts.append(replace(self, prompts=rank_prompts, **rank_tensors))
        return RolloutForest.joined(parts)

    @property
    def groups(self) -> int:
        """G, the number of groups."""
        return len(self.prompts)

    @property
    def group_size(self) -> int:
        """K, the number of leaves of each group."""
        return len(self.leaves) // self.groups

    @property
    def leaf_latents(self) -> Tensor:
        """The final latents, float32 [G * K, *latent]."""
        return self.states[self.leaves]

    @property
    def row_sigma(self) -> Tensor:
        """The sigma of each replay row, float32 [R]."""
        return self.edge_sigma[self._first_edge]

    @property
    def row_step(self) -> Tensor:
        """The step of the first edge that leaves each replay row, int64 [R]."""
        return self.edge_step[self._first_edge]

    @property
    def _first_edge(self) -> Tensor:
        """The first edge that leaves each replay row, int64 [R]."""
        return torch.searchsorted(self.edge_row, torch.arange(len(self.rows), device=self.edge_row.device))

    @property
    def edge_group(self) -> Tensor:
        """The group of each edge, int64 [E]."""
        return self.row_group[self.edge_row]

    @property
    def leaf_prompts(self) -> list[str]:
        """The prompt of each leaf."""
        return [prompt for prompt in self.prompts for _ in range(self.group_size)]

    def set_rewards(
        self, total: Tensor, scores: Mapping[str, Tensor], weights: Mapping[str, float], *, normalise: bool
    ) -> None:
        """Sets what the leaves are rewarded with, on the forest's device.

        Args:
            total: what is trained on: a sum as `groups.total` makes it, shaped or not, [G, K] or [G * K].
            scores: the raw scores of each reward, of the same shape.
            weights: the weight of each reward in the sum.
            normalise: whether several rewards were each standardised before they were added.
        """
        device = self.states.device
        self.rewards = total.flatten().to(device)
        self.scores = {name: raw.flatten().to(device) for name, raw in scores.items()}
        self.weights = weights
        self.standardised = groups.standardises(weights, normalise=normalise)

    def take_live_velocity(self) -> Tensor | None:
        """Returns `live_velocity` and forgets it, so that its graph is freed after the backward pass."""
        taken, self.live_velocity = self.live_velocity, None
        return taken

    def train_only(self, leaves: Tensor) -> None:
        """Restricts training to the rows on the paths to some leaves, bool [G * K], and to all edges that leave these rows."""
        self.trained = self.rows_to(leaves)

    def rows_to(self, leaves: Tensor) -> Tensor:
        """The replay rows on the paths to some leaves: bool [G * K] -> bool [R]."""
        rows = torch.zeros(len(self.rows), dtype=torch.bool, device=self.rows.device)
        rows[self.edge_row[self.leaf_edges[leaves]]] = True
        return rows

    def by_group(self, leaf_values: Tensor) -> Tensor:
        """Arranges values of leaves by group: [G * K] -> [G, K]."""
        return leaf_values.view(self.groups, self.group_size)

    @property
    def target_reward(self) -> Tensor:
        """R~ of a Boltzmann target, float32 [G, K]: see `groups.target_reward`."""
        return groups.target_reward(self.by_group(self.rewards), standardised=self.standardised)

    def path_sum(self, edge_values: Tensor) -> Tensor:
        """The sum over the edges of each leaf's path: [E] -> [G, K]. A shared edge counts for every leaf below it."""
        return self.by_group(edge_values[self.leaf_edges].sum(1))

    def descendant_mean(self, leaf_values: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """The mean over the leaves below each edge, without NaN values: [G, K] -> float64 [E].

        Args:
            log_weights: [G, K], the logarithms of the leaves' weights in a weighted mean, up to a constant.

        Returns:
            NaN for edges below which all values are NaN.
        """
        values = leaf_values.double().flatten()[:, None].expand_as(self.leaf_edges)
        present = ~torch.isnan(values)
        edges, values = self.leaf_edges[present], values[present]
        zeros, weights = values.new_zeros(len(self.old_log_prob)), torch.ones_like(values)
        if log_weights is not None:
            logs = log_weights.double().flatten()[:, None].expand_as(self.leaf_edges)[present]
            # Relative to the largest below each edge, so that not all weights can underflow to zero.
            weights = torch.exp(logs - (zeros - torch.inf).scatter_reduce(0, edges, logs, "amax")[edges])
        total, count = zeros.index_add(0, edges, weights * values), zeros.index_add(0, edges, weights)
        return torch.where(count > 0, total / count, torch.nan)

    def log_softmax_of_siblings(self, edge_values: Tensor) -> Tensor:
        """The log-softmax of the values over the edges that leave the same row: [E] -> [E]; 0 for an edge without siblings."""
        of_row = edge_values.new_full((len(self.rows),), -torch.inf)
        largest = of_row.scatter_reduce(0, self.edge_row, edge_values, "amax")[self.edge_row]
        exponentials = torch.exp(edge_values - largest)
        totals = torch.zeros_like(of_row).index_add(0, self.edge_row, exponentials)
        return edge_values - largest - torch.log(totals[self.edge_row])

    def path_mean(self, edge_values: Tensor) -> Tensor:
        """The mean over the edges of each leaf's path: [E] -> [G, K]."""
        return self.by_group(edge_values[self.leaf_edges].mean(1))
