"""fixed_tree: one root that splits at the same steps in every iteration."""

from typing import Self

import numpy as np
from pydantic import model_validator

from alignbench import Plan, Sampler
from samplers._tree import TreeSettings, tree_plan


class FixedTree(Sampler):
    class Settings(TreeSettings):
        splits: tuple[int, ...] = (1, 3, 4)
        """Steps that split."""

        @model_validator(mode="after")
        def _splits_fit(self) -> Self:
            inside = all(self.first_split <= s <= self.last_split for s in self.splits)
            if not (len(self.splits) == len(set(self.splits)) == self.levels and inside):
                raise ValueError(
                    f"splits must be {self.levels} different steps between {self.first_split} and {self.last_split}, "
                    f"got {list(self.splits)}"
                )
            return self

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        return tree_plan(self.settings, self.settings.splits)
