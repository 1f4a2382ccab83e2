"""Builds rollout forests: the one place that walks a plan, and that knows every field of an unscored forest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from alignbench.flow import Reduction
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.plan import Move, Plan


@dataclass(frozen=True)
class Branches:
    """The branches of all prompts at one point of the plan; B of them, ordered by prompt.

    Attributes:
        x: float32 [B, *latent], their states.
        group: int64 [B], the number of the prompt of each.
        path: int64 [B, S'], the edges that lead to each, for the scored steps so far.
        node: int64 [B], the node of each state where the forest keeps it already; None where it does not.
    """

    x: Tensor
    group: Tensor
    path: Tensor
    node: Tensor | None = None

    @classmethod
    def at_roots(cls, x: Tensor, groups: int) -> "Branches":
        """The branches that start from initial noise x [B, *latent], equally many for each prompt."""
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
    _rows: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Node, group and velocity of replay rows, as in `RolloutForest.rows` and `RolloutForest.row_*`."""
    _edges: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Row, child, step, (sigma, sigma_next, eta) and log-density of edges."""
    _state_count: int = 0
    _row_count: int = 0
    _edge_count: int = 0

    def add_states(self, states: Tensor) -> Tensor:
        """Keeps states [N', *latent]; returns their nodes, int64 [N'], which are indices into `RolloutForest.states`."""
        first, self._state_count = self._state_count, self._state_count + len(states)
        self._states.append(states)
        return torch.arange(first, self._state_count, device=states.device)

    def add_rows(self, nodes: Tensor, group: Tensor, velocity: Tensor) -> Tensor:
        """Adds replay rows, which are parents of edges.

        Args:
            nodes: int64 [R'], the node of each parent.
            group: int64 [R'], its group.
            velocity: [R', *latent], what the behaviour policy predicted there.

        Returns:
            int64 [R'], their indices into `RolloutForest.rows`.
        """
        first, self._row_count = self._row_count, self._row_count + len(nodes)
        self._rows.append((nodes, group, velocity.float()))
        return torch.arange(first, self._row_count, device=nodes.device)

    def add_edges(self, rows: Tensor, children: Tensor, step: Tensor, numbers: Tensor, log_prob: Tensor) -> Tensor:
        """Adds edges.

        Args:
            rows: int64 [E'], the parent of each edge as an index into `RolloutForest.rows`, non-decreasing.
            children: int64 [E'], the node of its child.
            step: int64 [E'], its step, an index into `Plan.moves`.
            numbers: float32 [E', 3], its sigma, sigma_next and eta.
            log_prob: float32 [E'], the log-density of the child under the behaviour policy.

        Returns:
            int64 [E'], their indices.
        """
        first, self._edge_count = self._edge_count, self._edge_count + len(children)
        self._edges.append((rows, children, step, numbers, log_prob))
        return torch.arange(first, self._edge_count, device=children.device)

    def add_scored(
        self, live: Branches, velocity: Tensor, sigma: float, group: Tensor, taken: "Sequence[Taken]"
    ) -> list[Branches]:
        """Adds the scored moves that leave one point: its states as replay rows, and an edge to each child.

        Args:
            live: the branches at the point; B of them.
            velocity: [B, *latent], what the behaviour policy predicted there.
            sigma: the point's.
            group: int64 [B], the group of each branch.
            taken: the moves.

        Returns:
            The branches after each move.
        """
        rows = self.add_rows(live.kept(self), group, velocity)
        nodes = [self.add_states(each.x) for each in taken]
        counts = [each.move.step.children for each in taken]
        numbers = [
            each.log_prob.new_tensor([sigma, each.sigma_next, each.move.step.eta]).expand(len(each.x), 3) for each in taken
        ]
        edges = self.add_edges(
            rows.repeat_interleave(sum(counts)),
            _by_parent(nodes, counts),
            _by_parent([torch.full_like(n, each.number) for n, each in zip(nodes, taken, strict=True)], counts),
            _by_parent(numbers, counts),
            _by_parent([each.log_prob for each in taken], counts),
        )
        parts = [part.flatten() for part in edges.view(-1, sum(counts)).split(counts, dim=1)]
        every = zip(parts, taken, nodes, counts, strict=True)
        return [live.along(part, each.x, node, count) for part, each, node, count in every]

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
            prompts: the prompt of each group.
            plan, sigmas, reduction, iteration, progress, seed, schedule_shift: as in `RolloutForest`.
        """
        states = torch.cat(self._states)
        index, number = leaves.new_empty(0), states.new_empty(0)
        rows, row_group, row_velocity = _columns(self._rows, (index, index, states[:0]))
        nothing = (index, index, index, states.new_empty(0, 3), number)
        edge_row, edge_child, edge_step, numbers, log_prob = _columns(self._edges, nothing)
        return RolloutForest(
            prompts=list(prompts),
            plan=plan,
            iteration=iteration,
            reduction=reduction,
            states=states,
            rows=rows,
            row_group=row_group,
            row_velocity=row_velocity,
            edge_row=edge_row,
            edge_child=edge_child,
            edge_step=edge_step,
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


class Taken(NamedTuple):
    """A move that all branches at a point have taken."""

    number: int
    """Its number in the plan."""
    move: Move
    sigma_next: float
    x: Tensor
    """The states that it leads to, float32 [B * children, *latent]."""
    log_prob: Tensor
    """Their log-densities, float32 [B * children]; empty if the move is not scored."""


Evaluate = Callable[[int, Tensor, Tensor], Tensor]
"""The number of a model call, states [B, *latent] and their prompts [B] -> velocities [B, *latent]."""
Take = Callable[[int, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
"""A move, states [B, *latent], velocities, sigma, sigma_next -> next states and log-densities, [B * children]."""


def grow(
    plan: Plan, roots: Tensor, groups: int, sigmas: Tensor, evaluate: Evaluate, take: Take
) -> tuple[ForestBuilder, Tensor, Tensor]:
    """Walks a plan from its initial noise to its images, with one call of `evaluate` for each place in the schedule.

    Args:
        roots: float32 [P * plan.roots, *latent], the initial noise of all prompts.
        groups: P, the number of prompts.
        sigmas: float32 [T + 1], sigma at each model call and at the end.
        evaluate: gives the velocities of all branches of one call.
        take: takes one move.

    Returns:
        The states and edges, the node of each leaf, int64 [P * leaves], and the edges on the path to it,
        int64 [P * leaves, S].
    """
    forest = ForestBuilder()
    points = {0: Branches.at_roots(roots, groups)}
    sigma_of = {index: float(sigma) for index, sigma in zip(plan.schedule_indices, sigmas.tolist(), strict=True)}
    for t, call in enumerate(plan.calls):
        at_points = [points.pop(departure.point) for departure in call]
        x, of_prompt = _together([live.x for live in at_points]), _together([live.group for live in at_points])
        velocities = evaluate(t, x, of_prompt).split([len(live.x) for live in at_points])
        sigma = sigma_of[plan.schedule_indices[t]]
        for departure, live, velocity in zip(call, at_points, velocities, strict=True):
            scored: list[Taken] = []
            for m in departure.moves:
                move = plan.moves[m]
                sigma_next = sigma_of[move.stop]
                x_next, log_prob = take(m, live.x, velocity, sigma, sigma_next)
                if move.scored:
                    scored.append(Taken(m, move, sigma_next, x_next, log_prob))
                else:
                    points[m + 1] = live.moved(x_next, move.step.children)
            if scored:
                group = live.group * plan.groups + plan.group_of_point[departure.point]
                after = forest.add_scored(live, velocity, sigma, group, scored)
                points |= {each.number + 1: branches for each, branches in zip(scored, after, strict=True)}
    leaves, paths = [], []
    for point, _ in plan.ends:  # ordered by group, so that the images of a prompt are
        leaves.append(points[point].kept(forest).view(groups, -1))
        paths.append(points[point].path.view(groups, leaves[-1].shape[1], -1))
    return forest, torch.cat(leaves, 1).flatten(), torch.cat(paths, 1).flatten(0, 1)


def planned_forest(plan: Plan, groups: int) -> RolloutForest:
    """The forest that a rollout of `groups` prompts by this plan would give, without a model.

    It tells what the forest costs to train on. States, velocities and log-densities are zeros; the rewards of each group
    differ from each other and from their mean.
    """
    sigmas = torch.linspace(1, 0, len(plan.schedule_indices))

    def take(m: int, x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
        x_next = torch.zeros(len(x) * plan.moves[m].step.children, 1)
        return x_next, x_next[:, 0]

    roots = torch.zeros(groups * plan.roots, 1)
    builder, leaves, paths = grow(plan, roots, groups, sigmas, lambda t, x, group: torch.zeros_like(x), take)
    prompts = [f"prompt {g}" for g in range(groups) for _ in range(plan.groups)]
    forest = builder.build(leaves, paths, prompts=prompts, plan=plan, sigmas=sigmas)
    forest.rewards = torch.arange(forest.group_size, dtype=torch.float64).sqrt().repeat(forest.groups)
    return forest


def _together(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _by_parent(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Joins values of the children that several moves give each of B parents, parent by parent.

    Args:
        parts: for each move [B * count, ...].
        counts: the number of children that each move gives a parent.
    """
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p.view(-1, n, *p.shape[1:]) for p, n in zip(parts, counts, strict=True)], 1).flatten(0, 1)


def _columns(tables: Sequence[tuple[Tensor, ...]], empty: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each column of several tables as one tensor; the tensors of `empty` where there is no table."""
    return tuple(torch.cat(column) for column in zip(*tables, strict=True)) if tables else empty
