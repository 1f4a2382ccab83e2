"""granular: like `trunk_tree`, but each branch is finished with steps of several sizes, and learns from all its images.

A branch's first, stochastic step is followed by the deterministic steps of the schedule, and also by steps that are twice as
large: two images of one branch. Each is compared with the images of the same step and the same size of steps, and the branch
learns from the mean of its advantages. The coarse images cost about half of the fine ones, and share their first state.

Source: G2RPO (arXiv 2510.01982). How it differs: docs/samplers.md.
"""

from pydantic import Field

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
