"""fixed_tree: one root that splits at the same steps in every iteration.

All other steps are deterministic. A plan whose first split is late shares most of its cost; its leaves are then more alike.

Source: the fixed splits that TMPO (arXiv 2605.10983) falls back to, in its released code. How it differs: docs/samplers.md.
"""

import numpy as np

from alignbench import Plan, Sampler
from samplers._tree import EarlySplit, FixedSplits, tree_plan


class FixedTree(Sampler):
    """A tree with fixed splits."""

    class Settings(EarlySplit, FixedSplits):
        splits: tuple[int, ...] = (1, 3, 4)
        """The steps that split, counted from 0: as many different ones as `levels` says."""

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        return tree_plan(o, tuple(sorted(o.splits)), early_split=o.early_split)
