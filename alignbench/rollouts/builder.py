"""Builds rollout forests: the one place that knows every field of an unscored forest, its dtype and its device."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alignbench.flow import Reduction
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.plan import Plan, Step


@dataclass(frozen=True)
class Branches:
    """The live branches of all groups before a step; B of them, ordered by group.

    Attributes:
        x: float32 [B, *latent], their states.
        group: int64 [B], the group of each.
        path: int64 [B, S'], the edges that lead to each, for the scored steps so far.
        node: int64 [B], the node of each state where the forest keeps it already; None where it does not.
    """

    x: Tensor
    group: Tensor
    path: Tensor
    node: Tensor | None = None

    @classmethod
    def at_roots(cls, x: Tensor, groups: int) -> "Branches":
        """The branches that start from initial noise x [B, *latent], equally many for each group."""
        group = torch.arange(groups, device=x.device).repeat_interleave(len(x) // groups)
        return cls(x, group, torch.empty(len(x), 0, dtype=torch.long, device=x.device))

    def kept(self, builder: "ForestBuilder") -> Tensor:
        """The node of each branch; states that the forest does not keep yet are added to it."""
        return builder.add_states(self.x) if self.node is None else self.node

    def moved(self, x: Tensor, children: int = 1) -> "Branches":
        """The branches after a step that leaves no edge: each becomes `children` branches, whose states are x."""
        return Branches(x, self.group.repeat_interleave(children), self.path.repeat_interleave(children, 0))

    def along(self, edges: Tensor, x: Tensor, node: Tensor, children: int) -> "Branches":
        """The branches after a step that leaves `edges`, int64 [B * children], to the kept states x."""
        after = self.moved(x, children)
        return Branches(x, after.group, torch.cat([after.path, edges[:, None]], dim=1), node)


@dataclass
class ForestBuilder:
    """Collects the states, replay rows and edges of a rollout in the order of its steps, and builds the forest from them.

    A forest without edges, such as one of fixed images, needs `add_states` and `build` alone.
    """

    _states: list[Tensor] = field(default_factory=list)
    _rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Node, group, step and velocity of replay rows, as in `RolloutForest.rows` and `RolloutForest.row_*`."""
    _edges: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Row, child, (sigma, sigma_next, eta) and log-density of edges."""
    _state_count: int = 0
    _row_count: int = 0
    _edge_count: int = 0

    def add_states(self, states: Tensor) -> Tensor:
        """Keeps states [N', *latent]; returns their nodes, int64 [N'], which are indices into `RolloutForest.states`."""
        first, self._state_count = self._state_count, self._state_count + len(states)
        self._states.append(states)
        return torch.arange(first, self._state_count, device=states.device)

    def add_rows(self, nodes: Tensor, group: Tensor, step: int, velocity: Tensor) -> Tensor:
        """Adds replay rows, which are parents of the edges of one step.

        Args:
            nodes: int64 [R'], the node of each parent.
            group: int64 [R'], its group.
            velocity: [R', *latent], what the behaviour policy predicted there.

        Returns:
            int64 [R'], their indices into `RolloutForest.rows`.
        """
        first, self._row_count = self._row_count, self._row_count + len(nodes)
        self._rows.append((nodes, group, torch.full_like(group, step), velocity.float()))
        return torch.arange(first, self._row_count, device=nodes.device)

    def add_edges(
        self, rows: Tensor, children: Tensor, sigma: float, sigma_next: float, eta: float, log_prob: Tensor
    ) -> Tensor:
        """Adds the edges of one step.

        Args:
            rows: int64 [E'], the parent of each edge as an index into `RolloutForest.rows`, non-decreasing.
            children: int64 [E'], the node of its child.
            log_prob: float32 [E'], the log-density of the child under the behaviour policy.

        Returns:
            int64 [E'], their indices.
        """
        first, self._edge_count = self._edge_count, self._edge_count + len(children)
        numbers = log_prob.new_tensor([sigma, sigma_next, eta]).expand(len(children), 3)
        self._edges.append((rows, children, numbers, log_prob))
        return torch.arange(first, self._edge_count, device=children.device)

    def add_step(
        self,
        live: Branches,
        t: int,
        step: Step,
        sigma: float,
        sigma_next: float,
        velocity: Tensor,
        x: Tensor,
        log_prob: Tensor,
    ) -> Branches:
        """Adds a scored step of all live branches: their states as replay rows, and an edge to each child.

        Args:
            t: the index of the step in the plan.
            velocity: [B, *latent], what the behaviour policy predicted at the branches' states.
            x: float32 [B * children, *latent], the states of the children.
            log_prob: float32 [B * children], their log-densities.

        Returns:
            The branches after the step.
        """
        rows = self.add_rows(live.kept(self), live.group, t, velocity)
        children = self.add_states(x)
        edges = self.add_edges(rows.repeat_interleave(step.children), children, sigma, sigma_next, step.eta, log_prob)
        return live.along(edges, x, children, step.children)

    def build(
        self,
        leaves: Tensor,
        leaf_edges: Tensor,
        *,
        prompts: Sequence[str],
        plan: Plan,
        sigmas: Tensor,
        reduction: Reduction = "mean",
        iteration: int = 0,
        progress: float = 0.0,
        seed: int = 0,
        schedule_shift: float = 1.0,
    ) -> RolloutForest:
        """The forest, which is not scored yet.

        Args:
            leaves: int64 [G * K], the node of each leaf.
            leaf_edges: int64 [G * K, S], the edges on the path to each leaf.
            prompts, plan, sigmas, reduction, iteration, progress, seed, schedule_shift: as in `RolloutForest`.
        """
        states = torch.cat(self._states)
        index, number = leaves.new_empty(0), states.new_empty(0)
        rows, row_group, row_step, row_velocity = _columns(self._rows, (index, index, index, states[:0]))
        edge_row, edge_child, numbers, log_prob = _columns(self._edges, (index, index, states.new_empty(0, 3), number))
        return RolloutForest(
            prompts=list(prompts),
            plan=plan,
            iteration=iteration,
            reduction=reduction,
            states=states,
            rows=rows,
            row_group=row_group,
            row_step=row_step,
            row_velocity=row_velocity,
            edge_row=edge_row,
            edge_child=edge_child,
            edge_sigma=numbers[:, 0],
            edge_sigma_next=numbers[:, 1],
            edge_eta=numbers[:, 2],
            old_log_prob=log_prob,
            leaves=leaves,
            leaf_edges=leaf_edges,
            progress=progress,
            seed=seed,
            sigmas=sigmas,
            schedule_shift=schedule_shift,
        )


def planned_forest(plan: Plan, groups: int) -> RolloutForest:
    """The forest that a rollout by this plan would give, without a model.

    It tells what the forest costs to train on. States, velocities and log-densities are zeros; the rewards of each group
    differ from each other and from their mean.
    """
    sigmas = torch.linspace(1, 0, len(plan.steps) + 1)
    builder = ForestBuilder()
    live = Branches.at_roots(torch.zeros(groups * plan.roots, 1), groups)
    for t, step in enumerate(plan.steps):
        x = torch.zeros(len(live.x) * step.children, 1)
        if step.stochastic and step.scored:
            live = builder.add_step(live, t, step, float(sigmas[t]), float(sigmas[t + 1]), live.x, x, x[:, 0])
        else:
            live = live.moved(x, step.children)
    prompts = [f"prompt {g}" for g in range(groups)]
    forest = builder.build(live.kept(builder), live.path, prompts=prompts, plan=plan, sigmas=sigmas)
    forest.rewards = torch.arange(plan.leaves, dtype=torch.float64).sqrt().repeat(groups)
    return forest


def _columns(tables: Sequence[tuple[Tensor, ...]], empty: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each column of several tables as one tensor; the tensors of `empty` where there is no table."""
    return tuple(torch.cat(column) for column in zip(*tables, strict=True)) if tables else empty
