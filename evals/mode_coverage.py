"""mode_coverage: how evenly the pictures of a drawn scene's prompt spread over what the prompt leaves open.

Colour (where none is asked for), place, size and background of what the detector of drawn shapes finds: for each the number
of different values, and the entropy over them divided by its maximum, the logarithm of the number of values or of pictures,
whichever is smaller. 1 is an even spread, 0 always the same.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cache
from math import log
from typing import Any

import numpy as np

from alignbench import SetMetric, UserError
from alignbench.drawing.palette import BACKGROUNDS, COLORS, PICTURE_SIZE, srgb_to_lab
from alignbench.drawing.scenes import SIZES, Scene, Shape
from evals._shapes import ShapesDetector
from evals.geneval import Detection, parse_scene_prompt

ASPECTS = ("color", "place", "size", "background")
PLACES = 3
"""Rows and columns of places."""
_BACKGROUNDS_LAB = srgb_to_lab(np.array(list(BACKGROUNDS.values())))


def coverage(values: Sequence[Hashable], possible: int) -> float:
    """Entropy of the values over its maximum for this many values and possible ones; NaN where there are fewer than two.

    Raises:
        UserError: fewer than two values are possible.
    """
    if possible < 2:
        raise UserError(f"coverage needs at least two possible values, got {possible}")
    if len(values) < 2:
        return float("nan")
    shares = [count / len(values) for count in Counter(values).values()]
    return -sum(p * log(p) for p in shares) / log(min(len(values), possible))


class ModeCoverage(SetMetric):
    def measure(self, images: np.ndarray, latents: Any, prompt: str) -> dict[str, float]:
        """NaN for what the prompt settles, for prompts of other tasks, and where nothing is found in two pictures."""
        found: dict[str, float] = {}
        metadata = parse_scene_prompt(prompt)
        seen: dict[str, list[Hashable]] = {aspect: [] for aspect in ASPECTS}
        seen["background"] = [background(picture) for picture in images]
        possible = {"color": len(COLORS), "place": PLACES**2, "size": 2, "background": len(BACKGROUNDS)}
        if metadata is not None:
            clause = metadata["include"][0]
            diameters = sorted(SIZES[sum(c["count"] for c in metadata["include"])])
            possible["size"] = len(diameters)
            for detections in ShapesDetector().detect(list(images)):
                shapes = detections.get(clause["class"], [])
                if not shapes:
                    continue
                if "color" not in clause:
                    seen["color"].append(shapes[0].get("color"))
                seen["place"].append(place(shapes[0], images.shape[1:3]))
                if len(diameters) > 1:
                    seen["size"].append(size(shapes[0], clause["class"], diameters, images.shape[1]))
        for aspect in ASPECTS:
            found[f"modes_{aspect}"] = float(len(set(seen[aspect]))) if seen[aspect] else float("nan")
            found[f"coverage_{aspect}"] = coverage(seen[aspect], max(possible[aspect], 2))
        return found


def place(shape: Detection, picture: Sequence[int]) -> tuple[int, int]:
    """Row and column of the box's centre among PLACES each."""
    x0, y0, x1, y1 = shape["box"]
    height, width = picture
    return min(int(PLACES * (y0 + y1) / 2 / height), PLACES - 1), min(int(PLACES * (x0 + x1) / 2 / width), PLACES - 1)


def size(shape: Detection, kind: str, diameters: Sequence[float], side: int) -> int:
    """Which of the drawn diameters (ascending, in pixels of a drawn picture) the box is nearest to."""
    x0, y0, x1, y1 = shape["box"]
    extent = max(x1 - x0, y1 - y0) * PICTURE_SIZE / side
    return int(np.abs([extent - drawn_extent(kind, diameter) for diameter in diameters]).argmin())


@cache
def drawn_extent(kind: str, diameter: float) -> float:
    """The longer side of the box around a drawn shape: a square's is shorter than its diameter."""
    middle = PICTURE_SIZE / 2
    picture = Scene("grey", (Shape(kind, "black", (middle, middle), diameter),)).draw()
    found = ShapesDetector().detect([picture])[0][kind][0]["box"]
    return max(found[2] - found[0], found[3] - found[1])


def background(picture: np.ndarray) -> int:
    """Index of the drawn background that the rim's median colour is nearest to."""
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    return int(np.linalg.norm(_BACKGROUNDS_LAB - srgb_to_lab(np.median(rim, axis=0)), axis=1).argmin())
