"""A detector of drawn shapes: exact on the drawing program's images, and tolerant of a small model's blur and noise.

The background is the median colour of the rim. A pixel near an object is a blend of that and of the object's ink, so its share
of ink follows from its colour alone; areas and centres that are computed from these shares are robust to blur. The kind of a
shape is the outline that overlaps best when drawn with that area and centre, and this overlap is the score.
"""

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from alignbench.embedded.drawing.palette import BACKGROUNDS, COLORS, IMAGE_SIZE, contrast, nearest, srgb_to_lab
from alignbench.embedded.drawing.scenes import MIN_CONTRAST, SHAPES, Scene, Shape
from evals.detectors.base import Detection, Detections, Detector
from evals.detectors.grammar import SCENES
from evals.detectors.pixels import NEIGHBOURS, background_of, box_around

MIN_OVERLAP = {"circle": 0.85, "square": 0.85, "triangle": 0.8, "star": 0.75, "cross": 0.8}
"""Kind -> the smallest overlap (soft intersection over union) by which a patch counts as an object. A diamond and a circle of
the same area overlap by 0.83, so compact outlines must fit better than those with thin limbs, which blur makes thinner and few
blobs resemble."""
MIN_AREA = 0.005
"""The smallest area of an object, as a fraction of the image; the smallest drawn star covers twice that."""
MIN_DISTANCE = min(d for b in BACKGROUNDS for c in COLORS if (d := contrast(c, b)) >= MIN_CONTRAST) / 2.5
"""The distance from the background, in L*a*b*, from which on a pixel may belong to an object. The object's edge is then
determined relative to its own ink."""
MIN_INK_SHARE = 0.25
"""The smallest fraction of a patch's flat pixels that is an ink; a rarer colour is a blend at an edge."""
INNER = 0.85
"""How near a pixel's distance from the background must be to the largest one around it for the pixel to show the ink itself."""
MARGIN = 2
"""How many pixels around a patch belong to its soft edge."""

_PALETTE_LAB = srgb_to_lab(np.array(list(COLORS.values())))


class ShapesDetector(Detector):
    """Finds circles, squares, triangles, stars and crosses in ten colours on a plain background, without a trained model."""

    classes = frozenset(SHAPES)
    colors = frozenset(COLORS)
    grammar = SCENES

    def detect(self, images: list[np.ndarray], colored: Sequence[Collection[str]] | None = None) -> list[Detections]:
        return [_detect(image) for image in images]

    def golden(self) -> list[tuple[np.ndarray, dict[str, Any], bool]]:
        pair = Scene("grey", (Shape("circle", "red", (16.0, 30.0), 20.0), Shape("star", "blue", (46.0, 34.0), 22.0)))
        row = Scene("night", tuple(Shape("cross", "yellow", (12.0 + 20 * i, 14.0 + 16 * i), 15.0) for i in range(3)))
        tower = Scene("sand", (Shape("triangle", "purple", (32.0, 18.0), 24.0), Shape("square", "white", (30.0, 48.0), 20.0)))
        cases = [
            (pair, "a red circle and a blue star", True),
            (pair, "a blue circle", False),
            (pair, "a circle left of a star", True),
            (pair, "a circle right of a star", False),
            (row, "three crosses", True),
            (row, "two crosses", False),
            (row, "four crosses", False),
            (tower, "a purple triangle and a white square", True),
            (tower, "a triangle above a square", True),
            (tower, "a star", False),
            (Scene("mint", ()), "a circle", False),
        ]
        return [(scene.draw(), SCENES.parse(prompt) or {}, answer) for scene, prompt, answer in cases]

    def describe(self) -> dict[str, Any]:
        return {"detector": "shapes", "device": "cpu", "min_overlap": MIN_OVERLAP, "min_area": MIN_AREA}


def _detect(image: np.ndarray) -> Detections:
    """The detections in one image, uint8 [h, w, 3]: class -> detections, best first."""
    rgb = image.astype(np.float64)
    background = background_of(image)
    smooth = ndimage.gaussian_filter(rgb, (0.6, 0.6, 0), mode="nearest")
    lab = srgb_to_lab(smooth)
    distance = np.linalg.norm(lab - srgb_to_lab(background), axis=2)
    min_area = MIN_AREA * distance.size
    detections: dict[str, list[Detection]] = {}
    for rows, columns, patch in _patches(distance > MIN_DISTANCE, min_area):
        window = rows, columns
        inks = _inks(smooth[window], lab[window], distance[window], patch)
        for ink, shares in zip(inks, _ink_shares(rgb[window], background, inks, patch), strict=True):
            color = nearest(ink, COLORS)
            for top, left, cover in _objects(shares, min_area):
                kind, overlap = _recognise(cover)
                if overlap >= MIN_OVERLAP[kind]:
                    box = box_around(cover > 0.5, left=columns.start + left, top=rows.start + top)
                    detections.setdefault(kind, []).append({"box": box, "score": overlap, "color": color})
    return {kind: sorted(of_kind, key=lambda d: -d["score"]) for kind, of_kind in detections.items()}


def _patches(mask: np.ndarray, min_area: float) -> list[tuple[slice, slice, np.ndarray]]:
    """The connected parts of a mask [h, w] with enough area: rows and columns of a window around each, and its mask there."""
    labels, _ = ndimage.label(mask, NEIGHBOURS)
    areas = np.bincount(labels.ravel())
    patches = []
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        if areas[label] >= min_area:
            rows, columns = (slice(max(p.start - MARGIN, 0), p.stop + MARGIN) for p in place)
            patches.append((rows, columns, labels[rows, columns] == label))
    return patches


