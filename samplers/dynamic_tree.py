"""dynamic_tree: one root that splits at steps drawn anew in every iteration, early in the training at early steps.

TMPO's dynamic stochastic tree (arXiv 2605.10983), with the released code's two schedules. `progress`, for split level j at
training progress u in 0..1:

    mu_j = early_j + (late_j - early_j) u,  clipped to the steps that may split
    m    = (mu_j - first) / (last - first), kept off 0 and 1
    xi   ~ Beta(m kappa, (1 - m) kappa),    s_j = round(first + xi (last - first))

kappa = 0 gives s_j = round(mu_j). `reward`, with alpha in 0.1..1 how good the rewards are between their running bounds:

    t    ~ Beta(1 + (1 - alpha) kappa, 1 + alpha kappa), the noise side;  s = round(first + (1 - t) (last - first))
    noise level times 1 + 0.3 (1 - alpha) - 0.2 alpha, kept within 0.2..1

so that low rewards branch early, where the picture's layout is decided; the released code has this the wrong way round.
Unlike there the splits are always distinct, so that every group has exactly children ** levels leaves, and each split is a
scored stochastic step. The released code turns a first split at step 0 or 1 into initial noises: `early_split: roots`.
"""

from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from alignbench import Plan, RolloutForest, Sampler
from samplers._tree import EarlySplit, distinct, tree_plan

ALPHA_MIN, ALPHA_DECAY, BOUND_DECAY = 0.1, 0.85, 0.99
NOISE_RANGE = (0.2, 1.0)
DEFAULT_KAPPA = {"progress": 6.0, "reward": 4.0}


class DynamicTree(Sampler):
    class Settings(EarlySplit):
        schedule: Literal["progress", "reward"] = "progress"
        """What decides where branches split: how far the training is, or how good its rewards are."""
        early: tuple[float, ...] = (1, 2, 3)
        """progress: mean split steps at the start of the training, one for each level."""
        late: tuple[float, ...] = (1, 3, 5)
        """progress: mean split steps at its end."""
        kappa: float | None = Field(None, ge=0)
        """Concentration of the draws around their means, 0 for none; 6 for progress and 4 for reward where it is null."""
        reward_bounds: tuple[float, float] = (0.2, 0.35)
        """reward: lowest and highest reward to start from; they then follow those of the rollouts."""
        min_gap: int = Field(1, ge=1)
        """Steps from one split to the next, at least."""

        @model_validator(mode="after")
        def _fits_its_schedule(self) -> Self:
            for name in ("early", "late"):
                if self.schedule == "progress" and len(getattr(self, name)) != self.levels:
                    raise ValueError(
                        f"{name} must name {self.levels} steps, one for each level, got {list(getattr(self, name))}"
                    )
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
        """Moves the running bounds and alpha by the rollout's rewards."""
        rewards = forest.rewards[~forest.rewards.isnan()]
        if len(rewards) == 0:
            return
        self.low += (1 - BOUND_DECAY) * (float(rewards.min()) - self.low)
        self.high += (1 - BOUND_DECAY) * (float(rewards.max()) - self.high)
        place = (float(rewards.mean()) - self.low) / max(self.high - self.low, 1e-8)
        self.alpha += (1 - ALPHA_DECAY) * (min(max(place, ALPHA_MIN), 1.0) - self.alpha)

    def state(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "alpha": self.alpha}

    def load_state(self, state: dict[str, Any]) -> None:
        self.low, self.high, self.alpha = state["low"], state["high"], state["alpha"]

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        first, last = o.first_split, o.last_split
        kappa = DEFAULT_KAPPA[o.schedule] if o.kappa is None else o.kappa
        if o.schedule == "progress":
            noise_level = o.noise_level
            wanted = self._by_progress(min(max(progress, 0.0), 1.0), kappa, rng)
        else:
            swing = 1 + 0.3 * (1 - self.alpha) - 0.2 * self.alpha
            noise_level = float(np.clip(o.noise_level * swing, *NOISE_RANGE))
            noise_side = rng.beta(1 + (1 - self.alpha) * kappa, 1 + self.alpha * kappa, size=o.levels)
            wanted = [round(first + (1 - float(t)) * (last - first)) for t in noise_side]
        return tree_plan(o, distinct(wanted, first, last, o.min_gap), noise_level, early_split=o.early_split)

    def _by_progress(self, u: float, kappa: float, rng: np.random.Generator) -> list[int]:
        o = self.settings
        first, last = o.first_split, o.last_split
        means = [float(np.clip(e + (late - e) * u, first, last)) for e, late in zip(o.early, o.late, strict=True)]
        if kappa == 0 or first == last:
            return [round(mean) for mean in means]
        m = [float(np.clip((mean - first) / (last - first), 1e-3, 1 - 1e-3)) for mean in means]
        return [round(first + float(rng.beta(mj * kappa, (1 - mj) * kappa)) * (last - first)) for mj in m]
