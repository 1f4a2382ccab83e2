"""independent: K rollouts that share nothing but their prompt, stochastic at all steps but the last.

The sampler of Flow-GRPO and DDPO. The last step is deterministic, since noise drawn there would stay in the picture. With
`stochastic_share` below 1 only the steps nearest the noise are stochastic; the others cost no training row. At 0 none is, for
objectives that train on final pictures alone (dpo, raft, nft).
"""

from math import ceil
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from alignbench import Plan, Sampler, settings
from alignbench.rollouts.plan import Step


class Independent(Sampler):
    class Settings(settings.Settings):
        steps: int = Field(6, ge=2)
        """T, denoising steps of a rollout."""
        group_size: int = Field(27, ge=2)
        """K, rollouts of a prompt."""
        rule: Literal["sde", "cps", "dance"] = "cps"
        """Rule of the stochastic steps."""
        noise_level: float = Field(0.7, gt=0)
        """Its noise level."""
        stochastic_share: float = Field(1.0, ge=0, le=1)
        """Share of the steps but the last that are stochastic, counted from the noise and rounded up."""
        initial_noise: Literal["own", "shared"] = "own"
        """own: each rollout starts from a noise of its own. shared: those of a group start from one and part at the first
        step (DanceGRPO), which is one model row in place of K."""

        @model_validator(mode="after")
        def _differs(self) -> Self:
            if self.initial_noise == "shared" and self.stochastic_share == 0:
                raise ValueError("initial_noise=shared with stochastic_share=0 makes all rollouts of a group equal")
            return self

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        stochastic = ceil(o.stochastic_share * (o.steps - 1) - 1e-9)  # 0.28 x 25 is 7
        plan = Plan((*[Step(o.rule, o.noise_level)] * stochastic, *[Step()] * (o.steps - stochastic)), roots=o.group_size)
        return plan.from_one_noise() if o.initial_noise == "shared" else plan
