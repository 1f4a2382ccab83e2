"""The base class of objectives: pure maths on small tensors. The engine owns the model."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alignbench import settings
from alignbench.config.run_config import ElboConfig
from alignbench.errors import UserError
from alignbench.rollouts.elbo import ElboRows, elbo_forest, elbo_rows, elbo_terms
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
        behaviour_is_ema: whether the behaviour policy is a moving average of the policy instead; see
            `Objective.behaviour_ema_decay`.
        ema_draws_rollouts: whether that moving average draws the rollouts, and not the policy.
        rollouts_from_reference: whether the reference, and not the policy, draws the rollouts.
    """

    training: bool = True
    rewards: bool = True
    reference: bool = False
    behaviour: bool = False
    behaviour_is_ema: bool = False
    ema_draws_rollouts: bool = True
    rollouts_from_reference: bool = False

    @property
    def policy_draws_rollouts(self) -> bool:
        """Whether the policy itself draws the rollouts, and not the reference or a moving average."""
        return not (self.rollouts_from_reference or (self.behaviour_is_ema and self.ema_draws_rollouts))


@dataclass(frozen=True)
class Strength:
    """The setting of an objective that trades reward for closeness to the base model.

    Attributes:
        setting: its name among the objective's settings.
        values: values worth trying, from the one that keeps the policy closest to the base model to the one that lets it go
            furthest. Their order is the setting's direction.
    """

    setting: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Divergence:
    """A divergence of path distributions that an objective claims to descend.

    With s the log-density of a path under the policy, l its log-ratio to the base model's, and y = kl l - reward R~, it is
    E[y] at alpha = 1. Else it is the alpha divergence whose gradient is that of E[exp((alpha - 1) y)] / (alpha - 1)^2 with its
    mean held at 1: E[w grad s] with w = exp((alpha - 1) y) / ((alpha - 1) E exp((alpha - 1) y)). So
    `Divergence("reverse KL", reward=beta)` is KL(p || p_ref exp(beta R~) / Z), with alpha = 0 it is the forward KL, and with
    kl = 0 and alpha = 1 the expected reward.

    Attributes:
        name: what tables call it.
        reward: how much the reward counts; for a Boltzmann target its beta.
        kl: how much the log-ratio to the base model counts.
        alpha: 1 for the reverse KL, 0 for the forward KL.
        relative_to_base: False if l is s itself, so that the target is exp(beta R~) alone; alpha is 1 then.
    """

    name: str
    reward: float
    kl: float = 1.0
    alpha: float = 1.0
    relative_to_base: bool = True


