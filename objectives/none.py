"""none: the base model, evaluated under the same protocol; trains nothing.

The loss is constant:

    L = 0

Fixed point: the base model. It is the baseline that every comparison needs: it shows what evaluation alone costs, and how far
two evaluations of one model can differ.
"""

from torch import Tensor

from alignbench import Objective
from alignbench.objective import Needs
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import Terms


class NoObjective(Objective):
    """The base model as it is: no rollouts are scored and no weight changes."""

    @property
    def needs(self) -> Needs:
        return Needs(training=False, rewards=False)

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        """Gives 0, whatever the terms are."""
        return terms["log_prob"].sum() * 0.0
