"""independent: K rollouts that share nothing but their prompt, stochastic at all steps but the last.

The sampler of Flow-GRPO and DDPO. The last step is deterministic, since noise drawn there would stay in the picture.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from alignbench import Plan, Sampler, settings
from alignbench.plan import Step


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

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        return Plan(steps=(*[Step(o.rule, o.noise_level)] * (o.steps - 1), Step()), roots=o.group_size)
