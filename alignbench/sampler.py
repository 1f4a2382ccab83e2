"""The base class of rollout samplers. A sampler makes plans, and the executor runs them."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from alignbench import settings
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.plan import Plan


class Sampler(ABC):
    """Decides how the rollouts of a group are drawn. Subclass it in `samplers/NAME.py`, and `--sampler NAME` finds it."""

    Settings: ClassVar[type[settings.Settings]] = settings.Settings
    name: str = ""
    """The name that the plug-in is loaded by."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def observe(self, forest: RolloutForest) -> None:  # noqa: B027 - most samplers remember nothing
        """Is called once for each rollout, which has its rewards; a schedule that depends on them remembers them here."""

    def trained_leaves(self, forest: RolloutForest) -> Tensor | None:
        """Marks the leaves whose paths are trained on, which may depend on their rewards: bool [G * K]; None for all."""
        return None

    def state(self) -> dict[str, Any]:
        """Returns what `observe` remembers, as plain data. It goes into checkpoints, and undoes an iteration that failed."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restores what `state` returned."""

    @abstractmethod
    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        """Makes the plan of one iteration, which all its groups share.

        Args:
            progress: how much of the training is done, from 0 to 1.
            rng: the only source of randomness. A plan may also depend on what `observe` remembers.
        """
