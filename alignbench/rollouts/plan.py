"""A plan is what a sampler returns: for each denoising step, its rule and into how many children each branch splits.

Most plans are one line of steps. A line can have side branches, which leave it before one of its steps and take steps of
their own from there: with other rules, other noise, other numbers of children, or larger steps. A line that stops before the
end of the schedule is a trunk, which has no images of its own.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, prod
from typing import Literal, NamedTuple, get_args

from alignbench.errors import UserError

Rule = Literal["ode", "sde", "cps", "dance", "memoryless"]
RULES: tuple[str, ...] = get_args(Rule)


@dataclass(frozen=True)
class Step:
    """One denoising step of the branches of a line, the same for all prompts.

    Attributes:
        rule: "ode" (deterministic), or a stochastic rule of `alignbench.flow`.
        eta: how much noise the step draws, in the units of its rule (`alignbench.flow`); 0 exactly where the rule is "ode".
        children: how many branches each live branch becomes; more than one needs a stochastic rule.
        stride: how many steps of the model's schedule the step takes at once.
        scored: whether the densities of a stochastic step enter the loss. A step that is not scored draws noise in the same
            way, but costs no training row.
        noise_scale: multiplies the noise that is drawn, but not the step's density. Anything but 1 draws from another
            distribution than the policy's, as BranchGRPO's script does.
    """

    rule: Rule = "ode"
    eta: float = 0.0
    children: int = 1
    stride: int = 1
    scored: bool = True
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"step rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if self.children < 1:
            raise UserError(f"a step needs at least one child for each branch, got {self.children}")
        if self.stride < 1:
            raise UserError(f"a step takes at least one step of the schedule, got stride {self.stride}")
        if self.rule == "ode" and (self.eta != 0 or self.children > 1):
            raise UserError("an ode step draws no noise: its eta is 0 and its branches cannot split")
        if self.rule != "ode" and not 0 < self.eta < inf:
            raise UserError(f"a {self.rule} step needs an eta (noise_level) above 0, got {self.eta}; use rule 'ode'")
        if not 0 < self.noise_scale < inf or (self.rule == "ode" and self.noise_scale != 1):
            raise UserError(f"a step's noise_scale is above 0, and 1 for an ode step, got {self.noise_scale} for {self.rule}")
        if self.rule == "cps" and self.eta > 1:
            raise UserError(f"a cps step's eta (noise_level) is a share of the noise, at most 1, got {self.eta}")
        if self.rule == "memoryless" and self.eta != 1:
            raise UserError(f"a memoryless step's noise follows from its sigmas: its eta is 1, got {self.eta}")

    @property
    def stochastic(self) -> bool:
        """Whether the step draws noise."""
        return self.rule != "ode"


@dataclass(frozen=True)
class Side:
    """Branches that leave a line before one of its steps.

    Attributes:
        at: the index of that step; the number of the line's steps for branches that leave at its end. The state is evaluated
            once, and its velocity serves the line and all its sides.
        steps: the steps that the branches take, in order.
        sides: branches that leave these, before the steps that their `at` counts in `steps`.
        group: the number of the group that its images belong to, counted from 0. Images are compared within their group.
    """

    at: int
    steps: tuple[Step, ...]
    sides: tuple["Side", ...] = ()
    group: int = 0


class Move(NamedTuple):
    """A step at its place in the plan. Moves are numbered, and move m leads from point `source` to point m + 1."""

    step: Step
    start: int
    """Where it starts in the model's schedule."""
    source: int
    """The point that it leaves: 0 for the initial noise, m + 1 for the states after move m."""
    branches: int
    """How many branches of one prompt take it, before they split."""

    @property
    def stop(self) -> int:
        """Where it ends in the model's schedule."""
        return self.start + self.step.stride

    @property
    def scored(self) -> bool:
        """Whether its density enters the loss."""
        return self.step.stochastic and self.step.scored


