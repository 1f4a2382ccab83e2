"""fixed_tree: one root that splits at the same steps in every iteration."""

import numpy as np

from alignbench import Plan, Sampler
from samplers._tree import FixedSplits, tree_plan


class FixedTree(Sampler):
    class Settings(FixedSplits):
        splits: tuple[int, ...] = (1, 3, 4)
        """Steps that split."""

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        return tree_plan(self.settings, self.settings.splits)
