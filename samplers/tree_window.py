"""tree_window: one root that splits at consecutive steps, inside a window that moves during the training.

w consecutive steps split into k children each, which gives k ** w leaves; the other steps are deterministic.

Source: TreeGRPO (arXiv 2512.08153). Its released code moves the window by one step from time to time; its paper draws the
window's start from a truncated geometric distribution. `schedule` offers both. How it differs: docs/samplers.md.
"""

from typing import Literal

import numpy as np
from pydantic import Field

from alignbench import Plan, Sampler
from samplers._schedule import place_at
from samplers._tree import TreeSettings, tree_plan


class TreeWindow(Sampler):
    """A tree whose consecutive splits move."""

    class Settings(TreeSettings):
        schedule: Literal["progress", "geometric"] = "progress"
        """Where the window is. progress: it moves from the first possible place to the last during the training. geometric: it
        is drawn in each iteration, with P(j-th place) proportional to ratio ** j."""
        ratio: float = Field(0.5, gt=0, le=1)
        """With `schedule: geometric`, how much less likely each place is than the one before; 1 makes all equally likely."""

    settings: Settings

    def plan(self, progress: float, rng: np.random.Generator) -> Plan:
        o = self.settings
        places = o.last_split - o.first_split - o.levels + 2
        if o.schedule == "progress":
            place = place_at(progress, places)
        else:
            weights = o.ratio ** np.arange(places)
            place = int(rng.choice(places, p=weights / weights.sum()))
        start = o.first_split + place
        return tree_plan(o, tuple(range(start, start + o.levels)))
