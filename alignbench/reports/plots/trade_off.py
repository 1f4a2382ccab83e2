"""The interactive trade-off plot of `report.html`, as numbers for its template."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.ticker import MaxNLocator

from alignbench.comparison.results import BASE
from alignbench.reports.style import looks, metric_pairs, objective_of, sampler_of, sign


class Canvas(NamedTuple):
    """The size of a drawing of the trade-off, in its own units.

    Attributes:
        width, height: of the drawing.
        frame: left, top, width and height of the axes.
        ticks: of an axis, about.
        numbered: whether marks are labelled by their numbers, since their names take too much room.
    """

    width: int
    height: int
    frame: tuple[float, float, float, float]
    ticks: int
    numbered: bool


WIDE = Canvas(900, 560, (80.0, 30.0, 800.0, 480.0), 6, numbered=False)
"""The drawing on a page that has room."""
NARROW = Canvas(390, 400, (56.0, 28.0, 324.0, 318.0), 3, numbered=True)
"""The drawing on the screen of a phone."""
LEADER = 20.0
"""Distance of a label from its mark, in the same units, from which a line joins them."""
LETTER, LINE, MIDDLE = 7.6, 16.0, 4.0
"""Estimated width of a letter of a label, its height, and its middle above the line it stands on, in the same units."""
MOST_LINES = 12
"""How far from its mark a label may be, in heights of a label."""
BEYOND, LONGEST_BAR = 0.3, 1.0
"""How far beyond the points, in units of their spread, the target's front and the ends of bars are shown."""
ARROWS = {(1.0, 1.0): "\N{NORTH EAST ARROW}", (1.0, -1.0): "\N{SOUTH EAST ARROW}"}
ARROWS |= {(-1.0, 1.0): "\N{NORTH WEST ARROW}", (-1.0, -1.0): "\N{SOUTH WEST ARROW}"}
"""The direction in which models are better, by the signs of reward and diversity."""
PATHS = {
    "o": "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0",
    "s": "M-5.5-5.5h11v11h-11z",
    "^": "M0-7L7 5.5H-7z",
    "D": "M0-7.5L7.5 0 0 7.5-7.5 0z",
    "v": "M0 7L7-5.5H-7z",
    "P": "M-2-7h4v5h5v4h-5v5h-4v-5h-5v-4h5z",
    "X": "M-6-3L-3-6 0-3 3-6 6-3 3 0 6 3 3 6 0 3-3 6-6 3-3 0z",
    "<": "M-7 0L5.5-7V7z",
    ">": "M7 0L-5.5-7V7z",
    "h": "M0-7L6-3.5V3.5L0 7-6 3.5V-3.5z",
    "*": "M0-8L2-2.5 8-2.5 3 1 5 7 0 3.5-5 7-3 1-8-2.5-2-2.5z",
}
"""Matplotlib's markers as SVG paths."""


def scatter(
    cells: pd.DataFrame, reward: str, diversity: str, target: Sequence[tuple[float, float]] = (), canvas: Canvas = WIDE
) -> dict[str, Any]:
    """Positions of the trade-off plot's points, labels, bars, ticks and front, in units of its view box.

    Args:
        cells: rows of `Results.cells_frame` of one setup.
        reward, diversity: the metrics of the x and the y axis.
        target: (reward, diversity) along the front of the tilted target, by ascending reward; it is drawn as far as it lies
            near the methods.
        canvas: the size of the drawing.
    """
    points = metric_pairs(cells, reward, diversity)
    left, top, width, height = canvas.frame
    target = _near(target, points)
    limits = {c: _limits(points, c, [point[i] for point in target]) for i, c in enumerate(("x", "y"))}

    def place(axis: str, value: float) -> float:
        low, high = limits[axis]
        share = (min(max(value, low), high) - low) / (high - low)
        return round(left + share * width if axis == "x" else top + (1 - share) * height, 2)

    look = looks([str(c) for c in points.index])
    names = short_names([str(c) for c in points.index])
    marks = [
        {
            "cell": str(cell),
            "label": str(number) if canvas.numbered else names[str(cell)],
            "color": look[str(cell)].color if cell != BASE else "currentColor",  # black is not seen in the dark
            "path": PATHS[look[str(cell)].marker],
            "front": bool(p["front"]),
            **{f"{c}{end}": place(c, float(p[f"{c}{end}"])) for c in ("x", "y") for end in ("", "_lower", "_upper")},
        }
        for number, (cell, p) in enumerate(points.iterrows(), 1)
    ]
    locator = MaxNLocator(canvas.ticks)
    ticks = {c: [(place(c, t), text) for t, text in _ticks(locator, limits[c])] for c in "xy"}
    ends = {c: points[[f"{c}_lower", f"{c}_upper"]].to_numpy(dtype=float) for c in "xy"}
    front = sorted((m["x"], m["y"]) for m in marks if m["front"])
    more_is_better = sign(cells, reward) > 0
    corners = [(x, below) if more_is_better else (right, y) for (x, y), (right, below) in pairwise(front)]
    line = [point for both in zip_longest(front, corners) for point in both if point]
    better = (sign(cells, reward), sign(cells, diversity))
    return {
        "marks": [mark | label for mark, label in zip(marks, _labels(marks, canvas.frame), strict=True)],
        "ticks": ticks,
        "front": " ".join(f"{x},{y}" for x, y in line),
        "target": " ".join(f"{place('x', x)},{place('y', y)}" for x, y in target),
        "canvas": canvas,
        "cut": any(not _within(float(end), limits[c]) for c in "xy" for end in ends[c].ravel() if not math.isnan(end)),
        "arrow": ARROWS[better],
    }