class Departure(NamedTuple):
    """The moves that leave one point."""

    point: int
    branches: int
    """How many branches of one prompt are there, each of which costs one model row."""
    moves: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The rollout of one prompt: initial noises and denoising steps. Its costs are known before anything runs.

    Attributes:
        steps: the denoising steps of the main line, in order.
        roots: the number of initial noises, which are the first branches.
        sides: branches that leave the main line. Its own images, unless it is a trunk, belong to group 0.
    """

    steps: tuple[Step, ...]
    roots: int = 1
    sides: tuple[Side, ...] = ()

    def __post_init__(self) -> None:
        if self.roots < 1 or not (self.steps or self.sides):
            raise UserError(f"a plan needs at least one root and one step, got {self.roots} and {len(self.steps)}")
        if self.sides:
            self._check_sides()

    def _check_sides(self) -> None:
        """Refuses side branches that leave no line, and images that cannot be compared."""
        for line in self._lines():
            if not line.steps and not line.sides:
                raise UserError("a side branch of a plan needs at least one step")
            if wrong := [side.at for side in line.sides if not 0 <= side.at <= len(line.steps)]:
                raise UserError(f"a side branch leaves before step {wrong[0]} of a line that has {len(line.steps)} steps")
        for point in set(range(len(self.moves) + 1)) - {move.source for move in self.moves}:
            if (stop := self._index_of(point)) != self.schedule_indices[-1]:
                raise UserError(
                    f"a line of the plan stops at step {stop} of the schedule, before its end at {self.schedule_indices[-1]}, "
                    "and nothing leaves it there"
                )
        sizes: dict[int, int] = defaultdict(int)
        for point, group in self.ends:
            sizes[group] += self.branches_at(point)
        if sorted(sizes) != list(range(len(sizes))):
            raise UserError(f"the groups of a plan are numbered from 0 without a gap, got {sorted(sizes)}")
        if len(set(sizes.values())) > 1:
            raise UserError(f"all groups of a plan need the same number of images, got {[sizes[g] for g in sorted(sizes)]}")
        lengths = sorted({sum(self.moves[m].scored for m in self.path_to(point)) for point, _ in self.ends})
        if len(lengths) > 1:
            raise UserError(f"all images of a plan need the same number of scored steps, got {lengths}")

    def _lines(self) -> "Iterator[Plan | Side]":
        """The main line and all side branches, each before those that leave it."""
        waiting: list[Plan | Side] = [self]
        while waiting:
            line = waiting.pop(0)
            yield line
            waiting = [*line.sides, *waiting]

    @cached_property
    def _placed(self) -> tuple[tuple[Move, ...], tuple[tuple[int, int], ...]]:
        """All moves, and for each line the point at its end and its group."""
        moves: list[Move] = []
        ends: list[tuple[int, int]] = []

        def place(line: "Plan | Side", point: int, index: int, branches: int, group: int) -> None:
            stops = [(point, index, branches)]
            for step in line.steps:
                moves.append(Move(step, index, point, branches))
                point, index, branches = len(moves), index + step.stride, branches * step.children
                stops.append((point, index, branches))
            ends.append((point, group))
            for side in line.sides:
                if 0 <= side.at < len(stops):  # any other is refused
                    place(side, *stops[side.at], side.group)

        place(self, 0, 0, self.roots, 0)
        return tuple(moves), tuple(ends)

    @property
    def moves(self) -> tuple[Move, ...]:
        """All steps of all lines: those of the main line in order, then those of each side branch and of its own sides."""
        return self._placed[0]

    @cached_property
    def ends(self) -> tuple[tuple[int, int], ...]:
        """The points at the end of the schedule in the order of their images, each with the number of its group."""
        last = self.schedule_indices[-1]
        return tuple(sorted((e for e in self._placed[1] if self._index_of(e[0]) == last), key=lambda end: end[1]))

    def _index_of(self, point: int) -> int:
        return self.moves[point - 1].stop if point else 0

    def branches_at(self, point: int) -> int:
        """The number of branches of one prompt at a point."""
        return self.moves[point - 1].branches * self.moves[point - 1].step.children if point else self.roots

    def path_to(self, point: int) -> tuple[int, ...]:
        """The moves that lead to a point, in order."""
        path: list[int] = []
        while point:
            path.insert(0, point - 1)
            point = self.moves[point - 1].source
        return tuple(path)

    @cached_property
    def group_of_point(self) -> tuple[int, ...]:
        """For each point the first group that has an image below it."""
        first = [len(self.ends)] * (len(self.moves) + 1)
        for point, group in self.ends:
            for reached in (0, *(m + 1 for m in self.path_to(point))):
                first[reached] = min(first[reached], group)
        return tuple(first)

    @cached_property
    def schedule_indices(self) -> tuple[int, ...]:
        """The indices in the model's schedule at which states are evaluated, and that of its end; ascending from 0."""
        return tuple(sorted({0, *(move.stop for move in self.moves)}))

    @cached_property
    def calls(self) -> tuple[tuple[Departure, ...], ...]:
        """What each model call evaluates: one call for each of `schedule_indices` but the last."""
        leaving: dict[int, list[int]] = defaultdict(list)
        for m, move in enumerate(self.moves):
            leaving[move.source].append(m)
        calls: dict[int, list[Departure]] = {index: [] for index in self.schedule_indices[:-1]}
        for point, moves in sorted(leaving.items()):
            calls[self._index_of(point)].append(Departure(point, self.branches_at(point), tuple(moves)))
        return tuple(map(tuple, calls.values()))

    @property
    def scored_calls(self) -> frozenset[int]:
        """The model calls of which at least one velocity enters the density of a scored step."""
        return frozenset(
            t for t, call in enumerate(self.calls) if any(self.moves[m].scored for each in call for m in each.moves)
        )

    @property
    def rows_of_calls(self) -> tuple[int, ...]:
        """The number of model rows of each call, for one prompt."""
        return tuple(sum(departure.branches for departure in call) for call in self.calls)

    def branches_before(self, step: int) -> int:
        """The number of branches of one prompt before a step of the main line."""
        return self.roots * prod(s.children for s in self.steps[:step])

    @property
    def leaves(self) -> int:
        """The number of images of one prompt: K of a single group, or of all its groups."""
        return sum(self.branches_at(point) for point, _ in self.ends)

    @property
    def groups(self) -> int:
        """The number of groups that the images of one prompt form; 1 without side branches."""
        return 1 + max(group for _, group in self.ends)

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """The moves that carry a log-density: those that are stochastic and scored."""
        return tuple(m for m, move in enumerate(self.moves) if move.scored)

    @property
    def path_length(self) -> int:
        """S, the number of scored steps on the path to each image."""
        return sum(self.moves[m].scored for m in self.path_to(self.ends[0][0]))

    @property
    def splits(self) -> tuple[int, ...]:
        """The model calls after which branches split, counted from 0; the indices of the steps where there are no sides."""
        at = {move.start for move in self.moves if move.step.children > 1}
        return tuple(t for t, index in enumerate(self.schedule_indices) if index in at)

    @property
    def branch_counts(self) -> tuple[int, ...]:
        """The number of branches of one group at the start and after each split of the main line."""
        return (self.roots, *(self.branches_before(t + 1) for t, s in enumerate(self.steps) if s.children > 1))

    def as_independent(self) -> "Plan":
        """The same steps as K independent rollouts, each with a root and a path of its own.

        Each single leaf keeps its distribution; only the dependence between leaves is gone.

        Raises:
            UserError: the plan has side branches, so that its leaves take different steps.
        """
        if self.sides:
            raise UserError(
                "a plan with side branches cannot be drawn as independent rollouts: its images take different steps"
            )
        return Plan(tuple(replace(s, children=1) for s in self.steps), roots=self.leaves)

    def from_one_noise(self) -> "Plan":
        """The same number of leaves from one initial noise per group, which diverge at the first stochastic step.

        Rollouts with the same initial noise are equal until then, so they are one branch and cost one model row for each step;
        from there on each draws its own noise. The joint distribution of the leaves is that of K such rollouts.

        Raises:
            UserError: no step is stochastic, so that all leaves would be equal, or the plan has side branches.
        """
        if self.sides:
            raise UserError("side branches leave a plan's own trunk; give it one root to start them from one noise")
        first = next((t for t, s in enumerate(self.steps) if s.stochastic), None)
        if first is None:
            raise UserError("rollouts that start from one initial noise need a stochastic step to differ")
        step = self.steps[first]
        split = replace(step, children=self.roots * step.children)
        return Plan((*self.steps[:first], split, *self.steps[first + 1 :]))

    def model_rows(self, groups: int = 1) -> int:
        """The number of model evaluations of a rollout of `groups` prompts."""
        return groups * sum(self.rows_of_calls)

    def replay_rows(self, groups: int = 1) -> int:
        """The number of model evaluations of one training pass over `groups` prompts: the distinct parents of scored edges."""
        return groups * sum(self.branches_at(p) for p in {self.moves[m].source for m in self.stochastic_steps})
