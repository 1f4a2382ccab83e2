"""flash: a sliding window of stochastic steps, with fewer and larger deterministic steps behind it.

MixGRPO-Flash (arXiv 2507.21802). What the window has drawn is only carried on to the picture behind it, which needs no fine
steps: the schedule's steps there are taken several at a time, `compress` times as many in all. The public code makes them by
a second-order multistep solver (DPM-Solver++); here they are Euler steps like all others.
"""

from math import ceil, floor
from typing import Literal

from pydantic import Field

from alignbench.rollouts.plan import Step
from samplers.sliding_window import SlidingWindow

ROUNDING = 1e-9
"""0.28 x 25 is 7 steps, not 8."""


class Flash(SlidingWindow):
    class Settings(SlidingWindow.Settings):
        compress: float = Field(0.4, gt=0, le=1)
        """Steps behind the window, as a share of the schedule's there, rounded up; 1 is sliding_window."""
        rounding: Literal["up", "released"] = "up"
        """How many steps `compress` makes of the n that are left behind the window. up: compress n, rounded up. released:
        the public code's count, compress (n + 1) rounded down, less 1, but at least one step."""

    settings: Settings

    def after(self, left: int) -> list[Step]:
        o = self.settings
        made = ceil(o.compress * left - ROUNDING)
        if left and o.rounding == "released":
            made = max(floor(o.compress * (left + 1) + ROUNDING) - 1, 1)
        # As even as whole numbers allow, the larger ones first: the picture's details want the smaller ones.
        return [Step(stride=left // made + (i < left % made)) for i in range(made)]
