"""pickscore: how well people would like the image for its prompt, by a CLIP that was tuned on choices.

PickScore is exp(logit_scale) times the cosine similarity of the embeddings of prompt and image, about 20 to 24 for real models.
Flow-GRPO (arXiv 2505.05470) trains on 1/26 of it; both scales are reported.

`yuvalkirstain/PickScore_v1` is the published model. Images of the `tiny` backbone are scored by a small CLIP that ships with
the package and was trained on drawn pairs: see its card, `alignbench/backbones/weights/pickscore/README.md`. Its scores can
only be compared with each other.

Source: Kirstain et al. 2023 (arXiv 2305.01569).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from alignbench.scorer import Images
from evals.embedders.clip import TINY, ClipScorer

FLOW_GRPO_SCALE = 26.0
"""What Flow-GRPO divides PickScore by."""


class PickScore(ClipScorer):
    """Human preference, by a tuned CLIP."""

    class Settings(ClipScorer.Settings):
        model: str = TINY
        """The CLIP model: `tiny`, a local folder that CLIPModel can open, or a hub id such as yuvalkirstain/PickScore_v1."""
        scale: Literal["raw", "over_26"] = "raw"
        """On which scale a run trains. raw: PickScore. over_26: PickScore / 26, as Flow-GRPO. If rewards are standardised in
        their group, it makes no difference."""

    settings: Settings

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        raw = self._raw(images, prompts)
        return raw if self.settings.scale == "raw" else raw / FLOW_GRPO_SCALE

    def measure(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        raw = self._raw(images, prompts)
        return {self.name: raw, f"{self.name}_over_26": raw / FLOW_GRPO_SCALE}

    def _raw(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        similarity = self.similarity(images, prompts)
        return (self.clip.scale * similarity).double().numpy()
