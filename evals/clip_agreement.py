"""clip_agreement: how well the picture fits its prompt, by a CLIP that nothing was trained on: 100 times the cosine of both.

CLIPScore (Hessel et al. 2021, arXiv 2104.08718) without its factor of 2.5 and its floor at 0. For photographs set `model` to
openai/clip-vit-large-patch14, say. For pictures of `tiny` it is the small CLIP that `pickscore` uses too, so that a task
which trains on that must not be judged by this.
"""

from collections.abc import Sequence

import numpy as np

from alignbench.scorer import Images, as_arrays
from evals.embedders.clip import ClipScorer


class ClipAgreement(ClipScorer):
    def score(self, images: Images, prompts: Sequence[str]) -> np.ndarray:
        text, image = self.clip.prompts(prompts), self.clip.pictures(as_arrays(images))
        return (100 * (text * image).sum(dim=1)).double().numpy()
