"""What a sampler returns: for each denoising step, how it moves and into how many children each branch splits."""

from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf, prod
from typing import Literal, get_args

from alignbench.errors import UserError

Rule = Literal["ode", "sde", "cps", "dance", "memoryless"]
RULES: tuple[str, ...] = get_args(Rule)


@dataclass(frozen=True)
class Step:
    """One denoising step, the same for all branches of all groups.

    Attributes:
        rule: "ode" (deterministic), or the stochastic rules of `alignbench.flow`.
        eta: eta or a of the rule; 0 exactly where the rule is "ode".
        children: how many branches each live branch becomes; more than one needs a stochastic rule.
        stride: how many steps of the model's schedule it takes at once.
        scored: whether a stochastic step's densities enter the loss. One that is not scored draws noise all the same, but
            costs no training row.
        noise_scale: multiplies the noise that is drawn, but not the step's density. Anything but 1 draws from another
            distribution than the policy's; it is there to reproduce BranchGRPO's script.
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
            raise UserError("an ode step draws no noise: its noise level is 0 and its branches cannot split")
        if self.rule != "ode" and not 0 < self.eta < inf:
            raise UserError(f"a {self.rule} step needs a noise level above 0, got {self.eta}; use rule 'ode'")
        if not 0 < self.noise_scale < inf or (self.rule == "ode" and self.noise_scale != 1):
            raise UserError(f"a step's noise_scale is above 0, and 1 for an ode step, got {self.noise_scale} for {self.rule}")
        if self.rule == "cps" and self.eta > 1:
            raise UserError(f"a cps step's noise level is a share of the noise, at most 1, got {self.eta}")
        if self.rule == "memoryless" and self.eta != 1:
            raise UserError(f"a memoryless step's noise follows from its sigmas: its eta is 1, got {self.eta}")

    @property
    def stochastic(self) -> bool:
        return self.rule != "ode"


@dataclass(frozen=True)
class Plan:
    """A group's rollout: `roots` initial noises, then `steps`. Costs are known before anything runs."""

    steps: tuple[Step, ...]
    roots: int = 1

    def __post_init__(self) -> None:
        if self.roots < 1 or not self.steps:
            raise UserError(f"a plan needs at least one root and one step, got {self.roots} and {len(self.steps)}")

    @property
    def schedule_indices(self) -> tuple[int, ...]:
        """Places in the schedule between the steps, from 0 to the schedule's number of steps; [len(steps) + 1]."""
        return tuple(accumulate((s.stride for s in self.steps), initial=0))

    def branches_before(self, step: int) -> int:
        """Branches of one group that are alive before `step`, which is the model rows that the step costs."""
        return self.roots * prod(s.children for s in self.steps[:step])

    @property
    def leaves(self) -> int:
        """Pictures of one group: K."""
        return self.branches_before(len(self.steps))

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """Indices of the steps that carry a log-density: stochastic, and scored."""
        return tuple(t for t, s in enumerate(self.steps) if s.stochastic and s.scored)

    @property
    def splits(self) -> tuple[int, ...]:
        """Indices of the steps at which branches split."""
        return tuple(t for t, s in enumerate(self.steps) if s.children > 1)

    @property
    def branch_counts(self) -> tuple[int, ...]:
        """Branches of one group at the noise and after each split; the last is K."""
        return (self.roots, *(self.branches_before(t + 1) for t in self.splits))

    def as_independent(self) -> "Plan":
        """Of as many leaves, each with a root and a path of its own: every single leaf has the same distribution as in this
        plan."""
        return Plan(tuple(replace(s, children=1) for s in self.steps), roots=self.leaves)

    def from_one_noise(self) -> "Plan":
        """As many leaves, which start from one initial noise a group and part at the first stochastic step.

        Rollouts with the same initial noise are equal until then, so they are one branch and cost one model row a step; the
        noise that each draws from there on is its own. The joint distribution of the leaves is that of K such rollouts.

        Raises:
            UserError: no step is stochastic, so that all leaves would be equal.
        """
        first = next((t for t, s in enumerate(self.steps) if s.stochastic), None)
        if first is None:
            raise UserError("rollouts that start from one initial noise need a stochastic step to differ")
        step = self.steps[first]
        parting = replace(step, children=self.roots * step.children)
        return Plan((*self.steps[:first], parting, *self.steps[first + 1 :]))

    def model_rows(self, groups: int = 1) -> int:
        """Velocity evaluations that a rollout of `groups` groups costs."""
        return groups * sum(self.branches_before(t) for t in range(len(self.steps)))

    def replay_rows(self, groups: int = 1) -> int:
        """Velocity evaluations of one training pass: the distinct parents of scored edges."""
        return groups * sum(self.branches_before(t) for t in self.stochastic_steps)
