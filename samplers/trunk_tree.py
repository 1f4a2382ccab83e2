"""trunk_tree: deterministic trunks, which stochastic branches leave at every step; each branch is finished deterministically.

From the state of a trunk at step j, `children` branches take one stochastic step, whose velocity is that of the trunk, and
then deterministic steps to the image. So each image has exactly one step that is trained on, and its reward says something of
that step alone. With roots r, children k and branches at steps 0 to T - 2, a prompt has r k (T - 1) images and costs
r ((T - 1) + k (T - 1) T / 2) model rows. The images of one step, over all trunks, are compared with each other.

Source: TempFlow-GRPO (arXiv 2508.04324). How it differs, and its weight of the steps: docs/samplers.md.
"""

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from alignbench import Plan, Sampler
from alignbench.rollouts.plan import Side, Step
from samplers._noise import NoiseSettings


class TrunkTree(Sampler):
    """Stochastic branches at every step of deterministic trunks."""

    class Settings(NoiseSettings):
        steps: int = Field(6, ge=2)
        """T: how many denoising steps a rollout has."""
        roots: int = Field(2, ge=1)
        """How many trunks a prompt has, each from its own initial noise."""
        children: int = Field(3, ge=1)
        """How many branches leave a trunk at a step."""
        first_branch: int = Field(0, ge=0)
        """The first step at which branches leave, counted from 0."""
        last_branch: int | None = Field(None, ge=0)
        """The last step at which branches leave; null for the last but one of the steps."""
        strides: tuple[int, ...] = (1,)
        """How many steps of the schedule the deterministic steps of a branch take at once. With several values each branch ends
        in as many images, finished with steps of each size. The last step is shorter where they do not fit."""
        compare: Literal["step", "prompt"] = "step"
        """Which images form a group, whose rewards are compared. step: those whose branches left at the same step and were
        finished with the same stride. prompt: all of a prompt."""

        @property
        def branch_steps(self) -> range:
            """The steps at which branches leave."""
            return range(self.first_branch, (self.steps - 2 if self.last_branch is None else self.last_branch) + 1)

        @model_validator(mode="after")
        def _fits(self) -> Self:
            at = self.branch_steps
            if not at or at[-1] > self.steps - 2:
                raise ValueError(
                    f"branches leave at steps {self.first_branch} to {at.stop - 1}, which must be at least one step and end by "
                    f"{self.steps - 2} of steps={self.steps}, because the last step is deterministic"
                )
            if not self.strides or min(self.strides) < 1 or len(set(self.strides)) < len(self.strides):
                raise ValueError(f"strides must be different whole numbers of at least 1, got {list(self.strides)}")
            if self.roots * self.children < 2:
                raise ValueError("roots * children must be at least 2, because one image cannot be compared with anything")
            return self

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        at = o.branch_steps
        trunk = (Step(),) * at[-1]
        return Plan(trunk, o.roots, tuple(self._branches(step, step - at[0]) for step in at))

    def _branches(self, at: int, place: int) -> Side:
        """The branches that leave at a step, which is number `place` of those at which branches leave."""
        o = self.settings
        first = place * len(o.strides) if o.compare == "step" else 0
        numbers = [first + i if o.compare == "step" else 0 for i in range(len(o.strides))]
        left = o.steps - at - 1
        others = tuple(self._side(left, s, n) for s, n in zip(o.strides[1:], numbers[1:], strict=True))
        split = Step(o.rule, o.noise_level, o.children)
        return Side(at, (split, *finish(left, o.strides[0])), others, numbers[0])

    def _side(self, left: int, stride: int, group: int) -> Side:
        """What finishes branches with steps of another size, over the `left` last steps of the schedule after the split."""
        return Side(1, finish(left, stride), group=group)


def finish(left: int, stride: int) -> tuple[Step, ...]:
    """Makes deterministic steps over the `left` last steps of the schedule, each of `stride` but perhaps the last."""
    whole, rest = divmod(left, stride)
    return (Step(stride=stride),) * whole + ((Step(stride=rest),) if rest else ())
