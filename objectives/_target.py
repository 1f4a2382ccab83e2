"""What the objectives with a Boltzmann target p_ref exp(beta R~) / Z share: the unit of R~.

beta has a fixed meaning only if the unit is fixed. `group` divides by the standard deviation of each group, which shrinks as
the policy learns. Then beta / deviation, the inverse temperature for the raw reward, grows without bound, and so does the
distance to the base model.
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
    """The unit of the reward in exp(beta R~). group: its standard deviation in each group, as published; the fixed point then
    moves as the policy learns. batch: its standard deviation within groups, pooled over the rollout. running: the same, pooled
    over all rollouts so far, which converges. raw: no unit; the fixed point is p_ref exp(beta R), and beta depends on the
    scorer's scale."""


class TargetObjective(Objective):
    """The base class of objectives with a Boltzmann target. It remembers the standard deviation of all rewards so far."""

    settings: TargetSettings

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.square_sum, self.reward_count = 0.0, 0

    def observe(self, forest: RolloutForest) -> None:
        """Adds the rollout's rewards to the pooled standard deviation within groups."""
        squares, count = _pooled_squares(forest)
        self.square_sum += squares
        self.reward_count += count

    def state(self) -> dict[str, Any]:
        return {"square_sum": self.square_sum, "reward_count": self.reward_count}

    def load_state(self, state: dict[str, Any]) -> None:
        # Earlier checkpoints knew only the scale `group`, which needs neither.
        self.square_sum = float(state.get("square_sum", 0.0))
        self.reward_count = int(state.get("reward_count", 0))

    def target_reward(self, forest: RolloutForest) -> Tensor:
        """Computes R~ in the unit of `reward_scale`, minus its group mean.

        A sum of several rewards that were each standardised is not divided again for `group` and `raw`.

        Returns:
            float32 [G, K], zero where a reward is missing and in groups whose rewards are all equal.
        """
        scale = self.settings.reward_scale
        if scale == "group":
            return forest.target_reward
        rewards = forest.by_group(forest.rewards)
        centred = groups.standardise(rewards, std="none")
        if scale == "raw":
            return centred
        squares, count = _pooled_squares(forest) if scale == "batch" else (self.square_sum, self.reward_count)
        deviation = max((squares / max(count, 1)) ** 0.5, groups.MIN_STD)
        return centred / deviation


def _pooled_squares(forest: RolloutForest) -> tuple[float, int]:
    """The sum of squared deviations from the group means, and the number of rewards; groups of equal rewards do not count."""
    rewards = forest.by_group(forest.rewards).double()
    usable = groups.usable_leaves(rewards)
    deviations = groups.deviation(rewards)
    counts = usable.sum(1)
    return float((torch.where(counts > 0, deviations**2, 0.0) * counts).sum()), int(counts.sum())
