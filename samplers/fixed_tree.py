"""fixed_tree: one root that splits at the same steps in every iteration."""

import numpy as np

from alignbench import Plan, Sampler
from samplers._tree import EarlySplit, FixedSplits, tree_plan


class FixedTree(Sampler):
    class Settings(EarlySplit, FixedSplits):
        splits: tuple[int, ...] = (1, 3, 4)
        """Steps that split."""

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        return tree_plan(o, tuple(sorted(o.splits)), early_split=o.early_split)
