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
        rewards: whether the images must be scored.
        reference: whether the frozen base model predicts a velocity for each row as well.
        behaviour: whether the behaviour policy does, which is the policy as it was at the rollout.
        behaviour_is_ema: whether the behaviour policy is a moving average of the policy instead, which also draws the
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
    """A loss on a scored rollout forest.

    Subclass it in `objectives/NAME.py`, implement `loss`, and `--objective NAME` finds it. `loss` must be a pure
    function of its arguments and of the state that `observe` keeps. Options are fields of an inner class
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
        """What the objective asks of a run; by default the policy and rewards alone."""
        return Needs()

    def prepare(self, latent_shape: tuple[int, ...], device: torch.device) -> None:  # noqa: B027
        """Creates parameters whose size depends on the model's latents; called once before the training.

        Args:
            latent_shape: the shape of one latent.
            device: where the parameters belong.
        """

    def observe(self, forest: RolloutForest) -> None:  # noqa: B027 - most objectives remember nothing
        """Updates running statistics; called once for each scored rollout, before its updates."""

    def state(self) -> dict[str, Any]:
        """The state that `observe` keeps, as plain data: for checkpoints, and to undo an iteration that failed."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restores what `state` returned."""

    def behaviour_ema_decay(self, updates: int) -> float:
        """The decay d in behaviour <- d behaviour + (1 - d) policy, which follows the updates of each rollout.

        It is used only by objectives with `Needs.behaviour_is_ema`.

        Args:
            updates: optimizer steps since the start of the training.
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
        """The leaves that this update of the rollout trains on, bool [G * K]; None for all leaves.

        `forest.update` is the number of the update. Rows on paths to other leaves only are not evaluated, so the loss must
        leave these leaves out: their terms are those of the rollout.
        """
        return None

    @property
    def replays(self) -> bool:
        """Whether the model is evaluated at the rollout's own steps, the default, and not at rows that `rows` makes."""
        return type(self).rows is Objective.rows

    def rows(self, forest: RolloutForest, update: int) -> Rows:
        """The model inputs of one update; by default each distinct parent of the forest's edges once.

        Args:
            update: how many updates this rollout has already served.
        """
        return EdgeRows.of(forest, self.trained_leaves(forest))

    def terms(self, rows: Any, velocities: Velocities) -> Terms:
        """The terms of some of the rows, differentiable in the policy's velocity; by default `edge_terms`.

        Args:
            rows: a contiguous part of what `rows` returned.
            velocities: what the policy and the models in `needs` predict for them.
        """
        return edge_terms(rows, velocities.policy, velocities.reference)

    @abstractmethod
    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        """The scalar to minimise.

        Args:
            terms: the terms of all rows; the loss is differentiated with respect to them.
            forest: with rewards.
        """

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        """Numbers for a row of the metrics table, from the detached terms before the rollout's first update."""
        return {}

    def parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the objective itself (log Z, a value head), which are trained with the policy's."""
        return ()
