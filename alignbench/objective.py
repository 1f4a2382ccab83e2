"""The base class of objectives: pure maths on small tensors. The engine owns the model."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignbench import settings
from alignbench.rollouts.forest import RolloutForest
from alignbench.rollouts.terms import EdgeRows, Rows, Terms, Velocities, edge_terms


@dataclass(frozen=True)
class Needs:
    """What an objective asks of a run beyond the policy.

    Attributes:
        training: False for an objective that never updates the policy.
        rewards: whether the pictures must be scored.
        reference: whether each row is also answered by the frozen base model.
        behaviour: whether each row is also answered by the behaviour policy, which is the policy as it was at the rollout.
        behaviour_is_ema: whether the behaviour policy is an average over the training instead, which also draws the
            rollouts; see `Objective.behaviour_ema_decay`.
        rollouts_from_reference: whether the reference, and not the policy, draws the rollouts.
    """

    training: bool = True
    rewards: bool = True
    reference: bool = False
    behaviour: bool = False
    behaviour_is_ema: bool = False
    rollouts_from_reference: bool = False


class Objective(ABC):
    """What to minimise, given a forest with rewards.

    Subclass it in `objectives/NAME.py`, implement `loss`, and `--objective NAME` finds it. `loss` must be a pure
    function of its arguments, and of what `observe` remembers. Options are fields of an inner class
    `Settings(alignbench.Settings)`.
    """

    Settings: ClassVar[type[settings.Settings]] = settings.Settings
    name: str = ""
    separable: ClassVar[bool] = False
    """Whether d(loss)/d(terms of a row) depends on no other row's terms. Then microbatches of later updates need one pass."""

    ratio_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that act through the importance ratio alone, such as a clip range."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    def needs(self) -> Needs:
        return Needs()

    def prepare(self, latent_shape: tuple[int, ...], device: torch.device) -> None:  # noqa: B027
        """Called once before training: where parameters are made whose size depends on the model's latents."""

    def observe(self, forest: RolloutForest) -> None:  # noqa: B027 - most objectives remember nothing
        """Called once for each rollout, with rewards and before its updates: where running statistics are kept."""

    def state(self) -> dict[str, Any]:
        """What `observe` remembers, as plain data: for a checkpoint, and to forget an iteration that failed."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Takes back what `state` gave."""

    def behaviour_ema_decay(self, updates: int) -> float:
        """d in old <- d old + (1 - d) policy, done after each rollout's updates, for an behaviour policy that lags.

        Args:
            updates: how many the policy has had.
        """
        return 0.0

    def ineffective_settings(self, updates_per_rollout: int) -> dict[str, str]:
        """Settings that cannot act in a run with this many updates for each rollout: name -> the reason as a clause."""
        needs = self.needs
        if updates_per_rollout > 1 or needs.behaviour_is_ema or needs.rollouts_from_reference:
            return {}
        return dict.fromkeys(self.ratio_settings, "with updates_per_rollout=1 every importance ratio is 1")

    def target_beta(self, iteration: int) -> float | None:
        """Inverse temperature of the Boltzmann target that the loss matches the policy to; None for other objectives.

        The target of a group is q = softmax(beta R~) over its leaves, with R~ from `target_reward`.

        Args:
            iteration: of the training, for an objective whose beta follows a schedule.
        """
        return None

    def target_reward(self, forest: RolloutForest) -> Tensor:
        """R~ of that target, float32 [G, K]; by default the reward in units of its group's standard deviation."""
        return forest.target_reward

    def trained_leaves(self, forest: RolloutForest) -> Tensor | None:
        """The leaves that this update of the rollout trains on, bool [G * K]; None for all. Rows to others cost nothing.

        `forest.update` says which update it is. The loss must not count the others: their terms are those of the rollout.
        """
        return None

    @property
    def replays(self) -> bool:
        """Whether the model is asked about the rollout's own steps, as by default, and not about rows that `rows` makes."""
        return type(self).rows is Objective.rows

    def rows(self, forest: RolloutForest, update: int) -> Rows:
        """What the model is asked in update number `update` of this rollout; by default each distinct parent once."""
        return EdgeRows.of(forest, self.trained_leaves(forest))

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        """Row terms of some of the rows, differentiable in the policy's velocity; by default `edge_terms`."""
        return edge_terms(rows, velocities.policy, velocities.reference)

    @abstractmethod
    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        """A scalar to minimise, from all the terms, `forest.rewards` and the forest's incidence."""

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        """Numbers for the metrics table, from the terms before the update; no gradients."""
        return {}

    def parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the objective's own (log Z, a value head), trained with the policy's."""
        return ()
