"""How pictures are prepared for models."""

from typing import Any

import numpy as np

MOST_EXTREME = 16
"""Times as long as it is wide may a picture be that is prepared whole."""


def middle(picture: np.ndarray) -> np.ndarray:
    """The middle of a picture that is more than MOST_EXTREME times as long as wide, [h, w, 3]; any other as it is.

    Processors make the shorter side as long as the model's input and cut the middle out; of 60,000 x 1 pixels they would make
    gigabytes before.
    """
    height, width = picture.shape[:2]
    longest = MOST_EXTREME * min(height, width)
    top, left = max(height - longest, 0) // 2, max(width - longest, 0) // 2
    return picture[top : top + longest, left : left + longest]


def torchvision() -> dict[str, Any]:
    """For `from_pretrained` of a processor: pictures are prepared by torchvision, as transformers 5 does untold.

    transformers has two ways, whose pixels differ a little.
    """
    import transformers

    return {"use_fast": True} if transformers.__version__.startswith("4.") else {}
