"""What objectives with a Boltzmann target p_ref exp(beta R~) / Z share: in which units R~ is measured.

beta means what it says only where the unit is fixed. `group` divides by the deviation of each group, which shrinks as the
policy learns: beta on the raw reward, beta / deviation, then grows without an end, and so does the distance to the base model.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from alignbench import Objective, groups, settings
from alignbench.rollouts.forest import RolloutForest

RewardScale = Literal["group", "batch", "running", "raw"]


class TargetSettings(settings.Settings):
    """The unit of the target's reward."""

    reward_scale: RewardScale = "group"
    """The unit of the reward in exp(beta R~). group: its deviation in each group, as published; the fixed point moves as the
    policy learns. batch: its deviation within groups, pooled over the rollout. running: the same, pooled over all rollouts so
    far, which settles. raw: none; the fixed point is p_ref exp(beta R), and beta depends on the scorer's scale."""


class TargetObjective(Objective):
    """An objective with a Boltzmann target; it remembers the deviation of all rewards so far."""

    settings: TargetSettings

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.square_sum, self.reward_count = 0.0, 0

    def observe(self, forest: RolloutForest) -> None:
        """Adds the rollout's rewards to the pooled deviation within groups."""
        squares, count = _squares(forest)
        self.square_sum += squares
        self.reward_count += count

    def state(self) -> dict[str, Any]:
        return {"square_sum": self.square_sum, "reward_count": self.reward_count}

    def load_state(self, state: dict[str, Any]) -> None:
        # Checkpoints of before had no scale but `group`, which needs neither.
        self.square_sum = float(state.get("square_sum", 0.0))
        self.reward_count = int(state.get("reward_count", 0))

    def target_reward(self, forest: RolloutForest) -> Tensor:
        """R~ in the unit that `reward_scale` names, minus its group mean, float32 [G, K]; 0 where a reward is missing or equal.

        A sum of several rewards that were standardised already stays as it is for `group` and `raw`.
        """
        scale = self.settings.reward_scale
        if scale == "group":
            return forest.target_reward
        rewards = forest.by_group(forest.rewards)
        centred = groups.standardise(rewards, std="none")
        if scale == "raw":
            return centred
        squares, count = _squares(forest) if scale == "batch" else (self.square_sum, self.reward_count)
        deviation = max((squares / max(count, 1)) ** 0.5, groups.MIN_STD)
        return centred / deviation


def _squares(forest: RolloutForest) -> tuple[float, int]:
    """Sum of squared deviations from the group means, and how many rewards it is over; groups without spread do not count."""
    rewards = forest.by_group(forest.rewards).double()
    usable = groups.usable_leaves(rewards)
    deviations = groups.deviation(rewards)
    counts = usable.sum(1)
    return float((torch.where(counts > 0, deviations**2, 0.0) * counts).sum()), int(counts.sum())
