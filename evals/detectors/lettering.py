"""Finds a drawn word: its box and its colour. Reading it is the task of `evals.ocr`.

As for drawn shapes, the background is the median colour of the rim, and a pixel is a blend of that and of the word's colour. So
the pixels furthest from the background show the word's colour itself.
"""

import numpy as np
from scipy import ndimage

from alignbench.embedded.drawing.lettering import MIN_CONTRAST
from alignbench.embedded.drawing.palette import COLORS, nearest, srgb_to_lab
from evals.detectors.base import Detection
from evals.detectors.pixels import NEIGHBOURS, background_of, box_around

MIN_DISTANCE = MIN_CONTRAST / 2.5
"""The distance from the background, in L*a*b*, from which on a pixel may belong to a letter."""
INK_SHARE = 0.1
"""The fraction of these pixels, those furthest from the background, that show the ink without blending."""
MIN_AREA = 0.002
"""The smallest area of a letter, as a fraction of the image; the thinnest letter covers three times that."""


def find_lettering(image: np.ndarray) -> Detection | None:
    """Finds the box around everything that is written in an image, and its colour.

    Args:
        image: uint8 [h, w, 3].

    Returns:
        The box and one of GenEval's colour names; None if nothing contrasts with the background.
    """
    rgb, background = image.astype(np.float64), background_of(image)
    distance = np.linalg.norm(srgb_to_lab(rgb) - srgb_to_lab(background), axis=2)
    far = distance[distance > MIN_DISTANCE]
    if len(far) < max(MIN_AREA * distance.size, 1):
        return None
    ink = np.median(rgb[distance >= np.quantile(far, 1 - INK_SHARE)], axis=0)
    direction = ink - background
    shares = (rgb - background) @ direction / (direction @ direction)
    labels, _ = ndimage.label(shares > 0.5, NEIGHBOURS)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    letters = areas[labels] >= max(MIN_AREA * distance.size, 1)
    if not letters.any():
        return None
    return {"box": box_around(letters), "score": 1.0, "color": nearest(ink, COLORS)}
