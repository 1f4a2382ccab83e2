"""flash: a sliding window of stochastic steps, with fewer and larger deterministic steps after it.

The steps after the window only carry what it has drawn on to the image, which needs no fine steps. So they take several steps
of the schedule at once: `compress` times as many steps as the schedule has there.

Source: MixGRPO-Flash (arXiv 2507.21802). Its code takes these steps with a second-order multistep solver (DPM-Solver++); here
they are Euler steps like all others. Further differences: docs/samplers.md.
"""

from math import floor
from typing import Literal

from pydantic import Field

from alignbench.rollouts.plan import Step
from samplers._schedule import ROUNDING, rounded_up
from samplers.sliding_window import SlidingWindow


class Flash(SlidingWindow):
    """A sliding window with larger steps after it."""

    class Settings(SlidingWindow.Settings):
        compress: float = Field(0.4, gt=0, le=1)
        """How many steps are taken after the window, as a fraction of the schedule's steps there; 1 is `sliding_window`."""
        rounding: Literal["up", "released"] = "up"
        """How that fraction of the n steps after the window is rounded. up: compress n, rounded up. released: as in the public
        code, compress (n + 1), rounded down, minus 1, but at least one step."""

    settings: Settings

    def after(self, left: int) -> list[Step]:
        """Makes the steps after the window. They are as equal as whole numbers allow, the larger ones first."""
        o = self.settings
        steps = rounded_up(o.compress, left)
        if left and o.rounding == "released":
            steps = max(floor(o.compress * (left + 1) + ROUNDING) - 1, 1)
        # The details of the image are decided last and need the smaller steps.
        return [Step(stride=left // steps + (i < left % steps)) for i in range(steps)]
