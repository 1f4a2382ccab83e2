"""fixed_tree: one root that splits at the same steps in every iteration."""

from typing import Self

import numpy as np
from pydantic import model_validator

from alignbench import Plan, Sampler
from samplers._tree import TreeSettings, checked_splits, tree_plan


class FixedTree(Sampler):
    class Settings(TreeSettings):
        splits: tuple[int, ...] = (1, 3, 4)
        """Steps that split."""

        @model_validator(mode="after")
        def _splits_fit(self) -> Self:
            checked_splits(self, self.splits)
            return self

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        return tree_plan(self.settings, self.settings.splits)
