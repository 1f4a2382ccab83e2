"""The base class of rollout samplers: a sampler is a plan, and the executor runs it."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from alignbench import settings
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.plan import Plan


class Sampler(ABC):
    """Says how a group is drawn. Subclass it in `samplers/NAME.py`, and `--sampler NAME` finds it."""

    Settings: ClassVar[type[settings.Settings]] = settings.Settings
    name: str = ""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def observe(self, forest: RolloutForest) -> None:  # noqa: B027 - most samplers remember nothing
        """Called once for each rollout, with rewards: where a schedule learns of them."""

    def trained_leaves(self, forest: RolloutForest) -> Tensor | None:
        """The leaves, bool [G * K], whose paths are trained on, by their rewards; None for all."""
        return None

    def state(self) -> dict[str, Any]:
        """What `observe` remembers, as plain data: for a checkpoint, and to forget an iteration that failed."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Takes back what `state` gave."""

    @abstractmethod
    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        """The plan of one iteration, shared by all its groups.

        Args:
            progress: 0 at the start of the training, 1 at its end.
            rng: the only source of randomness; besides it a plan may depend on what `observe` has seen.
        """