class Objective(ABC):
    """A loss on a scored rollout forest.

    Subclass it in `objectives/NAME.py`, implement `loss`, and `--objective NAME` finds it. `loss` must be a pure
    function of its arguments and of the state that `observe` keeps. Options are fields of an inner class
    `Settings(alignbench.Settings)`.
    """

    Settings: ClassVar[type[settings.Settings]] = settings.Settings
    name: str = ""
    separable: bool = False
    """Whether d(loss)/d(terms of a row) depends on no other row's terms. Then micro-batches of later updates need one pass."""

    ratio_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that act through the importance ratio alone, such as a clip range."""

    path_settings: ClassVar[dict[str, Any]] = {}
    """Settings that mean something only for the steps of a path, with the value that they must have where log-probabilities are
    estimated from final images (`likelihood: elbo`)."""

    needs_steps: ClassVar[bool] = False
    """Whether the loss relates the steps of a path to each other, so that log-probabilities cannot come from final images."""

    follows_progress: bool = False
    """Whether the loss depends on the share of the training that is done, so that a longer training has another one."""

    strength: ClassVar[Strength | None] = None
    """The setting that a trade-off curve sweeps; None where only the learning rate and the length of the training act so."""

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
        """Settings that cannot act in a run with this many updates for each rollout: name -> the reason as a clause.

        A run warns of a value that somebody chose for one of them. By default these are `ratio_settings` where every importance
        ratio is 1.
        """
        if not self.stays_on_policy(updates_per_rollout):
            return {}
        return dict.fromkeys(self.ratio_settings, "with updates_per_rollout=1 every importance ratio is 1")

    def ineffective_parts(self, updates_per_rollout: int) -> dict[str, str]:
        """Models and parts of the loss that cannot act in such a run: name -> the reason as a clause.

        A run always warns of them. By default this is a behaviour policy that is the policy itself.
        """
        needs = self.needs
        if needs.behaviour_is_ema or not (needs.behaviour and self.stays_on_policy(updates_per_rollout)):
            return {}
        return {"behaviour policy": "with updates_per_rollout=1 and without an average it is the policy itself"}

    def stays_on_policy(self, updates_per_rollout: int) -> bool:
        """Whether every update trains on a rollout of the very policy that it changes."""
        return updates_per_rollout == 1 and self.needs.policy_draws_rollouts

    def target_beta(self, iteration: int) -> float | None:
        """Inverse temperature of the Boltzmann target that the loss matches the policy to; None for other objectives.

        The target of a group is q = softmax(beta R~) over its leaves, with R~ from `target_reward`.

        Args:
            iteration: of the training, for an objective whose beta follows a schedule.
        """
        return None

    def target_reward(self, forest: RolloutForest) -> Tensor:
        """Computes R~ of the Boltzmann target, float32 [G, K]; by default in units of the group's standard deviation."""
        return forest.target_reward

    def descends(self, forest: RolloutForest) -> Divergence | None:
        """The divergence whose gradient the loss claims to estimate on policy; None if it claims none.

        `diagnose --gradients` compares the two. R~ of the divergence is `target_reward`.

        Args:
            forest: for settings that follow the iteration or the progress, or depend on the number of stochastic steps.
        """
        return None

    def trained_leaves(self, forest: RolloutForest) -> Tensor | None:
        """The leaves that this update of the rollout trains on, bool [G * K]; None for all leaves.

        `forest.update` is the number of the update. Rows on paths to other leaves only are not evaluated, so the loss must
        leave these leaves out: their terms are those of the rollout.
        """
        return None

    @property
    def replays(self) -> bool:
        """Whether the model is evaluated at the rollout's own steps, the default, and not at rows that `rows` makes."""
        return self.on_paths

    @property
    def on_paths(self) -> bool:
        """Whether the loss asks for log-probabilities of paths, which may be estimated from final images instead."""
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
        if isinstance(rows, ElboRows):
            return elbo_terms(rows, velocities)
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


class FromFinalImages(Objective):
    """A mixin for an objective on paths whose log-probabilities are estimated from final images; see `with_elbo`.

    Attributes:
        elbo: how they are estimated.
    """

    elbo: ElboConfig

    @property
    def needs(self) -> Needs:
        return replace(super().needs, behaviour=True)

    @property
    def replays(self) -> bool:
        return False

    @property
    def on_paths(self) -> bool:
        return True

    def rows(self, forest: RolloutForest, update: int) -> Rows:
        return elbo_rows(forest, self.elbo, self.trained_leaves(forest))

    def loss(self, terms: Terms, forest: RolloutForest) -> Tensor:
        return super().loss(terms, elbo_forest(forest, self.elbo))  # type: ignore[safe-super]

    def diagnostics(self, terms: Terms, forest: RolloutForest) -> dict[str, float]:
        return super().diagnostics(terms, elbo_forest(forest, self.elbo))

    def ineffective_parts(self, updates_per_rollout: int) -> dict[str, str]:
        # The behaviour policy gives the ratio its denominator, which is not a part that anybody chose.
        found = super().ineffective_parts(updates_per_rollout)
        return {name: reason for name, reason in found.items() if name != "behaviour policy"}

    def descends(self, forest: RolloutForest) -> Divergence | None:
        return None


def with_elbo(objective: Objective, elbo: ElboConfig) -> Objective:
    """Makes the same objective with log-probabilities that are estimated from final images.

    An objective that trains on final images by itself is returned unchanged.

    Raises:
        UserError: the objective, or one of its settings, has a meaning only for the steps of a path.
    """
    if not (objective.on_paths and objective.needs.training):
        return objective
    cls = type(objective)
    if objective.needs_steps:
        raise UserError(
            f"objective {objective.name} relates the steps of a path to each other, and likelihood=elbo has none; "
            "choose likelihood=path"
        )
    for name, value in objective.path_settings.items():
        if (chosen := getattr(objective.settings, name)) != value:
            raise UserError(
                f"objective.{name}={chosen} has a meaning only for the steps of a path; with likelihood=elbo it must be {value}"
            )
    derived: Any = type(cls.__name__, (FromFinalImages, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    made = copy.copy(objective)
    made.__class__ = derived
    made.elbo = elbo  # type: ignore[attr-defined]
    return made
