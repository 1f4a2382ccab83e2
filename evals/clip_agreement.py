"""clip_agreement: how well the image fits its prompt, by a CLIP that nothing was trained on: 100 times their cosine similarity.

Source: CLIPScore (Hessel et al. 2021, arXiv 2104.08718), without its factor of 2.5 and its floor at 0. For photographs set
`model`, for instance to openai/clip-vit-large-patch14. For images of `tiny` it is the small CLIP that `pickscore` uses too, so
a task that trains on `pickscore` must not have this as a judge.
"""

from collections.abc import Sequence

import numpy as np

from alignbench.scorer import Images
from evals.embedders.clip import ClipScorer


class ClipAgreement(ClipScorer):
    """Cosine similarity of prompt and image, by a CLIP."""

    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        return (100 * self.similarity(images, prompts)).double().numpy()
