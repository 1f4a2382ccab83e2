"""What the detectors share that look at pixels: the background, and boxes around masks."""

import numpy as np

NEIGHBOURS = np.ones((3, 3), dtype=bool)
"""The pixels that count as connected to the middle one: all eight around it."""


def background_of(image: np.ndarray) -> np.ndarray:
    """Estimates the background colour as the median colour of the image's rim: uint8 [h, w, 3] -> sRGB, float64 [3]."""
    rim = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    return np.asarray(np.median(rim, axis=0))


def box_around(mask: np.ndarray, left: int = 0, top: int = 0) -> list[float]:
    """Computes the box around the true pixels of a mask.

    Args:
        mask: bool [h, w], with at least one true pixel.
        left: the column of the image at which the mask begins.
        top: the row of the image at which the mask begins.

    Returns:
        [x0, y0, x1, y1] in pixels of the image.
    """
    ys, xs = np.nonzero(mask)
    return [float(v) for v in (left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1)]
