"""A plan is what a sampler returns: for each denoising step, its rule and into how many children each branch splits."""

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
class Plan:
    """The rollout of one group: initial noises and denoising steps. Its costs are known before anything runs.

    Attributes:
        steps: the denoising steps in order.
        roots: the number of initial noises, which are the first branches.
    """

    steps: tuple[Step, ...]
    roots: int = 1

    def __post_init__(self) -> None:
        if self.roots < 1 or not self.steps:
            raise UserError(f"a plan needs at least one root and one step, got {self.roots} and {len(self.steps)}")

    @property
    def schedule_indices(self) -> tuple[int, ...]:
        """The index in the model's schedule before each step and after the last; [len(steps) + 1], starting with 0."""
        return tuple(accumulate((s.stride for s in self.steps), initial=0))

    def branches_before(self, step: int) -> int:
        """The number of branches of one group before a step, which is also the number of model rows that the step costs."""
        return self.roots * prod(s.children for s in self.steps[:step])

    @property
    def leaves(self) -> int:
        """K, the number of images of one group."""
        return self.branches_before(len(self.steps))

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """The indices of the steps that carry a log-density: those that are stochastic and scored."""
        return tuple(t for t, s in enumerate(self.steps) if s.stochastic and s.scored)

    @property
    def splits(self) -> tuple[int, ...]:
        """The indices of the steps at which branches split."""
        return tuple(t for t, s in enumerate(self.steps) if s.children > 1)

    @property
    def branch_counts(self) -> tuple[int, ...]:
        """The number of branches of one group at the start and after each split; the last is K."""
        return (self.roots, *(self.branches_before(t + 1) for t in self.splits))

    def as_independent(self) -> "Plan":
        """The same steps as K independent rollouts, each with a root and a path of its own.

        Each single leaf keeps its distribution; only the dependence between leaves is gone.
        """
        return Plan(tuple(replace(s, children=1) for s in self.steps), roots=self.leaves)

    def from_one_noise(self) -> "Plan":
        """The same number of leaves from one initial noise per group, which diverge at the first stochastic step.

        Rollouts with the same initial noise are equal until then, so they are one branch and cost one model row for each step;
        from there on each draws its own noise. The joint distribution of the leaves is that of K such rollouts.

        Raises:
            UserError: no step is stochastic, so that all leaves would be equal.
        """
        first = next((t for t, s in enumerate(self.steps) if s.stochastic), None)
        if first is None:
            raise UserError("rollouts that start from one initial noise need a stochastic step to differ")
        step = self.steps[first]
        split = replace(step, children=self.roots * step.children)
        return Plan((*self.steps[:first], split, *self.steps[first + 1 :]))

    def model_rows(self, groups: int = 1) -> int:
        """The number of model evaluations of a rollout of `groups` groups."""
        return groups * sum(self.branches_before(t) for t in range(len(self.steps)))

    def replay_rows(self, groups: int = 1) -> int:
        """The number of model evaluations of one training pass: the distinct parents of scored edges."""
        return groups * sum(self.branches_before(t) for t in self.stochastic_steps)
