"""What drawn images share: their size, their grid, and colours with enough contrast."""

from collections.abc import Mapping
from functools import cache
from math import dist

import numpy as np

IMAGE_SIZE = 64
GRID = 8
"""Letters and shapes start at multiples of this number of pixels, the patch size of an image of 64 tokens."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 42),
    "orange": (245, 136, 24),
    "yellow": (250, 216, 40),
    "green": (44, 156, 66),
    "blue": (40, 88, 214),
    "purple": (130, 52, 176),
    "pink": (246, 132, 184),
    "brown": (126, 78, 40),
    "black": (24, 24, 26),
    "white": (250, 250, 250),
}
"""GenEval's colours by name, in sRGB."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (196, 200, 206),
    "sky": (184, 214, 238),
    "sand": (228, 214, 180),
    "mint": (192, 228, 206),
    "slate": (92, 102, 116),
    "night": (38, 46, 78),
}


def srgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """Converts sRGB values from 0 to 255 to CIE L*a*b* (D65); input and output are [..., 3]."""
    linear = np.asarray(rgb, dtype=np.float64) / 255.0
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
    xyz = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def nearest(rgb: np.ndarray, named: Mapping[str, tuple[int, int, int]]) -> str:
    """The name of the colour that is closest to an sRGB colour, [3], in L*a*b*."""
    lab = srgb_to_lab(np.array([rgb, *named.values()]))
    return list(named)[int(np.linalg.norm(lab[1:] - lab[0], axis=1).argmin())]


@cache
def contrast(color: str, background: str) -> float:
    """The distance in L*a*b* (CIE76) between a colour and a background, both given by name."""
    lab = srgb_to_lab(np.array([COLORS[color], BACKGROUNDS[background]]))
    return dist(lab[0], lab[1])


@cache
def backgrounds_for(colors: frozenset[str], minimum: float) -> tuple[str, ...]:
    """The backgrounds to which each of the colours has at least the contrast `minimum`."""
    return tuple(b for b in BACKGROUNDS if all(contrast(c, b) >= minimum for c in colors))


@cache
def colors_for(background: str, minimum: float) -> tuple[str, ...]:
    """The colours that have at least the contrast `minimum` to the background."""
    return tuple(c for c in COLORS if contrast(c, background) >= minimum)
