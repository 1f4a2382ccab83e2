"""none: the base model, evaluated under the same protocol; trains nothing."""

from torch import Tensor

from alignbench import Objective
from alignbench.objective import Needs
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms


class NoObjective(Objective):
    @property
    def needs(self) -> Needs:
        return Needs(training=False, rewards=False)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        """Zero, whatever the terms."""
        return terms["log_prob"].sum() * 0.0