def _inks(smooth: np.ndarray, lab: np.ndarray, distance: np.ndarray, patch: np.ndarray) -> list[np.ndarray]:
    """The colours that a patch is painted in, sRGB [3] each; more than one where objects touch.

    Args:
        smooth: the smoothed image in the patch's window, sRGB [h, w, 3].
        lab: the same in L*a*b*.
        distance: the distance from the background in L*a*b*, [h, w].
        patch: the pixels that belong to the patch, bool [h, w].
    """
    flat = patch & (distance >= INNER * ndimage.maximum_filter(distance, 3))
    names = np.linalg.norm(lab[flat][:, None] - _PALETTE_LAB, axis=2).argmin(axis=1)
    votes = np.bincount(names, minlength=len(COLORS))
    inks: list[np.ndarray] = []
    for color in np.argsort(-votes, kind="stable"):
        if votes[color] < max(MIN_INK_SHARE * len(names), 1):
            break
        reach = distance[flat][names == color]
        ink = np.median(smooth[flat][names == color][reach >= np.median(reach)], axis=0)
        # An ink whose colour lies between two names must not count twice.
        if all(np.linalg.norm(srgb_to_lab(ink) - srgb_to_lab(other)) > MIN_DISTANCE for other in inks):
            inks.append(ink)
    return inks


def _ink_shares(rgb: np.ndarray, background: np.ndarray, inks: list[np.ndarray], patch: np.ndarray) -> list[np.ndarray]:
    """The share of each ink in each pixel of the window, [h, w] in 0..1; a pixel is a blend of one ink and the background."""
    near = ndimage.binary_dilation(patch, NEIGHBOURS, iterations=MARGIN)
    shares, errors = [], []
    for ink in inks:
        direction = ink - background
        share = np.clip((rgb - background) @ direction / (direction @ direction), 0, 1)
        shares.append(np.where(near, share, 0))
        errors.append(np.linalg.norm(rgb - background - share[..., None] * direction, axis=2))
    if len(inks) < 2:
        return shares
    best = np.argmin(errors, axis=0)
    return [np.where(best == i, share, 0) for i, share in enumerate(shares)]


def _objects(shares: np.ndarray, min_area: float) -> list[tuple[int, int, np.ndarray]]:
    """The connected objects of one ink: top and left of a window, and the cover of the object in it, 0..1 with a soft edge."""
    labels, _ = ndimage.label(shares > 0.5, NEIGHBOURS)
    objects = []
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        rows, columns = (slice(max(p.start - MARGIN, 0), p.stop + MARGIN) for p in place)
        own = labels[rows, columns] == label
        if np.count_nonzero(own) < min_area:
            continue
        near = ndimage.binary_dilation(own, NEIGHBOURS, iterations=MARGIN) & (own | (labels[rows, columns] == 0))
        objects.append((rows.start, columns.start, np.where(near, shares[rows, columns], 0)))
    return objects


def _recognise(cover: np.ndarray) -> tuple[str, float]:
    """The kind whose outline of the same area and centre fits a cover [h, w] best, and their overlap, 0..1."""
    outlines = {kind: _outline(cover, kind) for kind in SHAPES}
    kind = max(outlines, key=lambda k: _overlap(cover, outlines[k]))
    # With edges of half the width, blur costs less overlap than a wrong outline does.
    return kind, _overlap(np.clip(2 * cover - 0.5, 0, 1), np.clip(2 * outlines[kind] - 0.5, 0, 1))


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """The soft intersection over union of two covers [h, w] in 0..1."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def _outline(cover: np.ndarray, kind: str) -> np.ndarray:
    """The ideal cover [h, w] of a kind, with the area and the centre of mass of a given cover."""
    template, template_area, (template_x, template_y) = _template(kind)
    area, (x, y) = _moments(cover)
    scale = float(np.sqrt(template_area / area))
    left, top = template_x - scale * x, template_y - scale * y
    window = left, top, left + scale * cover.shape[1], top + scale * cover.shape[0]
    if min(window) < 0 or max(window) > template.width:
        # The cover is too long and thin for any of the shapes.
        return np.zeros_like(cover)
    return np.asarray(template.resize(cover.shape[::-1], Image.Resampling.BILINEAR, box=window))


@cache
def _template(kind: str) -> tuple[Image.Image, float, tuple[float, float]]:
    """A large outline as the drawing program draws it: its cover in 0..1 with a margin, its area, and its centre of mass."""
    middle = IMAGE_SIZE / 2
    image = Scene("grey", (Shape(kind, "black", (middle, middle), IMAGE_SIZE - 4.0),)).draw().astype(np.float32)
    paper, ink = BACKGROUNDS["grey"][0], COLORS["black"][0]
    cover = np.pad((paper - image[..., 0]) / (paper - ink), IMAGE_SIZE)
    return Image.fromarray(cover), *_moments(cover)


def _moments(cover: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The area of a cover, and its centre of mass (x, y) in coordinates whose integers are the edges of pixels."""
    area = float(cover.sum())
    y, x = (float(cover.sum(axis=1 - axis) @ (np.arange(cover.shape[axis]) + 0.5)) / area for axis in (0, 1))
    return area, (x, y)
