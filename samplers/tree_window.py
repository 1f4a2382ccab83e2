"""tree_window: one root that splits at consecutive steps, inside a window that moves as the training goes on.

TreeGRPO (arXiv 2512.08153): w consecutive splits in k children, k ** w leaves, deterministic elsewhere. Its released code
moves the window by one step from time to time; its paper draws the window's start from a truncated geometric distribution.
Both are here, by `schedule`.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from alignbench import Plan, Sampler
from samplers._tree import TreeSettings, tree_plan


class TreeWindow(Sampler):
    class Settings(TreeSettings):
        schedule: Literal["progress", "geometric"] = "progress"
        """progress: the window starts early and ends late in the training. geometric: its start is drawn, P(j-th place)
        proportional to ratio ** j."""
        ratio: float = Field(0.5, gt=0, le=1)
        """Of `schedule: geometric`; below 1 early places are likelier."""

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        places = o.last_split - o.first_split - o.levels + 2
        if o.schedule == "progress":
            place = min(int(min(max(progress, 0.0), 1.0) * places), places - 1)
        else:
            weights = o.ratio ** np.arange(places)
            place = int(rng.choice(places, p=weights / weights.sum()))
        start = o.first_split + place
        return tree_plan(o, tuple(range(start, start + o.levels)))
