"""Finds a drawn word: its box and its ink. What the word says is for `evals.ocr` to read.

As for drawn shapes, the background is the rim's median colour and a pixel blends it with the ink, so that the pixels
furthest from the background show the ink itself.
"""

import numpy as np
from scipy import ndimage

from alignbench.embedded.drawing.lettering import MIN_CONTRAST
from alignbench.embedded.drawing.palette import COLORS, nearest, srgb_to_lab
from evals.detectors.base import Detection

MIN_DISTANCE = MIN_CONTRAST / 2.5
"""In L*a*b* from the background: where a letter may begin."""
INK_SHARE = 0.1
"""Of the pixels that stand out: the furthest from the background, which show the ink without blending."""
MIN_AREA = 0.002
"""Of the picture: a smaller part is a speck. The thinnest letter covers three times that."""
_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def background_of(picture: np.ndarray) -> np.ndarray:
    """The rim's median colour, sRGB [3], of uint8 [h, w, 3]."""
    rim = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    return np.asarray(np.median(rim, axis=0))


def find_lettering(picture: np.ndarray) -> Detection | None:
    """The box around all that is written and its colour, one of GenEval's names; None where nothing stands out."""
    rgb, background = picture.astype(np.float64), background_of(picture)
    distance = np.linalg.norm(srgb_to_lab(rgb) - srgb_to_lab(background), axis=2)
    far = distance[distance > MIN_DISTANCE]
    if len(far) < max(MIN_AREA * distance.size, 1):
        return None
    ink = np.median(rgb[distance >= np.quantile(far, 1 - INK_SHARE)], axis=0)
    direction = ink - background
    shares = (rgb - background) @ direction / (direction @ direction)
    labels, _ = ndimage.label(shares > 0.5, _NEIGHBOURS)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    ys, xs = np.nonzero(areas[labels] >= max(MIN_AREA * distance.size, 1))
    if not len(ys):
        return None
    box = [float(v) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)]
    return {"box": box, "score": 1.0, "color": nearest(ink, COLORS)}
