"""independent: K rollouts that share only their prompt, stochastic at all steps but the last.

The last step is deterministic, since noise drawn there would stay in the image. With `stochastic_share` below 1 only the steps
nearest the noise are stochastic, and the others cost no training row. With 0 no step is, for objectives that train on final
images only (dpo, raft, nft).

Source: the sampler of Flow-GRPO (arXiv 2505.05470) and DDPO (arXiv 2305.13301); with `initial_noise: shared` that of DanceGRPO
(arXiv 2505.07818). How it differs: docs/samplers.md.
"""

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from alignbench import Plan, Sampler
from alignbench.rollouts.plan import Step
from samplers._noise import NoiseSettings
from samplers._schedule import rounded_up


class Independent(Sampler):
    """K independent rollouts for each prompt."""

    class Settings(NoiseSettings):
        steps: int = Field(6, ge=2)
        """T: how many denoising steps a rollout has."""
        group_size: int = Field(27, ge=2)
        """K: how many rollouts a group has."""
        stochastic_share: float = Field(1.0, ge=0, le=1)
        """The fraction of the steps before the last that are stochastic, counted from the noise and rounded up."""
        initial_noise: Literal["own", "shared"] = "own"
        """Which noise a rollout starts from. own: each from its own. shared: all of a group from one, so that they diverge at
        the first step (DanceGRPO); that step then costs one model row instead of K."""

        @model_validator(mode="after")
        def _differs(self) -> Self:
            if self.initial_noise == "shared" and self.stochastic_share == 0:
                raise ValueError("initial_noise=shared with stochastic_share=0 makes all rollouts of a group equal")
            return self

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        stochastic = rounded_up(o.stochastic_share, o.steps - 1)
        plan = Plan((*[Step(o.rule, o.noise_level)] * stochastic, *[Step()] * (o.steps - stochastic)), roots=o.group_size)
        return plan.from_one_noise() if o.initial_noise == "shared" else plan
