"""Prepares images for the processors of models."""

from typing import Any

import numpy as np

MAX_ASPECT_RATIO = 16
"""The largest ratio of the longer to the shorter side of an image that is prepared as a whole."""


def middle(image: np.ndarray) -> np.ndarray:
    """Cuts out the middle of an image whose aspect ratio is above `MAX_ASPECT_RATIO`; other images stay as they are.

    Processors resize the shorter side to the model's input and cut out the middle afterwards. An image of 60,000 x 1 pixels
    would take gigabytes in between.

    Args:
        image: uint8 [h, w, 3].

    Returns:
        A view of it.
    """
    height, width = image.shape[:2]
    longest = MAX_ASPECT_RATIO * min(height, width)
    top, left = max(height - longest, 0) // 2, max(width - longest, 0) // 2
    return image[top : top + longest, left : left + longest]


def torchvision() -> dict[str, Any]:
    """Returns the options of `from_pretrained` by which a processor uses torchvision, as transformers 5 does by default.

    transformers has two implementations, whose pixels differ slightly.
    """
    import transformers

    return {"use_fast": True} if transformers.__version__.startswith("4.") else {}
