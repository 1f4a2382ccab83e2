"""branch: one root, stochastic at every step but the last, that splits at a few fixed steps.

BranchGRPO (arXiv 2509.06040) without its pruning. Unlike in the other trees a branch also draws noise between its splits,
and each of these steps is trained on.
"""

import numpy as np
from pydantic import Field

from alignbench import Plan, Sampler
from alignbench.plan import Step
from samplers._tree import FixedSplits


class Branch(Sampler):
    class Settings(FixedSplits):
        levels: int = Field(2, ge=1)
        """How many steps split; the leaves are children ** levels."""
        first_split: int = Field(0, ge=0)
        """The earliest step that may split."""
        splits: tuple[int, ...] = (0, 2)
        """Steps that split."""
        split_noise_level: float | None = Field(None, gt=0)
        """Noise level of the splitting steps; that of the others where it is null."""

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        between = Step(o.rule, o.noise_level)
        split = Step(o.rule, o.split_noise_level or o.noise_level, o.children)
        return Plan(steps=(*(split if t in o.splits else between for t in range(o.steps - 1)), Step()))
