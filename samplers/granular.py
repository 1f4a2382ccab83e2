"""granular: like `trunk_tree`, but each branch is finished with steps of several sizes, and learns from all its images.

A branch's first, stochastic step is followed by the deterministic steps of the schedule, and also by steps that are twice as
large: two images of one branch. Each is compared with the images of the same step and the same size of steps, and the branch
learns from the mean of its advantages. The coarse images cost about half of the fine ones, and share their first state.

With an optimizer step for each step at which branches leave, as the authors have it: `objective.part_by: step` of grpo.

Source: G2RPO (arXiv 2510.01982). How it differs: docs/samplers.md.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from alignbench.rollouts.plan import Side, Step
from samplers.trunk_tree import TrunkTree


class Granular(TrunkTree):
    """Branches of a trunk that are finished in several granularities."""

    class Settings(TrunkTree.Settings):
        roots: int = Field(1, ge=1)
        """How many trunks a prompt has, each from its own initial noise."""
        children: int = Field(4, ge=1)
        """How many branches leave a trunk at a step."""
        last_branch: int | None = Field(2, ge=0)
        """The last step at which branches leave; null for the last but one of the steps."""
        strides: tuple[int, ...] = (1, 2)
        """How many steps of the schedule the deterministic steps of a branch take at once. With several values each branch ends
        in as many images, finished with steps of each size. The last step is shorter where they do not fit."""
        coarse: Literal["even", "released"] = "even"
        """Where the larger steps lie. even: they begin right after the stochastic step, and the last is shorter if they do not
        fit. released: they begin one step of the schedule later, and the last is longer if they do not fit, as in the code of
        G2RPO. The first of `strides` must be 1 then."""

        @model_validator(mode="after")
        def _shares_the_first_step(self) -> Self:
            if self.coarse == "released" and self.strides[0] != 1:
                raise ValueError(f"coarse=released needs 1 as the first of strides, got {list(self.strides)}")
            return self

    settings: Settings

    def _side(self, left: int, stride: int, group: int) -> Side:
        if self.settings.coarse == "even":
            return super()._side(left, stride, group)
        whole, rest = divmod(left - 1, stride)
        if whole == 0:  # the first larger step would pass the end
            return Side(1, (Step(stride=left),), group=group)
        return Side(2, (*(Step(stride=stride),) * (whole - 1), Step(stride=stride + rest)), group=group)
