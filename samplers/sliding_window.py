"""sliding_window: K rollouts that are stochastic inside a window of steps alone; the window moves as the training goes on.

MixGRPO (arXiv 2507.21802). Outside the window the steps are deterministic: they cost a model row in the rollout and none in
training. The window starts at the noise and moves towards the picture; the last step stays deterministic.
"""

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from alignbench import Plan, Sampler, settings
from alignbench.rollouts.plan import Step


class SlidingWindow(Sampler):
    class Settings(settings.Settings):
        steps: int = Field(6, ge=2)
        """T, denoising steps of a rollout."""
        group_size: int = Field(27, ge=2)
        """K, rollouts of a prompt."""
        window: int = Field(3, ge=1)
        """How many steps are stochastic."""
        passes: int = Field(1, ge=1)
        """How often the window goes over the steps during the training; it starts again at the noise each time."""
        order: Literal["progressive", "random"] = "progressive"
        """random: the window stands anywhere, drawn anew in every iteration."""
        rule: Literal["sde", "cps", "dance"] = "cps"
        """Rule of the stochastic steps."""
        noise_level: float = Field(0.7, gt=0)
        """Its noise level."""
        initial_noise: Literal["own", "shared"] = "own"
        """own: each rollout starts from a noise of its own. shared: those of a group start from one and part at the window's
        first step (MixGRPO's code), until when they are one branch and cost one model row a step."""

        @model_validator(mode="after")
        def _fits(self) -> Self:
            if self.window >= self.steps:
                raise ValueError(f"window={self.window} leaves no deterministic step at the end of steps={self.steps}")
            return self

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        start = self.start(progress, rng)
        inside = [Step(o.rule, o.noise_level)] * o.window
        plan = Plan((*[Step()] * start, *inside, *self.after(o.steps - start - o.window)), roots=o.group_size)
        return plan.from_one_noise() if o.initial_noise == "shared" else plan

    def start(self, progress: float, rng: np.random.Generator) -> int:
        """The window's first step."""
        o = self.settings
        places = o.steps - o.window
        if o.order == "random":
            return int(rng.integers(places))
        u = min(max(progress, 0.0), 1.0)
        return min(int(u * o.passes * places), o.passes * places - 1) % places

    def after(self, left: int) -> list[Step]:
        """The steps behind the window, where that many of the schedule are left."""
        return [Step()] * left
