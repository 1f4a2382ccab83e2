"""dynamic_tree: one root that splits at steps drawn anew in every iteration, early in the training at early steps.

TMPO's dynamic stochastic tree with its progress schedule (arXiv 2605.10983, released code's `progress` mode). For split
level j at training progress u in 0..1:

    mu_j = early_j + (late_j - early_j) u,  clipped to the steps that may split
    m    = (mu_j - first) / (last - first), kept off 0 and 1
    xi   ~ Beta(m kappa, (1 - m) kappa),    s_j = round(first + xi (last - first))

kappa = 0 gives s_j = round(mu_j). Unlike in the released code the splits are always distinct, so that every group has
exactly children ** levels leaves, and each split is a scored stochastic step.
"""

from typing import Self

import numpy as np
from pydantic import Field, model_validator

from alignbench import Plan, Sampler
from samplers._tree import TreeSettings, distinct, tree_plan


class DynamicTree(Sampler):
    class Settings(TreeSettings):
        early: tuple[float, ...] = (1, 2, 3)
        """Mean split steps at the start of the training, one for each level."""
        late: tuple[float, ...] = (1, 3, 5)
        """Mean split steps at its end."""
        kappa: float = Field(6.0, ge=0)
        """Concentration of the draws around their means; 0 for none."""

        @model_validator(mode="after")
        def _one_mean_for_each_level(self) -> Self:
            for name in ("early", "late"):
                if len(getattr(self, name)) != self.levels:
                    raise ValueError(
                        f"{name} must name {self.levels} steps, one for each level, got {list(getattr(self, name))}"
                    )
            return self

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        first, last = o.first_split, o.last_split
        u = min(max(progress, 0.0), 1.0)
        means = [float(np.clip(e + (late - e) * u, first, last)) for e, late in zip(o.early, o.late, strict=True)]
        if o.kappa == 0 or first == last:
            wanted = [round(mean) for mean in means]
        else:
            m = [float(np.clip((mean - first) / (last - first), 1e-3, 1 - 1e-3)) for mean in means]
            wanted = [round(first + float(rng.beta(mj * o.kappa, (1 - mj) * o.kappa)) * (last - first)) for mj in m]
        return tree_plan(o, distinct(wanted, first, last))
