"""sliding_window: K rollouts that are stochastic only inside a window of steps, which moves during the training.

Outside the window the steps are deterministic: they cost a model row in the rollout and none in training. The window starts at
the noise and moves towards the image. The last step is always deterministic.

Source: MixGRPO (arXiv 2507.21802). How it differs: docs/samplers.md.
"""

from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from alignbench import Plan, Sampler
from alignbench.rollouts.plan import Step
from samplers._noise import NoiseSettings
from samplers._schedule import clamped


class SlidingWindow(Sampler):
    """K rollouts with a moving window of stochastic steps."""

    class Settings(NoiseSettings):
        steps: int = Field(6, ge=2)
        """T: how many denoising steps a rollout has."""
        group_size: int = Field(27, ge=2)
        """K: how many rollouts a group has."""
        window: int = Field(3, ge=1)
        """How many steps in a row are stochastic; fewer than `steps`."""
        passes: int = Field(1, ge=1)
        """How often the window passes over the steps during the training. It starts at the noise each time."""
        order: Literal["progressive", "random"] = "progressive"
        """Where the window is. progressive: it moves with the training's progress. random: at a random place in each
        iteration."""
        initial_noise: Literal["own", "shared"] = "own"
        """Which noise a rollout starts from. own: each from its own. shared: all of a group from one, so that they diverge at
        the window's first step (MixGRPO's code); until then they are one branch, which costs one model row per step."""

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
        """Chooses the window's first step, counted from 0."""
        o = self.settings
        places = o.steps - o.window
        if o.order == "random":
            return int(rng.integers(places))
        u = clamped(progress)
        return min(int(u * o.passes * places), o.passes * places - 1) % places

    def after(self, left: int) -> list[Step]:
        """Makes the steps after the window, where the schedule has `left` steps."""
        return [Step()] * left
