"""The interactive trade-off plot of `report.html`, as numbers for its template."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, zip_longest
from typing import Any

import pandas as pd
from matplotlib.ticker import MaxNLocator

from alignbench.comparison.results import BASE
from alignbench.reports.style import looks, metric_pairs, sign

FRAME = (80.0, 30.0, 800.0, 480.0)
"""Left, top, width and height of the trade-off plot's axes, in its own units."""
LETTER, LINE = 7.6, 16.0
"""Estimated width of a letter of a label, and its height, in the same units."""
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


def scatter(cells: pd.DataFrame, reward: str, diversity: str, target: Sequence[tuple[float, float]] = ()) -> dict[str, Any]:
    """Positions of the trade-off plot's points, labels, bars, ticks and front, in units of its view box.

    Args:
        cells: rows of `Results.cells_frame` of one setup.
        reward, diversity: the metrics of the x and the y axis.
        target: (reward, diversity) along the front of the tilted target, by ascending reward; it is drawn as far as it lies
            near the methods.
    """
    points = metric_pairs(cells, reward, diversity)
    left, top, width, height = FRAME
    target = _near(target, points)
    limits = {c: _limits(points, c, [point[i] for point in target]) for i, c in enumerate(("x", "y"))}

    def place(axis: str, value: float) -> float:
        low, high = limits[axis]
        share = (min(max(value, low), high) - low) / (high - low)
        return round(left + share * width if axis == "x" else top + (1 - share) * height, 2)

    look = looks([str(c) for c in points.index])
    marks = [
        {
            "cell": str(cell),
            "color": look[str(cell)].color if cell != BASE else "currentColor",  # black is not seen in the dark
            "path": PATHS[look[str(cell)].marker],
            "front": bool(p["front"]),
            **{f"{c}{end}": place(c, float(p[f"{c}{end}"])) for c in ("x", "y") for end in ("", "_lower", "_upper")},
        }
        for cell, p in points.iterrows()
    ]
    ticks = {
        c: [(place(c, t), f"{t:.4g}") for t in MaxNLocator(6).tick_values(*limits[c]) if _within(t, limits[c])] for c in "xy"
    }
    front = sorted((m["x"], m["y"]) for m in marks if m["front"])
    more_is_better = sign(cells, reward) > 0
    corners = [(x, below) if more_is_better else (right, y) for (x, y), (right, below) in pairwise(front)]
    line = [point for both in zip_longest(front, corners) for point in both if point]
    better = (sign(cells, reward), sign(cells, diversity))
    return {
        "marks": [mark | label for mark, label in zip(marks, _labels(marks), strict=True)],
        "ticks": ticks,
        "front": " ".join(f"{x},{y}" for x, y in line),
        "target": " ".join(f"{place('x', x)},{place('y', y)}" for x, y in target),
        "frame": FRAME,
        "arrow": ARROWS[better],
    }


def _near(target: Sequence[tuple[float, float]], points: pd.DataFrame) -> list[tuple[float, float]]:
    """The part of the target's front whose reward is that of the points, and a little beyond."""
    if not len(points):
        return []
    low, high = float(points["x"].min()), float(points["x"].max())
    margin = BEYOND * ((high - low) or abs(high) or 1.0)
    return [(x, y) for x, y in target if low - margin <= x <= high + margin and math.isfinite(y)]


def _labels(marks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where each mark's name stands: the first place beside it that is free of other names and marks and inside the frame."""
    taken = [(mark["x"] - 9, mark["y"] - 9, mark["x"] + 9, mark["y"] + 9) for mark in marks]
    left, top, width, height = FRAME
    labels = []
    for mark in marks:
        size = LETTER * len(mark["cell"])
        places = [
            (mark["x"] + dx, mark["y"] + dy, anchor)
            for dy in (-8, 19, -24, 35, -40, 51, -56)
            for dx, anchor in ((14, "start"), (-14, "end"))
        ]
        boxes = [_box(place, size) for place in places]
        free = [
            i
            for i, box in enumerate(boxes)
            if left <= box[0]
            and box[2] <= left + width
            and top <= box[1]
            and box[3] <= top + height
            and not any(_overlap(box, other) for other in taken)
        ]
        best = free[0] if free else 0
        taken.append(boxes[best])
        x, y, anchor = places[best]
        labels.append({"label_x": round(x, 2), "label_y": round(y, 2), "anchor": anchor})
    return labels


def _box(place: tuple[float, float, str], size: float) -> tuple[float, float, float, float]:
    x, y, anchor = place
    start = x if anchor == "start" else x - size
    return start, y - LINE + 3, start + size, y + 3


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


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


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