def _near(target: Sequence[tuple[float, float]], points: pd.DataFrame) -> list[tuple[float, float]]:
    """The part of the target's front whose reward is that of the points, and a little beyond."""
    if not len(points):
        return []
    low, high = float(points["x"].min()), float(points["x"].max())
    margin = BEYOND * ((high - low) or abs(high) or 1.0)
    return [(x, y) for x, y in target if low - margin <= x <= high + margin and math.isfinite(y)]


def short_names(cells: Sequence[str]) -> dict[str, str]:
    """Cell -> its label in a figure: the objective alone where all methods have the same sampler."""
    samplers = {sampler_of(cell) for cell in cells if cell != BASE}
    return {cell: cell if cell == BASE or len(samplers) > 1 else objective_of(cell) for cell in cells}


def _labels(marks: Sequence[Mapping[str, Any]], frame: tuple[float, float, float, float]) -> list[dict[str, Any]]:
    """Where each mark's label stands: the nearest place that is free of other labels and marks and inside the frame.

    Where no place is free, the one that covers least. A label that is far from its mark has a line to it.
    """
    taken = [(mark["x"] - 9, mark["y"] - 9, mark["x"] + 9, mark["y"] + 9) for mark in marks]
    left, top, width, height = frame
    labels = []
    for mark in marks:
        size = LETTER * len(mark["label"])
        offsets = [
            (dx, MIDDLE + step * LINE * side)
            for step in range(MOST_LINES)
            for side in ((1, -1) if step else (1,))
            for dx in (14.0, -14.0)
        ]
        places = [(mark["x"] + dx, mark["y"] + dy, "start" if dx > 0 else "end") for dx, dy in offsets]
        boxes = [_box(place, size) for place in places]
        inside = [
            i
            for i, box in enumerate(boxes)
            if left <= box[0] and box[2] <= left + width and top <= box[1] and box[3] <= top + height
        ]
        best = min(inside or range(len(boxes)), key=lambda i: sum(_overlap(boxes[i], other) for other in taken))
        taken.append(boxes[best])
        x, y, anchor = places[best]
        label = {"label_x": round(x, 2), "label_y": round(y, 2), "anchor": anchor}
        far = abs(y - MIDDLE - mark["y"]) > LEADER
        labels.append(
            label | {"leader": (round(x + (-3 if anchor == "start" else 3), 2), round(y - MIDDLE, 2)) if far else None}
        )
    return labels


def _box(place: tuple[float, float, str], size: float) -> tuple[float, float, float, float]:
    x, y, anchor = place
    start = x if anchor == "start" else x - size
    return start, y - LINE + 3, start + size, y + 3


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """The area that two boxes share."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    return max(0.0, width) * max(0.0, height)


def _limits(points: pd.DataFrame, axis: str, target: Sequence[float] = ()) -> tuple[float, float]:
    """Around all bars that end, and the target's front; an unbounded bar runs to the frame.

    Bars that are far longer than the distances between the points run to the frame too, so that the points stay apart.
    """
    values = points[axis].to_numpy(dtype=float)
    spread = float(values.max() - values.min())
    ends = points[[f"{axis}_lower", f"{axis}_upper"]].to_numpy(dtype=float).ravel()
    reach = LONGEST_BAR * spread if spread > 0 else math.inf
    near = [v for v in ends if math.isfinite(v) and values.min() - reach <= v <= values.max() + reach]
    finite = [*values, *near, *target]
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(locator: MaxNLocator, limits: tuple[float, float]) -> list[tuple[float, str]]:
    """Ticks inside the limits, with as many digits as tell them apart."""
    values = [float(value) for value in locator.tick_values(*limits) if _within(value, limits)]
    digits = next((d for d in range(4, 17) if len({f"{value:.{d}g}" for value in values}) == len(values)), 17)
    return [(value, f"{value:.{digits}g}") for value in values]


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
