"""scenario_reward: the known reward of a point of the `gaussian_mixture` backbone.

`reward` is what training sees, with its noise and as a proxy; `true_reward` is what is really meant. Their formulas are in
`alignbench.backbones.mixture.scenarios`.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from alignbench import Scorer, settings
from alignbench.backbones.mixture.mixtures import from_images
from alignbench.backbones.mixture.scenarios import scored
from alignbench.scorer import Images, as_arrays


class ScenarioReward(Scorer):
    """The closed-form reward of a toy scenario."""

    class Settings(settings.Settings):
        which: Literal["reward", "true_reward"] = "reward"
        """Which of the two rewards is computed. They differ where the scenario has noise or a proxy."""

    settings: Settings

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        points = from_images(np.stack(as_arrays(images)))
        scores = np.empty(len(points))
        for prompt in set(prompts):
            indices = [i for i, p in enumerate(prompts) if p == prompt]
            scores[indices] = scored(points[indices], prompt, true=self.settings.which == "true_reward")
        return scores
