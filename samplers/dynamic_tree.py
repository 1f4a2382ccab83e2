"""dynamic_tree: one root that splits at steps drawn anew in every iteration, early in the training at early steps.

There are two schedules. `progress`, for split level j at training progress u in 0..1:

    mu_j = early_j + (late_j - early_j) u,  clipped to the steps that may split
    m    = (mu_j - first) / (last - first), clipped to 0.001..0.999
    xi   ~ Beta(m kappa, (1 - m) kappa),    s_j = round(first + xi (last - first))

kappa = 0 gives s_j = round(mu_j). `reward`, with alpha in 0.1..1 for where the rewards lie between their running bounds:

    t    ~ Beta(1 + (1 - alpha) kappa, 1 + alpha kappa),    s = round(first + (1 - t) (last - first))
    eta  = noise_level (1 + 0.3 (1 - alpha) - 0.2 alpha), clipped to 0.2..1

t = 1 is the noise. So branches split early while rewards are low, where the layout of the image is decided.

Source: TMPO's dynamic stochastic tree (arXiv 2605.10983), with the two schedules of its released code, which has the direction
of `reward` the wrong way round. Unlike there the splits are always distinct, so that every group has exactly children ** levels
leaves, and each split is a scored stochastic step. The released code replaces a first split at step 0 or 1 by initial noises:
`early_split: roots`. Further differences: docs/samplers.md.
"""

from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from alignbench import Plan, RolloutForest, Sampler
from samplers._schedule import clamped
from samplers._tree import EarlySplit, distinct, tree_plan

ALPHA_MIN = 0.1
"""The smallest alpha, which is also its first value."""
ALPHA_DECAY = 0.85
"""Decay of the moving average alpha, per rollout."""
BOUND_DECAY = 0.99
"""Decay of the moving averages of the lowest and the highest reward, per rollout."""
MIN_BOUND_DISTANCE = 1e-8
"""The smallest distance between the two bounds that is divided by."""
NOISE_RANGE = (0.2, 1.0)
"""The smallest and the largest eta of `schedule: reward`."""
DEFAULT_KAPPA = {"progress": 6.0, "reward": 4.0}
"""Schedule -> kappa where the setting is null."""


class DynamicTree(Sampler):
    """A tree whose splits are drawn in each iteration."""

    class Settings(EarlySplit):
        schedule: Literal["progress", "reward"] = "progress"
        """What decides where branches split. progress: how far the training is. reward: where the rewards lie between their
        running bounds."""
        early: tuple[float, ...] = (1, 2, 3)
        """With `schedule: progress`, the mean steps of the splits at the start of the training, one for each level."""
        late: tuple[float, ...] = (1, 3, 5)
        """With `schedule: progress`, the mean steps of the splits at the end of the training, one for each level."""
        kappa: float | None = Field(None, ge=0)
        """How closely the splits are drawn around their means. With `schedule: progress` 0 does not draw at all. null is 6 for
        progress and 4 for reward."""
        reward_bounds: tuple[float, float] = (0.2, 0.35)
        """With `schedule: reward`, the lowest and the highest reward at the start; both then follow the rewards of the
        rollouts."""
        min_gap: int = Field(1, ge=1)
        """The smallest number of steps from one split to the next."""

        @model_validator(mode="after")
        def _fits_its_schedule(self) -> Self:
            for name in ("early", "late"):
                if self.schedule == "progress" and len(getattr(self, name)) != self.levels:
                    raise ValueError(
                        f"{name} must name {self.levels} steps, one for each level, got {list(getattr(self, name))}"
                    )
            if self.schedule == "reward" and self.rule == "memoryless":
                raise ValueError("schedule=reward changes the noise, which rule=memoryless fixes; choose another of the two")
            if not self.reward_bounds[0] < self.reward_bounds[1]:
                raise ValueError(f"reward_bounds must rise, got {list(self.reward_bounds)}")
            room = self.last_split - self.first_split
            if (self.levels - 1) * self.min_gap > room:
                raise ValueError(
                    f"levels={self.levels} splits with min_gap={self.min_gap} do not fit into steps "
                    f"{self.first_split}..{self.last_split}; lower min_gap or raise steps"
                )
            return self

    settings: Settings

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.low, self.high = settings.reward_bounds
        self.alpha = ALPHA_MIN

    def observe(self, forest: RolloutForest) -> None:
        """Updates the running bounds and alpha with the rollout's rewards."""
        rewards = forest.rewards[~forest.rewards.isnan()]
        if len(rewards) == 0:
            return
        self.low += (1 - BOUND_DECAY) * (float(rewards.min()) - self.low)
        self.high += (1 - BOUND_DECAY) * (float(rewards.max()) - self.high)
        position = (float(rewards.mean()) - self.low) / max(self.high - self.low, MIN_BOUND_DISTANCE)
        self.alpha += (1 - ALPHA_DECAY) * (min(max(position, ALPHA_MIN), 1.0) - self.alpha)

    def state(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "alpha": self.alpha}

    def load_state(self, state: dict[str, Any]) -> None:
        self.low, self.high, self.alpha = state["low"], state["high"], state["alpha"]

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        first, last = o.first_split, o.last_split
        kappa = DEFAULT_KAPPA[o.schedule] if o.kappa is None else o.kappa
        if o.schedule == "progress":
            eta = o.noise_level
            splits = self._splits_at(clamped(progress), kappa, rng)
        else:
            factor = 1 + 0.3 * (1 - self.alpha) - 0.2 * self.alpha
            eta = float(np.clip(o.noise_level * factor, *NOISE_RANGE))
            times = rng.beta(1 + (1 - self.alpha) * kappa, 1 + self.alpha * kappa, size=o.levels)
            splits = [round(first + (1 - float(t)) * (last - first)) for t in times]
        return tree_plan(o, distinct(splits, first, last, o.min_gap), eta, early_split=o.early_split)

    def _splits_at(self, u: float, kappa: float, rng: np.random.Generator) -> list[int]:
        """Draws one split for each level at training progress u; they may coincide."""
        o = self.settings
        first, last = o.first_split, o.last_split
        means = [float(np.clip(e + (late - e) * u, first, last)) for e, late in zip(o.early, o.late, strict=True)]
        if kappa == 0 or first == last:
            return [round(mean) for mean in means]
        m = [float(np.clip((mean - first) / (last - first), 1e-3, 1 - 1e-3)) for mean in means]
        return [round(first + float(rng.beta(mj * kappa, (1 - mj) * kappa)) * (last - first)) for mj in m]
