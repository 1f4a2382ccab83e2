"""pickscore: how well people would like the picture for its prompt, by a CLIP that was tuned on choices.

PickScore (Kirstain et al. 2023, arXiv 2305.01569): exp(logit_scale) times the cosine of the embeddings of prompt and
picture, about 20 to 24 for real models. Flow-GRPO (arXiv 2505.05470) trains on a 26th of it; both scales are reported.

`yuvalkirstain/PickScore_v1` is the published model. Pictures of the `tiny` backbone are scored by a small CLIP that ships,
trained on drawn pairs: see its card, `alignbench/backbones/weights/pickscore/README.md`. Its numbers compare with its own.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from alignbench.scorer import Images, as_arrays
from evals.embedders.clip import TINY, ClipScorer

FLOW_GRPO_SCALE = 26.0


class PickScore(ClipScorer):
    class Settings(ClipScorer.Settings):
        model: str = TINY
        """`tiny`, a local folder that CLIPModel opens, or a hub id such as yuvalkirstain/PickScore_v1."""
        scale: Literal["raw", "over_26"] = "raw"
        """What `score` gives, and so what is trained on. With rewards standardised in their group it makes no difference."""

    settings: Settings

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        raw = self._raw(images, prompts)
        return raw if self.settings.scale == "raw" else raw / FLOW_GRPO_SCALE

    def measure(self, images: Images, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        raw = self._raw(images, prompts)
        return {self.name: raw, f"{self.name}_over_26": raw / FLOW_GRPO_SCALE}

    def _raw(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        pictures, clip = as_arrays(images), self.clip
        text, image = clip.prompts(prompts), clip.pictures(pictures)
        return (clip.scale * (text * image).sum(dim=1)).double().numpy()
